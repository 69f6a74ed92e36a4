"""The contraction on Hopper: a warp-specialised, persistent kernel.

The same tiles and the same integers as `portable`, in three ways faster: a producer warp starts TMA
loads (`producer`), so that the others always have a matrix instruction in flight; the operands of
the next tile arrive while one is written; and the epilogue stores a few pixels at a time
(`hopper_epilogue`), so that two programs share a multiprocessor: one computes, the other writes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from quantempo.kernels.gpu.contraction import hopper_epilogue as epilogue
from quantempo.kernels.gpu.contraction import input_reuse, producer
from quantempo.kernels.gpu.contraction.packed import multiply
from quantempo.kernels.gpu.contraction.records import Scalars, pixel, place_of, row_of, tiles_of
from quantempo.kernels.gpu.dependent_launch import wait_for_predecessor

__all__ = ["contract_hopper"]


@gluon.jit
def _sum(acc, buffers, stage, phase, count, PER: gl.constexpr, BLOCK: gl.constexpr):
    """Return the sum of `count` steps, and the stage and phase of the next.

    What acc held is dropped by the first instruction: setting it to zero with others would make the
    compiler wait for each matrix instruction. With split-K finer than the number of steps a program
    may have none: acc stays 0 and its arrive is harmless.
    """
    smem_x, smem_w, ready, free = buffers
    STAGES: gl.constexpr = BLOCK.STAGES
    for step in range(count):
        hopper.mbarrier.wait(ready.index(stage), phase)
        pixels = smem_x.index(stage).reshape([BLOCK.PIXELS, BLOCK.CHANNELS])
        # All but the newest are done, so the stage before this one is free.
        acc = multiply(acc, smem_w, pixels, stage, step > 0, PER)
        hopper.mbarrier.arrive(free.index(producer.stage_before(stage, STAGES)), pred=step > 0)
        stage, phase = producer.next_stage(stage, phase, STAGES)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])
    hopper.mbarrier.arrive(free.index(producer.stage_before(stage, STAGES)))
    return acc, stage, phase


@gluon.jit
def _add_half(v, buffers, stage, phase, count, BLOCK: gl.constexpr, num_warps: gl.constexpr):
    """Return v and what `count` steps of a float16 segment add, and the stage and phase after."""
    smem_x, smem_w, ready, free = buffers
    x_shape: gl.constexpr = [BLOCK.PIXELS, BLOCK.CHANNELS // 2]
    w_shape: gl.constexpr = [BLOCK.OUTS, BLOCK.CHANNELS // 2]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(w_shape, gl.float16)
    shape: gl.constexpr = [16, min(128, BLOCK.PIXELS), 16]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], shape)
    acc = gl.convert_layout(v, mma, assert_trivial=True)
    for _ in range(count):
        hopper.mbarrier.wait(ready.index(stage), phase)
        pixels = smem_x.index(stage)._reinterpret(gl.float16, x_shape, layout)
        weight = smem_w.index(stage)._reinterpret(gl.float16, w_shape, layout)
        acc = hopper.warpgroup_mma(weight, pixels.permute((1, 0)), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        hopper.mbarrier.arrive(free.index(stage))
        stage, phase = producer.next_stage(stage, phase, BLOCK.STAGES)
    return gl.convert_layout(acc, v.type.layout, assert_trivial=True), stage, phase


@gluon.jit
def _scaled(
    acc, place, scales, weight_scale, table, bucket, s, BUCKETS: gl.constexpr,
    FORM: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """Return s[b] s_w[o] (acc - table[o]), float32, in the layout of the sums."""
    here = gl.arange(0, BLOCK.OUTS, gl.SliceLayout(1, mma))
    o = epilogue.channels_of(here, place, s.outs, FORM, BLOCK)
    acc -= gl.expand_dims(gl.load(table + o, mask=o < s.outs, other=0), 1)
    factor = gl.expand_dims(gl.load(weight_scale + o, mask=o < s.outs, other=0.0), 1)
    p = gl.arange(0, BLOCK.PIXELS, gl.SliceLayout(0, mma))
    n, h, w = pixel(p, place, s, WINDOW, BLOCK)
    row = row_of(n, h, w, s)[0]
    scale = epilogue.scale_of(
        scales, bucket, row, s.rows_per_bucket, BUCKETS, FORM.MIXED, FORM.ROWS
    )
    return acc.to(gl.float32) * (factor * scale)


@gluon.jit
def _share(
    acc, partial, counters, tile, SLOTS: gl.constexpr, BLOCK: gl.constexpr, mma: gl.constexpr
):
    """Write this program's partial sums [p, o]; return whether it is the last of its tile."""
    p = gl.arange(0, BLOCK.PIXELS, gl.SliceLayout(0, mma))
    o = gl.arange(0, BLOCK.OUTS, gl.SliceLayout(1, mma))
    at = gl.expand_dims(o, 1) + gl.expand_dims(p * BLOCK.OUTS, 0)
    area: gl.constexpr = BLOCK.OUTS * BLOCK.PIXELS
    gl.store(partial + (tile * SLOTS + gl.program_id(1)).to(gl.int64) * area + at, acc)
    # All threads' stores come before the one thread's release.
    gl.thread_barrier()
    last = gl.atomic_add(counters + tile, 1, sem="acq_rel") == SLOTS - 1
    if last:
        gl.store(counters + tile, 0)
    return last


@gluon.jit
def _compute(
    buffers, rows, count, steps0, steps1, y, partial, counters, terms, s, tiles,
    FORM: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Consume the stages: sum `count` steps of the main loop of tile after tile, and write it."""
    SIDES: gl.constexpr = FORM.SIDES
    STAGES: gl.constexpr = BLOCK.STAGES
    shape: gl.constexpr = [16, min(128, BLOCK.PIXELS), 32]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], shape)
    acc = gl.full([BLOCK.OUTS, BLOCK.PIXELS], 0, gl.int32, mma)
    ready = buffers[2]
    free = buffers[3]
    # The batch is at one time: one scale for all pixels, and the inverse of one.
    scale = 1.0
    inverse = 1.0
    if not FORM.MIXED and not FORM.ROWS:
        scale = epilogue.scale_of(terms.act_scale, terms.bucket, 0, 1, FORM.BUCKETS, False)
    if not FORM.MIXED and terms.out_scale is not None:
        own = epilogue.scale_of(terms.out_scale, terms.bucket, 0, 1, FORM.OUT_BUCKETS, False)
        inverse = gl.div_rn(1.0, own)
    stage = 0
    phase = 0
    box = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles.count:
        place = place_of(tile, tiles, WINDOW, BLOCK)
        if terms.residual is not None and BLOCK.SPLITS == 1:
            epilogue.prefetch_residual(terms.residual, place, s, WINDOW, BLOCK, num_warps)
        vectors = epilogue.read_channel_terms(place, terms, s, FORM, BLOCK, num_warps)
        if BLOCK.REUSE:
            acc, stage, phase, box, turn = input_reuse.sum_reuse(
                acc, buffers, stage, phase, box, turn, count, BLOCK
            )
        elif BLOCK.SPLITS == 1 or (BLOCK.PER == BLOCK.PER0 and BLOCK.PER == BLOCK.PER1):
            acc, stage, phase = _sum(acc, buffers, stage, phase, count, BLOCK.PER, BLOCK)
        else:
            # Of a split sum a program has one part: of the weight, or that of a side.
            slot = gl.program_id(1)
            if slot < BLOCK.SPLITS:
                acc, stage, phase = _sum(acc, buffers, stage, phase, count, BLOCK.PER, BLOCK)
            elif slot == BLOCK.SPLITS:
                acc, stage, phase = _sum(acc, buffers, stage, phase, count, BLOCK.PER0, BLOCK)
            else:
                acc, stage, phase = _sum(acc, buffers, stage, phase, count, BLOCK.PER1, BLOCK)
        ours = True
        v = acc
        if BLOCK.SPLITS > 1:
            ours = _share(acc, partial, counters, tile, BLOCK.SPLITS + SIDES, BLOCK, mma)
        elif SIDES > 0:
            v = _scaled(
                acc, place, terms.act_scale, terms.weight_scale, terms.table, terms.bucket, s,
                FORM.BUCKETS, FORM, WINDOW, BLOCK, mma,
            )  # fmt: skip
            for side in gl.static_range(SIDES - FORM.HALF):
                acc, stage, phase = _sum(
                    acc, buffers, stage, phase, steps0 if side == 0 else steps1,
                    BLOCK.PER0 if side == 0 else BLOCK.PER1, BLOCK,
                )  # fmt: skip
                v += _scaled(
                    acc, place, epilogue.side_scales_of(side, terms, s, FORM),
                    terms.side_weight_scale, terms.side_table + side * s.outs, terms.bucket, s,
                    FORM.SIDE_BUCKETS, FORM, WINDOW, BLOCK, mma,
                )  # fmt: skip
            if FORM.HALF:
                v, stage, phase = _add_half(
                    v, buffers, stage, phase, steps0 if SIDES == 1 else steps1, BLOCK, num_warps
                )
                # The first instruction of the next tile names it: else its registers were kept.
                acc = v.to(gl.int32, bitcast=True)
        residual = ()
        if rows is not None:
            hopper.mbarrier.wait(ready.index(stage), phase)
            if BLOCK.REUSE:
                after, later = producer.next_stage(stage, phase, STAGES)
                hopper.mbarrier.wait(ready.index(after), later)
                low, high = input_reuse.residual_stages(rows, buffers, stage, STAGES)
            else:
                low, high = producer.residual_stage(rows, buffers, stage)
            half: gl.constexpr = [BLOCK.PIXELS // 2, BLOCK.OUTS]
            residual = (low.reshape(half), high.reshape(half))
        if ours:
            epilogue.write_tile(
                v, residual, partial, tile, place, vectors, scale, inverse, y, terms, s, FORM,
                WINDOW, BLOCK, num_warps,
            )  # fmt: skip
        if rows is not None:
            hopper.mbarrier.arrive(free.index(stage))
            stage, phase = producer.next_stage(stage, phase, STAGES)
            if BLOCK.REUSE:
                hopper.mbarrier.arrive(free.index(stage))
                stage, phase = producer.next_stage(stage, phase, STAGES)
        tile += gl.num_programs(0)


@gluon.jit
def _produce(
    operands, rows, buffers, tiles, begin, end, steps, steps0, channels, apart,
    SIDES: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fill one ring of stages, or with REUSE two."""
    if BLOCK.REUSE:
        input_reuse.produce_reuse(
            operands[0], rows, buffers, tiles, begin, end, channels, apart, WINDOW, BLOCK
        )
    else:
        producer.produce(
            operands, rows, buffers, tiles, begin, end, steps, steps0, channels, apart, SIDES,
            WINDOW, BLOCK,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["images", "rows_per_bucket", "shift_stride", "tiles", "out_zero",
                              "out_qmax", "rows_per_gate"])  # fmt: skip
def contract_hopper(
    x, weight, side0, weight0, side1, weight1, groups, groups0, groups1, rows, y, partial,
    counters, terms,
    images, in_h, in_w, out_h, out_w, channels, channels0, channels1, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax, tiles, gate_stride, rows_per_gate,
    FORM: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr, EARLY: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Compute tiles of y (or one share of the sums of one); arguments as `portable.contract`.

    x, weight, side*, weight*: tensor descriptors. partial: (tiles, SPLITS + SIDES, P, O). rows: one
    of the residual, in boxes of half a tile, if it is loaded as operands are. With REUSE x is in
    boxes of a row of a tile. groups*: of packed weights. EARLY: a programmatic dependent launch.
    """
    s = Scalars(
        images, in_h, in_w, out_h, out_w, outs, rows_per_bucket, shift_stride, out_zero, out_qmax,
        gate_stride, rows_per_gate,
    )  # fmt: skip
    SIDES: gl.constexpr = FORM.SIDES
    SPLITS: gl.constexpr = BLOCK.SPLITS
    tiles = tiles_of(tiles, s, WINDOW, BLOCK)
    if BLOCK.REUSE:
        buffers = input_reuse.allocate_reuse(x, BLOCK)
        steps = WINDOW.KERNEL * gl.cdiv(channels, BLOCK.CHANNELS)
    else:
        buffers = producer.allocate(x, BLOCK.STAGES, BLOCK)
        steps = WINDOW.KERNEL * WINDOW.KERNEL * gl.cdiv(channels, BLOCK.CHANNELS)
    hopper.fence_async_shared()
    steps0 = gl.cdiv(channels0, BLOCK.CHANNELS)
    steps1 = gl.cdiv(channels1, BLOCK.CHANNELS)
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
        wait_for_predecessor()
    operands = ((x, weight, groups),)
    if SIDES > 0:
        operands = ((x, weight, groups), (side0, weight0, groups0))
    if SIDES > 1:
        operands = ((x, weight, groups), (side0, weight0, groups0), (side1, weight1, groups1))
    gl.warp_specialize([
        (_compute, (buffers, rows, last - begin, steps0, steps1, y, partial, counters, terms, s,
                    tiles, FORM, WINDOW, BLOCK, num_warps)),
        (_produce, (operands, rows, buffers, tiles, begin, end, steps, steps0, channels, outs // 2,
                    SIDES, WINDOW, BLOCK)),
    ], [1], [24])  # fmt: skip
