"""The contraction on Hopper where the three taps of a column share their pixels.

A 3x3 kernel reads every pixel nine times. Here a box of two rows more than the tile is brought once
for each column of taps, and the three taps above each other are three views of it: a third more
pixels instead of three times as many. Pixels and weights have rings of their own; a row of pixels
is one copy, so that a view may begin at any row.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"

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

from quantempo.kernels.gpu.contraction.producer import next_stage, place_of, stage_before

__all__ = ["bring_taps", "halves_taps", "sum_taps", "tap_buffers"]

# Boxes of pixels under way: one is read three times while the next arrives.
STAGES_X: gl.constexpr = gl.constexpr(2)


@gluon.jit
def tap_buffers(
    x, weight, BLOCK_H: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Return shared memory for rows of pixels and for weights, and the barriers of both."""
    rows: gl.constexpr = [STAGES_X * (BLOCK_H + 2)] + x.block_type.shape  # noqa: RUF005
    smem_x = gl.allocate_shared_memory(x.dtype, rows, x.layout)
    smem_w = gl.allocate_shared_memory(weight.dtype, [STAGES, BLOCK_O, BLOCK_C], weight.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_x = gl.allocate_shared_memory(gl.int64, [STAGES_X, 1], mbarrier.MBarrierLayout())
    free_x = gl.allocate_shared_memory(gl.int64, [STAGES_X, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(STAGES_X):
        mbarrier.init(ready_x.index(i), count=1)
        mbarrier.init(free_x.index(i), count=1)
    fence_async_shared()
    return smem_x, smem_w, ready, free, ready_x, free_x


@gluon.jit
def sum_taps(
    acc, buffers, stage, phase, box, turn, count, BLOCK_H: gl.constexpr, PIXELS: gl.constexpr,
    BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Return the sum of `count` columns of taps, and where both rings go on; see `hopper._sum`."""
    smem_x, smem_w, ready, free, ready_x, free_x = buffers
    layout: gl.constexpr = smem_w.layout
    for column in range(count):
        mbarrier.wait(ready_x.index(box), turn)
        for tap in gl.static_range(3):
            mbarrier.wait(ready.index(stage), phase)
            view = smem_x.index(box * (BLOCK_H + 2) + tap)
            pixels = view._reinterpret(smem_x.dtype, [PIXELS, BLOCK_C], layout).permute((1, 0))
            later = (column > 0) if tap == 0 else True
            acc = warpgroup_mma(smem_w.index(stage), pixels, acc, use_acc=later, is_async=True)
            # All but the newest are done, so what the one before it read is free.
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(free.index(stage_before(stage, STAGES)), pred=later)
            if tap == 0:
                mbarrier.arrive(free_x.index(stage_before(box, STAGES_X)), pred=later)
            stage, phase = next_stage(stage, phase, STAGES)
        box, turn = next_stage(box, turn, STAGES_X)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(free.index(stage_before(stage, STAGES)))
    mbarrier.arrive(free_x.index(stage_before(box, STAGES_X)))
    return acc, stage, phase, box, turn


@gluon.jit
def halves_taps(rows, buffers, stage, STAGES: gl.constexpr):
    """Return two stages of weights as room for half a tile of `rows` each."""
    smem_w = buffers[1]
    after = next_stage(stage, 0, STAGES)[0]
    low = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    high = smem_w.index(after)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    return low, high


@gluon.jit
def _bring_rows(
    rows, buffers, stage, phase, n0, h0, w0, o0, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Bring the two halves of a tile of the residual, each where a step's weights would be."""
    _smem_x, smem_w, ready, free, _ready_x, _free_x = buffers
    # A box is halved where it is not one high.
    DOWN: gl.constexpr = BLOCK_H // rows.block_type.shape[1] == 2
    for i in gl.static_range(2):
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), rows.block_type.nbytes)
        room = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
        h1 = h0 + (i * BLOCK_H // 2 if DOWN else 0)
        w1 = w0 + (0 if DOWN else i * BLOCK_W // 2)
        tma.async_copy_global_to_shared(rows, [n0, h1, 0, w1, o0], ready.index(stage), room)
        stage, phase = next_stage(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def bring_taps(
    x, weight, rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end, channels,
    TOP: gl.constexpr, LEFT: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What one warp does: fill both rings, tile after tile, as they become free."""
    smem_x, smem_w, ready, free, ready_x, free_x = buffers
    ROWS: gl.constexpr = BLOCK_H + 2
    stage = 0
    phase = 0
    box = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles:
        n0, h0, w0, _phase_h, _phase_w, o0 = place_of(
            tile, tiles_h, tiles_w, tiles_o, 1, BLOCK_H, BLOCK_W, BLOCK_O, False
        )
        for column in range(begin, end):
            c = column // 3 * BLOCK_C
            across = column % 3
            # Of a barrier that none has arrived at yet, phase 1 counts as over.
            mbarrier.wait(free_x.index(box), turn ^ 1)
            bar = ready_x.index(box)
            mbarrier.expect(bar, ROWS * x.block_type.nbytes)
            for row in gl.static_range(ROWS):
                from_x = [n0, h0 - TOP + row, 0, w0 - LEFT + across, c]
                tma.async_copy_global_to_shared(x, from_x, bar, smem_x.index(box * ROWS + row))
            box, turn = next_stage(box, turn, STAGES_X)
            for down in gl.static_range(3):
                mbarrier.wait(free.index(stage), phase ^ 1)
                mbarrier.expect(ready.index(stage), weight.block_type.nbytes)
                from_w = [o0, (down * 3 + across) * channels + c]
                tma.async_copy_global_to_shared(
                    weight, from_w, ready.index(stage), smem_w.index(stage)
                )
                stage, phase = next_stage(stage, phase, STAGES)
        if rows is not None:
            stage, phase = _bring_rows(
                rows, buffers, stage, phase, n0, h0, w0, o0, BLOCK_H, BLOCK_W, STAGES
            )
        tile += gl.num_programs(0)
