"""Networks quantized without data compute what the float ones do, in the dtype that is timed."""

from typing import Any

import pytest
import torch

from quantempo.bench import networks
from quantempo.bench.candidates import cast_inputs
from quantempo.bench.networks import quick_network, quick_recipe
from quantempo.bench.run import _float32
from quantempo.engines.base import BACKENDS
from quantempo.engines.select import ENGINES, attach
from quantempo.evaluation.fidelity import sqnr_db
from quantempo.quantized import quantized_layers, weight_only_layers
from tests.tiny import DENOISERS, tiny_flux, tiny_unet


@pytest.mark.parametrize("kind", DENOISERS)
def test_a_network_without_data_computes_what_the_float_one_does(kind: str) -> None:
    net = DENOISERS[kind]()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    network = quick_network("tiny", net)
    layers = dict(quantized_layers(network.packed))
    assert layers and all(layer.act_scale.shape[1] == 1 for layer in layers.values())
    attach(network.packed, "simulated")
    for dtype in (torch.float32, torch.bfloat16):
        torch.nn.Module.to(network.packed, dtype)
        inputs = network.subject(2).inputs
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            wanted, got = net(**inputs)[0], network.packed(**given)[0]
        # 8 bits in tens of layers: some 48 dB each at best.
        assert sqnr_db(wanted, got.float()) > 15 and got.dtype == dtype
    # The float network is left as it was.
    assert not dict(quantized_layers(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@torch.no_grad()
def test_a_large_network_is_packed_by_the_layer_and_shares_the_rest(monkeypatch) -> None:
    made = networks.random_inputs

    def few(*given: Any, **how: Any) -> dict[str, Any]:
        inputs = made(*given, **how)
        counts = {"hidden_states": 40, "encoder_hidden_states": 9}
        inputs |= {name: inputs[name][:, :count] for name, count in counts.items()}
        return inputs | {"img_ids": inputs["img_ids"][:40], "txt_ids": inputs["txt_ids"][:9]}

    monkeypatch.setattr(networks, "random_inputs", few)
    net = tiny_flux(9)[0].transformer
    # None may run in 8 bits: none is measured.
    monkeypatch.setattr(networks, "measured_attention", None)
    some = quick_recipe().override("attention", max_error=0.0)
    network = quick_network("tiny", torch.nn.Module.to(net, torch.bfloat16), recipe=some)
    packed, inputs = network.packed, network.subject(2).inputs
    assert packed.x_embedder.weight is net.x_embedder.weight and network.dtype == torch.bfloat16
    assert len(dict(quantized_layers(packed))) == 1 + 12 + 5
    attach(packed, "simulated")
    got = packed(**cast_inputs(inputs, torch.bfloat16))[0]
    assert sqnr_db(_float32(network, inputs), got.float()) > 15
    # One copy of the modulations for all, in int8, in files too.
    monkeypatch.setattr(BACKENDS.get("triton"), "missing", lambda: None)
    ENGINES.get("triton").attach(packed)
    shared = packed.single_transformer_blocks[0].forward.modulations[0].shared
    assert set(shared.layers) == set(weight_only_layers(packed)) and len(shared.layers) > 2
    for layer, part in zip(shared.layers, shared.joined[0].split(shared._sizes), strict=True):
        assert layer.weight_int.data_ptr() == part.data_ptr()


def test_a_recipe_gives_the_bits() -> None:
    recipe = quick_recipe().override("weights", bits=4).override("activations", symmetric=True)
    net = quick_network("tiny", tiny_unet(), recipe=recipe).packed
    assert net is not None
    for _, layer in quantized_layers(net):
        assert layer.act_zero_point.unique().tolist() == [128]
        assert int(layer.weight_codes.abs().max()) <= 7
