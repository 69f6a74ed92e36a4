"""Blocks of a network as few passes over memory, around int8 convolutions.

What stands between two integer layers becomes one compiled pass (`kernels/cpu/fused.c`) that writes
codes: GroupNorm, time embedding, SiLU; upsampling or padding. The result equals the layers run one
by one up to the order of float operations, which may move a code by one.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import last, rows_of, run_per_bucket
from quantempo.engines.fusion import Blocks, FusedBlock, FusedUpBlock, Network, same
from quantempo.engines.onednn.layer import FoldedLayer, quantize_tokens
from quantempo.engines.per_forward import TimeShifts, float_rows
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.kernels.cpu.fused import Norm, Part
from quantempo.models import fusion_unet
from quantempo.quantized import QLayer, StepClock

__all__ = ["BLOCKS", "FloatTimeShifts"]

# More tokens than this, and attention that never stores its scores is faster.
MAX_TOKENS = 1024


def _norm_refusal(norm: nn.GroupNorm) -> str | None:
    many = norm.num_channels > fused_cpu.MAX_CHANNELS
    return f"its norm has more than {fused_cpu.MAX_CHANNELS} channels" if many else None


BLOCKS = Blocks("onednn", missing=lambda: fused_cpu.missing(), norm=_norm_refusal)
BLOCKS.build(fusion_unet.UpBlockParts)(FusedUpBlock.build)


def _library() -> fused_cpu.Library:
    library = fused_cpu.load()
    assert library is not None
    return library


def _norm(norm: nn.GroupNorm) -> Norm:
    # Copies in float32: the model itself may have been loaded in half precision.
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return Norm(norm.num_groups, weight.float().contiguous(), bias.float().contiguous(), norm.eps)


class FloatTimeShifts(TimeShifts):
    """Time shifts in float32, one row of work where the whole batch has one time-step."""

    merged: tuple[Tensor, Tensor] | None = None

    def make(self, given: Tensor) -> Tensor:
        """Return float32 (B, sum C_i) of temb (B, E)."""
        if self.merged is None:
            self.merged = float_rows(self.layers, torch.float32)
        rows = given.detach().float()
        same_time = len(rows) > 1 and torch.equal(rows[1:], rows[:-1])
        with torch.autocast("cpu", enabled=False):
            y = F.linear(F.silu(rows[:1] if same_time else rows), *self.merged)
        return y.expand(len(rows), -1) if same_time else y


class _Block(FusedBlock):
    """A block on (B, C, H, W), run once for each time bucket of the batch."""

    clock: StepClock

    def takes(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether x is an image of a type that the kernels read."""
        half = x.dtype == torch.bfloat16 and onednn.native_bfloat16()
        return (x.dtype == torch.float32 or half) and x.device.type == "cpu" and x.ndim == 4

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run_per_bucket(self.clock, self._run, last(x))

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        raise NotImplementedError


class _FloatShortcut:
    """A 1x1 convolution left in float, in the type of the stream: no codes, no grids."""

    def __init__(self, layer: nn.Conv2d, widths: tuple[int, ...]) -> None:
        self.layer, self.widths = layer, widths

    def grid(self, bucket: int, part: int) -> None:
        """Return no grid: it reads the images themselves."""

    def part(self, part: int, rows: Tensor, bucket: int, dtype: torch.dtype, into: Tensor) -> None:
        """Add what input `part` (R, C_i) gives to `into` (R, O); the bias goes with the first."""
        weight = self.layer.weight.detach().flatten(1).split(self.widths, 1)[part]
        into.addmm_(rows, weight.to(dtype).t())
        if part == 0 and self.layer.bias is not None:
            into.add_(self.layer.bias.detach().to(dtype))


@BLOCKS.build(fusion_unet.ResnetParts)
class _Resnet(_Block):
    """A residual block: two passes that write codes, two convolutions, one sum.

    Between its convolutions it is in bfloat16 if the CPU has that; the stream that all blocks add
    to is not: there every rounding stays, and costs 3 dB of the image.
    """

    def __init__(self, parts: fusion_unet.ResnetParts, network: Network) -> None:
        super().__init__(parts, network)
        self.shifts = network.once(FloatTimeShifts.of)
        self.index = self.shifts.index(parts.time)
        self.norm1, self.norm2 = _norm(parts.norm1), _norm(parts.norm2)
        self.conv1, self.conv2 = FoldedLayer(parts.conv1), FoldedLayer(parts.conv2)
        self.clock = parts.conv1.clock
        # By the channels of its inputs.
        self.shortcuts: dict[tuple[int, ...], FoldedLayer | _FloatShortcut] = {}

    def run(self, x: Tensor, temb: Tensor | None, skip: Tensor | None = None) -> Tensor:
        shift, time, index = None, self.parts.time, self.index
        if temb is not None and time is not None:
            shift = time(F.silu(temb)).float() if index is None else self.shifts(index, temb)
        skip = None if skip is None else last(skip).to(x.dtype)
        return run_per_bucket(self.clock, self._join, last(x), skip, shift)

    def _join(self, bucket: int, x: Tensor, skip: Tensor | None, shift: Tensor | None) -> Tensor:
        library, dtype = _library(), x.dtype
        inputs = self._inputs(x, skip)
        shortcut = self._shortcut(inputs)
        raw = [None if shortcut is None else shortcut.grid(bucket, i) for i in range(len(inputs))]
        parts, grid = list(map(Part, inputs, raw)), self.conv1.grid(bucket)
        codes, raws = library.group_norm(parts, self.norm1, silu=True, grid=grid)
        inner = torch.bfloat16 if onednn.native_bfloat16() else dtype
        hidden = [Part(self.conv1(codes, bucket, inner))]
        grid = self.conv2.grid(bucket)
        codes, _ = library.group_norm(hidden, self.norm2, silu=True, grid=grid, shift=shift)
        y = self.conv2(codes, bucket, dtype, add=x if shortcut is None else None)
        if shortcut is not None:
            into = rows_of(y)
            for i, part in enumerate(raws or inputs):
                shortcut.part(i, rows_of(part), bucket, dtype, into=into)
        return y

    def _inputs(self, x: Tensor, skip: Tensor | None) -> list[Tensor]:
        if skip is not None:
            return [x, skip]
        layer = self.parts.shortcut
        return list(x.split(layer.segments, 1)) if isinstance(layer, QLayer) else [x]

    def _shortcut(self, inputs: list[Tensor]) -> FoldedLayer | _FloatShortcut | None:
        layer, widths = self.parts.shortcut, tuple(x.shape[1] for x in inputs)
        if layer is not None and widths not in self.shortcuts:
            kind = FoldedLayer if isinstance(layer, QLayer) else _FloatShortcut
            self.shortcuts[widths] = kind(layer, widths=widths)
        return self.shortcuts.get(widths)


@BLOCKS.build(fusion_unet.AttentionParts)
class _Attention(_Block):
    """Self-attention over pixels: one pass that writes codes for q, k and v; products in bf16."""

    def __init__(self, parts: fusion_unet.AttentionParts, network: Network) -> None:
        super().__init__(parts, network)
        self.norm, self.clock = _norm(parts.norm), parts.q.clock
        self.dim = parts.q.out_features // parts.heads
        # The scale of the scores is folded into q.
        self.q = FoldedLayer(parts.q, factor=1 / math.sqrt(self.dim))
        self.k, self.v, self.out = (FoldedLayer(p) for p in (parts.k, parts.v, parts.out))

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = height * width
        small = tokens <= MAX_TOKENS
        dtype = torch.bfloat16 if small and onednn.native_bfloat16() else torch.float32
        # (B, heads, tokens, dim)
        q, k, v = (
            y.view(batch, tokens, self.parts.heads, self.dim).transpose(1, 2)
            for y in self._project(bucket, x, dtype)
        )
        if small:
            scores = torch.matmul(q, k.transpose(2, 3))
            y = torch.matmul(scores.softmax(-1), v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        codes = quantize_tokens(y.transpose(1, 2).flatten(2), *self.out.grid(bucket))
        rows = self.out(codes, bucket, x.dtype, add=rows_of(x))
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _project(self, bucket: int, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k and v (B tokens, C); quantized once if their grids are equal."""
        results: list[Tensor] = []
        codes, known = None, None
        for layer in (self.q, self.k, self.v):
            grid = layer.grid(bucket)
            if grid != known:
                codes, _ = _library().group_norm([Part(x)], self.norm, silu=False, grid=grid)
                codes, known = rows_of(codes), grid
            results.append(layer(codes, bucket, dtype))
        return results


@BLOCKS.build(fusion_unet.DownsampleParts)
@BLOCKS.build(fusion_unet.UpsampleParts)
class _Sampler(_Block):
    """Quantize into a border of zero points, then one convolution without padding.

    Upsampling repeats codes, not floats: a quarter of the work, a sixteenth of the memory.
    """

    def __init__(self, parts: Any, network: Network) -> None:
        super().__init__(parts, network)
        self.conv, self.clock = FoldedLayer(parts.conv, bordered=True), parts.conv.clock
        up = isinstance(parts, fusion_unet.UpsampleParts)
        self.border = (1, 1, 1, 1) if up else parts.border
        self.repeat = 2 if up else 1

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        grid = self.conv.grid(bucket)
        codes = _library().quantize(x, *grid, border=self.border, repeat=self.repeat)
        return self.conv(codes, bucket, x.dtype)


@BLOCKS.build(fusion_unet.HeadParts)
def _ends(head: fusion_unet.HeadParts, network: Network) -> list[tuple[nn.Module, Any]]:
    affine = _norm(head.norm)

    def stem(x: Tensor) -> Tensor:
        """Run the first convolution in float, writing channels_last."""
        return last(type(head.stem).forward(head.stem, last(x)))

    def norm(x: Tensor) -> Tensor:
        """Run the last GroupNorm and SiLU in one pass, float32 out."""
        if x.dtype not in (torch.float32, torch.bfloat16):
            return F.silu(type(head.norm).forward(head.norm, x))
        y, _ = _library().group_norm([Part(last(x))], affine, silu=True, grid=None)
        return y.to(head.out.weight.dtype)

    return [(head.stem, stem), (head.norm, norm), (head.activation, same)]
