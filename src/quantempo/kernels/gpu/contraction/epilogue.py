"""What follows the integer sums of a contraction, on one tile.

    y = s_a[b] s_w[o] (acc - zero-point part) + side terms + bias[o] + shift[n, o] + residual

Tiles are [pixels, output channels] here, so that every load and store runs along the channels,
which are contiguous in memory.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish", "main_term", "side_term"]


@triton.jit
def _scale_of(scales, bucket, row, rows_per_bucket, BUCKETS: tl.constexpr, MIXED: tl.constexpr):
    """Return the scale of each row [pixels, 1], or one for all if the batch is at one time."""
    if BUCKETS == 1:
        scale = tl.load(scales)
    elif MIXED:
        scale = tl.load(scales + tl.load(bucket + row // rows_per_bucket))[:, None]
    else:
        scale = tl.load(scales + tl.load(bucket))
    return scale


@triton.jit
def main_term(
    acc, row, edge, o, inside, outs, act_scale, weight_scale, table, bucket, rows_per_bucket,
    BUCKETS: tl.constexpr, MIXED: tl.constexpr, BORDER: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Return s_a s_w[o] (acc - its zero-point part), [pixels, O] float32; RAW: the integers."""
    acc -= tl.load(table + o, mask=o < outs, other=0)[None, :]
    if BORDER:
        rim = inside & (edge > 0)[:, None]
        acc -= tl.load(table + edge[:, None] * outs + o[None, :], mask=rim, other=0)
    if RAW:
        v = acc
    else:
        factor = tl.load(weight_scale + o, mask=o < outs, other=0.0)
        scale = _scale_of(act_scale, bucket, row, rows_per_bucket, BUCKETS, MIXED)
        v = acc.to(tl.float32) * (scale * factor[None, :])
    return v


@triton.jit
def side_term(
    acc, row, o, outs, scales, weight_scale, table, bucket, rows_per_bucket,
    BUCKETS: tl.constexpr, MIXED: tl.constexpr,
):  # fmt: skip
    """Return s_i s_w[o] (acc_i - table_i[o]) of one side segment, [pixels, O] float32."""
    acc -= tl.load(table + o, mask=o < outs, other=0)[None, :]
    factor = tl.load(weight_scale + o, mask=o < outs, other=0.0)
    scale = _scale_of(scales, bucket, row, rows_per_bucket, BUCKETS, MIXED)
    return acc.to(tl.float32) * (scale * factor[None, :])


@triton.jit
def _requantize(v, scale, zero, qmax):
    """Return the stored codes of v, int8."""
    v = v * tl.math.div_rn(1.0, scale)
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
    v = tl.minimum(tl.maximum(v, -1024.0), 1024.0)
    v = (v + 12582912.0) - 12582912.0 + zero
    return (tl.minimum(tl.maximum(v, 0.0), qmax * 1.0) - 128.0).to(tl.int8)


@triton.jit
def _halves(v):
    """Return the two halves of the columns of v."""
    return tl.split(tl.permute(tl.reshape(v, (v.shape[0], 2, v.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def finish(
    v, image, row, o, inside, outs, y, bias, shift, shift_stride, residual, out_scale, bucket,
    rows_per_bucket, out_zero, out_qmax,
    BUCKETS: tl.constexpr, MIXED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add what there is to add, quantize if asked to, and store [pixels, O]."""
    if bias is not None:
        v += tl.load(bias + o, mask=o < outs, other=0.0)[None, :]
    if shift is not None:
        where = image[:, None] * shift_stride + o[None, :]
        v += tl.load(shift + where, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    if ACTIVATION == "geglu":
        v, gate = _halves(v)
        v = 0.5 * v * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        o = _halves(o[None, :])[0]
        outs = outs // 2
        inside = _halves(inside.to(tl.int1))[0] & (o < outs)
    else:
        o = o[None, :]
    where = row[:, None].to(tl.int64) * outs + o
    if residual is not None:
        v += tl.load(residual + where, mask=inside, other=0.0).to(tl.float32)
    if out_scale is not None:
        scale = _scale_of(out_scale, bucket, row, rows_per_bucket, BUCKETS, MIXED)
        tl.store(y + where, _requantize(v, scale, out_zero, out_qmax), inside)
    else:
        tl.store(y + where, v.to(y.dtype.element_ty), inside)
