"""The producer warp of the contraction on Hopper: TMA loads into pipeline stages in shared memory.

A stage holds the operands of one step: a box of pixels, and one of weights. The residual of a tile,
128 x 128 values of two bytes, is as large: it comes after the last step, in a stage like any other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from quantempo.kernels.gpu.contraction.packed import halves_of
from quantempo.kernels.gpu.contraction.records import place_of

__all__ = ["allocate", "load_boxes", "next_stage", "produce", "residual_stage", "stage_before"]


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Return the stage after one, and its phase: how often, modulo 2, all were filled before."""
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), phase ^ wraps.to(gl.int32)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    """Return the stage before one."""
    # Computed, not carried: of two names that begin a loop with one value Triton 3.6 carries one.
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def allocate(x, BOXES: gl.constexpr, BLOCK: gl.constexpr):
    """Return shared memory for boxes of pixels and stages of weights, these' `ready` and `free`."""
    STAGES: gl.constexpr = BLOCK.STAGES
    box: gl.constexpr = [BOXES] + x.block_type.shape  # noqa: RUF005 - Gluon has no [a, *b]
    rows: gl.constexpr = [STAGES, BLOCK.OUTS, BLOCK.CHANNELS]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(rows[1:], gl.int8)
    smem_x = gl.allocate_shared_memory(x.dtype, box, x.layout)
    smem_w = gl.allocate_shared_memory(gl.int8, rows, layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    return smem_x, smem_w, ready, free


@gluon.jit
def load_boxes(
    operand, from_x, from_o, tap, c, channels, apart, buffers, stage, some, BLOCK: gl.constexpr
):
    """Start the loads of a step into a stage, if `some`; from_x None: of the weight alone.

    A box of x, and one of weight, or two half as high: of values and, `apart` rows on, their gates.
    """
    from_c = tap * channels + c
    x, weight, groups = operand
    smem_w = buffers[1]
    bar = buffers[2].index(stage)
    ROWS: gl.constexpr = weight.block_type.shape[0]
    BOXES: gl.constexpr = BLOCK.OUTS // ROWS if groups is None else BLOCK.OUTS // 16 // ROWS
    fields: gl.constexpr = 0 if groups is None else groups.block_type.nbytes
    pixels: gl.constexpr = 0 if from_x is None else x.block_type.nbytes
    nbytes: gl.constexpr = pixels + BOXES * (weight.block_type.nbytes + fields)
    mbarrier.expect(bar, nbytes, pred=some)
    if from_x is not None:
        tma.async_copy_global_to_shared(x, from_x, bar, buffers[0].index(stage), pred=some)
    if groups is None:
        for i in gl.static_range(BOXES):
            there = smem_w.index(stage).slice(i * ROWS, ROWS)
            from_w = [from_o // BOXES + i * apart, from_c]
            tma.async_copy_global_to_shared(weight, from_w, bar, there, pred=some)
    else:
        codes, words = halves_of(smem_w, stage)
        tall: gl.constexpr = [BLOCK.OUTS // 16]
        codes = codes._reinterpret(gl.uint8, tall + weight.block_type.shape[1:], weight.layout)
        words = words._reinterpret(gl.uint8, tall + groups.block_type.shape[1:], groups.layout)
        block = tap * gl.cdiv(channels, 64) + c // 64
        for i in gl.static_range(BOXES):
            row = (from_o // BOXES + i * apart) // 16
            there = codes.slice(i * ROWS, ROWS)
            tma.async_copy_global_to_shared(weight, [row, 0, block * 32], bar, there, pred=some)
            there = words.slice(i * ROWS, ROWS)
            tma.async_copy_global_to_shared(groups, [row, block, 0, 0], bar, there, pred=some)


@gluon.jit
def _load_step(
    operands, buffers, stage, step, tap, c, steps, steps0, channels, apart, place,
    SIDES: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Start the loads of a step: channels from c on of a tap, from step `steps` on of a side."""
    h = place.phase_h + tap // WINDOW.KERNEL - WINDOW.TOP
    w = place.phase_w + tap % WINDOW.KERNEL - WINDOW.LEFT
    odd = 0
    from_c = c
    if WINDOW.STRIDE == 2:
        # The image is seen as (N, H / 2, 2, W / 2, 2 C): parity is an index.
        odd = h & 1
        from_c = c + (w & 1) * channels
    if WINDOW.STRIDE == 2 or WINDOW.UPSAMPLE:
        h = h >> 1
        w = w >> 1
    mine = True
    if SIDES > 0:
        mine = step < steps
    from_x = [place.n, place.h + h, odd, place.w + w, from_c]
    load_boxes(operands[0], from_x, place.o, tap, c, channels, apart, buffers, stage, mine, BLOCK)
    if SIDES > 0:
        c = (step - steps) * BLOCK.CHANNELS
        mine = step >= steps
        if SIDES > 1:
            mine = mine & (step < steps + steps0)
        from_x = [place.n, place.h, 0, place.w, c]
        load_boxes(operands[1], from_x, place.o, 0, c, 0, apart, buffers, stage, mine, BLOCK)
    if SIDES > 1:
        c = (step - steps - steps0) * BLOCK.CHANNELS
        mine = step >= steps + steps0
        from_x = [place.n, place.h, 0, place.w, c]
        load_boxes(operands[2], from_x, place.o, 0, c, 0, apart, buffers, stage, mine, BLOCK)


@gluon.jit
def residual_stage(rows, buffers, stage):
    """Return the two parts of a stage as room for half a tile of `rows` each."""
    smem_x, smem_w, _ready, _free = buffers
    low = smem_x.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    high = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    return low, high


@gluon.jit
def _load_residual(rows, buffers, stage, place, BLOCK: gl.constexpr):
    """Start the loads of a tile of the residual into a stage: what follows the last step."""
    ready = buffers[2]
    low, high = residual_stage(rows, buffers, stage)
    bar = ready.index(stage)
    mbarrier.expect(bar, 2 * rows.block_type.nbytes)
    from_low = [place.n, place.h, 0, place.w, place.o]
    tma.async_copy_global_to_shared(rows, from_low, bar, low)
    # The second half of its pixels: a box is halved where it is not one wide.
    HALF_N: gl.constexpr = BLOCK.N // rows.block_type.shape[0]
    HALF_H: gl.constexpr = BLOCK.H // rows.block_type.shape[1]
    n = place.n + (BLOCK.N // 2 if HALF_N == 2 else 0)
    h = place.h + (BLOCK.H // 2 if HALF_H == 2 else 0)
    w = place.w + (BLOCK.W // 2 if HALF_N * HALF_H == 1 else 0)
    tma.async_copy_global_to_shared(rows, [n, h, 0, w, place.o], bar, high)


@gluon.jit
def produce(
    operands, rows, buffers, tiles, begin, end, steps, steps0, channels, apart,
    SIDES: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fill the stages, steps [begin, end) of tile after tile, as they become free."""
    free = buffers[3]
    per_tap = gl.cdiv(channels, BLOCK.CHANNELS)
    stage = 0
    phase = 0
    tile = gl.program_id(0)
    while tile < tiles.count:
        place = place_of(tile, tiles, WINDOW, BLOCK)
        tap = begin // per_tap
        c = (begin - tap * per_tap) * BLOCK.CHANNELS
        for step in range(begin, end):
            # Of a barrier that none has arrived at yet, phase 1 counts as over.
            mbarrier.wait(free.index(stage), phase ^ 1)
            _load_step(
                operands, buffers, stage, step, tap, c, steps, steps0, channels, apart, place,
                SIDES, WINDOW, BLOCK,
            )  # fmt: skip
            stage, phase = next_stage(stage, phase, BLOCK.STAGES)
            c += BLOCK.CHANNELS
            over = c >= channels
            tap += over.to(gl.int32)
            c = gl.where(over, 0, c)
        if rows is not None:
            mbarrier.wait(free.index(stage), phase ^ 1)
            _load_residual(rows, buffers, stage, place, BLOCK)
            stage, phase = next_stage(stage, phase, BLOCK.STAGES)
        tile += gl.num_programs(0)
