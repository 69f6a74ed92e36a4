"""Networks quantized without data compute what the float ones do, in the dtype that is timed."""

import pytest
import torch

from quantempo.bench.networks import cast_floats, quick_network, quick_recipe
from quantempo.engines.select import attach
from quantempo.evaluation.fidelity import sqnr_db
from quantempo.quantized import Float16Linear, quantized_layers
from tests.tiny import DENOISERS, tiny_unet


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_network_without_data_computes_what_the_float_one_does(kind: str) -> None:
    net = DENOISERS[kind]()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network = quick_network("tiny", net)
    layers = dict(quantized_layers(network.packed))
    assert layers and all(layer.act_scale.shape[1] == 1 for layer in layers.values())
    attach(network.packed, "simulated")
    for dtype in (torch.float32, torch.bfloat16):
        cast_floats(network.packed, dtype)
        inputs = network.subject(2).inputs
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            wanted, got = net(**inputs)[0], network.packed(**given)[0]
        # 8 bits in tens of layers: some 48 dB each at best.
        assert sqnr_db(wanted, got.float()) > 15 and got.dtype == dtype
    # The float network is left as it was.
    assert not dict(quantized_layers(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_casting_leaves_integers_and_scales() -> None:
    net = quick_network("tiny", tiny_unet()).packed
    assert net is not None
    before = {n: v.dtype for n, v in net.state_dict().items()}
    cast_floats(net, torch.float16)
    stored = {n for n, m in net.named_modules() if isinstance(m, Float16Linear)}
    kept = stored | {name for name, _ in quantized_layers(net)} | {"quantempo_clock"}
    changed = set()
    for name, value in net.state_dict().items():
        if name.rpartition(".")[0] in kept or before[name] != torch.float32:
            assert value.dtype == before[name], name
        else:
            changed.add(value.dtype)
    assert changed == {torch.float16}


def test_a_recipe_gives_the_bits() -> None:
    recipe = quick_recipe().override("weights", bits=4).override("activations", symmetric=True)
    net = quick_network("tiny", tiny_unet(), recipe=recipe).packed
    assert net is not None
    for _, layer in quantized_layers(net):
        assert layer.act_zero_point.unique().tolist() == [128]
        assert int(layer.weight_codes.abs().max()) <= 7
