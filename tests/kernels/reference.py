"""Slow exact truth for every integer kernel: int64 sums in plain torch.

acc[o] = sum_k q_a q_w - z * sum_k q_w        y = s_a * s_w[o] * acc + bias[o]
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize(x: Tensor, scale: float, zero_point: int, qmax: int = 255) -> Tensor:
    """Return q = clamp(round(x / scale) + zero_point, 0, qmax), uint8, ties to even.

    x is used as float32, as every kernel does, and the scale is rounded to it.
    """
    # A float32 quotient, because that is what the kernels round; a float64 one would disagree
    # about values half way between two integers.
    quotient = x.to(torch.float32) / torch.tensor(scale, dtype=torch.float32)
    return (torch.round(quotient).double() + zero_point).clamp(0, qmax).to(torch.uint8)


def linear_accumulator(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """Return the integer sums int64 (..., O) of x uint8 (..., K) and a weight int8 (O, K)."""
    q_a, q_w = x.to(torch.int64), weight.to(torch.int64)
    return q_a @ q_w.T - zero_point * q_w.sum(1)


def conv2d_accumulator(
    x: Tensor,
    weight: Tensor,
    zero_point: int,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return the integer sums int64 (B, O, H', W') of a convolution padded with the zero point.

    x: uint8 (B, C, H, W); weight: int8 (O, C / groups, kh, kw);
    H' = (H + 2 ph - dh (kh - 1) - 1) // sh + 1.
    """
    q_w = weight.to(torch.int64)
    batch, _, height, width = x.shape
    out, per_group, kh, kw = weight.shape
    (sh, sw), (ph, pw), (dh, dw) = stride, padding, dilation
    padded = F.pad(x.to(torch.int64), (pw, pw, ph, ph), value=zero_point)
    rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
    columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    acc = torch.zeros((batch, out, rows, columns), dtype=torch.int64)
    for group in range(groups):
        outputs = slice(group * out // groups, (group + 1) * out // groups)
        inputs = slice(group * per_group, (group + 1) * per_group)
        for i in range(kh):
            for j in range(kw):
                # (B, C / groups, H', W'): the pixels that tap (i, j) sees.
                down = slice(i * dh, i * dh + sh * (rows - 1) + 1, sh)
                across = slice(j * dw, j * dw + sw * (columns - 1) + 1, sw)
                seen, tap = padded[:, inputs, down, across], q_w[outputs, :, i, j]
                acc[:, outputs] += torch.einsum("bchw,oc->bohw", seen, tap)
    return acc - zero_point * q_w.sum((1, 2, 3))[:, None, None]


def epilogue(
    acc: Tensor, scale: float | Tensor, weight_scale: Tensor, bias: Tensor | None, axis: int
) -> Tensor:
    """Return y = scale * weight_scale[o] * acc + bias[o] in float64; o runs along `axis`."""
    shape = [1] * acc.ndim
    shape[axis] = -1
    y = acc.double() * scale * weight_scale.double().reshape(shape)
    return y if bias is None else y + bias.double().reshape(shape)
