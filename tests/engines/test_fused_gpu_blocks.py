"""Single fused blocks for GPUs, built by hand, against diffusers' own forward on a CPU."""

import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from quantempo.engines.cuda import unet as fused_gpu
from quantempo.engines.cuda.constants import Sides
from quantempo.engines.cuda.layer import TritonBackend
from quantempo.engines.cuda.per_forward import SharedShifts
from quantempo.engines.cuda.unet import FusedDownsample, FusedResnet
from quantempo.models.fusion import find_parts
from quantempo.models.fusion_unet import ResnetParts
from quantempo.quantized import Float16Linear
from tests.engines.quantized import make_clock, make_conv
from tests.engines.truth import relative
from tests.tiny import noise


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonBackend, "missing", lambda self: None)


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
        conv.kernel = TritonBackend().lower(conv)
    parts = ResnetParts(
        "", block, block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2,
        block.conv_shortcut,
    )  # fmt: skip
    fused = FusedResnet(parts, SharedShifts([block.time_emb_proj]))
    fused.accept((16, 32))
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
    block.conv.kernel = TritonBackend().lower(block.conv)
    fused = FusedDownsample(next(find_parts(block))[2])
    assert fused.parts.border == ((1, 1, 1, 1) if padding else (0, 1, 0, 1))
    fused.prepare(torch.device("cpu"))
    x = noise(2, 32, *size)
    assert relative(fused(x), block(x)) <= 2e-7


def test_time_shifts_are_those_of_each_layer_and_never_stale():
    layers = [nn.Linear(8, 5), Float16Linear.like(nn.Linear(8, 3)).fill(nn.Linear(8, 3))]
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
        assert shifts._value is None
        assert shifts(1, first.bfloat16()).dtype == torch.float16
