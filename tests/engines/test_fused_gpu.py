"""Fused blocks for GPUs against the same layers run one by one, on a CPU, on tiny U-Nets."""

import copy
import logging

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantempo.engines import ENGINES, attach
from quantempo.engines.cuda.blocks import BLOCKS
from quantempo.engines.cuda.layer import TritonBackend
from quantempo.engines.cuda.per_forward import SharedShifts
from quantempo.engines.fusion import FusedUpBlock, fuse, fused_modules, unfuse
from quantempo.engines.layerwise import execution
from quantempo.quantized import quantized_layers
from tests.engines import truth
from tests.engines.quantized import quantize_network
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise, tiny_text, tiny_unet

KINDS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")
ENGINE = ENGINES.get("triton")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "missing", lambda self: None)


@pytest.fixture(scope="module")
def float_network() -> UNet2DModel:
    return tiny_unet()


INPUTS = [(noise(2, 3, 16, 16, seed=t), torch.tensor(t)) for t in (900, 500, 20)]


@pytest.fixture(scope="module")
def packed(float_network):
    return quantize_network(float_network, INPUTS)


@pytest.fixture
def network(packed):
    network = copy.deepcopy(packed)
    ENGINE.attach(network)
    return network


@torch.no_grad()
def block_calls(network: nn.Module, *arguments) -> dict[str, tuple[tuple, Tensor]]:
    """Return for each block what it was called with and gave, not fused."""
    unfuse(network)
    seen = truth.block_calls(network, KINDS, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        # As the layers compute them: else codes move, and hide an error.
        patch.setattr(SharedShifts, "dtype", torch.float32)
        fuse(network, BLOCKS)
        for module in fused_modules(network).values():
            getattr(module.forward, "prepare", lambda device: None)(torch.device("cpu"))
    return seen


def check_blocks(network: nn.Module, calls: dict[str, tuple[tuple, Tensor]]) -> None:
    errors = {}
    for name, (arguments, expected) in calls.items():
        with torch.no_grad():
            y = network.get_submodule(name)(*arguments)
        kind = type(network.get_submodule(name)).__name__
        # Convolutions alone: float32 roundings. Norms: a few codes move by one of 255.
        limit = 6e-3 if kind in ("ResnetBlock2D", "Attention") else 2e-6
        assert relative(y, expected) <= limit, name
        for cut in ((..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None))):
            assert relative(y[cut], expected[cut]) <= 2 * limit, name
        if kind == "ResnetBlock2D":
            errors[name] = relative(y, expected)
    # A moved code costs about 1e-3; most small blocks have none, and then nothing hides an error.
    assert sorted(errors.values())[len(errors) // 2] <= 2e-6, errors


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", ["one", "mixed"])
def test_each_block_equals_its_layers(network, batch, steps):
    timestep = torch.tensor([970, 10, 450])[:batch] if steps == "mixed" else torch.tensor(450)
    calls = block_calls(network, noise(batch, 3, 16, 16), timestep)
    assert {type(network.get_submodule(name)).__name__ for name in calls} == set(KINDS)
    check_blocks(network, calls)


@pytest.mark.parametrize("bits", [{"*": "w4a8"}, {"*": "w6a6"}], ids=["w4a8", "w6a6"])
def test_low_bits_run_in_the_same_blocks(float_network, bits):
    network = quantize_network(float_network, INPUTS, bits=bits)
    ENGINE.attach(network)
    assert set(execution(network).values()) == {"triton, fused"}
    calls = block_calls(network, noise(2, 3, 16, 16), torch.tensor(450))
    for name, (arguments, expected) in calls.items():
        with torch.no_grad():
            # A code that moves is up to four times as large.
            assert relative(network.get_submodule(name)(*arguments), expected) <= 2.4e-2, name


@torch.no_grad()
@pytest.mark.parametrize("timestep", [450, [970, 10, 450]])
def test_the_network_is_as_near_to_float_as_simulated(float_network, network, timestep):
    x, t = noise(3, 3, 16, 16), torch.tensor(timestep)
    truth, fused = float_network(x, t).sample, network(x, t).sample
    assert fused.dtype == torch.float32
    unfuse(network)
    unfused = network(x, t).sample
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
        assert relative(together[row : row + 1], alone) <= 2e-2
    # Two images for each time-step.
    twice = network(x.repeat_interleave(2, 0), t.repeat_interleave(2)).sample
    assert relative(twice[::2], together) <= 2e-2


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
    assert network(noise(1, 3, 24, 32), t).sample.shape == (1, 3, 24, 32)
    with torch.enable_grad():
        assert torch.equal(network(x, t).sample, first)
    with torch.inference_mode():
        assert torch.equal(network(x, t).sample, first)
    # What one forward shares between its blocks is gone after it.
    shifts = network.mid_block.resnets[0].forward.shifts
    assert shifts._value is None and shifts._given is None


class NoWaiting(TorchDispatchMode):
    """Refuse what would have to wait for a GPU."""

    names = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.names, func
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_waits_for_the_device(network):
    with pytest.raises(AssertionError, match="_local_scalar"), NoWaiting():
        torch.ones(()).item()
    with NoWaiting():
        network(noise(3, 3, 16, 16), torch.tensor([970, 10, 450]))
        unfuse(network)
        network(noise(3, 3, 16, 16), torch.tensor(450))


def test_all_layers_are_fused_and_the_stream_is_float16(network):
    assert set(execution(network).values()) == {"triton, fused"}
    seen = []
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        for resnet in block.resnets:
            run = resnet.forward.run
            resnet.forward.run = lambda *a, run=run: seen.append(run(*a)) or seen[-1]
    with torch.no_grad():
        network(noise(2, 3, 16, 16), torch.tensor(450))
    assert len(seen) == 8
    assert {y.dtype for y in seen} == {torch.float16}
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)
    unfuse(network)
    assert set(execution(network).values()) == {"triton"}


@torch.no_grad()
def test_a_float_layer_leaves_its_block_unfused_and_the_stream_in_float32(float_network):
    network = quantize_network(float_network, INPUTS, exclude=("mid_block.resnets.0.conv1",))
    ENGINE.attach(network)
    table = execution(network)
    assert table["mid_block.resnets.0.conv2"] == "triton"
    assert table["mid_block.resnets.1.conv2"] == "triton, fused"
    assert network.conv_in.forward.dtype is None
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    y = network(x, t).sample
    attach(network, "simulated")
    check_like_simulated(y, network(x, t).sample, float_network(x, t).sample, 0.03)


@torch.no_grad()
def test_channels_that_do_not_fit_are_counted(caplog):
    network = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 24), norm_num_groups=8,
        attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    x, t = noise(2, 3, 8, 8), torch.tensor(450)
    packed = quantize_network(network, [(x, t)])
    with caplog.at_level(logging.WARNING, "quantempo"):
        ENGINE.attach(packed)
    table = list(execution(packed).values())
    left = table.count("simulated")
    assert 0 < left < len(table) and "triton, fused" in table
    lines = [record.message for record in caplog.records]
    assert sum("no multiple of 16" in line for line in lines) == left
    assert f"{left} of {len(table)} integer layers cannot run on 'triton'" in lines[-1]
    y = packed(x, t).sample
    attach(packed, "simulated")
    check_like_simulated(y, packed(x, t).sample, network(x, t).sample, 0.04)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision(float_network, packed, dtype):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    half = copy.deepcopy(packed).to(dtype)
    for name, buffer in packed.named_buffers():
        # As after loading: integers, scales and biases keep their types.
        owner, _, leaf = name.rpartition(".")
        half.get_submodule(owner)._buffers[leaf] = buffer
    ENGINE.attach(half)
    y = half(x.to(dtype), t).sample
    assert y.dtype == dtype
    attach(half, "simulated")
    simulated = half(x.to(dtype), t).sample
    check_like_simulated(y, simulated, float_network(x, t).sample, 0.05)


@torch.no_grad()
def test_a_copy_runs_on_its_own(network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    expected = network(x, t).sample
    other = copy.deepcopy(network)
    assert torch.equal(other(x, t).sample, expected)
    fused, first = other.mid_block.resnets[0].forward, other.down_blocks[0].resnets[0].forward
    assert fused.parts.module is other.mid_block.resnets[0]
    assert fused.shifts is first.shifts is not network.mid_block.resnets[0].forward.shifts
    for _, layer in quantized_layers(other):
        layer.weight_int.zero_()
    assert not torch.equal(other(x, t).sample, expected)
    assert torch.equal(network(x, t).sample, expected)


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
    for name, value in (("s1", 0.5), ("s2", 0.5), ("b1", 1.5), ("b2", 1.5)):
        setattr(block, name, value)
    block.resolution_idx = 0
    fused = network(x, t).sample
    unfuse(network)
    assert relative(fused, plain) > 1e-2
    assert relative(fused, network(x, t).sample) <= 0.04


@torch.no_grad()
@pytest.mark.parametrize("other", ["to_k", "to_v"])
def test_projections_of_other_grids_are_quantized_apart(packed, other):
    network = copy.deepcopy(packed)
    layer = getattr(network.mid_block.attentions[0], other)
    # In one time bucket alone.
    layer.act_scale[0, 1] *= 1.5
    ENGINE.attach(network)
    assert len(network.mid_block.attentions[0].forward.projections) == 3
    assert len(network.up_blocks[0].attentions[0].forward.projections) == 1
    check_blocks(network, block_calls(network, noise(2, 3, 16, 16), torch.tensor(450)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "text"])
def test_a_network_compiles_whole_and_once(kind):
    if kind == "text":
        unet = tiny_text().unet
        more = (noise(2, 5, unet.config.cross_attention_dim),)
        x = noise(2, unet.config.in_channels, 8, 8)
    else:
        unet, more, x = tiny_unet(), (), noise(2, 3, 16, 16)
    network = quantize_network(unet, [(x, torch.tensor([900, 20]), *more)])
    ENGINE.attach(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (450, 10, 999):
            step = torch.tensor(t)
            assert torch.equal(compiled(x, step, *more).sample, network(x, step, *more).sample)


@torch.no_grad()
def test_a_text_network_is_fused_whole():
    unet = tiny_text().unet
    x, text = noise(2, unet.config.in_channels, 8, 8), noise(2, 5, unet.config.cross_attention_dim)
    t = torch.tensor([900, 20])
    network = quantize_network(unet, [(x, t, text)])
    ENGINE.attach(network)
    assert set(execution(network).values()) == {"triton, fused"}
    blocks = [type(block).__name__ for block in network.up_blocks]
    assert "CrossAttnUpBlock2D" in blocks
    assert all(isinstance(block.forward, FusedUpBlock) for block in network.up_blocks)
    fused, truth = network(x, t, text).sample, unet(x, t, text).sample
    unfuse(network)
    unfused = network(x, t, text).sample
    attach(network, "simulated")
    simulated = network(x, t, text).sample
    check_like_simulated(fused, simulated, truth, 0.03)
    check_like_simulated(unfused, simulated, truth, 0.03)
