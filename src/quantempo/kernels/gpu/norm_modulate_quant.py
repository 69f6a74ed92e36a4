"""Launch `kernels.ops.norm_modulate_quant` on a GPU: tokens are read once and written as codes.

A program owns whole tokens of one image, which stay in its registers: mean, then the centred sum of
squares, then the largest magnitude. What modulates them is asked for before the first of these.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.gpu.group_norm.portable import stored
from quantempo.kernels.ops.norm_modulate_quant import SMALLEST_SCALE, Tokens

__all__ = ["launch", "quantize_tokens", "tiles"]

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
# 1.5 * 2^23: float32 of this size hold integers only, the lowest byte of which is the code.
_MAGIC = tl.constexpr(12582912.0)
_INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def _float(part):
    """Return float32; the upper half of a word is one instruction so, as a conversion two."""
    if part.dtype == tl.bfloat16:
        return (part.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return part.to(tl.float32)


@triton.jit
def _piece(pointer, c, start, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the channels start + c as they are stored."""
    if start + WIDTH <= CHANNELS:
        return tl.load(pointer + (c + start))
    return tl.load(pointer + (c + start), mask=c + start < CHANNELS, other=0.0)


@triton.jit
def _pieces(pointer, c, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return all channels, WIDTH in each, or nothing of no matrix."""
    parts = ()
    if pointer is not None:
        for start in tl.static_range(0, CHANNELS, WIDTH):
            parts += (_piece(pointer, c, start, CHANNELS, WIDTH),)
    return parts


@triton.jit
def _total(parts, SQUARE: tl.constexpr):
    """Return the sums (R, 1) of rows, or of their squares."""
    total = parts[0] * parts[0] if SQUARE else parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i] * parts[i] if SQUARE else parts[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _symmetric_scale(parts):
    """Return the scales (R, 1) of rows, NaN where a value is not finite."""
    top = tl.abs(parts[0])
    for i in tl.static_range(1, len(parts)):
        top = tl.maximum(top, tl.abs(parts[i]), propagate_nan=tl.PropagateNan.ALL)
    # Of magnitudes the bits are ordered as the values are, and those of a NaN come last.
    top = tl.max(top.to(tl.int32, bitcast=True), 1)[:, None]
    scale = tl.maximum(tl.math.div_rn(top.to(tl.float32, bitcast=True), 127.0), _SMALLEST)
    return tl.where(top < _INFINITE, scale, float("nan"))


@triton.jit(do_not_specialize=["tokens", "per_entry", "zero_point", "qmax"])
def quantize_tokens(
    x, weight, bias, scale, shift, act_scale, bucket, codes, row_scale, tokens, image_stride,
    token_stride, scale_stride, shift_stride, per_entry, eps, zero_point, qmax,
    NORM: tl.constexpr, MANY: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write the codes of ROWS tokens, PIECES of WIDTH channels; MANY: act_scale by bucket."""
    blocks = tl.cdiv(tokens, ROWS)
    image = tl.program_id(0) // blocks
    t = ((tl.program_id(0) - image * blocks) * ROWS + tl.arange(0, ROWS))[:, None]
    # Eight values of two bytes are a load; of the codes too, which then need no other threads.
    c = tl.max_contiguous(tl.arange(0, WIDTH), 8)[None, :]
    # By token too, so that each thread loads what it uses.
    c += 0 * t
    # Beyond the last token it is written once more.
    t = tl.minimum(t, tokens - 1)
    if EARLY:
        wait_for_predecessor()
    n = image.to(tl.int64)
    tile = _pieces(x + n * image_stride + t.to(tl.int64) * token_stride, c, CHANNELS, WIDTH)
    scales, shifts = (), ()
    if scale is not None:
        scales = _pieces(scale + n * scale_stride, c, CHANNELS, WIDTH)
    if shift is not None:
        shifts = _pieces(shift + n * shift_stride, c, CHANNELS, WIDTH)
    if act_scale is not None:
        entry = 0
        if MANY:
            entry = tl.load(bucket + image // per_entry)
        ratio = tl.math.div_rn(1.0, tl.load(act_scale + entry))
    parts = ()
    for i in tl.static_range(PIECES):
        parts += (_float(tile[i]),)
    if NORM == "layer":
        mean = _total(parts, False) * (1.0 / CHANNELS)
        centred = ()
        for i in tl.static_range(PIECES):
            part = parts[i] - mean
            if (i + 1) * WIDTH > CHANNELS:
                part = tl.where(c + i * WIDTH < CHANNELS, part, 0.0)
            centred += (part,)
        parts = centred
    inverse = 1.0
    if NORM != "none":
        square = _total(parts, True) * (1.0 / CHANNELS) + eps
        # Of squares beyond float32 too the row is to be NaN, not 0.
        inverse = tl.where(square < float("inf"), tl.rsqrt(square), float("nan"))
    values = ()
    for i in tl.static_range(PIECES):
        v = parts[i]
        factor = inverse
        if weight is not None:
            factor = factor * _float(_piece(weight, c, i * WIDTH, CHANNELS, WIDTH))
        if bias is not None:
            v = v * factor + _float(_piece(bias, c, i * WIDTH, CHANNELS, WIDTH))
            factor = 1.0
        if scale is not None:
            factor = factor * _float(scales[i]) + factor
        v = v * factor
        if shift is not None:
            v += _float(shifts[i])
        values += (v,)
    row = n * tokens + t
    if act_scale is None:
        own = _symmetric_scale(values)
        tl.store(row_scale + row, own)
        ratio = tl.math.div_rn(1.0, own)
    for i in tl.static_range(PIECES):
        inside = c + i * WIDTH < CHANNELS if (i + 1) * WIDTH > CHANNELS else True
        target = codes + (row * CHANNELS + c + i * WIDTH)
        if act_scale is None:
            q = (values[i] * ratio + _MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
            # Two stores, of which one is skipped, instead of a selection of each value.
            tl.store(target, q, mask=(own == own) & inside)
            tl.store(target, tl.zeros_like(q), mask=(own != own) & inside)
        else:
            tl.store(target, stored(values[i] * ratio, zero_point, qmax), mask=inside)


def tiles(channels: int) -> tuple[int, int, int]:
    """Return (WIDTH, PIECES, ROWS): the least padding, 24 to 40 values a thread of 128 or more."""
    widths = [(count * triton.next_power_of_2(-(-channels // count)), count) for count in (3, 4, 5)]
    padded, pieces = min(widths)
    width = max(padded // pieces, 16)
    return width, triton.cdiv(channels, width), max(1, 1024 // width)


def launch(call: Tokens) -> tuple[Tensor, Tensor]:
    """Return the results of a call, which was checked."""
    x, (codes, row_scale) = call.x, call.empty()
    count, tokens, channels = x.shape
    if codes.numel() == 0:
        return codes, row_scale
    width, pieces, rows = tiles(channels)
    numbers = (
        tokens, x.stride(0), x.stride(1), *(0 if v is None else v.stride(0)
        for v in (call.scale, call.shift)), count // call.bucket.numel(), call.eps,
        call.zero_point, call.qmax,
    )  # fmt: skip
    placed = {"EARLY": True, "launch_pdl": True} if early(x.device) else {}
    quantize_tokens[(count * triton.cdiv(tokens, rows),)](
        x, call.weight, call.bias, call.scale, call.shift, call.act_scale, call.bucket, codes,
        row_scale, *numbers, NORM=call.norm,
        MANY=call.act_scale is not None and len(call.act_scale) > 1, CHANNELS=channels,
        WIDTH=width, PIECES=pieces, ROWS=rows, num_warps=max(1, width * rows // 256), **placed,
    )  # fmt: skip
    return codes, row_scale
