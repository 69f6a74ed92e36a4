"""The contraction behind qconv2d and qgemm, on any GPU with int8 tensor cores: weights first.

    acc[o, p] = sum over taps and channels of w[o, tap, c] x[p + tap, c]

A tile is output channels by pixels; a linear layer is an image of one row. Split-K: `SPLITS`
programs share the taps of a tile, and the last to finish adds their integers, in a fixed order.
The epilogue (`kernels.ops.epilogue`) follows on tiles [pixels, output channels], so that every load
and store runs along the channels, which are contiguous in memory.
"""

import triton
import triton.language as tl

from quantempo.kernels.gpu.contraction import records

__all__ = ["contract"]


@triton.jit
def _sum(
    acc, x, weight, apart, first, last, channels, n, h, w, o, images, outs, in_h, in_w,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add steps [first, last) to acc, BLOCK.CHANNELS of one tap each; n, h, w: output pixels."""
    per_tap = tl.cdiv(channels, BLOCK.CHANNELS)
    span = tl.arange(0, BLOCK.CHANNELS)
    for step in tl.range(first, last, num_stages=BLOCK.STAGES):
        tap = step // per_tap
        c = (step - tap * per_tap) * BLOCK.CHANNELS + span
        row = h * WINDOW.STRIDE + tap // WINDOW.KERNEL - WINDOW.TOP
        column = w * WINDOW.STRIDE + tap % WINDOW.KERNEL - WINDOW.LEFT
        if WINDOW.UPSAMPLE:
            row = row >> 1
            column = column >> 1
        seen = (n < images) & (row >= 0) & (row < in_h) & (column >= 0) & (column < in_w)
        at = ((n.to(tl.int64) * in_h + row) * in_w + column) * channels
        some = (c < channels)[None, :]
        tile = tl.load(x + at[:, None] + c[None, :], mask=seen[:, None] & some, other=0.0)
        at_w = o * apart + tap * channels
        rows = tl.load(
            weight + at_w[:, None] + c[None, :], mask=(o < outs)[:, None] & some, other=0.0
        )
        acc = tl.dot(rows, tl.trans(tile), acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _side(
    acc, side, weight, apart, channels, n, h, w, o, s, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the sums of a 1x1 segment to acc."""
    ONE: tl.constexpr = WINDOW.ONE
    steps = tl.cdiv(channels, BLOCK.CHANNELS)
    return _sum(
        acc, side, weight, apart, 0, steps, channels, n, h, w, o, s.images, s.outs, s.out_h,
        s.out_w, ONE, BLOCK,
    )  # fmt: skip


@triton.jit
def _share(acc, partial, counters, tile, slot, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write this program's partial sums; return whether it is the last of its tile to do so."""
    area: tl.constexpr = BLOCK.OUTS * BLOCK.PIXELS
    at = tl.arange(0, BLOCK.OUTS)[:, None] * BLOCK.PIXELS + tl.arange(0, BLOCK.PIXELS)[None, :]
    tl.store(partial + (tile * SLOTS + slot).to(tl.int64) * area + at, acc)
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SLOTS - 1
    if last:
        tl.store(counters + tile, 0)
    return last


@triton.jit
def _gather(acc, partial, tile, first, last, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of slots [first, last), in that order; read past the first-level cache."""
    area: tl.constexpr = BLOCK.OUTS * BLOCK.PIXELS
    at = tl.arange(0, BLOCK.OUTS)[:, None] * BLOCK.PIXELS + tl.arange(0, BLOCK.PIXELS)[None, :]
    for slot in range(first, last):
        where = partial + (tile * SLOTS + slot).to(tl.int64) * area + at
        acc += tl.load(where, cache_modifier=".cg")
    return acc


@triton.jit
def _scale_of(
    scales, bucket, row, rows_per_bucket, BUCKETS: tl.constexpr, MIXED: tl.constexpr,
    ROWS: tl.constexpr = False,
):  # fmt: skip
    """Return the scale of each row [pixels, 1], or one for all if the batch is at one time."""
    if ROWS:
        scale = tl.load(scales + row)[:, None]
    elif BUCKETS == 1:
        scale = tl.load(scales)
    elif MIXED:
        scale = tl.load(scales + tl.load(bucket + row // rows_per_bucket))[:, None]
    else:
        scale = tl.load(scales + tl.load(bucket))
    return scale


@triton.jit
def _main_term(
    acc, row, edge, o, inside, terms, s, FORM: tl.constexpr, BORDER: tl.constexpr,
    RAW: tl.constexpr,
):  # fmt: skip
    """Return s_a s_w[o] (acc - its zero-point part), [pixels, O] float32; RAW: the integers."""
    acc -= tl.load(terms.table + o, mask=o < s.outs, other=0)[None, :]
    if BORDER:
        rim = inside & (edge > 0)[:, None]
        acc -= tl.load(terms.table + edge[:, None] * s.outs + o[None, :], mask=rim, other=0)
    if RAW:
        v = acc
    else:
        factor = tl.load(terms.weight_scale + o, mask=o < s.outs, other=0.0)
        scale = _scale_of(
            terms.act_scale, terms.bucket, row, s.rows_per_bucket, FORM.BUCKETS, FORM.MIXED,
            FORM.ROWS,
        )  # fmt: skip
        v = acc.to(tl.float32) * (scale * factor[None, :])
    return v


@triton.jit
def _side_term(acc, side: tl.constexpr, row, o, terms, s, FORM: tl.constexpr):
    """Return s_i s_w[o] (acc_i - table_i[o]) of one side segment, [pixels, O] float32."""
    acc -= tl.load(terms.side_table + side * s.outs + o, mask=o < s.outs, other=0)[None, :]
    factor = tl.load(terms.side_weight_scale + o, mask=o < s.outs, other=0.0)
    entries = side * FORM.SIDE_BUCKETS
    if FORM.ROWS:
        entries = side * s.images * s.out_h * s.out_w
    scale = _scale_of(
        terms.side_scales + entries, terms.bucket, row, s.rows_per_bucket, FORM.SIDE_BUCKETS,
        FORM.MIXED, FORM.ROWS,
    )  # fmt: skip
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
def _finish(v, image, row, o, inside, y, terms, s, FORM: tl.constexpr):
    """Add what there is to add, quantize if asked to, and store [pixels, O]."""
    outs = s.outs
    if terms.bias is not None:
        v += tl.load(terms.bias + o, mask=o < outs, other=0.0)[None, :]
    if terms.shift is not None:
        where = image[:, None] * s.shift_stride + o[None, :]
        v += tl.load(terms.shift + where, mask=inside, other=0.0).to(tl.float32)
    if FORM.ACTIVATION == "gelu":
        v = 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif FORM.ACTIVATION == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3)
        v = v / (1.0 + tl.exp(v * (v * v * -0.0713548162726 - 1.5957691216057308)))
    elif FORM.ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    if FORM.GATED:
        v, gate = _halves(v)
        if FORM.ACTIVATION == "geglu":
            v = 0.5 * v * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
        else:
            v = v * gate / (1.0 + tl.exp(-gate))
        o = _halves(o[None, :])[0]
        outs = outs // 2
        inside = _halves(inside.to(tl.int1))[0] & (o < outs)
    else:
        o = o[None, :]
    where = row[:, None].to(tl.int64) * outs + o
    if terms.gate is not None:
        at = (row // s.rows_per_gate)[:, None] * s.gate_stride + o
        v *= tl.load(terms.gate + at, mask=inside, other=0.0).to(tl.float32)
    if terms.residual is not None:
        v += tl.load(terms.residual + where, mask=inside, other=0.0).to(tl.float32)
    if terms.out_scale is not None:
        scale = _scale_of(
            terms.out_scale, terms.bucket, row, s.rows_per_bucket, FORM.OUT_BUCKETS, FORM.MIXED
        )
        tl.store(y + where, _requantize(v, scale, s.out_zero, s.out_qmax), inside)
    else:
        tl.store(y + where, v.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["images", "rows_per_bucket", "shift_stride", "out_zero", "out_qmax",
                               "rows_per_gate"])  # fmt: skip
def contract(
    x, weight, side0, weight0, side1, weight1, y, partial, counters, terms,
    images, in_h, in_w, out_h, out_w, channels, channels0, channels1, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax, gate_stride, rows_per_gate, apart, apart0,
    apart1, FORM: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y (or one share of its sums).

    apart: from one output channel of a weight to the next. partial: (tiles, SPLITS + SIDES, OUTS,
    PIXELS) int32; counters: (tiles,) int32, zero before and after.
    """
    s = records.Scalars(
        images, in_h, in_w, out_h, out_w, outs, rows_per_bucket, shift_stride, out_zero, out_qmax,
        gate_stride, rows_per_gate,
    )  # fmt: skip
    SPLITS: tl.constexpr = BLOCK.SPLITS
    SIDES: tl.constexpr = FORM.SIDES
    SLOTS: tl.constexpr = SPLITS + SIDES
    # A tuple of a record's fields is none of constants.
    OUTS: tl.constexpr = BLOCK.OUTS
    PIXELS: tl.constexpr = BLOCK.PIXELS
    tile = tl.program_id(0)
    tiles = records.tiles_of(tl.num_programs(0), s, WINDOW, BLOCK)
    place = records.place_of(tile, tiles, WINDOW, BLOCK)
    n, h, w = records.pixel(tl.arange(0, PIXELS), place, s, WINDOW, BLOCK)
    o = place.o + tl.arange(0, BLOCK.OUTS)
    if FORM.GATED:
        # Values, and as many gates, which are the second half of all channels.
        half = tl.arange(0, BLOCK.OUTS) // (BLOCK.OUTS // 2)
        o = (place.o + half * (outs - BLOCK.OUTS)) // 2 + tl.arange(0, BLOCK.OUTS)
    zeros = tl.zeros((OUTS, PIXELS), tl.int32)
    steps = WINDOW.KERNEL * WINDOW.KERNEL * tl.cdiv(channels, BLOCK.CHANNELS)
    slot = tl.program_id(1)
    acc = zeros
    if SPLITS == 1 or slot < SPLITS:
        acc = _sum(
            acc, x, weight, apart, slot * steps // SPLITS, (slot + 1) * steps // SPLITS, channels,
            n, h, w, o, images, outs, in_h, in_w, WINDOW, BLOCK,
        )  # fmt: skip
    if SPLITS > 1:
        # A constant condition of its own: the other way round the branch is compiled all the same.
        if SIDES > 0:  # noqa: SIM102
            if slot == SPLITS:
                acc = _side(acc, side0, weight0, apart0, channels0, n, h, w, o, s, WINDOW, BLOCK)
        if SIDES > 1:  # noqa: SIM102
            if slot == SPLITS + 1:
                acc = _side(acc, side1, weight1, apart1, channels1, n, h, w, o, s, WINDOW, BLOCK)
        if not _share(acc, partial, counters, tile, slot, SLOTS, BLOCK):
            return
        acc = _gather(zeros, partial, tile, 0, SPLITS, SLOTS, BLOCK)
    row, seen = records.row_of(n, h, w, s)
    inside = seen[:, None] & (o < outs)[None, :]
    edge = records.border_row(h, w, s, WINDOW)
    v = _main_term(
        tl.trans(acc), row, edge, o, inside, terms, s, FORM, WINDOW.KERNEL > 1,
        y.dtype.element_ty == tl.int32,
    )  # fmt: skip
    for side in tl.static_range(SIDES):
        start = zeros.to(tl.float32) if FORM.HALF and side == SIDES - 1 else zeros
        if SPLITS > 1:
            acc = _gather(zeros, partial, tile, SPLITS + side, SPLITS + side + 1, SLOTS, BLOCK)
        elif side == 0:
            acc = _side(start, side0, weight0, apart0, channels0, n, h, w, o, s, WINDOW, BLOCK)
        else:
            acc = _side(start, side1, weight1, apart1, channels1, n, h, w, o, s, WINDOW, BLOCK)
        if FORM.HALF and side == SIDES - 1:
            v += tl.trans(acc)
        else:
            v += _side_term(tl.trans(acc), side, row, o, terms, s, FORM)
    _finish(v, tl.where(seen, n, 0), row, o, inside, y, terms, s, FORM)
