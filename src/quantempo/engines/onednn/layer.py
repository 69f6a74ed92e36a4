"""Int8 layers on the CPU through oneDNN, one at a time; `blocks` joins them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantempo.engines.base import ActivationGrids, Backend, run_per_bucket
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


class _Kernel:
    """A packed operator for each segment, grids as numbers."""

    backend = "onednn"

    def __init__(self, layer: QLayer) -> None:
        self.layer = layer
        self.grids: ActivationGrids | None = None
        self.parts: list[Any] = []

    def __call__(self, x: Tensor) -> Tensor:
        grids = self.here(x.device)
        run = self._convolve if isinstance(self.layer, QConv2d) else self._multiply
        if grids.buckets == 1:
            return run(0, x)
        return run_per_bucket(grids.clock, run, x)

    def prepare(self, device: torch.device) -> None:
        layer = self.layer
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_codes.shape[1],)
        self.parts = [self._pack(w.contiguous()) for w in layer.weight_codes.split(width, 1)]
        self.grids = ActivationGrids(layer)

    def here(self, device: torch.device) -> ActivationGrids:
        if self.grids is None:
            self.prepare(device)
        assert self.grids is not None
        return self.grids

    def _pack(self, weight: Tensor) -> onednn.Int8Conv2d | onednn.Int8Linear:
        layer = self.layer
        if not isinstance(layer, QConv2d):
            return onednn.Int8Linear(weight, layer.weight_scale)
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return onednn.Int8Conv2d(weight, layer.weight_scale, *how)

    def _convolve(self, bucket: int, x: Tensor) -> Tensor:
        grids, bias = self.here(x.device), self.layer.bias
        y: Any = None
        for i, part in enumerate(x.split(grids.segments, 1)):
            grid = grids.of(bucket, i)
            term = self.parts[i](_quantize_image(part, *grid), *grid[:2], bias, self._dtype(x))
            y, bias = (term if y is None else y.add_(term)), None
        result: Tensor = y.to(x.dtype)
        return result

    def _multiply(self, bucket: int, x: Tensor) -> Tensor:
        grids, bias = self.here(x.device), self.layer.bias
        y: Any = None
        for i, part in enumerate(x.split(grids.segments, -1)):
            grid = grids.of(bucket, i)
            codes = quantize_tokens(part, *grid)
            y, bias = self.parts[i](codes, *grid[:2], bias, self._dtype(x), into=y), None
        result: Tensor = y.reshape(*x.shape[:-1], -1).to(x.dtype)
        return result

    def _dtype(self, x: Tensor) -> torch.dtype:
        # Parts are added up in float32; half precision is left to a last cast.
        half = x.dtype == torch.bfloat16 and len(self.parts) == 1 and onednn.native_bfloat16()
        return torch.bfloat16 if half else torch.float32


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
