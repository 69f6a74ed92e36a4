"""Second moments of the quantized input of a layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.engines.base import channel_dim
from quantempo.quantized import QConv2d, QLayer
from quantempo.rounding.record import BlockRun

__all__ = ["dequantized_input", "input_hessian", "moments"]

# Bytes of unfolded patches at a time.
_PATCH_BYTES = 2**28


def dequantized_input(layer: QLayer, x: Tensor) -> Tensor:
    """Return s (clamp(round(x / s) + z, 0, qmax) - z) in float32, the shape of x.

    The time buckets are those of the layer's clock; one grid for each segment.
    """
    axis, parts = channel_dim(layer), []
    for i, part in enumerate(x.float().split(layer.segments, axis)):
        scale, zero = layer.scale_now(i, x), layer.act_zero_point[i]
        codes = (torch.round(part / scale) + zero).clamp(0, layer.act_qmax) - zero
        parts.append(codes * scale)
    return torch.cat(parts, axis)


def moments(layer: QLayer, x: Tensor) -> Tensor:
    """Return X X^T of an input, (groups, K, K) float32, K in the order of weight.flatten(1).

    Args:
        layer: gives the kernel size, stride, padding and groups.
        x: (B, C, H, W), or (..., C) for a linear layer; already on the layer's grid.

    Memory: patches of a convolution are made for a few images at a time, 256 MB of them.
    """
    if not isinstance(layer, QConv2d):
        flat = x.reshape(-1, x.shape[-1])
        return (flat.t() @ flat)[None]
    width = math.prod(layer.weight_shape[1:])
    total = x.new_zeros(layer.groups, width, width)
    positions = 1
    for i in (0, 1):
        span = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        positions *= (x.shape[2 + i] + 2 * layer.padding[i] - span) // layer.stride[i] + 1
    rows = max(1, _PATCH_BYTES // (4 * layer.groups * width * positions))
    for part in x.split(rows):
        patches = F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        # (b, groups K, L) -> (groups, K, b L)
        patches = patches.unflatten(1, (layer.groups, width)).permute(1, 2, 0, 3).flatten(2)
        total.baddbmm_(patches, patches.transpose(1, 2))
    return total


@torch.no_grad()
def input_hessian(block: BlockRun, name: str) -> Tensor:
    """Return (groups, K, K): moments of one layer's quantized input over all recorded rows.

    The block runs with its integers as they are now, up to that layer.
    """
    layer = block.twins[name]
    total: Tensor | None = None
    count = 0
    for x in block.layer_inputs(name):
        term = moments(layer, dequantized_input(layer, x))
        total, count = term if total is None else total.add_(term), count + x.shape[0]
    assert total is not None
    # A mean, so that the numbers do not grow with the set.
    return total / count
