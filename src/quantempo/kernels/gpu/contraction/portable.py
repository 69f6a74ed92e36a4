"""The contraction behind qconv2d and qgemm: weights first, pixels second.

    acc[o, p] = sum over taps and channels of w[o, tap, c] x[p + tap, c]

A tile is BLOCK_O output channels by BLOCK_N x BLOCK_H x BLOCK_W pixels; a linear layer is an image
of one row. Split-K: `SPLITS` programs share the taps of a tile, and the last to finish adds their
integers, in a fixed order.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from quantempo.kernels.gpu.contraction.epilogue import finish, main_term, side_term

__all__ = ["contract"]


@triton.jit
def _tile(
    tile, tiles_h, tiles_w, tiles_o, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Return (n0, h0, w0, phase_h, phase_w, o0): tiles of one place stand side by side."""
    o0 = (tile % tiles_o) * BLOCK_O
    place = tile // tiles_o
    phase = 0
    if UPSAMPLE:
        # The four pixels that one input pixel becomes are tiles of their own.
        phase = place % 4
        place = place // 4
    w0 = (place % tiles_w) * BLOCK_W
    place = place // tiles_w
    h0 = (place % tiles_h) * BLOCK_H
    n0 = (place // tiles_h) * BLOCK_N
    return n0, h0, w0, phase // 2, phase % 2, o0


@triton.jit
def _pixels(
    n0, h0, w0, phase_h, phase_w, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Return image, row and column of every output pixel of a tile."""
    p = tl.arange(0, BLOCK_N * BLOCK_H * BLOCK_W)
    n = n0 + p // (BLOCK_H * BLOCK_W)
    h = h0 + (p // BLOCK_W) % BLOCK_H
    w = w0 + p % BLOCK_W
    if UPSAMPLE:
        h = 2 * h + phase_h
        w = 2 * w + phase_w
    return n, h, w


@triton.jit
def _edge(
    h, w, in_h, in_w, KERNEL: tl.constexpr, STRIDE: tl.constexpr, TOP: tl.constexpr,
    LEFT: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Return the row of the border table: 4 (above + 2 below) + (left + 2 right)."""
    if UPSAMPLE:
        in_h = 2 * in_h
        in_w = 2 * in_w
    first_h = h * STRIDE - TOP
    first_w = w * STRIDE - LEFT
    rows = (first_h < 0).to(tl.int32) + 2 * (first_h + KERNEL > in_h).to(tl.int32)
    columns = (first_w < 0).to(tl.int32) + 2 * (first_w + KERNEL > in_w).to(tl.int32)
    return 4 * rows + columns


@triton.jit
def _sum(
    acc, x, weight, first, last, channels, n, h, w, o, images, outs, in_h, in_w,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    UPSAMPLE: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add steps [first, last) to acc, BLOCK_C channels of one tap each; n, h, w: output pixels."""
    per_tap = tl.cdiv(channels, BLOCK_C)
    span = tl.arange(0, BLOCK_C)
    for step in tl.range(first, last, num_stages=STAGES):
        tap = step // per_tap
        c = (step - tap * per_tap) * BLOCK_C + span
        row = h * STRIDE + tap // KERNEL - TOP
        column = w * STRIDE + tap % KERNEL - LEFT
        if UPSAMPLE:
            row = row >> 1
            column = column >> 1
        seen = (n < images) & (row >= 0) & (row < in_h) & (column >= 0) & (column < in_w)
        at = ((n.to(tl.int64) * in_h + row) * in_w + column) * channels
        some = (c < channels)[None, :]
        tile = tl.load(x + at[:, None] + c[None, :], mask=seen[:, None] & some, other=0.0)
        at_w = (o * (KERNEL * KERNEL) + tap) * channels
        rows = tl.load(
            weight + at_w[:, None] + c[None, :], mask=(o < outs)[:, None] & some, other=0.0
        )
        acc = tl.dot(rows, tl.trans(tile), acc, out_dtype=acc.dtype)
    return acc


@triton.jit
def _share(
    acc, partial, counters, tile, slot, SLOTS: tl.constexpr, BLOCK_O: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Put down this program's sums; return whether it is the last of its tile to do so."""
    area: tl.constexpr = BLOCK_O * PIXELS
    at = tl.arange(0, BLOCK_O)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    tl.store(partial + (tile * SLOTS + slot).to(tl.int64) * area + at, acc)
    # All threads' stores come before the one thread's release.
    tl.debug_barrier()
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SLOTS - 1
    if last:
        tl.store(counters + tile, 0)
    return last


@triton.jit
def _gather(
    acc, partial, tile, first, last, SLOTS: tl.constexpr, BLOCK_O: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """Return the sum of slots [first, last), in that order; read past the first-level cache."""
    area: tl.constexpr = BLOCK_O * PIXELS
    at = tl.arange(0, BLOCK_O)[:, None] * PIXELS + tl.arange(0, PIXELS)[None, :]
    for slot in range(first, last):
        where = partial + (tile * SLOTS + slot).to(tl.int64) * area + at
        acc += tl.load(where, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["images", "rows_per_bucket", "shift_stride", "out_zero", "out_qmax"])
def contract(
    x, weight, side0, weight0, side1, weight1, y, partial, counters,
    act_scale, weight_scale, table, bucket, bias, shift, residual,
    side_scales, side_weight_scale, side_table, out_scale,
    images, in_h, in_w, out_h, out_w, channels, channels0, channels1, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    UPSAMPLE: tl.constexpr, SIDES: tl.constexpr, BUCKETS: tl.constexpr,
    SIDE_BUCKETS: tl.constexpr, OUT_BUCKETS: tl.constexpr, MIXED: tl.constexpr,
    BORDER: tl.constexpr, RAW: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Compute one tile of y (or one share of its sums); arguments as in `kernels.ops.qconv2d`.

    side_scales is (2, G), side_table (2, O). partial: (tiles, SPLITS + SIDES, BLOCK_O, PIXELS)
    int32; counters: (tiles,) int32, zero before and after.
    """
    PIXELS: tl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    SLOTS: tl.constexpr = SPLITS + SIDES
    tile = tl.program_id(0)
    rows = in_h if UPSAMPLE else out_h
    columns = in_w if UPSAMPLE else out_w
    n0, h0, w0, phase_h, phase_w, o0 = _tile(
        tile, tl.cdiv(rows, BLOCK_H), tl.cdiv(columns, BLOCK_W), tl.cdiv(outs, BLOCK_O),
        BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE,
    )  # fmt: skip
    n, h, w = _pixels(n0, h0, w0, phase_h, phase_w, BLOCK_N, BLOCK_H, BLOCK_W, UPSAMPLE)
    o = o0 + tl.arange(0, BLOCK_O)
    if ACTIVATION == "geglu":
        # Values, and as many gates, which are the second half of all channels.
        half = tl.arange(0, BLOCK_O) // (BLOCK_O // 2)
        o = (o0 + half * (outs - BLOCK_O)) // 2 + tl.arange(0, BLOCK_O)
    zeros = tl.zeros((BLOCK_O, PIXELS), tl.int32)
    steps = KERNEL * KERNEL * tl.cdiv(channels, BLOCK_C)
    steps0 = tl.cdiv(channels0, BLOCK_C)
    steps1 = tl.cdiv(channels1, BLOCK_C)
    slot = tl.program_id(1)
    acc = zeros
    if SPLITS == 1 or slot < SPLITS:
        acc = _sum(
            acc, x, weight, slot * steps // SPLITS, (slot + 1) * steps // SPLITS, channels,
            n, h, w, o, images, outs, in_h, in_w, KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, BLOCK_C,
            STAGES,
        )  # fmt: skip
    if SPLITS > 1:
        # A constant condition of its own: the other way round the branch is compiled all the same.
        if SIDES > 0:  # noqa: SIM102
            if slot == SPLITS:
                acc = _sum(
                    acc, side0, weight0, 0, steps0, channels0, n, h, w, o, images, outs,
                    out_h, out_w, 1, 1, 0, 0, False, BLOCK_C, STAGES,
                )  # fmt: skip
        if SIDES > 1:  # noqa: SIM102
            if slot == SPLITS + 1:
                acc = _sum(
                    acc, side1, weight1, 0, steps1, channels1, n, h, w, o, images, outs,
                    out_h, out_w, 1, 1, 0, 0, False, BLOCK_C, STAGES,
                )  # fmt: skip
        if not _share(acc, partial, counters, tile, slot, SLOTS, BLOCK_O, PIXELS):
            return
        acc = _gather(zeros, partial, tile, 0, SPLITS, SLOTS, BLOCK_O, PIXELS)
    row = (n * out_h + h) * out_w + w
    seen = (n < images) & (h < out_h) & (w < out_w)
    row = tl.where(seen, row, 0)
    inside = seen[:, None] & (o < outs)[None, :]
    edge = _edge(h, w, in_h, in_w, KERNEL, STRIDE, TOP, LEFT, UPSAMPLE)
    v = main_term(
        tl.trans(acc), row, edge, o, inside, outs, act_scale, weight_scale, table, bucket,
        rows_per_bucket, BUCKETS, MIXED, BORDER, RAW,
    )  # fmt: skip
    if SIDES > 0:
        if SPLITS > 1:
            acc = _gather(zeros, partial, tile, SPLITS, SPLITS + 1, SLOTS, BLOCK_O, PIXELS)
        else:
            acc = _sum(
                zeros, side0, weight0, 0, steps0, channels0, n, h, w, o, images, outs,
                out_h, out_w, 1, 1, 0, 0, False, BLOCK_C, STAGES,
            )  # fmt: skip
        v += side_term(
            tl.trans(acc), row, o, outs, side_scales, side_weight_scale, side_table, bucket,
            rows_per_bucket, SIDE_BUCKETS, MIXED,
        )  # fmt: skip
    if SIDES > 1:
        if SPLITS > 1:
            acc = _gather(zeros, partial, tile, SPLITS + 1, SPLITS + 2, SLOTS, BLOCK_O, PIXELS)
        else:
            acc = _sum(
                zeros, side1, weight1, 0, steps1, channels1, n, h, w, o, images, outs,
                out_h, out_w, 1, 1, 0, 0, False, BLOCK_C, STAGES,
            )  # fmt: skip
        v += side_term(
            tl.trans(acc), row, o, outs, side_scales + SIDE_BUCKETS, side_weight_scale,
            side_table + outs, bucket, rows_per_bucket, SIDE_BUCKETS, MIXED,
        )  # fmt: skip
    image = tl.where(seen, n, 0)
    finish(
        v, image, row, o, inside, outs, y, bias, shift, shift_stride, residual, out_scale, bucket,
        rows_per_bucket, out_zero, out_qmax, OUT_BUCKETS, MIXED, ACTIVATION,
    )  # fmt: skip
