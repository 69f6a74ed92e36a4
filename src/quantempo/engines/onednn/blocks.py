"""Blocks of a network as few passes over memory, around int8 convolutions.

What stands between two integer layers becomes one compiled pass (`kernels/cpu/fused.c`) that
writes codes: GroupNorm, time embedding, SiLU and quantization; upsampling or padding and
quantization. A block is fused by setting `forward` on its instance. The result equals the layers
run one by one up to the order of float operations, which may move a code by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import run_per_bucket
from quantempo.engines.fusion import Kit, same
from quantempo.engines.onednn.folded import Folded, TimeShifts
from quantempo.engines.onednn.layer import quantize_tokens
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.kernels.cpu.fused import Norm, Part
from quantempo.models.fusion_unet import (
    AttentionParts,
    DownsampleParts,
    HeadParts,
    ResnetParts,
    UpsampleParts,
)
from quantempo.quantized import StepClock

__all__ = [
    "BLOCKS",
    "FusedAttention",
    "FusedDownsample",
    "FusedHead",
    "FusedResnet",
    "FusedStem",
    "FusedUpsample",
]

# More tokens than this, and attention that never stores its scores is faster.
MAX_TOKENS = 1024


def _library() -> fused_cpu.Library:
    library = fused_cpu.load()
    assert library is not None
    return library


def _norm(norm: nn.GroupNorm) -> Norm:
    # Copies in float32: the model itself may have been loaded in half precision.
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return Norm(norm.num_groups, weight.float().contiguous(), bias.float().contiguous(), norm.eps)


def _takes(x: Tensor) -> bool:
    half = x.dtype == torch.bfloat16 and onednn.native_bfloat16()
    return (x.dtype == torch.float32 or half) and x.device.type == "cpu"


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) channels_last -> (B H W, C), a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class FusedResnet:
    """A residual block: two passes that write codes, two convolutions, one sum."""

    takes = staticmethod(_takes)

    def __init__(self, parts: ResnetParts, shifts: TimeShifts | None, index: int) -> None:
        self.parts, self.shifts, self.index = parts, shifts, index
        self.norm1, self.norm2 = _norm(parts.norm1), _norm(parts.norm2)
        self.conv1, self.conv2 = Folded(parts.conv1), Folded(parts.conv2)
        self.clock = parts.conv1.clock
        self.shortcut: Folded | None = None

    def __call__(self, x: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on x (B, C, H, W)."""
        if not _takes(x):
            return type(self.parts.module).forward(self.parts.module, x, temb, *args, **kwargs)
        return self.run(x, None, temb)

    def accept(self, widths: tuple[int, int]) -> None:
        """Do nothing: weights are packed for the inputs of the first call."""

    def run(self, x: Tensor, skip: Tensor | None, temb: Tensor | None) -> Tensor:
        """Run the block on torch.cat([x, skip], 1), without making it."""
        shift = None
        if temb is not None and self.parts.time is not None:
            if self.shifts is not None:
                shift = self.shifts(self.index, temb)
            else:
                shift = self.parts.time(F.silu(temb)).float()
        skip = None if skip is None else _last(skip)
        return run_per_bucket(self.clock, self._run, _last(x), skip, shift)

    def _run(self, bucket: int, x: Tensor, skip: Tensor | None, shift: Tensor | None) -> Tensor:
        library, dtype = _library(), x.dtype
        inputs, shortcut = self._inputs(x, skip), self._shortcut(x, skip)
        raw = [None if shortcut is None else shortcut.grid(bucket, i) for i in range(len(inputs))]
        codes, raws = library.group_norm(
            [Part(part, grid) for part, grid in zip(inputs, raw, strict=True)],
            self.norm1,
            silu=True,
            grid=self.conv1.grid(bucket),
        )
        hidden = self.conv1(codes, bucket, dtype)
        codes, _ = library.group_norm(
            [Part(hidden)],
            self.norm2,
            silu=True,
            grid=self.conv2.grid(bucket),
            shift=shift,
            edge=self.conv1.edge(bucket),
        )
        y = self.conv2(codes, bucket, dtype)
        library.add(y, x if shortcut is None else None, self.conv2.edge(bucket))
        if shortcut is not None:
            into = _rows(y)
            for i, part in enumerate(raws):
                shortcut.part(i, _rows(part), bucket, dtype, into=into)
        return y

    def _inputs(self, x: Tensor, skip: Tensor | None) -> list[Tensor]:
        if skip is not None:
            return [x, skip]
        layer = self.parts.shortcut
        return [x] if layer is None else list(x.split(layer.segments, 1))

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> Folded | None:
        layer = self.parts.shortcut
        if layer is not None and self.shortcut is None:
            widths = layer.segments if skip is None else (x.shape[1], skip.shape[1])
            self.shortcut = Folded(layer, widths=widths)
        return self.shortcut


class FusedAttention:
    """Self-attention over pixels: one pass that writes codes for q, k and v; products in bf16."""

    def __init__(self, parts: AttentionParts) -> None:
        self.parts, self.norm = parts, _norm(parts.norm)
        self.clock = parts.q.clock
        self.dim = parts.q.out_features // parts.heads
        # The scale of the scores is folded into q.
        self.q = Folded(parts.q, factor=1 / math.sqrt(self.dim))
        self.k, self.v, self.out = Folded(parts.k), Folded(parts.v), Folded(parts.out)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on x (B, C, H, W)."""
        plain = not args and all(v is None for k, v in kwargs.items() if k != "temb")
        if not plain or x.ndim != 4 or not _takes(x):
            return type(self.parts.module).forward(self.parts.module, x, *args, **kwargs)
        return run_per_bucket(self.clock, self._run, _last(x))

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
        rows = self.out(codes, bucket, x.dtype, add=_rows(x))
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _project(self, bucket: int, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Return q, k and v (B tokens, C); quantized once if their grids are equal."""
        results: list[Tensor] = []
        codes, known = None, None
        for layer in (self.q, self.k, self.v):
            grid = layer.grid(bucket)
            if grid != known:
                codes, _ = _library().group_norm([Part(x)], self.norm, silu=False, grid=grid)
                codes, known = _rows(codes), grid
            results.append(layer(codes, bucket, dtype))
        return results


class FusedDownsample:
    """Quantize into a border of zero points, then the strided convolution."""

    def __init__(self, parts: DownsampleParts) -> None:
        self.parts, self.conv = parts, Folded(parts.conv, bordered=True)
        self.clock = parts.conv.clock

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block on x (B, C, H, W)."""
        if not _takes(x):
            return type(self.parts.module).forward(self.parts.module, x, *args, **kwargs)
        return run_per_bucket(self.clock, self._run, _last(x))

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        codes = _library().quantize(x, *self.conv.grid(bucket), border=self.parts.border)
        return self.conv(codes, bucket, x.dtype)


class FusedUpsample:
    """Quantize, then repeat the codes (a quarter of the work, a sixteenth of the memory)."""

    def __init__(self, parts: UpsampleParts) -> None:
        self.parts, self.conv = parts, Folded(parts.conv, bordered=True)
        self.clock = parts.conv.clock

    def __call__(
        self, x: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run the block on x (B, C, H, W)."""
        if output_size is not None or not _takes(x):
            module = self.parts.module
            return type(module).forward(module, x, output_size, *args, **kwargs)
        return run_per_bucket(self.clock, self._run, _last(x))

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        grid = self.conv.grid(bucket)
        codes = _library().quantize(x, *grid, border=(1, 1, 1, 1), repeat=2)
        return self.conv(codes, bucket, x.dtype)


class FusedStem:
    """The first convolution, in float, writing channels_last in the type of the stream."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        self.conv, self.dtype = conv, dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W), channels_last."""
        return _last(type(self.conv).forward(self.conv, _last(x))).to(self.dtype)


class FusedHead:
    """The last GroupNorm and SiLU in one pass, float32 out; the activation becomes a no-op."""

    def __init__(self, parts: HeadParts) -> None:
        self.parts, self.norm = parts, _norm(parts.norm)

    def __call__(self, x: Tensor) -> Tensor:
        """Return silu(norm(x)), (B, C, H, W), float32 or the type of the last layer."""
        y, _ = _library().group_norm([Part(_last(x))], self.norm, silu=True, grid=None)
        return y.to(self.parts.out.weight.dtype)


def _ends(
    head: HeadParts, closed: bool, clock: StepClock
) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Between stem and head the activations are bfloat16 if the CPU has it and nothing minds."""
    dtype = torch.bfloat16 if closed and onednn.native_bfloat16() else torch.float32
    return [
        (head.stem, FusedStem(head.stem, dtype)),
        (head.norm, FusedHead(head)),
        (head.activation, same),
    ]


def _norm_refusal(norm: nn.GroupNorm) -> str | None:
    many = norm.num_channels > fused_cpu.MAX_CHANNELS
    return f"its norm has more than {fused_cpu.MAX_CHANNELS} channels" if many else None


BLOCKS = Kit(
    backend="onednn",
    missing=lambda: fused_cpu.missing(),
    eager=False,
    norm=_norm_refusal,
    shifts=TimeShifts,
    resnet=FusedResnet,
    attention=FusedAttention,
    downsample=FusedDownsample,
    upsample=FusedUpsample,
    ends=_ends,
)
