"""Fused blocks of each engine against the same layers run one by one, on a tiny U-Net on a CPU."""

import copy
from fnmatch import fnmatch

import pytest
import torch
from diffusers.models import modeling_utils
from torch import nn

from quantempo.engines import ENGINES, attach
from quantempo.engines.cuda.unet import SharedShifts
from quantempo.engines.fusion import FusedUpBlock, fuse, fused_modules, report, unfuse
from quantempo.engines.layerwise import LayerwiseEngine, execution
from quantempo.kernels.cpu import onednn
from tests.engines import truth
from tests.engines.quantized import quantize_network, quantized_unet
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise, tiny_text, tiny_unet

KINDS = ("ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D")
# Convolutions alone: float32 roundings. Norms: a few codes move by one of 255. Attention of onednn:
# products in bfloat16 (2^-9 of each factor).
LIMITS = {
    "onednn": {"ResnetBlock2D": 4e-3, "Attention": 1e-2},
    "triton": {"ResnetBlock2D": 6e-3, "Attention": 6e-3},
}
LOW = {"onednn": 3e-2, "triton": 2.4e-2}
MIXED = {"attention": "w8a6", "down_blocks.*": "w4a4", "up_blocks.0.resnets.*": "w5a7"}


@pytest.fixture(params=LIMITS)
def engine(request, on_a_cpu) -> LayerwiseEngine:
    engine = ENGINES.get(request.param)
    if reason := engine.missing() or engine.handicap():
        pytest.skip(reason)
    return engine


@pytest.fixture
def network(packed_unet, engine) -> nn.Module:
    network = copy.deepcopy(packed_unet)
    engine.attach(network)
    return network


@torch.no_grad()
def check_blocks(engine: LayerwiseEngine, network: nn.Module, *arguments, low=False) -> None:
    unfuse(network)
    calls = truth.block_calls(network, KINDS, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        # As the layers compute them: else codes move, and hide an error.
        patch.setattr(SharedShifts, "dtype", torch.float32)
        fuse(network, engine.blocks)
        for module in fused_modules(network).values():
            getattr(module.forward, "prepare", lambda device: None)(torch.device("cpu"))
    errors, kinds = [], set()
    for name, (args, kwargs, expected) in calls.items():
        block = network.get_submodule(name)
        kind, y = type(block).__name__, block(*args, **kwargs)
        # A code of fewer bits that moves is a larger part of the range.
        limit = LOW[engine.name] if low else LIMITS[engine.name].get(kind, 2e-6)
        if kind == "ResnetBlock2D":
            # onednn: between the convolutions it is in bfloat16, which moves codes too.
            assert relative(y, expected) <= max(limit, 1e-2), name
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onednn, "native_bfloat16", lambda: False)
                y = block(*args, **kwargs)
        assert relative(y, expected) <= limit, name
        # Border pixels apart: padding is where a folded zero point goes wrong.
        for edge in ((..., 0), (..., -1), (..., 0, slice(None)), (..., -1, slice(None))):
            assert relative(y[edge], expected[edge]) <= 2 * limit, name
        kinds.add(kind)
        if kind == "ResnetBlock2D":
            errors.append(relative(y, expected))
    assert kinds == set(KINDS)
    # A moved code costs about 1e-3; most small blocks have none, and then nothing hides an error.
    assert sorted(errors)[len(errors) // 2] <= (1e-5 if low else 2e-6), errors


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("steps", ["one", "mixed"])
def test_each_block_equals_its_layers(engine, network, batch, steps):
    assert set(execution(network).values()) == {f"{engine.name}, fused"}
    timestep = torch.tensor([970, 10, 450])[:batch] if steps == "mixed" else torch.tensor(450)
    check_blocks(engine, network, noise(batch, 3, 16, 16), timestep)
    unfuse(network)
    assert set(execution(network).values()) == {engine.name}


@pytest.mark.parametrize("bits", ["w8a4", "w4a6", "w4a8", "w6a6", MIXED], ids=str)
def test_low_bits_run_in_the_same_blocks(engine, bits):
    network = quantized_unet(bits=bits if isinstance(bits, dict) else {"*": bits})
    engine.attach(network)
    assert set(execution(network).values()) == {f"{engine.name}, fused"}
    check_blocks(engine, network, noise(2, 3, 16, 16), torch.tensor(450), low=True)


@torch.no_grad()
@pytest.mark.parametrize("other", ["to_k", "to_v"])
def test_projections_of_other_grids_are_quantized_apart(engine, packed_unet, other):
    network = copy.deepcopy(packed_unet)
    # In one time bucket alone.
    getattr(network.mid_block.attentions[0], other).act_scale[0, 1] *= 1.5
    engine.attach(network)
    if engine.name == "triton":
        assert len(network.mid_block.attentions[0].forward.projections) == 3
        assert len(network.up_blocks[0].attentions[0].forward.projections) == 1
    check_blocks(engine, network, noise(2, 3, 16, 16), torch.tensor(450))


@torch.no_grad()
def test_rows_of_a_mixed_batch_are_those_of_single_calls(network):
    x, t = noise(3, 3, 16, 16), torch.tensor([970, 10, 450])
    together = network(x, t).sample
    for row in range(3):
        alone = network(x[row : row + 1], t[row : row + 1]).sample
        # Sums of the time embedding and of the norms may be taken in another order.
        assert relative(together[row : row + 1], alone) <= 2e-2
    # Two images for each time-step.
    twice = network(x.repeat_interleave(2, 0), t.repeat_interleave(2)).sample
    assert relative(twice[::2], together) <= 2e-2


@torch.no_grad()
def test_calls_repeat_and_inputs_stay(engine, network):
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
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            assert torch.equal(network(x, t).sample, first)
    # Down blocks hand their outputs on twice; a sum in place would spoil the second use.
    hidden = noise(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    kept = hidden.clone()
    network.down_blocks[0](hidden, noise(2, 64))
    assert torch.equal(hidden, kept)


@torch.no_grad()
def test_a_float_layer_leaves_its_block_unfused_and_the_stream_in_float32(engine):
    network = quantized_unet(exclude=("mid_block.resnets.0.conv1",))
    engine.attach(network)
    table = execution(network)
    assert table["mid_block.resnets.0.conv2"] == engine.name
    assert table["mid_block.resnets.1.conv2"] == f"{engine.name}, fused"
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    assert network.conv_in(x).dtype == torch.float32
    y = network(x, t).sample
    attach(network, "simulated")
    check_like_simulated(y, network(x, t).sample, tiny_unet()(x, t).sample, 0.03)


@torch.no_grad()
@pytest.mark.parametrize("left", ["*conv_shortcut", "up_blocks.*.1.conv_shortcut"])
def test_a_shortcut_in_float_is_part_of_its_block(engine, left):
    network, x, t = quantized_unet(exclude=(left,)), noise(2, 3, 16, 16), torch.tensor([970, 10])
    engine.attach(network)
    assert set(execution(network).values()) == {f"{engine.name}, fused"}
    # Nothing is left outside: on a GPU the stream is in half precision, of 11 bits.
    assert network.conv_in(x).dtype == {"triton": torch.float16}.get(engine.name, torch.float32)
    y = network(x, t).sample
    check_blocks(engine, network, x, t)
    # Of another kind it leaves its block unfused.
    next(m for n, m in network.named_modules() if fnmatch(n, left)).stride = (2, 2)
    engine.attach(network)
    reasons = [row.reason for row in report(network) if row.kind == "ResnetBlock2D"]
    assert reasons.count("a convolution in it is not a plain 1x1") == 1
    simulated = quantized_unet(exclude=(left,))
    attach(simulated, "simulated")
    check_like_simulated(y, simulated(x, t).sample, tiny_unet()(x, t).sample, 0.03)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision(engine, packed_unet, dtype):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    half = copy.deepcopy(packed_unet).to(dtype)
    engine.attach(half)
    y = half(x.to(dtype), t).sample
    assert y.dtype == dtype
    attach(half, "simulated")
    check_like_simulated(y, half(x.to(dtype), t).sample, tiny_unet()(x, t).sample, 0.05)


@torch.no_grad()
def test_a_text_network_is_fused_as_far_as_the_engine_goes(engine):
    unet = tiny_text().unet
    x, text = noise(2, unet.config.in_channels, 8, 8), noise(2, 5, unet.config.cross_attention_dim)
    t = torch.tensor([900, 20])
    network = quantize_network(unet, [(x, t, text)])
    engine.attach(network)
    whole = engine.name == "triton"
    assert set(execution(network).values()) - {f"{engine.name}, fused"} == (
        set() if whole else {engine.name}
    )
    assert network.conv_in(x).dtype == (torch.float16 if whole else torch.float32)
    assert type(network.up_blocks[0]).__name__ == "CrossAttnUpBlock2D"
    assert all(isinstance(block.forward.active, FusedUpBlock) for block in network.up_blocks)
    fused, exact = network(x, t, text).sample, unet(x, t, text).sample
    attach(network, "simulated")
    check_like_simulated(fused, network(x, t, text).sample, exact, 0.03)


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
def test_free_u_is_respected(engine, network):
    x, t = noise(1, 3, 16, 16), torch.tensor(450)
    plain = network(x, t).sample
    block = network.up_blocks[1]
    assert isinstance(block.forward.active, FusedUpBlock)
    for name, value in (("s1", 0.5), ("s2", 0.5), ("b1", 1.5), ("b2", 1.5)):
        setattr(block, name, value)
    block.resolution_idx = 0
    fused = network(x, t).sample
    unfuse(network)
    assert relative(fused, plain) > 1e-2
    assert relative(fused, network(x, t).sample) <= (0.03 if engine.name == "onednn" else 0.04)


def test_a_call_asks_no_module_for_the_dtype(packed_unet, monkeypatch):
    network, walks = copy.deepcopy(packed_unet), []
    attach(network, "onednn" if onednn.missing() is None else "simulated")
    x, t = noise(1, 3, 16, 16), torch.tensor(500)
    expected = network(x, t).sample
    counted = modeling_utils.get_parameter_dtype
    monkeypatch.setattr(
        modeling_utils, "get_parameter_dtype", lambda m: walks.append(m) or counted(m)
    )
    assert torch.equal(network(x, t).sample, expected) and not walks
    network.to(torch.bfloat16)
    assert network(x.bfloat16(), t).sample.dtype == network.dtype == torch.bfloat16
    assert torch.isfinite(copy.deepcopy(network)(x.bfloat16(), t).sample).all()
