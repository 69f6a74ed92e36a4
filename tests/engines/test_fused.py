"""Fused blocks against the same layers run one by one, on a tiny U-Net."""

import copy
import logging

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from quantempo.engines import attach, detach, layerwise
from quantempo.engines.fusion import FusedUpBlock, fuse, unfuse
from quantempo.engines.layerwise import execution
from quantempo.engines.onednn.blocks import BLOCKS, FloatTimeShifts
from quantempo.engines.onednn.folded_layer import FoldedLayer
from quantempo.kernels import reference
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.models.fusion import find_parts
from quantempo.quantized import quantized_layers
from tests.engines import truth
from tests.engines.quantized import make_conv, make_linear, quantize_network
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise, tiny_text, tiny_unet

pytestmark = [
    pytest.mark.skipif(onednn.missing() is not None, reason=str(onednn.missing())),
    pytest.mark.skipif(fused_cpu.load() is None, reason=str(fused_cpu.missing())),
]

KINDS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")


@pytest.fixture(scope="module")
def float_network() -> UNet2DModel:
    return tiny_unet()


@pytest.fixture
def network(float_network):
    inputs = [(noise(2, 3, 16, 16, seed=t), torch.tensor(t)) for t in (900, 500, 20)]
    network = quantize_network(float_network, inputs)
    attach(network, "onednn")
    return network


@torch.no_grad()
def block_calls(network: nn.Module, *arguments) -> dict[str, tuple[tuple, Tensor]]:
    """Return for each block what it was called with and gave, not fused."""
    unfuse(network)
    seen = truth.block_calls(network, KINDS, *arguments)
    fuse(network, BLOCKS)
    return seen


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("steps", ["one", "mixed"])
def test_each_block_equals_its_layers(network, batch, steps):
    timestep = torch.tensor([970, 10, 450])[:batch] if steps == "mixed" else torch.tensor(450)
    calls = block_calls(network, noise(batch, 3, 16, 16), timestep)
    assert {type(network.get_submodule(name)).__name__ for name in calls} == set(KINDS)
    for name, (arguments, expected) in calls.items():
        with torch.no_grad():
            y = network.get_submodule(name)(*arguments)
        kind = type(network.get_submodule(name)).__name__
        # Convolutions alone: float32 roundings. Norms: a few codes move by one of 255.
        # Attention: products in bfloat16 (2^-9 of each factor).
        limit = {"ResnetBlock2D": 4e-3, "Attention": 1e-2}.get(kind, 2e-6)
        assert relative(y, expected) <= limit, name
        # Border pixels apart: padding is where a folded zero point goes wrong.
        for cut in ((..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None))):
            assert relative(y[cut], expected[cut]) <= 2 * limit, name


def test_most_blocks_are_equal_to_float_rounding(network):
    # A moved code costs about 1e-3; most small blocks have none, and then nothing hides an error.
    calls = block_calls(network, noise(2, 3, 16, 16), torch.tensor(450))
    with torch.no_grad():
        errors = {
            name: relative(network.get_submodule(name)(*arguments), expected)
            for name, (arguments, expected) in calls.items()
            if type(network.get_submodule(name)).__name__ == "ResnetBlock2D"
        }
    assert sorted(errors.values())[len(errors) // 2] <= 2e-6, errors


@torch.no_grad()
@pytest.mark.parametrize("timestep", [450, [970, 10, 450]])
def test_the_network_is_as_near_to_float_as_unfused(float_network, network, timestep):
    x, t = noise(3, 3, 16, 16), torch.tensor(timestep)
    truth, fused = float_network(x, t).sample, network(x, t).sample
    assert fused.dtype == torch.float32
    unfuse(network)
    unfused = network(x, t).sample
    detach(network)
    attach(network, "simulated")
    simulated = network(x, t).sample
    check_like_simulated(fused, simulated, truth, 0.03)
    check_like_simulated(unfused, simulated, truth, 0.03)


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_of_single_calls(network):
    x, t = noise(3, 3, 16, 16), torch.tensor([970, 10, 450])
    together = network(x, t).sample
    for row in range(3):
        alone = network(x[row : row + 1], t[row : row + 1]).sample
        # Sums of the time embedding and of the norms may be taken in another order.
        assert relative(together[row : row + 1], alone) <= 2e-2


@torch.no_grad()
def test_calls_repeat_and_inputs_stay(network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    kept = x.clone()
    first = network(x, t).sample
    network(noise(1, 3, 16, 16, seed=3), torch.tensor(5))
    assert torch.equal(network(x, t).sample, first)
    assert torch.equal(x, kept)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(network(last, t).sample, first)
    # Another size of image: weights are packed anew.
    assert network(noise(1, 3, 24, 32), t).sample.shape == (1, 3, 24, 32)
    assert torch.equal(network(x, t).sample, first)
    with torch.enable_grad():
        assert torch.equal(network(x, t).sample, first)


@torch.no_grad()
def test_skip_inputs_are_not_changed(network):
    # Down blocks hand their outputs on twice; a sum in place would spoil the second use.
    block = network.down_blocks[0]
    hidden = noise(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    kept = hidden.clone()
    block(hidden, noise(2, 64))
    assert torch.equal(hidden, kept)


@torch.no_grad()
def test_a_copy_runs_on_its_own(network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    expected = network(x, t).sample
    other = copy.deepcopy(network)
    assert torch.equal(other(x, t).sample, expected)
    fused = other.mid_block.resnets[0].forward
    assert fused.parts.module is other.mid_block.resnets[0]
    for _, layer in quantized_layers(other):
        layer.weight_int.zero_()
    assert torch.equal(network(x, t).sample, expected)


def test_all_integer_layers_are_in_fused_blocks(network):
    assert set(execution(network).values()) == {"onednn, fused"}
    assert network.conv_in.forward.dtype == torch.bfloat16
    unfuse(network)
    assert set(execution(network).values()) == {"onednn"}


@torch.no_grad()
def test_a_float_layer_leaves_its_block_unfused_and_the_stream_in_float32(float_network):
    inputs = [(noise(2, 3, 16, 16, seed=t), torch.tensor(t)) for t in (900, 20)]
    network = quantize_network(float_network, inputs, exclude=("mid_block.resnets.0.conv1",))
    attach(network, "onednn")
    table = execution(network)
    assert table["mid_block.resnets.0.conv2"] == "onednn"
    assert table["mid_block.resnets.1.conv2"] == "onednn, fused"
    assert network.conv_in.forward.dtype == torch.float32
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    assert relative(network(x, t).sample, float_network(x, t).sample) <= 0.03


@torch.no_grad()
def test_an_odd_attention_in_a_fused_up_block_is_run_by_its_layers(float_network, network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    name = next(n for n in execution(network) if n.startswith("up_blocks.0.attentions"))
    block = network.get_submodule(name.rpartition(".")[0])
    # Any value but 1 takes it off the list; this one changes nothing that could be measured.
    block.rescale_output_factor = 1.0000001
    attach(network, "onednn")
    assert isinstance(network.up_blocks[0].forward, FusedUpBlock)
    assert execution(network)[name] == "onednn"
    assert network.conv_in.forward.dtype == torch.float32
    assert relative(network(x, t).sample, float_network(x, t).sample) <= 0.03


@torch.no_grad()
def test_without_compiled_kernels_layers_run_one_by_one(network, monkeypatch, caplog):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
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
def test_a_network_in_bfloat16(float_network, network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    truth = float_network(x, t).sample
    exact = {name: buffer.clone() for name, buffer in network.named_buffers()}
    half = network.to(torch.bfloat16)
    for name, buffer in exact.items():
        # As after loading: integers, scales and biases keep their types.
        owner, _, leaf = name.rpartition(".")
        half.get_submodule(owner)._buffers[leaf] = buffer
    attach(half, "onednn")
    y = half(x.bfloat16(), t).sample
    assert y.dtype == torch.bfloat16
    assert relative(y, truth) <= 0.05


@torch.no_grad()
def test_without_native_bfloat16_everything_is_float32(float_network, network, monkeypatch):
    monkeypatch.setattr(onednn, "native_bfloat16", lambda: False)
    attach(network, "onednn")
    assert network.conv_in.forward.dtype == torch.float32
    calls = block_calls(network, noise(2, 3, 16, 16), torch.tensor(450))
    for name, (arguments, expected) in calls.items():
        if type(network.get_submodule(name)).__name__ == "Attention":
            # Only the order of sums differs from attention that never stores its scores.
            assert relative(network.get_submodule(name)(*arguments), expected) <= 2e-3


@torch.no_grad()
def test_a_text_network_is_fused_in_part():
    unet = tiny_text().unet
    x, text = noise(2, unet.config.in_channels, 8, 8), noise(2, 5, unet.config.cross_attention_dim)
    t = torch.tensor([900, 20])
    network = quantize_network(unet, [(x, t, text)])
    attach(network, "onednn")
    found = set(execution(network).values())
    assert found == {"onednn", "onednn, fused"}
    assert network.conv_in.forward.dtype == torch.float32
    assert relative(network(x, t, text).sample, unet(x, t, text).sample) <= 0.03


@torch.no_grad()
def test_arguments_out_of_the_ordinary_take_the_original_path(network):
    x = noise(1, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    upsample = next(m for m in network.modules() if type(m).__name__ == "Upsample2D")
    assert upsample(x).shape == (1, 32, 16, 16)
    assert upsample(x, (13, 15)).shape == (1, 32, 13, 15)
    attention = network.mid_block.attentions[0]
    other = attention(x, encoder_hidden_states=noise(1, 5, 32))
    assert relative(attention(x), other) > 1e-3


@torch.no_grad()
def test_free_u_is_respected(network):
    x, t = noise(1, 3, 16, 16), torch.tensor(450)
    plain = network(x, t).sample
    block = network.up_blocks[1]
    assert isinstance(block.forward, FusedUpBlock)
    for name, value in (("s1", 0.5), ("s2", 0.5), ("b1", 1.5), ("b2", 1.5)):
        setattr(block, name, value)
    block.resolution_idx = 0
    fused = network(x, t).sample
    unfuse(network)
    assert relative(fused, plain) > 1e-2
    assert relative(fused, network(x, t).sample) <= 0.03


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
def test_folded_zero_points_give_the_sums_of_the_reference(zero_points, size):
    layer = make_conv(19, 7, plain=True)
    layer.act_zero_point.copy_(torch.tensor(zero_points))
    zero = zero_points[0]
    codes = torch.randint(0, 256, (2, 19, *size), dtype=torch.uint8)
    codes = codes.contiguous(memory_format=torch.channels_last)
    folded = FoldedLayer(layer)
    y = folded(codes, 0, torch.float32)
    fused_cpu.load().add(y, None, folded.edge(0))
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
