"""Blocks of a network as few launches on a GPU, around int8 convolutions.

Nothing waits for the device or depends on the value of a time-step: a block works eagerly, compiled
and in a CUDA graph, for any batch, mixed time-steps included. The result equals the layers run one
by one up to the order of float operations, which may move a code by one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import Prepared, last, rows_of
from quantempo.engines.cuda import constants
from quantempo.engines.fusion import Blocks, FusedBlock, FusedUpBlock, Network, same
from quantempo.engines.per_forward import TimeShifts, float_rows
from quantempo.models import fusion_unet
from quantempo.quantized import Float16Linear, QLayer, StepClock

__all__ = ["BLOCKS", "FusedDownsample", "FusedResnet", "GpuBlock", "SharedShifts"]

# Codes for the norm's convolution and for the shortcut are written together, unless the images are
# of more bytes: both would be the peak of the memory.
_LARGE = 128 << 20


def _carries(parts: Any, layer: nn.Module) -> bool:
    """Return whether a LoRA beside a layer stays when a block is fused: no more than two sides."""
    shortcut = getattr(parts, "shortcut", None)
    full = isinstance(shortcut, QLayer) and layer is parts.conv2
    return isinstance(layer, QLayer | nn.Linear) and layer is not shortcut and not full


BLOCKS = Blocks("triton", eager=True, carries=_carries)
BLOCKS.build(fusion_unet.UpBlockParts)(FusedUpBlock.build)


class GpuBlock(Prepared, FusedBlock):
    """A fused block on images (B, C, H, W) of any floating type that the operators read."""

    def takes(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether `run` can be given these."""
        return x.dtype in constants.FLOATS and x.ndim == 4


class SharedShifts(Prepared, TimeShifts):
    """Time shifts in float16: an eighth of the error of bfloat16, in a float32 stream too."""

    dtype = torch.float16

    def _prepare(self, device: torch.device) -> None:
        if not self.layers:
            return
        self.weight, self.bias = map(constants.constant, float_rows(self.layers, self.dtype))
        for layer, part in zip(self.layers, self.weight.split(self._sizes), strict=True):
            # One copy in memory serves both, where the layer's own loses nothing.
            if isinstance(layer, Float16Linear) and torch.equal(layer.weight.float(), part.float()):
                layer.weight.data = constants.alone(part)

    def make(self, given: Tensor) -> Tensor:
        """Return (B, sum C_i) of temb (B, E)."""
        self.here(given.device)
        with torch.autocast(given.device.type, enabled=False):
            return F.linear(F.silu(given.float()).to(self.weight.dtype), self.weight, self.bias)


@BLOCKS.build(fusion_unet.ResnetParts)
class FusedResnet(GpuBlock):
    """A residual block: two passes that write codes, two convolutions that add all the rest."""

    def __init__(self, parts: fusion_unet.ResnetParts, network: Network) -> None:
        super().__init__(parts, network)
        self.shifts = network.once(SharedShifts.of)
        self.index = self.shifts.index(parts.time)
        self.clock = parts.conv1.clock
        # Of a shortcut: channels of each input -> its operands; those that have own scales.
        self.sides: dict[tuple[int, ...], constants.Sides | constants.FloatSides] = {}
        self.widths: set[tuple[int, ...]] = set()
        shortcut: Any = parts.shortcut
        if shortcut is not None:
            self.segments = getattr(shortcut, "segments", (shortcut.in_channels,))
            self.widths.add(self.segments)
            # Two inputs of these channels, as an up block will hand them over.
            halves = network.halves.get(f"{parts.name}.conv_shortcut", ())
            aligned = all(width % constants.ALIGNED == 0 for width in halves)
            if halves and aligned and len(self.segments) == 1:
                self.widths.add(halves)

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.norm1, self.norm2 = constants.Norm(parts.norm1), constants.Norm(parts.norm2)
        self.conv1 = constants.constants_of(parts.conv1, device)
        self.conv2 = constants.constants_of(parts.conv2, device)
        shortcut: Any = parts.shortcut
        self.bias = self.conv2.bias
        kind = constants.Sides if isinstance(shortcut, QLayer) else constants.FloatSides
        self.sides = {widths: kind(shortcut, widths) for widths in self.widths}
        if shortcut is not None and shortcut.bias is not None:
            bias = shortcut.bias.float()
            self.bias = constants.constant(bias if self.bias is None else self.bias + bias)

    def run(self, x: Tensor, temb: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """Run the block on torch.cat([x, skip], 1), without making it."""
        self.here(x.device)
        x, skip, sides = self._inputs(x, skip)
        shift, (conv1, conv2), dtype = self._shift(x, temb), (self.conv1, self.conv2), x.dtype
        bucket = self.clock.bucket
        how: dict[str, Any] = {"bucket": bucket, "silu": True}
        values = x.numel() + (0 if skip is None else skip.numel())
        large = values * dtype.itemsize > _LARGE
        first = sides if isinstance(sides, constants.Sides) and not large else None
        codes, raws = self.norm1(x, skip, grid=conv1.grids[0], sides=first, **how)
        hidden = conv1.conv(codes, dtype, bias=conv1.bias, shift=shift)
        codes, _ = self.norm2(hidden, grid=conv2.grids[0], **how)
        if isinstance(sides, constants.Sides):
            added = sides.arguments(raws or sides.codes_of(x, skip, bucket))
        else:
            added = {"residual": x if sides is None else sides(x, skip)}
        return conv2.conv(codes, dtype, bias=self.bias, **added)

    def _inputs(
        self, x: Tensor, skip: Tensor | None
    ) -> tuple[Tensor, Tensor | None, constants.Sides | constants.FloatSides | None]:
        """Return the one or two images to read, and the shortcut that takes them."""
        if self.parts.shortcut is None:
            return last(x if skip is None else torch.cat([x, skip], 1)), None, None
        widths = (x.shape[1],) if skip is None else (x.shape[1], skip.shape[1])
        if widths not in self.sides:
            # Cut otherwise than its scales are: only where an up block runs diffusers' own code.
            whole = x if skip is None else torch.cat([x, skip], 1)
            x, *rest = whole.split(self.segments, 1)
            skip, widths = rest[0] if rest else None, self.segments
        # A control network may have added to it in another type.
        return last(x), None if skip is None else last(skip.to(x.dtype)), self.sides[widths]

    def _shift(self, x: Tensor, temb: Tensor | None) -> Tensor | None:
        time = self.parts.time
        if temb is None or time is None:
            return None
        shift = time(F.silu(temb)) if self.index is None else self.shifts(self.index, temb)
        return shift.expand(x.shape[0], -1)


@BLOCKS.build(fusion_unet.AttentionParts)
class _Attention(GpuBlock):
    """Self-attention over pixels: one pass that writes codes for q, k and v."""

    def __init__(self, parts: fusion_unet.AttentionParts, network: Network) -> None:
        super().__init__(parts, network)
        self.clock = parts.q.clock
        self.dim = parts.q.out_features // parts.heads

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.norm, self.out = constants.Norm(parts.norm), constants.constants_of(parts.out, device)
        layers = [constants.constants_of(layer, device) for layer in (parts.q, parts.k, parts.v)]
        self.projections = constants.LayerConstants.together(layers)

    def run(self, x: Tensor) -> Tensor:
        self.here(x.device)
        x = last(x)
        batch, _, height, width = x.shape
        # (B, tokens, 3, heads, dim), then each (B, heads, tokens, dim)
        parts = (batch, height * width, -1, self.parts.heads, self.dim)
        every = [part for y in self._project(x) for part in y.view(parts).unbind(2)]
        q, k, v = (y.transpose(1, 2) for y in every)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        codes = constants.quantize_rows(y, self.out.grids[0])
        rows = self.out.gemm(codes, x.dtype, bias=self.out.bias, residual=rows_of(x))
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def _project(self, x: Tensor) -> list[Tensor]:
        """Return q, k and v together (B tokens, 3 C), or each of them (B tokens, C)."""
        bucket, results = self.clock.bucket, []
        for layer in self.projections:
            codes, _ = self.norm(x, bucket=bucket, silu=False, grid=layer.grids[0])
            results.append(layer.gemm(rows_of(codes), x.dtype, bias=layer.bias))
        return results


class _Sampler(GpuBlock):
    """Quantize, then one convolution that reads another grid of pixels than it writes."""

    def _prepare(self, device: torch.device) -> None:
        self.conv = constants.constants_of(self.parts.conv, device)

    def _convolve(self, x: Tensor, **how: Any) -> Tensor:
        self.here(x.device)
        codes = constants.quantize(x, self.conv.grids[0])
        return self.conv.conv(codes, x.dtype, bias=self.conv.bias, **how)


@BLOCKS.build(fusion_unet.DownsampleParts)
class FusedDownsample(_Sampler):
    """The strided convolution, its border never written."""

    def run(self, x: Tensor) -> Tensor:
        """Run the block on x (B, C, H, W)."""
        kernel, stride = self.parts.conv.kernel_size[0], self.parts.conv.stride[0]
        return self._convolve(x, kernel=kernel, stride=stride, border=self.parts.border)


@BLOCKS.build(fusion_unet.UpsampleParts)
class _Upsample(_Sampler):
    """The convolution of an image four times as large, which is never made."""

    def run(self, x: Tensor) -> Tensor:
        return self._convolve(x, upsample=True)


class _End(Prepared):
    """A float convolution at an end; dtype: of the stream, None: x's; first: which it writes."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype | None, *, first: bool) -> None:
        self.conv, self.dtype, self.first = conv, dtype, first

    def _prepare(self, device: torch.device) -> None:
        conv, dtype = self.conv, self.dtype or self.conv.weight.dtype
        self.weight = last(conv.weight.detach().to(dtype))
        torch._dynamo.mark_static_address(self.weight)
        self.bias = None if conv.bias is None else constants.constant(conv.bias.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
        # Of the class: its own padding mode, with our weight.
        x = last(x).to(self.weight.dtype)
        y: Tensor = type(self.conv)._conv_forward(self.conv, x, self.weight, self.bias)
        return last(y) if self.first else y.to(self.conv.weight.dtype)


class _Head(Prepared):
    """The last GroupNorm and SiLU in one pass, in the type of the stream."""

    def __init__(self, parts: fusion_unet.HeadParts, clock: StepClock) -> None:
        self.parts, self.clock = parts, clock

    def _prepare(self, device: torch.device) -> None:
        self.norm = constants.Norm(self.parts.norm)

    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
        y, _ = self.norm(last(x), bucket=self.clock.bucket, silu=True)
        return y


@BLOCKS.build(fusion_unet.HeadParts)
def _ends(
    head: fusion_unet.HeadParts, network: Network
) -> list[tuple[nn.Module, Callable[..., Tensor]]]:
    """Between stem and head the activations are in half precision if nothing there minds."""
    # float16 where the model is in float32: the 8 bits of bfloat16 would cost 0.1 dB and more.
    single = head.stem.weight.dtype not in (torch.float16, torch.bfloat16)
    dtype = torch.float16 if single and network.closed(head) else None
    return [
        (head.stem, _End(head.stem, dtype, first=True)),
        (head.norm, _Head(head, network.clock)),
        (head.activation, same),
        (head.out, _End(head.out, dtype, first=False)),
    ]
