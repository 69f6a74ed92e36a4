"""Int8 layers on the CPU through oneDNN: on floats, and on codes for `blocks`, which joins them."""

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantempo.core import GroupFormat, token_scale
from quantempo.engines import base
from quantempo.engines.base import ActivationGrids, Kernel, channel_dim, run_per_bucket
from quantempo.errors import log
from quantempo.kernels import layout
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.kernels.cpu.packed import Packed
from quantempo.kernels.cpu.product import Product
from quantempo.quantized import QConv2d, QLayer

__all__ = ["FoldedLayer", "quantize_tokens"]


def _quantize_image(x: Tensor, scale: float, zero_point: int, qmax: int = 255) -> Tensor:
    """Return uint8 codes (B, C, H, W), channels_last; x floating, any layout."""
    library = fused_cpu.load()
    if library is None or x.dtype not in (torch.float32, torch.bfloat16):
        codes = onednn.quantize(x, scale, zero_point, qmax)
        return codes.contiguous(memory_format=torch.channels_last)
    try:
        return library.quantize(x, scale, zero_point, qmax)
    except ValueError:
        # Not channels_last, nor a channel slice of such a tensor.
        x = x.contiguous(memory_format=torch.channels_last)
        return library.quantize(x, scale, zero_point, qmax)


def quantize_tokens(x: Tensor, scale: float, zero_point: int, qmax: int = 255) -> Tensor:
    """Return uint8 codes (R, K) of x (..., K) floating."""
    rows = x.reshape(-1, x.shape[-1])
    library = fused_cpu.load()
    if library is None or x.dtype not in (torch.float32, torch.bfloat16):
        return onednn.quantize(rows, scale, zero_point, qmax).contiguous()
    return library.quantize_rows(rows, scale, zero_point, qmax)


def _quantize_each(x: Tensor, layer: QLayer) -> tuple[Tensor, Tensor]:
    """Return uint8 codes (R, K) of x (R, K) with a scale for every row, and these, (R, 1)."""
    codes, library = layer.act_format, fused_cpu.load()
    zero, qmax = codes.symmetric_zero_point, codes.qmax
    if library is None or x.dtype not in (torch.float32, torch.bfloat16):
        scale = token_scale(x, codes)
        return onednn.quantize(x / scale, 1.0, zero, qmax).contiguous(), scale
    scale = x.new_empty((len(x), 1), dtype=torch.float32)
    return library.quantize_rows(x, 0.0, zero, qmax, scale), scale


def _weights(layer: QLayer, widths: tuple[int, ...], flat: bool = False) -> list[Tensor | Packed]:
    """Return the weight of each part of a layer's input, int8 or packed; flat: (O, K)."""
    spec, groups = layer.weight_format, layer.weight_group
    parts = list(zip(itertools.accumulate(widths, initial=0), widths, strict=False))

    def dense(first: int, width: int) -> Tensor:
        codes = layer.weight_codes[:, first : first + width]
        return (codes.flatten(1) if flat else codes).contiguous()

    if not isinstance(spec, GroupFormat) or groups is None or layer.unpack:
        return [dense(*part) for part in parts]
    apart = "oneDNN runs grouped convolutions" if getattr(layer, "groups", 1) > 1 else None
    if (reason := fused_cpu.missing() or apart) is not None:
        # Said once, but not while what this thread says is left out.
        if log.filter(logging.makeLogRecord({})):
            base.warn_once(f"weights of 4 bits are held as bytes: {reason}")
        return [dense(*part) for part in parts]
    given = (layer.stored["weight_int"], groups, spec.group)
    return [Packed(*given, *part, functools.partial(dense, *part)) for part in parts]


def _alone(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep a compiler out of a call: it takes these operators of constant weights alone."""
    outside = torch.compiler.disable(call)

    @functools.wraps(call)
    def run(*args: Any, **how: Any) -> Tensor:
        return (outside if torch.compiler.is_compiling() else call)(*args, **how)

    return run


def _operator(
    layer: QLayer, weight: Tensor | Packed, scale: Tensor, padding: Any, own: bool
) -> Any:
    """Return what multiplies codes by a weight, ours or oneDNN's; padding: of images, else None."""
    if own or isinstance(weight, Packed):
        how = () if padding is None else (layer.kernel_size, layer.stride, padding, layer.dilation)
        return Product(weight, scale, *how)
    if padding is None:
        return onednn.Int8Linear(weight, scale)
    how = (layer.stride, padding, layer.dilation, layer.groups)
    return onednn.Int8Conv2d(weight, scale, *how)


class _Kernel(Kernel):
    """A packed operator for each segment, grids as numbers."""

    backend, traceable = "onednn", True
    grids: ActivationGrids
    parts: list[Any]

    @_alone
    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
        if self.layer.dynamic:
            return self._run_tokens(x)
        if self.grids.buckets == 1:
            return self._run(0, x)
        return run_per_bucket(self.layer.clock, self._run, x)

    def _prepare(self, device: torch.device) -> None:
        layer: Any = self.layer
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_shape[1],)
        padding = layer.padding if isinstance(layer, QConv2d) else None
        how = layer.weight_scale, padding, False
        self.parts = [_operator(layer, weight, *how) for weight in _weights(layer, width)]
        self.grids = ActivationGrids(layer)

    def _run(self, bucket: int, x: Tensor) -> Tensor:
        convolution, bias = isinstance(self.layer, QConv2d), self.layer.bias
        # Parts are added up in float32; half precision is left to a last cast.
        half = x.dtype == torch.bfloat16 and len(self.parts) == 1 and onednn.native_bfloat16()
        dtype = torch.bfloat16 if half else torch.float32
        y: Any = None
        for i, part in enumerate(x.split(self.grids.segments, channel_dim(self.layer))):
            grid = self.grids.of(bucket, i)
            codes = (_quantize_image if convolution else quantize_tokens)(part, *grid)
            term = self.parts[i](codes, *grid[:2], bias, dtype)
            y, bias = (term if y is None else y.add_(term)), None
        result: Tensor = y if convolution else y.reshape(*x.shape[:-1], y.shape[-1])
        return result.to(x.dtype)

    def _run_tokens(self, x: Tensor) -> Tensor:
        """Return the output of a layer with a scale for every token, the row scale put on last."""
        layer = self.layer
        y: Any = layer.bias
        for i, part in enumerate(x.reshape(-1, x.shape[-1]).split(self.grids.segments, -1)):
            codes, scale = _quantize_each(part, layer)
            term = self.parts[i](codes, 1.0, self.grids.zero_points[i], None)
            y = term.mul_(scale) if y is None else torch.addcmul(y, term, scale, out=term)
        result: Tensor = y.reshape(*x.shape[:-1], y.shape[-1])
        return result.to(x.dtype)


def _refuses(layer: QLayer) -> str | None:
    if layer.weight_scale.device.type not in ("cpu", "meta"):
        return f"it runs on the CPU, the layer is on {layer.weight_scale.device.type}"
    if isinstance(layer, QConv2d) and layer.groups > 1 and len(layer.segments) > 1:
        return "a grouped convolution cannot have one scale for each half of its input"
    return None


_backend = base.Backend("onednn", _Kernel, lambda: onednn.missing(), _refuses)
base.BACKENDS.register("onednn")(_backend)


class FoldedLayer:
    """An int8 layer on codes, its zero points folded into the bias of each time bucket.

        y = s s_w[o] sum_k q_a q_w + (bias[o] - s s_w[o] z sum_k q_w)

    oneDNN's own zero points are worked out again at every call, up to half of the time of a small
    convolution. It then pads zeros instead of zero points: `edge`, what that leaves out, is added.

    factor: multiplies the result; widths: input channels of each operand, None: the segments;
    bordered: the codes bring their border of zero points with them, nothing is padded.
    """

    def __init__(
        self, layer: QLayer, factor: float = 1.0, widths: tuple[int, ...] | None = None,
        bordered: bool = False,
    ) -> None:  # fmt: skip
        self.layer, self.factor = layer, factor
        self.widths, self.bordered = widths or layer.segments, bordered
        self.image = isinstance(layer, QConv2d) and layer.kernel_size != (1, 1)
        self.grids = ActivationGrids(layer)
        self._parts: list[Any] = []
        # Of each column of scales.
        self._biases: list[list[Tensor]] = []
        self._edges: list[Tensor] = []

    def grid(self, bucket: int, part: int = 0) -> tuple[float, int, int]:
        """Return (scale, zero_point, qmax) of an operand."""
        return self.grids.of(bucket, part if len(self.grids.segments) > 1 else 0)

    def __call__(self, codes: Tensor, bucket: int, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        """Return the layer's output for one operand; see Int8Conv2d and Int8Linear."""
        return self.part(0, codes, bucket, dtype, **kwargs)

    @_alone
    def part(self, part: int, codes: Tensor, bucket: int, dtype: torch.dtype, **how: Any) -> Tensor:
        """Return what operand `part` adds to the output; the bias goes with the first."""
        if not self._parts:
            self._biases = self._fold()
            self._parts = self._pack()
        scale, *_ = self.grid(bucket, part)
        bias = self._biases[self.grids.column(bucket)][part]
        operator, given = self._parts[part], (codes, scale, 0, bias, dtype)
        if not self.image or self.bordered:
            return operator(*given, **how)
        if isinstance(operator, Product):
            return operator(*given, edge=self.edge(bucket), **how)
        library = fused_cpu.load()
        assert library is not None
        return library.add(operator(*given), how.get("add"), self.edge(bucket))

    def edge(self, bucket: int) -> Tensor:
        """Return s s_w[o] z sum_k q_w of a 3x3 kernel over the taps outside; see `Library.add`."""
        if not self._edges:
            # sum_k q_w with its sign turned, (16, O); here the places along columns come first.
            outside = layout.border_table(self.layer.weight_codes, layout.OFFSET + 1)
            outside[0] = 0
            outside = -outside.view(4, 4, -1).transpose(0, 1).flatten(0, 1)
            sums = outside.double() * self.layer.weight_scale
            grids = map(self.grid, range(self.grids.buckets))
            self._edges = [(sums * scale * zero).float() for scale, zero, _ in grids]
        return self._edges[self.grids.column(bucket)]

    def _pack(self) -> list[Any]:
        layer: Any = self.layer
        padding = None if not self.image else (0, 0) if self.bordered else layer.padding
        # What multiplies tiles is faster than what is called faster.
        how = layer.weight_scale * self.factor, padding, not onednn.has("amx_int8")
        weights = _weights(layer, self.widths, flat=not self.image)
        return [_operator(layer, weight, *how) for weight in weights]

    def _fold(self) -> list[list[Tensor]]:
        layer = self.layer
        parts = layer.weight_codes.split(self.widths, 1)
        sums = [part.flatten(1).sum(1, dtype=torch.float64) for part in parts]

        def bias(bucket: int, part: int) -> Tensor:
            scale, zero, _ = self.grid(bucket, part)
            bias = sums[part] * -scale * zero * layer.weight_scale
            if part == 0 and layer.bias is not None:
                bias += layer.bias
            return (bias * self.factor).float()

        buckets, some = range(self.grids.buckets), range(len(sums))
        return [[bias(bucket, part) for part in some] for bucket in buckets]
