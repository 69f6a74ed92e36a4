"""The GPU operators on a CPU: the definition of their results, in float64.

    y = s_a s_w[o] (sum q' w - zero-point table) + shortcuts + bias + shift + residual

Integer sums below 2^53 are exact in float64 in any order. Slow; it exists to test the fused
network and the kernels without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels import layout

__all__ = ["gn_act_quant", "qconv2d", "qgemm"]


def _entries(table: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Return the table entry of each of N = `count` images or rows: table[bucket[n // (N / B)]].

    Args:
        table: (G,); with G = 1 its entry serves every bucket.
        bucket: int64 () or (B,), B divides `count`.
    """
    if table.shape[0] == 1:
        return table.expand(count)
    return table[bucket.reshape(-1)].repeat_interleave(count // bucket.numel())


def _quantize(x: Tensor, scale: Tensor, zero_point: int, qmax: int) -> Tensor:
    """Return clamp(rne(x * (1 / scale)) + z, 0, qmax) - 128, int8.

    Args:
        x: any float dtype, used as float32.
        scale: float32, broadcasts with x; its reciprocal is rounded to float32.
    """
    ratio = x.float() * scale.float().reciprocal()
    # int8 codes of a larger grid than 8 bits do not exist; the clamp also ends overflow.
    return ((ratio.round() + zero_point).clamp(0, qmax) - layout.OFFSET).to(torch.int8)


def gn_act_quant(
    x: Tensor,
    skip: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    zero_point: int,
    qmax: int,
    bucket: Tensor,
    raw_scales: Tensor | None,
    raw_zero_points: list[int],
    raw_qmax: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, activate and quantize; see `ops.gn_act_quant`."""
    count = x.shape[0]

    def codes(value: Tensor, table: Tensor, zero: int, largest: int) -> Tensor:
        picked = _entries(table, bucket, count).reshape(-1, 1, 1, 1)
        return _channels_last(_quantize(value, picked, zero, largest))

    raws = [torch.empty(0, dtype=torch.int8), torch.empty(0, dtype=torch.int8)]
    if raw_scales is not None:
        for i, part in enumerate([x] if skip is None else [x, skip]):
            row = min(i, raw_scales.shape[0] - 1)
            raws[i] = codes(part, raw_scales[row], raw_zero_points[row], raw_qmax)
    if gamma is None and not silu and scale is None:
        return torch.empty(0, dtype=x.dtype), raws[0], raws[1]
    value = (x if skip is None else torch.cat([x, skip], 1)).double()
    if gamma is not None and beta is not None and value.numel():
        # (N, groups, elements)
        grouped = value.reshape(count, groups, -1)
        var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
        value = ((grouped - mean) / torch.sqrt(var + eps)).reshape(value.shape)
        value = value * _row(gamma) + _row(beta)
    if silu:
        value = value / (1 + torch.exp(-value))
    if scale is None:
        return _channels_last(value.to(x.dtype)), raws[0], raws[1]
    return codes(value, scale, zero_point, qmax), raws[0], raws[1]


def qconv2d(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    bucket: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    side_codes: list[Tensor],
    side_weights: list[Tensor],
    side_scales: Tensor | None,
    side_weight_scale: Tensor | None,
    side_table: Tensor | None,
    kernel: int,
    stride: int,
    border: list[int],
    upsample: bool,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero: int,
    out_qmax: int,
) -> Tensor:
    """Convolve codes and apply the whole epilogue; see `ops.qconv2d`."""
    count = codes.shape[0]
    acc = _accumulate(codes, weight, table, kernel, stride, border, upsample)
    if out_dtype == torch.int32:
        return _channels_last(acc.to(torch.int32))
    y = acc * _entries(act_scale, bucket, count).double().reshape(-1, 1, 1, 1)
    y *= _row(weight_scale)
    if side_scales is not None and side_weight_scale is not None and side_table is not None:
        for i, (side, side_weight) in enumerate(zip(side_codes, side_weights, strict=True)):
            # (N, O, H', W')
            extra = torch.einsum("nchw,oc->nohw", side.double(), side_weight.double())
            extra -= _row(side_table[i])
            extra *= _entries(side_scales[i], bucket, count).double().reshape(-1, 1, 1, 1)
            y += extra * _row(side_weight_scale)
    if bias is not None:
        y += _row(bias)
    if shift is not None:
        y += shift.double()[:, :, None, None]
    if residual is not None:
        y += residual.double()
    if out_scale is None:
        return _channels_last(y.to(out_dtype))
    picked = _entries(out_scale, bucket, count).reshape(-1, 1, 1, 1)
    return _channels_last(_quantize(y, picked, out_zero, out_qmax))


def qgemm(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    bucket: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero: int,
    out_qmax: int,
) -> Tensor:
    """Multiply rows of codes by a weight and apply the whole epilogue; see `ops.qgemm`."""
    rows = codes.shape[0]
    acc = codes.double() @ weight.double().T - table.double()
    if out_dtype == torch.int32:
        return acc.to(torch.int32)
    y = acc * _entries(act_scale, bucket, rows).double()[:, None] * weight_scale.double()
    if bias is not None:
        y += bias.double()
    if activation == "gelu":
        y = F.gelu(y)
    elif activation == "silu":
        y = y / (1 + torch.exp(-y))
    elif activation == "geglu":
        value, gate = y.chunk(2, 1)
        y = value * F.gelu(gate)
    if residual is not None:
        y += residual.double()
    if out_scale is None:
        return y.to(out_dtype)
    picked = _entries(out_scale, bucket, rows)[:, None]
    return _quantize(y, picked, out_zero, out_qmax)


def _accumulate(
    codes: Tensor,
    weight: Tensor,
    table: Tensor,
    kernel: int,
    stride: int,
    border: list[int],
    upsample: bool,
) -> Tensor:
    """Return sum q' w less its zero-point part in float64, (N, O, H', W')."""
    image = codes.double()
    if upsample:
        image = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    height, width = image.shape[2:]
    top, bottom, left, right = border
    rows, columns = layout.output_size(height, width, kernel, stride, border, False)
    out, _, channels = weight.shape
    # (O, C, k, k)
    taps = weight.double().reshape(out, kernel, kernel, channels).permute(0, 3, 1, 2)
    if codes.shape[0] == 0 or rows <= 0 or columns <= 0:
        return image.new_empty((codes.shape[0], out, max(rows, 0), max(columns, 0)))
    acc = F.conv2d(F.pad(image, (left, right, top, bottom)), taps, stride=stride)
    row_class = layout.border_class(height, rows, kernel, stride, top)
    column_class = layout.border_class(width, columns, kernel, stride, left)
    # (H', W', O); row 0 holds for all windows, the others are what the border takes off it.
    kind = 4 * row_class[:, None] + column_class
    correction = table[0].double() + table[kind].double() * (kind > 0)[..., None]
    return acc - correction.permute(2, 0, 1)


def _row(values: Tensor) -> Tensor:
    """Return per-channel values (O,) as float64 (1, O, 1, 1)."""
    return values.double().reshape(1, -1, 1, 1)


def _channels_last(x: Tensor) -> Tensor:
    """Return a copy of x (N, C, H, W) whose strides are those torch gives a new channels_last one.

    `contiguous` keeps other strides where sizes of 1 make them equivalent; fake kernels cannot.
    """
    y = torch.empty(x.shape, dtype=x.dtype, memory_format=torch.channels_last)
    return y.copy_(x)
