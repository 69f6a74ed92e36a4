"""The contraction on Hopper, with its matrix instructions kept in flight.

The same tiles and the same integers as `contraction`, in three ways faster: one warp does nothing
but bring operands (`hopper_loads`), so that the others always have a matrix instruction under way;
a program takes one tile after another, and the operands of the next arrive while this one is
written; and sums are turned to rows of channels a few pixels at a time (`hopper_rows`), so that two
programs share a multiprocessor and one computes while the other writes.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantempo.kernels.gpu.contraction.hopper_epilogue import (
    after_predecessor,
    pixel,
    prefetch_rows,
    read_vectors,
    scale_of,
    write_rows,
)
from quantempo.kernels.gpu.contraction.input_reuse import (
    bring_taps,
    halves_taps,
    sum_taps,
    tap_buffers,
)
from quantempo.kernels.gpu.contraction.producer import (
    bring,
    halves,
    next_stage,
    place_of,
    stage_before,
)

__all__ = ["contract_hopper"]


@gluon.jit
def _sum(
    acc, buffers, stage, phase, count, PIXELS: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Return the sum of `count` steps, and the stage and phase of the next.

    What acc held is dropped by the first instruction: setting it to zero with others would make the
    compiler wait for each matrix instruction. Where a sum is split finer than its steps a program
    has none: acc is still zero there, and nobody waits for the stage it gives back unused.
    """
    smem_x, smem_w, ready, free = buffers
    for step in range(count):
        mbarrier.wait(ready.index(stage), phase)
        pixels = smem_x.index(stage).reshape([PIXELS, BLOCK_C]).permute((1, 0))
        acc = warpgroup_mma(smem_w.index(stage), pixels, acc, use_acc=step > 0, is_async=True)
        # All but the newest are done, so the stage before this one is free.
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(free.index(stage_before(stage, STAGES)), pred=step > 0)
        stage, phase = next_stage(stage, phase, STAGES)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(stage_before(stage, STAGES)))
    return acc, stage, phase


@gluon.jit
def _scaled(
    acc, place, outs, scales, weight_scale, table, bucket, images, out_h, out_w, rows_per_bucket,
    BUCKETS: gl.constexpr, MIXED: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_O: gl.constexpr, PIXELS: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Return s[b] s_w[o] (acc - table[o]), float32, where the sums lie."""
    o = place[5] + gl.arange(0, BLOCK_O, gl.SliceLayout(1, mma))
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
    """Return shared memory for the stages, and for each the barriers `ready` and `free`."""
    box: gl.constexpr = [STAGES] + x.block_type.shape  # noqa: RUF005 - Gluon has no [a, *b]
    smem_x = gl.allocate_shared_memory(x.dtype, box, x.layout)
    smem_w = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_O, BLOCK_C], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    return smem_x, smem_w, ready, free


@gluon.jit
def _compute(
    buffers, rows, tiles_h, tiles_w, tiles_o, count, steps0, steps1, y, partial, counters,
    act_scale, weight_scale, table, bucket, bias, shift, residual,
    side_scales, side_weight_scale, side_table, out_scale,
    images, in_h, in_w, out_h, out_w, outs, rows_per_bucket, shift_stride, out_zero, out_qmax,
    tiles,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BUCKETS: gl.constexpr,
    SIDE_BUCKETS: gl.constexpr, OUT_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    BORDER: gl.constexpr, RAW: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr,
    BLOCK_C: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    TAPS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What the other warps do: sum the stages of a tile, `count` of its main loop, and write it."""
    PIXELS: gl.constexpr = BLOCK_N * BLOCK_H * BLOCK_W
    WIDE: gl.constexpr = min(128, PIXELS)
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, WIDE, 32])
    acc = gl.full([BLOCK_O, PIXELS], 0, gl.int32, mma)
    if TAPS:
        _smem_x, _smem_w, ready, free, _ready_x, _free_x = buffers
    else:
        _smem_x, _smem_w, ready, free = buffers
    # The batch is at one time: one scale for all pixels, and the inverse of one.
    scale = 1.0
    inverse = 1.0
    if not MIXED:
        scale = scale_of(act_scale, bucket, 0, 1, BUCKETS, False)
        if out_scale is not None:
            inverse = gl.div_rn(1.0, scale_of(out_scale, bucket, 0, 1, OUT_BUCKETS, False))
    stage = 0
    phase = 0
    box = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles:
        place = place_of(
            tile, tiles_h, tiles_w, tiles_o, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE
        )
        if residual is not None and SPLITS == 1:
            prefetch_rows(
                residual, place, images, out_h, out_w, outs, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS,
                UPSAMPLE, num_warps,
            )  # fmt: skip
        vectors = read_vectors(
            place, weight_scale, table, bias, shift, outs, shift_stride, ACTIVATION, BLOCK_N,
            BLOCK_O, num_warps,
        )  # fmt: skip
        if TAPS:
            acc, stage, phase, box, turn = sum_taps(
                acc, buffers, stage, phase, box, turn, count, BLOCK_H, PIXELS, BLOCK_C, STAGES
            )
        else:
            acc, stage, phase = _sum(acc, buffers, stage, phase, count, PIXELS, BLOCK_C, STAGES)
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
                acc, stage, phase = _sum(
                    acc, buffers, stage, phase, steps0 if side == 0 else steps1, PIXELS, BLOCK_C,
                    STAGES,
                )  # fmt: skip
                v += _scaled(
                    acc, place, outs, side_scales + side * SIDE_BUCKETS, side_weight_scale,
                    side_table + side * outs, bucket, images, out_h, out_w, rows_per_bucket,
                    SIDE_BUCKETS, MIXED, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS, mma,
                )  # fmt: skip
        held = ()
        if rows is not None:
            mbarrier.wait(ready.index(stage), phase)
            if TAPS:
                after, later = next_stage(stage, phase, STAGES)
                mbarrier.wait(ready.index(after), later)
                low, high = halves_taps(rows, buffers, stage, STAGES)
            else:
                low, high = halves(rows, buffers, stage)
            held = (low.reshape([PIXELS // 2, BLOCK_O]), high.reshape([PIXELS // 2, BLOCK_O]))
        if ours:
            write_rows(
                v, held, partial, tile, place, vectors, scale, inverse, y, act_scale, table, bucket,
                bias, shift, residual, side_scales, side_weight_scale, side_table, out_scale,
                images, in_h, in_w, out_h, out_w, outs, rows_per_bucket, shift_stride, out_zero,
                out_qmax,
                KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BUCKETS, SIDE_BUCKETS, OUT_BUCKETS,
                MIXED, BORDER, RAW, ACTIVATION, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, PIXELS, SPLITS,
                num_warps,
            )  # fmt: skip
        if rows is not None:
            mbarrier.arrive(free.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            if TAPS:
                mbarrier.arrive(free.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
        tile += gl.num_programs(0)


@gluon.jit
def _bring(
    operands, rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end, steps, steps0, channels,
    apart,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr,
    BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
    TAPS: gl.constexpr,
):  # fmt: skip
    """What one warp does: fill one ring of stages, or with TAPS two."""
    if TAPS:
        bring_taps(
            operands[0], operands[1], rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end,
            channels, TOP, LEFT, BLOCK_H, BLOCK_W, BLOCK_O, BLOCK_C, STAGES,
        )  # fmt: skip
    else:
        bring(
            operands, rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end, steps, steps0,
            channels, apart, KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BLOCK_N, BLOCK_H,
            BLOCK_W, BLOCK_O, BLOCK_C, STAGES,
        )  # fmt: skip


@gluon.jit(
    do_not_specialize=["images", "rows_per_bucket", "shift_stride", "tiles", "out_zero", "out_qmax"]
)
def contract_hopper(
    x, weight, side0, weight0, side1, weight1, rows, y, partial, counters,
    act_scale, weight_scale, table, bucket, bias, shift, residual,
    side_scales, side_weight_scale, side_table, out_scale,
    images, in_h, in_w, out_h, out_w, channels, channels0, channels1, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax, tiles,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BUCKETS: gl.constexpr,
    SIDE_BUCKETS: gl.constexpr, OUT_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    BORDER: gl.constexpr, RAW: gl.constexpr, ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr,
    BLOCK_C: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    TAPS: gl.constexpr, EARLY: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Compute tiles of y (or one share of the sums of one); arguments as `contraction.contract`.

    x, weight, side*, weight*: tensor descriptors. partial: (tiles, SPLITS + SIDES, P, O). rows: one
    of the residual, in boxes of half a tile, if it is brought as operands are. TAPS: as in
    `hopper_taps`; x is in boxes of a row of a tile then.
    """
    tiles_h = gl.cdiv(in_h if UPSAMPLE else out_h, BLOCK_H)
    tiles_w = gl.cdiv(in_w if UPSAMPLE else out_w, BLOCK_W)
    tiles_o = gl.cdiv(outs, BLOCK_O)
    if TAPS:
        buffers = tap_buffers(x, weight, BLOCK_H, BLOCK_O, BLOCK_C, STAGES)
        steps = KERNEL * gl.cdiv(channels, BLOCK_C)
    else:
        buffers = _buffers(x, weight, BLOCK_O, BLOCK_C, STAGES)
        steps = KERNEL * KERNEL * gl.cdiv(channels, BLOCK_C)
    steps0 = gl.cdiv(channels0, BLOCK_C)
    steps1 = gl.cdiv(channels1, BLOCK_C)
    begin = 0
    last = steps
    end = steps + steps0 + steps1
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
    operands = (x, weight)
    if SIDES > 0:
        operands = (x, weight, side0, weight0)
    if SIDES > 1:
        operands = (x, weight, side0, weight0, side1, weight1)
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    buffers, rows, tiles_h, tiles_w, tiles_o, last - begin, steps0, steps1, y,
                    partial, counters, act_scale, weight_scale, table, bucket, bias, shift,
                    residual, side_scales, side_weight_scale, side_table, out_scale,
                    images, in_h, in_w, out_h, out_w, outs, rows_per_bucket, shift_stride,
                    out_zero, out_qmax, tiles,
                    KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BUCKETS, SIDE_BUCKETS,
                    OUT_BUCKETS, MIXED, BORDER, RAW, ACTIVATION, BLOCK_N, BLOCK_H, BLOCK_W,
                    BLOCK_O, BLOCK_C, STAGES, SPLITS, TAPS, num_warps,
                ),
            ),
            (
                _bring,
                (
                    operands, rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end, steps,
                    steps0, channels, outs // 2,
                    KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BLOCK_N, BLOCK_H, BLOCK_W,
                    BLOCK_O, BLOCK_C, STAGES, TAPS,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip
