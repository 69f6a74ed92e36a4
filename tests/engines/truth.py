"""What a quantized layer must give, from the int64 reference alone; shared by backend tests."""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.kernels import reference
from quantempo.quantized import QConv2d, QLayer

__all__ = ["codes_of", "expected", "noise"]


def codes_of(layer: QLayer, x: Tensor, bucket: int = 0) -> list[tuple[Tensor, Tensor, int, float]]:
    """Return (codes, weight, zero point, scale) of each segment."""
    axis = 1 if isinstance(layer, QConv2d) else -1
    result, start = [], 0
    for i, width in enumerate(layer.segments):
        scale, zero = float(layer.act_scale[i, bucket]), int(layer.act_zero_point[i])
        weight = layer.weight_codes
        if len(layer.segments) > 1:
            weight = weight[:, start : start + width]
        part = x.narrow(axis, start, width)
        result.append((reference.quantize(part, scale, zero, layer.act_qmax), weight, zero, scale))
        start += width
    return result


def expected(layer: QLayer, x: Tensor, bucket: int = 0) -> Tensor:
    """Return the layer's output in float64 from the int64 reference."""
    y: Tensor | float = 0.0
    for codes, weight, zero, scale in codes_of(layer, x, bucket):
        if isinstance(layer, QConv2d):
            acc = reference.conv2d_accumulator(
                codes, weight, zero, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            y = y + reference.epilogue(acc, scale, layer.weight_scale, None, 1)
        else:
            acc = reference.linear_accumulator(codes, weight, zero)
            y = y + reference.epilogue(acc, scale, layer.weight_scale, None, -1)
    rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
    return y + layer.bias.double().reshape(rows)


def noise(*shape: int, seed: int = 0, spread: float = 60.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
