"""What the fused blocks of `onednn` do that those of other engines do not, on a tiny U-Net."""

import copy
import logging

import pytest
import torch
from torch import nn

from quantempo.engines import ENGINES, attach, detach, layerwise
from quantempo.engines.fusion import FusedBlock, FusedUpBlock, fuse, unfuse
from quantempo.engines.layerwise import execution
from quantempo.engines.onednn.blocks import BLOCKS, FloatTimeShifts
from quantempo.engines.onednn.layer import FoldedLayer
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.models.fusion import find_parts
from tests.engines.quantized import make_conv, make_linear
from tests.engines.truth import block_calls, relative
from tests.kernels import reference
from tests.tiny import noise, tiny_unet

pytestmark = [
    pytest.mark.skipif(onednn.missing() is not None, reason=str(onednn.missing())),
    pytest.mark.skipif(fused_cpu.load() is None, reason=str(fused_cpu.missing())),
]


@pytest.fixture
def network(packed_unet):
    network = copy.deepcopy(packed_unet)
    attach(network, "onednn")
    return network


@torch.no_grad()
def test_an_odd_attention_in_a_fused_up_block_is_run_by_its_layers(network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    name = next(n for n in execution(network) if n.startswith("up_blocks.0.attentions"))
    block = network.get_submodule(name.rpartition(".")[0])
    # Any value but 1 takes it off the list; this one changes nothing that could be measured.
    block.rescale_output_factor = 1.0000001
    attach(network, "onednn")
    assert isinstance(network.up_blocks[0].forward.active, FusedUpBlock)
    assert execution(network)[name] == "onednn"
    assert relative(network(x, t).sample, tiny_unet()(x, t).sample) <= 0.03


@torch.no_grad()
def test_a_block_takes_its_input_by_the_name_of_its_class(network):
    x, temb = noise(2, 16, 16, 16), noise(2, 64)
    block = network.down_blocks[0].resnets[0]
    assert isinstance(block.forward.active, FusedBlock)
    assert torch.equal(block(input_tensor=x, temb=temb), block(x, temb))


@torch.no_grad()
def test_without_compiled_kernels_layers_run_one_by_one(network, monkeypatch, caplog):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    detach(network)
    ENGINES.get("onednn").attach(network)
    unfuse(network)
    expected = network(x, t).sample
    monkeypatch.setattr(fused_cpu, "missing", lambda: "there is no C compiler")
    monkeypatch.setattr(fused_cpu, "load", lambda: None)
    with caplog.at_level(logging.WARNING, "quantempo"):
        attach(network, "onednn")
    assert [r.message for r in caplog.records if "no C compiler" in r.message]
    assert set(execution(network).values()) == {"onednn"}
    assert torch.equal(network(x, t).sample, expected)


@torch.no_grad()
def test_without_native_bfloat16_everything_is_float32(network, monkeypatch):
    monkeypatch.setattr(onednn, "native_bfloat16", lambda: False)
    attach(network, "onednn")
    unfuse(network)
    calls = block_calls(network, ("Attention",), noise(2, 3, 16, 16), torch.tensor(450))
    fuse(network, BLOCKS)
    for name, (args, _, expected) in calls.items():
        # Only the order of sums differs from attention that never stores its scores.
        assert relative(network.get_submodule(name)(*args), expected) <= 2e-3


def test_parts_are_found_by_exact_class_and_plain_configuration():
    network = tiny_unet()

    def names() -> set[str]:
        return {name for name, _, parts in find_parts(network) if not isinstance(parts, str)}

    every = names()
    assert {"", "mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0"} <= every
    changes = {
        "mid_block.resnets.0": ("output_scale_factor", 2.0),
        "mid_block.resnets.1": ("nonlinearity", nn.GELU()),
        "mid_block.attentions.0": ("rescale_output_factor", 2.0),
    }
    for name, (attribute, value) in changes.items():
        setattr(network.get_submodule(name), attribute, value)
    assert every - names() == set(changes)


@pytest.mark.parametrize("zero_points", [(0,), (255,), (17,)])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (4, 5)])
@pytest.mark.parametrize("own", [True, False])
def test_folded_zero_points_give_the_sums_of_the_reference(zero_points, size, own, monkeypatch):
    layer = make_conv(19, 7, plain=True)
    layer.act_zero_point.copy_(torch.tensor(zero_points))
    zero = zero_points[0]
    codes = torch.randint(0, 256, (2, 19, *size), dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    if not own:
        monkeypatch.setattr(onednn, "has", lambda *names: "amx_int8" in names)
    y = FoldedLayer(layer)(codes, 0, torch.float32)
    acc = reference.conv2d_accumulator(codes, layer.weight_int, zero, padding=(1, 1))
    # All terms are integers below 2^24: float32 adds them exactly.
    assert torch.equal(y.long(), acc)
    bordered = torch.full((2, 19, size[0] + 2, size[1] + 2), zero, dtype=torch.uint8)
    bordered[:, :, 1:-1, 1:-1] = codes
    assert torch.equal(FoldedLayer(layer, bordered=True)(bordered, 0, torch.float32).long(), acc)


def test_folded_parts_add_up_to_the_layer():
    layer = make_linear(12, 5, segments=(4, 8))
    x = noise(3, 12, seed=2) * 0.5
    layer.kernel = layerwise.BACKENDS.get("onednn").lower(layer)
    expected = layer(x)
    folded = FoldedLayer(layer, factor=0.5)
    y = torch.zeros(3, 5)
    for i, part in enumerate(x.split((4, 8), 1)):
        codes = reference.quantize(part, *folded.grid(0, i))
        folded.part(i, codes.contiguous(), 0, torch.float32, into=y)
    assert (2 * y - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_time_shifts_are_those_of_each_layer():
    layers = [nn.Linear(8, 5), nn.Linear(8, 3)]
    shifts = FloatTimeShifts(layers)
    with torch.no_grad():
        for temb in (noise(4, 8), noise(1, 8).expand(4, -1), noise(1, 8)):
            for i, layer in enumerate(layers):
                expected = layer(nn.functional.silu(temb))
                assert torch.allclose(shifts(i, temb), expected, atol=1e-6)
        temb = noise(2, 8)
        before = shifts(0, temb)
        temb.mul_(2)
        assert not torch.allclose(shifts(0, temb), before)
