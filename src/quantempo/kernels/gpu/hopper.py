"""The contraction on Hopper, with its matrix instructions kept in flight (layer L0).

The same tiles and the same integers as `contraction`, in three ways faster: an int8 matrix
instruction is always under way while the next operands arrive (there each is waited for); a program
takes one tile after another and fetches the first operands of the next before it finishes this one;
and the sums are turned to rows of channels a few pixels at a time, so that two programs share a
multiprocessor and one computes while the other writes.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantempo.kernels.gpu.hopper_rows import (
    after_predecessor,
    pixel,
    prefetch_rows,
    scale_of,
    write_rows,
)

__all__ = ["contract_hopper"]


@gluon.jit
def _place(
    tile, tiles_h, tiles_w, tiles_o, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr,
    BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr, UPSAMPLE: gl.constexpr,
):  # fmt: skip
    """Return (n0, h0, w0, phase_h, phase_w, o0): tiles of one place stand side by side."""
    o0 = (tile % tiles_o) * BLOCK_O
    spot = tile // tiles_o
    phase = 0
    if UPSAMPLE:
        # The four pixels that one input pixel becomes are tiles of their own.
        phase = spot % 4
        spot = spot // 4
    w0 = (spot % tiles_w) * BLOCK_W
    spot = spot // tiles_w
    return (spot // tiles_h) * BLOCK_N, (spot % tiles_h) * BLOCK_H, w0, phase // 2, phase % 2, o0


@gluon.jit
def _choose(other, here, there):
    """Return the place `there` if `other`, else `here`."""
    return (
        gl.where(other, there[0], here[0]),
        gl.where(other, there[1], here[1]),
        gl.where(other, there[2], here[2]),
        gl.where(other, there[3], here[3]),
        gl.where(other, there[4], here[4]),
        gl.where(other, there[5], here[5]),
    )


@gluon.jit
def _copy(x, weight, from_x, from_w, buffers, stage, some):
    """Start the copies of a box of x and one of weight into a stage, if `some`."""
    smem_x, smem_w, bars = buffers
    bar = bars.index(stage)
    mbarrier.expect(bar, x.block_type.nbytes + weight.block_type.nbytes, pred=some)
    tma.async_copy_global_to_shared(x, from_x, bar, smem_x.index(stage), pred=some)
    tma.async_copy_global_to_shared(weight, from_w, bar, smem_w.index(stage), pred=some)


@gluon.jit
def _load(
    operands, buffers, step, stage, some, steps, steps0, channels, place,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step into a stage, if `some`.

    Steps [0, steps) are BLOCK_C channels of one tap, then come those of the sides.
    """
    x, weight, side0, weight0, side1, weight1 = operands
    n0, h0, w0, phase_h, phase_w, o0 = place
    per_tap = gl.cdiv(channels, BLOCK_C)
    tap = step // per_tap
    c = (step - tap * per_tap) * BLOCK_C
    h = phase_h + tap // KERNEL - TOP
    w = phase_w + tap % KERNEL - LEFT
    odd = 0
    from_c = c
    if STRIDE == 2:
        # The image is seen as (N, H / 2, 2, W / 2, 2 C): parity is an index.
        odd = h & 1
        from_c = c + (w & 1) * channels
    if STRIDE == 2 or UPSAMPLE:
        h = h >> 1
        w = w >> 1
    mine = some
    if SIDES > 0:
        mine = some & (step < steps)
    from_x = [n0, h0 + h, odd, w0 + w, from_c]
    _copy(x, weight, from_x, [o0, tap * channels + c], buffers, stage, mine)
    if SIDES > 0:
        c = (step - steps) * BLOCK_C
        mine = some & (step >= steps)
        if SIDES > 1:
            mine = mine & (step < steps + steps0)
        _copy(side0, weight0, [n0, h0, 0, w0, c], [o0, c], buffers, stage, mine)
    if SIDES > 1:
        c = (step - steps - steps0) * BLOCK_C
        mine = some & (step >= steps + steps0)
        _copy(side1, weight1, [n0, h0, 0, w0, c], [o0, c], buffers, stage, mine)


@gluon.jit
def _sum(
    acc, operands, buffers, at, first, last, begin, end, steps, steps0, channels, place, after,
    more,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, PIXELS: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Return the sum of steps [first, last), and the count of steps so far.

    What acc held is dropped by the first instruction: setting it to zero with others would make the
    compiler wait for each matrix instruction.

    Loads run ahead to `end`, then on with step `begin` of the tile at `after` if there is `more`.
    """
    smem_x, smem_w, bars = buffers
    for step in range(first, last):
        stage = at % STAGES
        mbarrier.wait(bars.index(stage), (at // STAGES) & 1)
        pixels = smem_x.index(stage).reshape([PIXELS, BLOCK_C]).permute((1, 0))
        acc = warpgroup_mma(smem_w.index(stage), pixels, acc, use_acc=step > first, is_async=True)
        # All but the newest are done, so the stage before this one is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        ahead = step + STAGES - 1
        other = ahead >= end
        _load(
            operands, buffers, gl.where(other, ahead - end + begin, ahead),
            (at + STAGES - 1) % STAGES, (ahead < end) | more, steps, steps0, channels,
            _choose(other, place, after),
            KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BLOCK_C,
        )  # fmt: skip
        at += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    return acc, at


@gluon.jit
def _scaled(
    acc, place, outs, scales, weight_scale, table, bucket, images, out_h, out_w, rows_per_bucket,
    BUCKETS: gl.constexpr, MIXED: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_O: gl.constexpr, PIXELS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Return s[b] s_w[o] (acc - table[o]), float32, where the sums lie."""
    o = place[5] + gl.arange(0, BLOCK_O, gl.SliceLayout(1, mma))
    if acc.dtype == gl.int32:
        acc -= gl.expand_dims(gl.load(table + o, mask=o < outs, other=0), 1)
    factor = gl.expand_dims(gl.load(weight_scale + o, mask=o < outs, other=0.0), 1)
    p = gl.arange(0, PIXELS, gl.SliceLayout(0, mma))
    row = pixel(p, place, images, out_h, out_w, BLOCK_H, BLOCK_W, False)[3]
    scale = scale_of(scales, bucket, row, rows_per_bucket, BUCKETS, MIXED)
    return acc.to(gl.float32) * (factor * scale)


@gluon.jit
def _share(
    acc, partial, counters, tile, SLOTS: gl.constexpr, BLOCK_O: gl.constexpr,
    PIXELS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Put down this program's sums [p, o]; return whether it is the last of its tile."""
    p = gl.arange(0, PIXELS, gl.SliceLayout(0, mma))
    o = gl.arange(0, BLOCK_O, gl.SliceLayout(1, mma))
    at = gl.expand_dims(o, 1) + gl.expand_dims(p * BLOCK_O, 0)
    area: gl.constexpr = BLOCK_O * PIXELS
    gl.store(partial + (tile * SLOTS + gl.program_id(1)).to(gl.int64) * area + at, acc)
    # All threads' stores come before the one thread's release.
    gl.thread_barrier()
    last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == SLOTS - 1
    if last:
        gl.store(counters + tile, 0)
    return last


@gluon.jit
def _buffers(x, weight, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr):
    """Return shared memory for the stages and their barriers."""
    box: gl.constexpr = [STAGES] + x.block_type.shape  # noqa: RUF005 - Gluon has no [a, *b]
    smem_x = gl.allocate_shared_memory(x.dtype, box, x.layout)
    smem_w = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_O, BLOCK_C], weight.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    return smem_x, smem_w, bars


@gluon.jit(
    do_not_specialize=["images", "rows_per_bucket", "shift_stride", "tiles", "out_zero", "out_qmax"]
)
def contract_hopper(
    x, weight, side0, weight0, side1, weight1, y, partial, counters,
    act_scale, weight_scale, table, bucket, bias, shift, residual,
    side_scales, side_weight_scale, side_table, out_scale,
    images, in_h, in_w, out_h, out_w, channels, channels0, channels1, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax, tiles,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BUCKETS: gl.constexpr,
    SIDE_BUCKETS: gl.constexpr, OUT_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    BORDER: gl.constexpr, RAW: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr,
    BLOCK_C: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, FP8: gl.constexpr,
    EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Compute tiles of y (or one share of the sums of one); arguments as `contraction.contract`.

    x, weight, side*, weight*: tensor descriptors. partial: (tiles, SPLITS + SIDES, P, O). A tile
    has at least STAGES - 1 steps.
    """
    PIXELS: gl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    ACC: gl.constexpr = gl.float32 if FP8 else gl.int32
    WIDE: gl.constexpr = min(256 if FP8 else 128, PIXELS)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 32])
    rows = in_h if UPSAMPLE else out_h
    columns = in_w if UPSAMPLE else out_w
    tiles_h = gl.cdiv(rows, BLOCK_H)
    tiles_w = gl.cdiv(columns, BLOCK_W)
    tiles_o = gl.cdiv(outs, BLOCK_O)
    operands = (x, weight, side0, weight0, side1, weight1)
    buffers = _buffers(x, weight, BLOCK_O, BLOCK_C, STAGES)
    steps = KERNEL * KERNEL * gl.cdiv(channels, BLOCK_C)
    steps0 = gl.cdiv(channels0, BLOCK_C)
    begin = 0
    last = steps
    end = steps + steps0 + gl.cdiv(channels1, BLOCK_C)
    tile = gl.program_id(0)
    if SPLITS > 1:
        slot = gl.program_id(1)
        begin = slot * steps // SPLITS
        last = (slot + 1) * steps // SPLITS
        if SIDES > 0:
            begin = gl.where(slot < SPLITS, begin, steps)
            last = gl.where(slot < SPLITS, last, steps + steps0)
        if SIDES > 1:
            begin = gl.where(slot < SPLITS + 1, begin, steps + steps0)
            last = gl.where(slot < SPLITS + 1, last, end)
        end = last
    if EARLY:
        after_predecessor()
    here = _place(tile, tiles_h, tiles_w, tiles_o, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE)
    for i in gl.static_range(STAGES - 1):
        _load(
            operands, buffers, begin + i, i, begin + i < end, steps, steps0, channels, here,
            KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BLOCK_C,
        )  # fmt: skip
    at = 0
    acc = gl.full([BLOCK_O, PIXELS], 0, ACC, mma)
    while tile < tiles:
        after = tile + gl.num_programs(0)
        place = _place(
            tile, tiles_h, tiles_w, tiles_o, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE
        )
        there = _place(
            after, tiles_h, tiles_w, tiles_o, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE
        )
        if residual is not None and SPLITS == 1:
            prefetch_rows(
                residual, place, images, out_h, out_w, outs, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS,
                UPSAMPLE, num_warps,
            )  # fmt: skip
        acc, at = _sum(
            acc, operands, buffers, at, begin, last, begin, end, steps, steps0, channels, place,
            there, after < tiles,
            KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, PIXELS, BLOCK_C, STAGES,
        )  # fmt: skip
        ours = True
        v = acc
        if SPLITS > 1:
            ours = _share(acc, partial, counters, tile, SPLITS + SIDES, BLOCK_O, PIXELS, mma)
        elif SIDES > 0:
            v = _scaled(
                acc, place, outs, act_scale, weight_scale, table, bucket, images, out_h, out_w,
                rows_per_bucket, BUCKETS, MIXED, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS, mma,
            )  # fmt: skip
            for side in gl.static_range(SIDES):
                first = steps + side * steps0
                acc, at = _sum(
                    acc, operands, buffers, at, first, end if side + 1 == SIDES else first + steps0,
                    begin, end, steps, steps0, channels, place, there, after < tiles,
                    KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, PIXELS, BLOCK_C, STAGES,
                )  # fmt: skip
                v += _scaled(
                    acc, place, outs, side_scales + side * SIDE_BUCKETS, side_weight_scale,
                    side_table + side * outs, bucket, images, out_h, out_w, rows_per_bucket,
                    SIDE_BUCKETS, MIXED, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS, mma,
                )  # fmt: skip
        if ours:
            write_rows(
                v, partial, tile, place, y, act_scale, weight_scale, table, bucket, bias, shift,
                residual, side_scales, side_weight_scale, side_table, out_scale, images, in_h,
                in_w, out_h, out_w, outs, rows_per_bucket, shift_stride,
                out_zero, out_qmax,
                KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BUCKETS, SIDE_BUCKETS, OUT_BUCKETS,
                MIXED, BORDER, RAW, ACTIVATION, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS, SPLITS,
                FP8, num_warps,
            )  # fmt: skip
        tile = after
