"""Int8 layers on the CPU through oneDNN: on floats, and on codes for `blocks`, which joins them."""

from typing import Any

import torch
from torch import Tensor

from quantempo.core import token_scale
from quantempo.engines.base import ActivationGrids, Backend, Kernel, channel_dim, run_per_bucket
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.quantized import QConv2d, QLayer

__all__ = ["FoldedLayer", "OneDNNBackend", "quantize_tokens"]


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


class _Kernel(Kernel):
    """A packed operator for each segment, grids as numbers."""

    backend, traceable = "onednn", True
    grids: ActivationGrids
    parts: list[Any]

    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
        if self.layer.dynamic:
            return self._run_tokens(x)
        if self.grids.buckets == 1:
            return self._run(0, x)
        return run_per_bucket(self.layer.clock, self._run, x)

    def _prepare(self, device: torch.device) -> None:
        layer = self.layer
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_codes.shape[1],)
        self.parts = [self._pack(w.contiguous()) for w in layer.weight_codes.split(width, 1)]
        self.grids = ActivationGrids(layer)

    def _pack(self, weight: Tensor) -> onednn.Int8Conv2d | onednn.Int8Linear:
        layer = self.layer
        if not isinstance(layer, QConv2d):
            return onednn.Int8Linear(weight, layer.weight_scale)
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return onednn.Int8Conv2d(weight, layer.weight_scale, *how)

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


class OneDNNBackend(Backend):
    """Run each layer as one int8 kernel of oneDNN, a scale row a time bucket."""

    name = "onednn"
    kernel = _Kernel

    def missing(self) -> str | None:
        """Return why the kernels cannot be used here, or None."""
        return onednn.missing()

    def unsupported(self, layer: QLayer) -> str | None:
        """Return why it cannot take this layer, or None."""
        if layer.weight_scale.device.type not in ("cpu", "meta"):
            return f"it runs on the CPU, the layer is on {layer.weight_scale.device.type}"
        if isinstance(layer, QConv2d) and layer.groups > 1 and len(layer.segments) > 1:
            return "a grouped convolution cannot have one scale for each half of its input"
        return super().unsupported(layer)


class FoldedLayer:
    """An int8 layer on codes, its zero points folded into the bias of each time bucket.

        y = s s_w[o] sum_k q_a q_w + (bias[o] - s s_w[o] z sum_k q_w)

    oneDNN's own zero points are worked out again at every call, up to half of the time of a small
    convolution. It then pads zeros instead of zero points: `edge` is what that leaves out.

    Args:
        factor: multiplies the result.
        widths: input channels of each operand; the layer's segments if None.
        bordered: the codes bring their border of zero points with them, nothing is padded.
    """

    def __init__(
        self,
        layer: QLayer,
        factor: float = 1.0,
        widths: tuple[int, ...] | None = None,
        bordered: bool = False,
    ) -> None:
        self.layer, self.factor = layer, factor
        self.widths, self.bordered = widths or layer.segments, bordered
        self.grids = ActivationGrids(layer)
        self._parts: list[Any] = []
        self._biases: dict[int, list[Tensor]] = {}
        self._edges: dict[int, Tensor] = {}

    def grid(self, bucket: int, part: int = 0) -> tuple[float, int, int]:
        """Return (scale, zero_point, qmax) of an operand."""
        return self.grids.of(bucket, part if len(self.grids.segments) > 1 else 0)

    def __call__(self, codes: Tensor, bucket: int, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        """Return the layer's output for one operand; see Int8Conv2d and Int8Linear."""
        return self.part(0, codes, bucket, dtype, **kwargs)

    def part(
        self, part: int, codes: Tensor, bucket: int, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor:
        """Return what operand `part` adds to the output; the bias goes with the first."""
        if not self._parts:
            self._parts = [self._pack(weight) for weight in self._split()]
        column = self.grids.column(bucket)
        if column not in self._biases:
            self._biases[column] = self._fold(bucket)
        scale, *_ = self.grid(bucket, part)
        bias = self._biases[column][part]
        return self._parts[part](codes, scale, 0, bias, dtype, **kwargs)

    def edge(self, bucket: int) -> Tensor:
        """Return s s_w[o] z sum_k q_w over the taps outside the image, (16, O) as `Library.add`.

        Of a 3x3 convolution with stride 1 and padding 1.
        """
        column = self.grids.column(bucket)
        if column not in self._edges:
            scale, zero, _ = self.grid(bucket)
            # (O, 3, 3), then (16, O)
            taps = self.layer.weight_codes.sum(1, dtype=torch.float64)
            outside = torch.zeros((16, 3, 3), dtype=torch.bool)
            for mask in range(16):
                outside[mask, 0] |= bool(mask & 1)
                outside[mask, 2] |= bool(mask & 2)
                outside[mask, :, 0] |= bool(mask & 4)
                outside[mask, :, 2] |= bool(mask & 8)
            sums = torch.einsum("mij,oij->mo", outside.double(), taps)
            self._edges[column] = (sums * self.layer.weight_scale * scale * zero).float()
        return self._edges[column]

    def _split(self) -> list[Tensor]:
        weight = self.layer.weight_codes
        if len(self.widths) == 1:
            return [weight]
        return [part.contiguous() for part in weight.split(self.widths, 1)]

    def _pack(self, weight: Tensor) -> onednn.Int8Conv2d | onednn.Int8Linear:
        layer, weight_scale = self.layer, self.layer.weight_scale * self.factor
        if isinstance(layer, QConv2d) and layer.kernel_size != (1, 1):
            padding = (0, 0) if self.bordered else layer.padding
            return onednn.Int8Conv2d(weight, weight_scale, layer.stride, padding)
        return onednn.Int8Linear(weight.flatten(1), weight_scale)

    def _fold(self, bucket: int) -> list[Tensor]:
        layer, biases = self.layer, []
        for i, weight in enumerate(self._split()):
            scale, zero, _ = self.grid(bucket, i)
            bias = weight.flatten(1).sum(1, dtype=torch.float64) * -scale * zero
            bias *= layer.weight_scale
            if i == 0 and layer.bias is not None:
                bias += layer.bias
            biases.append((bias * self.factor).float())
        return biases
