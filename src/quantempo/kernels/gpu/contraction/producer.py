"""What the loading warp of the contraction on Hopper does: fill stages in shared memory.

A stage holds the operands of one step: a box of pixels, and one of weights. The residual of a tile,
128 x 128 values of two bytes, is as large: it comes after the last step, in a stage like any other.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

__all__ = ["bring", "halves", "next_stage", "place_of", "stage_before"]


@gluon.jit
def place_of(
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
def _copy(x, weight, from_x, from_o, from_c, apart, buffers, stage, some):
    """Start the copies of a box of x and one of weight into a stage, if `some`.

    Or of two boxes of weight, half as high: of values and, `apart` rows on, of their gates.
    """
    smem_x, smem_w, ready, _free = buffers
    ROWS: gl.constexpr = weight.block_type.shape[0]
    BOXES: gl.constexpr = smem_w.shape[1] // ROWS
    bar = ready.index(stage)
    mbarrier.expect(bar, x.block_type.nbytes + BOXES * weight.block_type.nbytes, pred=some)
    tma.async_copy_global_to_shared(x, from_x, bar, smem_x.index(stage), pred=some)
    for i in gl.static_range(BOXES):
        there = smem_w.index(stage).slice(i * ROWS, ROWS)
        from_w = [from_o // BOXES + i * apart, from_c]
        tma.async_copy_global_to_shared(weight, from_w, bar, there, pred=some)


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """Return the stage after one, and its phase: how often, modulo 2, all were filled before."""
    wraps = stage + 1 == STAGES
    return gl.where(wraps, 0, stage + 1), phase ^ wraps.to(gl.int32)


@gluon.jit
def stage_before(stage, STAGES: gl.constexpr):
    """Return the stage before one.

    Computed, not carried: of two names that begin a loop with one value Triton 3.6 carries one.
    """
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _load(
    operands, buffers, stage, step, tap, c, steps, steps0, channels, apart, place,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """Start the copies of a step: channels from c on of a tap, from step `steps` on of a side."""
    n0, h0, w0, phase_h, phase_w, o0 = place
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
    mine = True
    if SIDES > 0:
        mine = step < steps
    from_x = [n0, h0 + h, odd, w0 + w, from_c]
    from_w = tap * channels + c
    _copy(operands[0], operands[1], from_x, o0, from_w, apart, buffers, stage, mine)
    if SIDES > 0:
        c = (step - steps) * BLOCK_C
        mine = step >= steps
        if SIDES > 1:
            mine = mine & (step < steps + steps0)
        from_x = [n0, h0, 0, w0, c]
        _copy(operands[2], operands[3], from_x, o0, c, apart, buffers, stage, mine)
    if SIDES > 1:
        c = (step - steps - steps0) * BLOCK_C
        mine = step >= steps + steps0
        from_x = [n0, h0, 0, w0, c]
        _copy(operands[4], operands[5], from_x, o0, c, apart, buffers, stage, mine)


@gluon.jit
def halves(rows, buffers, stage):
    """Return the two parts of a stage as room for half a tile of `rows` each."""
    smem_x, smem_w, _ready, _free = buffers
    low = smem_x.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    high = smem_w.index(stage)._reinterpret(rows.dtype, rows.block_type.shape, rows.layout)
    return low, high


@gluon.jit
def _load_rows(
    rows, buffers, stage, place, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr,
    BLOCK_W: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile of the residual into a stage: what follows the last step."""
    ready = buffers[2]
    low, high = halves(rows, buffers, stage)
    n0, h0, w0, _phase_h, _phase_w, o0 = place
    bar = ready.index(stage)
    mbarrier.expect(bar, 2 * rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [n0, h0, 0, w0, o0], bar, low)
    # The second half of its pixels: a box is halved where it is not one wide.
    HALF_N: gl.constexpr = BLOCK_N // rows.block_type.shape[0]
    HALF_H: gl.constexpr = BLOCK_H // rows.block_type.shape[1]
    n1 = n0 + (BLOCK_N // 2 if HALF_N == 2 else 0)
    h1 = h0 + (BLOCK_H // 2 if HALF_H == 2 else 0)
    w1 = w0 + (BLOCK_W // 2 if HALF_N * HALF_H == 1 else 0)
    tma.async_copy_global_to_shared(rows, [n1, h1, 0, w1, o0], bar, high)


@gluon.jit
def bring(
    operands, rows, buffers, tiles, tiles_h, tiles_w, tiles_o, begin, end, steps, steps0, channels,
    apart,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_H: gl.constexpr,
    BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr, BLOCK_C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What one warp does: fill the stages, tile after tile, as they become free."""
    free = buffers[3]
    per_tap = gl.cdiv(channels, BLOCK_C)
    stage = 0
    phase = 0
    tile = gl.program_id(0)
    while tile < tiles:
        place = place_of(
            tile, tiles_h, tiles_w, tiles_o, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O, UPSAMPLE
        )
        tap = begin // per_tap
        c = (begin - tap * per_tap) * BLOCK_C
        for step in range(begin, end):
            # Of a barrier that none has arrived at yet, phase 1 counts as over.
            mbarrier.wait(free.index(stage), phase ^ 1)
            _load(
                operands, buffers, stage, step, tap, c, steps, steps0, channels, apart, place,
                KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BLOCK_C,
            )  # fmt: skip
            stage, phase = next_stage(stage, phase, STAGES)
            c += BLOCK_C
            over = c >= channels
            tap += over.to(gl.int32)
            c = gl.where(over, 0, c)
        if rows is not None:
            mbarrier.wait(free.index(stage), phase ^ 1)
            _load_rows(rows, buffers, stage, place, BLOCK_N, BLOCK_H, BLOCK_W)
            stage, phase = next_stage(stage, phase, STAGES)
        tile += gl.num_programs(0)
