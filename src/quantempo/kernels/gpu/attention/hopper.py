"""8-bit attention on Hopper: a warp-specialised, persistent kernel.

A tile is 128 queries of a head, 64 for each of two warpgroups; a producer warp loads blocks of 128
keys and values. Scores of the next block and the product with the values of this one are in flight
together. Key t of a block has scale t % 8 // 2: a thread's scores of a row are those of one scale.
After whole tiles each program takes as many blocks of what is left, to be joined by `launch`.
Heads of D values are loaded and multiplied as 64 or 128, with zeros at the end.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quantempo.kernels.gpu.contraction.producer import next_stage

__all__ = ["attend"]


@gluon.jit
def _barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def _share(n, rounds, tiles, blocks):
    """Return the n-th tile of this program, the first of its blocks and how many.

    After whole tiles in `rounds` rounds every program takes as many blocks of what is left: the
    end of one tile and the beginning of another.
    """
    c = gl.program_id(0)
    programs = gl.num_programs(0)
    left = (tiles - rounds * programs) * blocks
    lo = c * left // programs
    hi = (c + 1) * left // programs
    edge = gl.minimum(hi, (lo // blocks + 1) * blocks)
    begin = gl.where(n == rounds, lo, edge)
    end = gl.where(n == rounds + 1, hi, edge)
    whole = n < rounds
    tile = gl.where(whole, n * programs + c, rounds * programs + begin // blocks)
    first = gl.where(whole, 0, begin % blocks)
    return tile, first, gl.where(whole, blocks, end - begin)


@gluon.jit
def _weights(
    s, m, total, sq, sk, inside, FIRST: gl.constexpr, FIXED: gl.constexpr, HEADROOM: gl.constexpr
):
    """Return 2^(s c - m), the m of a row, the sums (of a row and scale), what the old are worth.

    FIXED: m stays what it was of the first block.
    """
    ROWS: gl.constexpr = s.shape[0]
    KEYS: gl.constexpr = s.shape[1]
    flat: gl.constexpr = s.type.layout
    if FIRST:
        # Below any sum of products.
        s = gl.where(inside, s, -0x400000)
    s = s.reshape([ROWS, KEYS // 8, 4, 2])
    c = gl.expand_dims(sq, 1) * gl.expand_dims(sk, 0)
    new = m
    if FIRST or not FIXED:
        new = gl.max(gl.max(gl.max(s, 3), 1).to(gl.float32) * c, 1)
        if FIRST:
            new += HEADROOM
        else:
            new = gl.maximum(m, new)
    p = s.to(gl.float32) * gl.expand_dims(gl.expand_dims(c, 1), 3)
    p = gl.exp2(p - gl.expand_dims(gl.expand_dims(gl.expand_dims(new, 1), 1), 3))
    flat_p = gl.convert_layout(p.reshape([ROWS, KEYS]), flat, assert_trivial=True)
    if FIRST:
        flat_p = gl.where(inside, flat_p, 0.0)
        return flat_p, new, gl.sum(gl.sum(flat_p.reshape([ROWS, KEYS // 8, 4, 2]), 3), 1), new
    more = gl.sum(gl.sum(p, 3), 1)
    if FIXED:
        return flat_p, new, total + more, new
    alpha = gl.exp2(m - new)
    return flat_p, new, total * gl.expand_dims(alpha, 1) + more, alpha


@gluon.jit
def _scales(scales, tile, first, sizes, row, group):
    """Return the scales of the rows of a tile, and of its first two blocks."""
    q_scale, k_scale, factor = scales
    _rounds, _tiles, q_blocks, blocks, q_tokens, _k_tokens, _heads = sizes
    head = tile // q_blocks
    row = tile % q_blocks * 128 + row
    inside = (row < q_tokens) & (first >= 0)
    sq = gl.load(q_scale + head * q_tokens + row, mask=inside, other=0.0) * factor
    steps = k_scale + head * blocks * 4 + group
    j = blocks - 1 - first
    return sq, gl.load(steps + j * 4), gl.load(steps + gl.maximum(j - 1, 0) * 4)


@gluon.jit
def _consume(
    WHICH: gl.constexpr, buffers, scales, results, over, sizes, D: gl.constexpr,
    FIXED: gl.constexpr, HEADROOM: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Compute 64 queries of tile after tile; blocks of keys come last to first."""
    smem_q, smem_k, smem_v, q_ready, q_free, ready, free = buffers
    rounds, tiles, q_blocks, blocks, q_tokens, k_tokens, _heads = sizes
    STAGES: gl.constexpr = smem_k.shape[0]
    KEYS: gl.constexpr = smem_k.shape[2]
    ROOM: gl.constexpr = smem_k.shape[4]
    mma_s: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 32])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROOM, 16])
    rows_o: gl.constexpr = gl.SliceLayout(1, mma_o)
    left: gl.constexpr = gl.DotOperandLayout(0, mma_o, 2)
    s = gl.full([64, KEYS], 0, gl.int32, mma_s)
    four: gl.constexpr = s.reshape([64, KEYS // 8, 4, 2]).type.layout
    pairs: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, four))
    rows_s: gl.constexpr = gl.SliceLayout(1, pairs)
    acc = gl.full([64, ROOM], 0.0, gl.float32, mma_o)
    group = gl.arange(0, 4, gl.SliceLayout(0, pairs))
    row = WHICH * 64 + gl.arange(0, 64, rows_s)
    at = 0
    was = 0
    n = 0
    tile, first, count = _share(0, rounds, tiles, blocks)
    sq, sk, sk_next = _scales(scales, tile, first, sizes, row, group)
    mbarrier.wait(q_ready.index(WHICH), 0, pred=count > 0)
    mbarrier.wait(ready.index(0), 0, pred=count > 0)
    q = smem_q.index(WHICH).reshape([64, ROOM])
    keys = smem_k.index(0).reshape([KEYS, ROOM]).permute((1, 0))
    s = warpgroup_mma(q, keys, s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    while count > 0:
        stage = at
        phase = was
        q = smem_q.index(n % 2 * 2 + WHICH).reshape([64, ROOM])
        j = blocks - 1 - first
        steps = scales[1] + tile // q_blocks * blocks * 4 + group
        # The last block may have fewer keys.
        column = gl.arange(0, KEYS, gl.SliceLayout(0, mma_s)) + j * KEYS
        inside = gl.expand_dims(column < k_tokens, 0)
        p, m, total, alpha = _weights(s, 0.0, 0.0, sq, sk, inside, True, FIXED, HEADROOM)
        p16 = gl.convert_layout(p.to(smem_v.dtype), left, assert_trivial=True)
        at, was = next_stage(stage, phase, STAGES)
        mbarrier.wait(ready.index(at), was, pred=count > 1)
        for i in range(1, count):
            sk = sk_next
            sk_next = gl.load(steps + gl.maximum(j - 1 - i, 0) * 4)
            keys = smem_k.index(at).reshape([KEYS, ROOM]).permute((1, 0))
            s = warpgroup_mma(q, keys, s, use_acc=False, is_async=True)
            if not FIXED:
                acc = acc * gl.expand_dims(gl.convert_layout(alpha, rows_o), 1)
            values = smem_v.index(stage).reshape([KEYS, ROOM])
            acc = warpgroup_mma(p16, values, acc, use_acc=i > 1, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            p, m, total, alpha = _weights(s, m, total, sq, sk, None, False, FIXED, HEADROOM)
            later = gl.convert_layout(p.to(smem_v.dtype), left, assert_trivial=True)
            # Of the next step. Across this loop the assembler does not move what comes before.
            then, then_was = next_stage(at, was, STAGES)
            mbarrier.wait(ready.index(then), then_was, pred=i + 1 < count)
            acc, p16, later, m, total, alpha = warpgroup_mma_wait(
                0, deps=[acc, p16, later, m, total, alpha]
            )
            mbarrier.arrive(free.index(stage))
            p16 = later
            stage = at
            phase = was
            at = then
            was = then_was
        mbarrier.arrive(q_free.index(n % 2 * 2 + WHICH))
        if not FIXED:
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, rows_o), 1)
        values = smem_v.index(stage).reshape([KEYS, ROOM])
        acc = warpgroup_mma(p16, values, acc, use_acc=count > 1, is_async=True)
        # The first scores of the next tile while this is written (after the last: of no use).
        n += 1
        tile_next, first_next, count_next = _share(n, rounds, tiles, blocks)
        tile_next = gl.where(count_next > 0, tile_next, tile)
        sq, sk, sk_next = _scales(scales, tile_next, first_next, sizes, row, group)
        mbarrier.wait(q_ready.index(n % 2 * 2 + WHICH), n // 2 % 2, pred=count_next > 0)
        mbarrier.wait(ready.index(at), was, pred=count_next > 0)
        q_next = smem_q.index(n % 2 * 2 + WHICH).reshape([64, ROOM])
        keys = smem_k.index(at).reshape([KEYS, ROOM]).permute((1, 0))
        s = warpgroup_mma(q_next, keys, s, use_acc=False, is_async=True)
        total = gl.sum(total, 1)
        if FIXED:
            # More than the 16 bits of p hold, some of it: all is to be done again.
            mask = (tile % q_blocks * 128 + row < q_tokens) & (total >= LIMIT)
            gl.store(over + row * 0, 1, mask=mask)
        acc, total = warpgroup_mma_wait(1, deps=[acc, total])
        mbarrier.arrive(free.index(stage))
        where = (tile, n - 1 - rounds, count == blocks, row)
        _write(WHICH, acc, m, total, results, where, sizes, D)
        s = warpgroup_mma_wait(0, deps=[s])
        tile = tile_next
        first = first_next
        count = count_next


@gluon.jit
def _write(WHICH: gl.constexpr, acc, m, total, results, where, sizes, D: gl.constexpr):
    """Write rows of y, or the sums of a share: those of the weights and what they refer to."""
    y, part, part_rows = results
    tile, which_share, whole, row = where
    _rounds, _tiles, q_blocks, _blocks, q_tokens, _k_tokens, heads = sizes
    ROOM: gl.constexpr = acc.shape[1]
    mma_o: gl.constexpr = acc.type.layout
    rows_o: gl.constexpr = gl.SliceLayout(1, mma_o)
    d = gl.expand_dims(gl.arange(0, ROOM, gl.SliceLayout(0, mma_o)), 0)
    t = WHICH * 64 + gl.arange(0, 64, rows_o)
    if whole:
        inverse = gl.convert_layout(1.0 / total, rows_o)
        t += tile % q_blocks * 128
        head = tile // q_blocks
        at = ((head // heads * q_tokens + t).to(gl.int64) * heads + head % heads) * D
        inside = gl.expand_dims(t < q_tokens, 1)
        gl.store(
            y + gl.expand_dims(at, 1) + d,
            (acc * gl.expand_dims(inverse, 1)).to(y.dtype.element_ty),
            mask=inside if D == ROOM else inside & (d < D),
        )
    else:
        slot = gl.program_id(0) * 2 + which_share
        gl.store(part + gl.expand_dims((slot * 128 + t) * ROOM, 1) + d, acc)
        gl.store(part_rows + slot * 256 + row, m)
        gl.store(part_rows + slot * 256 + 128 + row, total)


@gluon.jit
def _produce(q, k, v, buffers, sizes):
    """Start the loads of queries of each tile, two tiles ahead, and of its keys and values."""
    smem_q, smem_k, smem_v, q_ready, q_free, ready, free = buffers
    rounds, tiles, q_blocks, blocks, _q_tokens, _k_tokens, heads = sizes
    STAGES: gl.constexpr = smem_k.shape[0]
    KEYS: gl.constexpr = smem_k.shape[2]
    stage = 0
    phase = 0
    n = 0
    tile, first, count = _share(0, rounds, tiles, blocks)
    while count > 0:
        t = tile % q_blocks * 128
        image = tile // q_blocks // heads
        head = tile // q_blocks % heads
        for i in gl.static_range(2):
            slot = n % 2 * 2 + i
            bar = q_ready.index(slot)
            mbarrier.wait(q_free.index(slot), n // 2 % 2 ^ 1)
            mbarrier.expect(bar, q.block_type.nbytes)
            there = smem_q.index(slot)
            tma.async_copy_global_to_shared(q, [image, t + i * 64, head, 0], bar, there)
        for i in range(count):
            t = (blocks - 1 - first - i) * KEYS
            bar = ready.index(stage)
            mbarrier.wait(free.index(stage), phase ^ 1)
            mbarrier.expect(bar, k.block_type.nbytes + v.block_type.nbytes)
            tma.async_copy_global_to_shared(k, [image, t, head, 0], bar, smem_k.index(stage))
            tma.async_copy_global_to_shared(v, [image, t, head, 0], bar, smem_v.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
        n += 1
        tile, first, count = _share(n, rounds, tiles, blocks)


@gluon.jit(
    do_not_specialize=["rounds", "tiles", "q_blocks", "blocks", "q_tokens", "k_tokens", "heads"]
)
def attend(
    q, k, v, q_scale, k_scale, y, part, part_rows, over, rounds, tiles, q_blocks, blocks, q_tokens,
    k_tokens, factor, heads, D: gl.constexpr, STAGES: gl.constexpr, FIXED: gl.constexpr,
    HEADROOM: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Compute y, or shares of it; q, k, v: tensor descriptors of codes, codes and values.

    part, part_rows: two shares of each program: sums (128, D), references and sums of weights
    (2, 128). FIXED: weights refer to the first block, HEADROOM powers of two above its maximum, and
    `over` is set where a sum of them reaches LIMIT; otherwise all is computed, if `over` is set,
    relative to the largest score so far.
    """
    # Both in one condition would load before FIXED is looked at.
    if not FIXED:  # noqa: SIM102
        if gl.load(over) == 0:
            return
    box_q: gl.constexpr = [4] + q.block_type.shape  # noqa: RUF005 - Gluon has no [a, *b]
    box_k: gl.constexpr = [STAGES] + k.block_type.shape  # noqa: RUF005
    smem_q = gl.allocate_shared_memory(q.dtype, box_q, q.layout)
    smem_k = gl.allocate_shared_memory(k.dtype, box_k, k.layout)
    smem_v = gl.allocate_shared_memory(v.dtype, box_k, v.layout)
    q_ready = _barriers(4, 1)
    q_free = _barriers(4, 1)
    ready = _barriers(STAGES, 1)
    free = _barriers(STAGES, 2)
    fence_async_shared()
    buffers = (smem_q, smem_k, smem_v, q_ready, q_free, ready, free)
    sizes = (rounds, tiles, q_blocks, blocks, q_tokens, k_tokens, heads)
    scales = (q_scale, k_scale, factor)
    results = (y, part, part_rows)
    # One tuple of all arguments for both ends Triton 3.6 in an assertion.
    gl.warp_specialize(
        [
            (_consume, (0, buffers, scales, results, over, sizes, D, FIXED, HEADROOM, LIMIT)),
            (_consume, (1, buffers, scales, results, over, sizes, D, FIXED, HEADROOM, LIMIT)),
            (_produce, (q, k, v, buffers, sizes)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
