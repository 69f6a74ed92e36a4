"""What the exact definitions of all operators share: buckets, codes, memory layout.

Integer sums below 2^53 are exact in float64 in any order. Slow: for tests without a GPU.
"""

import torch
from torch import Tensor

from quantempo.kernels import layout
from quantempo.kernels.ops.operator import image

__all__ = ["channels_last", "entries", "quantize"]


def entries(table: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Return table[bucket[n // (N / B)]] of N = `count` images or rows, table[0] if G = 1."""
    if table.shape[0] == 1:
        return table.expand(count)
    return table[bucket.reshape(-1)].repeat_interleave(count // bucket.numel())


def quantize(x: Tensor, scale: Tensor, zero_point: int, qmax: int) -> Tensor:
    """Return clamp(rne(x * (1 / scale)) + z, 0, qmax) - 128, int8; x, scale, 1 / scale float32."""
    ratio = x.float() * scale.float().reciprocal()
    # The clamp also ends overflow.
    return ((ratio.round() + zero_point).clamp(0, qmax) - layout.OFFSET).to(torch.int8)


def channels_last(x: Tensor) -> Tensor:
    """Return a copy of x (N, C, H, W) with the strides that torch gives a new channels_last one."""
    # `contiguous` keeps other strides where sizes of 1 make them equivalent; fake kernels cannot.
    return image(x.shape, x.dtype, x.device).copy_(x)
