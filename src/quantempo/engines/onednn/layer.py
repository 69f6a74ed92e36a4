"""Int8 layers on the CPU through oneDNN, one at a time; `blocks` joins them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantempo.engines.base import ActivationGrids, Backend, Kernel, channel_dim, run_per_bucket
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.quantized import QConv2d, QLayer

__all__ = ["OneDNNBackend", "quantize_tokens"]


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


class _Kernel(Kernel):
    """A packed operator for each segment, grids as numbers."""

    backend, traceable = "onednn", True
    grids: ActivationGrids
    parts: list[Any]

    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
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
        result: Tensor = y if convolution else y.reshape(*x.shape[:-1], -1)
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
