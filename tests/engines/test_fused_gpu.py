"""Fused blocks for GPUs on a CPU: in tiny U-Nets, and built by hand against diffusers' own."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantempo.engines import ENGINES, attach
from quantempo.engines.base import BACKENDS
from quantempo.engines.cuda import unet as fused_gpu
from quantempo.engines.cuda.constants import Sides
from quantempo.engines.cuda.unet import FusedDownsample, FusedResnet, SharedShifts
from quantempo.engines.fusion import unfuse
from quantempo.engines.layerwise import execution
from quantempo.models.fusion import find_parts
from quantempo.models.fusion_unet import ResnetParts
from quantempo.quantized import Float16Linear, quantized_layers
from tests.engines.quantized import make_clock, make_conv, quantize_network
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise, tiny_text, tiny_unet

pytestmark = pytest.mark.usefixtures("on_a_cpu")

ENGINE = ENGINES.get("triton")


@pytest.fixture
def network(packed_unet):
    network = copy.deepcopy(packed_unet)
    ENGINE.attach(network)
    return network


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


def test_the_stream_is_float16(network):
    seen = []
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        for resnet in block.resnets:
            run = resnet.forward.active.run
            resnet.forward.active.run = lambda *a, run=run: seen.append(run(*a)) or seen[-1]
    with torch.no_grad():
        network(noise(2, 3, 16, 16), torch.tensor(450))
    assert len(seen) == 8
    assert {y.dtype for y in seen} == {torch.float16}
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


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
def test_a_copy_runs_on_its_own(network):
    x, t = noise(2, 3, 16, 16), torch.tensor(450)
    expected = network(x, t).sample
    other = copy.deepcopy(network)
    ENGINE.attach(other)
    assert torch.equal(other(x, t).sample, expected)
    fused, first = other.mid_block.resnets[0].forward, other.down_blocks[0].resnets[0].forward
    assert fused.parts.module is other.mid_block.resnets[0]
    assert fused.shifts is first.shifts is not network.mid_block.resnets[0].forward.shifts
    for _, layer in quantized_layers(other):
        layer.weight_int.zero_()
    assert not torch.equal(other(x, t).sample, expected)
    assert torch.equal(network(x, t).sample, expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unconditional", "text", "float shortcuts"])
def test_a_network_compiles_whole_and_once(kind):
    if kind == "text":
        unet = tiny_text().unet
        more = (noise(2, 5, unet.config.cross_attention_dim),)
        x = noise(2, unet.config.in_channels, 8, 8)
    else:
        unet, more, x = tiny_unet(), (), noise(2, 3, 16, 16)
    left = ("*conv_shortcut",) if kind == "float shortcuts" else ()
    network = quantize_network(unet, [(x, torch.tensor([900, 20]), *more)], exclude=left)
    ENGINE.attach(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (450, 10, 999):
            step = torch.tensor(t)
            assert torch.equal(compiled(x, step, *more).sample, network(x, step, *more).sample)


@torch.no_grad()
@pytest.mark.parametrize("segments", [(), (16, 32), (32, 16)], ids=str)
def test_a_shortcut_reads_its_inputs_where_they_are(monkeypatch, segments):
    # Groups of 6 channels: one straddles the boundary at 16.
    block = ResnetBlock2D(in_channels=48, out_channels=32, temb_channels=8, groups=8).eval()
    clock = make_clock(3)
    block.conv1, block.conv2 = make_conv(48, 32, clock=clock), make_conv(32, 32, clock=clock)
    one = {"kernel": (1, 1), "padding": (0, 0)}
    block.conv_shortcut = make_conv(48, 32, segments=segments, clock=clock, seed=2, **one)
    for conv in (block.conv1, block.conv2, block.conv_shortcut):
        conv.act_zero_point.fill_(100)
        conv.kernel = BACKENDS.get("triton").lower(conv)
    parts = ResnetParts(
        "", block, block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2,
        block.conv_shortcut,
    )  # fmt: skip
    shifts = SharedShifts([block.time_emb_proj])
    network = SimpleNamespace(once=lambda of: shifts, halves={".conv_shortcut": (16, 32)})
    fused = FusedResnet(parts, network)
    fused.prepare(torch.device("cpu"))
    assert ((16, 32) in fused.sides) == (segments != (32, 16))
    clock.set(torch.tensor([10, 999]))
    x, skip, temb = noise(2, 16, 5, 4), noise(2, 32, 5, 4, seed=1), noise(2, 8, seed=2)
    whole = torch.cat([x, skip], 1)
    expected = block(whole, temb)
    results = [fused.run(x, temb, skip), fused(whole, temb)]
    for y in results:
        assert relative(y, expected) <= 4e-3
    # Of large images the shortcut's codes are written apart from those of the norm.
    monkeypatch.setattr(fused_gpu, "_LARGE", 0)
    codes_of = Sides.codes_of
    written = []
    monkeypatch.setattr(Sides, "codes_of", lambda *args: written.append(1) or codes_of(*args))
    assert torch.equal(fused.run(x, temb, skip), results[0])
    assert torch.equal(fused(whole, temb), results[1])
    assert len(written) == 2


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("size", [(5, 4), (4, 7)], ids=str)
def test_a_downsampler_has_the_border_of_its_block(padding, size):
    block = Downsample2D(32, use_conv=True, padding=padding)
    block.conv = make_conv(32, 32, stride=(2, 2), padding=(padding, padding))
    block.conv.kernel = BACKENDS.get("triton").lower(block.conv)
    fused = FusedDownsample(next(find_parts(block))[2], None)
    assert fused.parts.border == ((1, 1, 1, 1) if padding else (0, 1, 0, 1))
    fused.prepare(torch.device("cpu"))
    x = noise(2, 32, *size)
    assert relative(fused(x), block(x)) <= 2e-7


def test_time_shifts_are_those_of_each_layer_and_never_stale():
    layers = [nn.Linear(8, 5), Float16Linear(nn.Linear(8, 3)).fill(nn.Linear(8, 3))]
    shifts = SharedShifts(layers)
    shifts.prepare(torch.device("cpu"))

    def check(index: int, temb: Tensor) -> None:
        expected = layers[index](nn.functional.silu(temb))
        # Operands and result have 11 bits.
        torch.testing.assert_close(shifts(index, temb).float(), expected, rtol=2e-3, atol=2e-3)

    with torch.no_grad():
        # In any order, broken off, read again, changed in place in between, in half precision.
        first, second = noise(4, 8), noise(4, 8, seed=1)
        for index, temb in ((0, first), (1, first), (1, second), (1, second), (0, first)):
            check(index, temb)
        first.mul_(2)
        check(0, first)
        check(1, first)
        assert shifts._kept.value is None
        assert shifts(1, first.bfloat16()).dtype == torch.float16
    assert layers[1].weight.data_ptr() == shifts.weight[5:].data_ptr()
    assert layers[1].state_dict()["weight"].untyped_storage().nbytes() == 3 * 8 * 2
