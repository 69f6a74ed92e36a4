"""The contraction on Hopper with input reuse along kernel rows: three taps read one box of pixels.

A box of two rows more than the tile is loaded once for each column of taps of a 3x3 kernel, and the
three taps above each other are three views of it. Pixels and weights have rings of stages of their
own; a row of pixels is one TMA load, so that a view may begin at any row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma_wait

from quantempo.kernels.gpu.contraction import producer
from quantempo.kernels.gpu.contraction.packed import multiply
from quantempo.kernels.gpu.contraction.records import place_of

__all__ = ["allocate_reuse", "produce_reuse", "residual_stages", "sum_reuse"]

# Boxes of pixels under way: one is read three times while the next arrives.
STAGES_X: gl.constexpr = gl.constexpr(2)


@gluon.jit
def allocate_reuse(x, BLOCK: gl.constexpr):
    """Return shared memory for rows of pixels and for weights, and the barriers of both."""
    BOXES: gl.constexpr = STAGES_X * (BLOCK.H + 2)
    smem_x, smem_w, ready, free = producer.allocate(x, BOXES, BLOCK)
    ready_x = gl.allocate_shared_memory(gl.int64, [STAGES_X, 1], mbarrier.MBarrierLayout())
    free_x = gl.allocate_shared_memory(gl.int64, [STAGES_X, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES_X):
        mbarrier.init(ready_x.index(i), count=1)
        mbarrier.init(free_x.index(i), count=1)
    return smem_x, smem_w, ready, free, ready_x, free_x


@gluon.jit
def sum_reuse(acc, buffers, stage, phase, box, turn, count, BLOCK: gl.constexpr):
    """Return the sum of `count` columns of taps, and where both rings go on; see `hopper._sum`."""
    smem_x, smem_w, ready, free, ready_x, free_x = buffers
    STAGES: gl.constexpr = BLOCK.STAGES
    layout: gl.constexpr = smem_w.layout
    seen: gl.constexpr = [BLOCK.PIXELS, BLOCK.CHANNELS]
    for column in range(count):
        mbarrier.wait(ready_x.index(box), turn)
        for tap in gl.static_range(3):
            mbarrier.wait(ready.index(stage), phase)
            view = smem_x.index(box * (BLOCK.H + 2) + tap)
            pixels = view._reinterpret(smem_x.dtype, seen, layout)
            later = (column > 0) if tap == 0 else True
            # All but the newest are done, so what the one before it read is free.
            acc = multiply(acc, smem_w, pixels, stage, later, BLOCK.PER)
            mbarrier.arrive(free.index(producer.stage_before(stage, STAGES)), pred=later)
            if tap == 0:
                mbarrier.arrive(free_x.index(producer.stage_before(box, STAGES_X)), pred=later)
            stage, phase = producer.next_stage(stage, phase, STAGES)
        box, turn = producer.next_stage(box, turn, STAGES_X)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(producer.stage_before(stage, STAGES)))
    mbarrier.arrive(free_x.index(producer.stage_before(box, STAGES_X)))
    return acc, stage, phase, box, turn


@gluon.jit
def residual_stages(rows, buffers, stage, STAGES: gl.constexpr):
    """Return two stages of weights as room for half a tile of `rows` each."""
    smem_w = buffers[1]
    after = producer.next_stage(stage, 0, STAGES)[0]
    low = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    high = smem_w.index(after)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    return low, high


@gluon.jit
def _load_residual(rows, buffers, stage, phase, place, BLOCK: gl.constexpr):
    """Load the two halves of a tile of the residual, each where a step's weights would be."""
    _smem_x, smem_w, ready, free, _ready_x, _free_x = buffers
    # A box is halved where it is not one high.
    DOWN: gl.constexpr = BLOCK.H // rows.block_type.shape[1] == 2
    for i in gl.static_range(2):
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), rows.block_type.nbytes)
        room = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
        h = place.h + (i * BLOCK.H // 2 if DOWN else 0)
        w = place.w + (0 if DOWN else i * BLOCK.W // 2)
        from_rows = [place.n, h, 0, w, place.o]
        tma.async_copy_global_to_shared(rows, from_rows, ready.index(stage), room)
        stage, phase = producer.next_stage(stage, phase, BLOCK.STAGES)
    return stage, phase


@gluon.jit
def produce_reuse(
    operand, rows, buffers, tiles, begin, end, channels, apart, WINDOW: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """Fill both rings, columns of taps [begin, end) of tile after tile, as they become free."""
    smem_x, _smem_w, _ready, free, ready_x, free_x = buffers
    x = operand[0]
    ROWS: gl.constexpr = BLOCK.H + 2
    stage = 0
    phase = 0
    box = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles.count:
        place = place_of(tile, tiles, WINDOW, BLOCK)
        for column in range(begin, end):
            c = column // 3 * BLOCK.CHANNELS
            across = column % 3
            # Of a barrier that none has arrived at yet, phase 1 counts as over.
            mbarrier.wait(free_x.index(box), turn ^ 1)
            bar = ready_x.index(box)
            mbarrier.expect(bar, ROWS * x.block_type.nbytes)
            for row in gl.static_range(ROWS):
                w = place.w - WINDOW.LEFT + across
                from_x = [place.n, place.h - WINDOW.TOP + row, 0, w, c]
                tma.async_copy_global_to_shared(x, from_x, bar, smem_x.index(box * ROWS + row))
            box, turn = producer.next_stage(box, turn, STAGES_X)
            for down in gl.static_range(3):
                mbarrier.wait(free.index(stage), phase ^ 1)
                producer.load_boxes(
                    operand, None, place.o, down * 3 + across, c, channels, apart, buffers, stage,
                    True, BLOCK,
                )  # fmt: skip
                stage, phase = producer.next_stage(stage, phase, BLOCK.STAGES)
        if rows is not None:
            stage, phase = _load_residual(rows, buffers, stage, phase, place, BLOCK)
        tile += gl.num_programs(0)
