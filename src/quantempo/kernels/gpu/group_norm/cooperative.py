"""GroupNorm, SiLU and quantization of few large maps, in one launch that reads once.

The map is register-resident, spread over all programs. A program takes the pixels of one chunk of
an image and a slab of whole groups, writes mean and M2 of its part of each group, waits at a grid
barrier for the programs of the same image and slab, puts together what they wrote, and normalizes
what it holds. That works only if all of them are resident at once: the launch is cooperative, which
the driver refuses otherwise, and no thread takes more registers than `plan.make_cooperative_plan`
counted on.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from math import gcd

import torch
import triton
import triton.language as tl

from quantempo.kernels.gpu.contraction.launch import stream_counters
from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.gpu.group_norm.arguments import Results, shared_arguments
from quantempo.kernels.gpu.group_norm.plan import APART, CooperativePlan, power_of_two
from quantempo.kernels.gpu.group_norm.portable import (
    _LOG2E,
    _VARYING,
    _inverse,
    _own,
    _place,
    _stored,
    _write,
)
from quantempo.kernels.ops.gn_act_quant import Normalization

__all__ = ["normalize_resident", "run"]

# Values of a thread that are written in one piece, at most.
_WHOLE = 96


@triton.jit
def _arrive(counter, last, order: tl.constexpr):
    """Arrive at a grid barrier: one thread adds 1 to its counter, which goes from `last` to 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred one; .reg .b32 me; mov.u32 me, %tid.x; setp.eq.u32 one, me, 0;"
        " @one red." + order + ".gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0; }",
        "=r,l,r", [counter.to(tl.int64), last], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _grid_barrier(counter, least):
    """Wait until `least` programs arrived (acquire): what they wrote before is seen after."""
    # One thread polls: 256 of each program would keep the counter from those that add to it.
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 seen; mov.u32 seen, %tid.x; setp.ne.u32 p, seen, 0; @p bra DONE;"
        " POLL: ld.acquire.gpu.global.u32 seen, [$1]; setp.lt.u32 p, seen, $2; @p bra POLL;"
        " DONE: mov.b32 $0, 0; }",
        "=r,l,r", [counter.to(tl.int64), least], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def _opaque(tile, zero, how: tl.constexpr, ON: tl.constexpr):
    """Return `tile` through an opaque no-op, so ptxas cannot keep its float32 copy live as well.

    how: the PTX operation (x or 0, x ^ 0, x - 0); another each time, or the results would be one.
    """
    if ON:
        tile = tl.inline_asm_elementwise(
            how + " $0, $1, $2;", "=r,r,r,r", [tile, zero], dtype=tile.dtype, is_pure=True, pack=2
        )
    return tile


@triton.jit
def _inside(
    pixel, first, pixels, C, OFFSET: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Return which LANES channels of a slab, from OFFSET on, there are of each pixel (P, LANES)."""
    lane = OFFSET + tl.arange(0, LANES)
    known = (lane < WIDTH) & (first + lane < C)
    return ((pixel < pixels) | EVEN) & known[None, :]


@triton.jit
def _fetch(
    x, skip, image, pixel, first, pixels, C1, C2, OFFSET: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, SOURCE: tl.constexpr,
):  # fmt: skip
    """Return the pixels of LANES channels of a slab, from OFFSET on."""
    inside = _inside(pixel, first, pixels, C1 + C2, OFFSET, LANES, WIDTH, EVEN)
    channel = (first + OFFSET + tl.arange(0, LANES))[None, :]
    place = _place(x, skip, image, pixel, channel, first, pixels, C1, C2, SOURCE)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _left(group, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """Return how many channels of a group lie in the first BLOCK_C of a slab."""
    return tl.minimum(tl.maximum(BLOCK_C - group * GROUP, 0), GROUP)


@triton.jit
def _moments(
    tile, count, zero, members, OFFSET: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Return mean and M2 (groups,) of what a tile holds of each group, in two passes.

    Of UNIT channels first, which a thread holds itself: few numbers go between threads. The units
    of a group are put together by Chan's formula.
    """
    UNITS: tl.constexpr = tile.shape[1] // UNIT
    cut: tl.constexpr = (tile.shape[0], UNITS, UNIT)
    value = tl.reshape(tile.to(tl.float32), cut)
    mean = tl.sum(tl.sum(value, axis=2), axis=0) / (count * UNIT)
    again = _opaque(tile, zero, "or.b32", KEEP)
    centred = tl.reshape(again.to(tl.float32), cut) - mean[None, :, None]
    if not EVEN:
        centred = tl.where(tl.arange(0, tile.shape[0])[:, None, None] < count, centred, 0.0)
    m2 = tl.sum(tl.sum(centred * centred, axis=2), axis=0)
    # A group is a row, which one warp holds.
    channel = OFFSET + UNIT * tl.arange(0, UNITS)
    member = tl.arange(0, members.shape[0])[:, None] == (channel // GROUP)[None, :]
    share = 1.0 / tl.maximum(members // UNIT, 1).to(tl.float32)
    mean_g = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1) * share
    off = mean[None, :] - mean_g[:, None]
    spread = m2[None, :] + off * off * (count * UNIT)
    return mean_g, tl.sum(tl.where(member, spread, 0.0), axis=1)


@triton.jit
def _together(
    place, chunks, pixels, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return mean and M2 of each group (GROUPS,) from those of all chunks, by Chan's formula."""
    group = tl.arange(0, GROUPS)[:, None]
    entry = tl.arange(0, PARTS * CHUNKS)[None, :]
    chunk = entry % CHUNKS
    there = chunk < chunks
    count = tl.maximum(tl.minimum(pixels - chunk * BLOCK_P, BLOCK_P), 0)
    if PARTS == 1:
        count = (count * GROUP).to(tl.float32)
    else:
        left = _left(group, BLOCK_C, GROUP)
        count = (count * tl.where(entry < CHUNKS, left, GROUP - left)).to(tl.float32)
    place += group * (PARTS * CHUNKS) + entry
    # Others wrote it while this kernel ran, so it must not come from this processor's cache.
    means = tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
    m2s = tl.load(place + GROUPS * PARTS * CHUNKS, mask=there, other=0.0, cache_modifier=".cg")
    mean = tl.sum(means * count, axis=1) / (pixels * GROUP)
    off = means - mean[:, None]
    return mean, tl.sum(m2s + off * off * count, axis=1)


@triton.jit
def _channels(first, LANES: tl.constexpr):
    """Return the channels (1, LANES) of codes to be written, 8 to a thread.

    As a thread loads them. Left to itself the compiler gives each 16, whose codes are one store,
    but then twice the factors are in registers, and twice the sums go between threads.
    """
    return tl.max_contiguous(first + tl.arange(0, LANES), 8)[None, :]


@triton.jit
def _pieces(tile, PIECES: tl.constexpr):
    """Return a tile (P, C) as two, of half the pixels each, or as one."""
    pieces = (tile,)
    if PIECES == 2:
        cut: tl.constexpr = (2, tile.shape[0] // 2, tile.shape[1])
        pieces = tl.split(tl.permute(tl.reshape(tile, cut), (1, 2, 0)))
    return pieces


@triton.jit
def _write_raw(
    tile, image, start, first, pixels, C1, C2, raw_x, raw_skip, of_x, of_skip, zero_x, zero_skip,
    qmax, OFFSET: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    SOURCE: tl.constexpr,
):  # fmt: skip
    """Write codes of what a program holds, as it is."""
    LANES: tl.constexpr = tile.shape[1]
    LINES: tl.constexpr = tile.shape[0] // PIECES
    channel = _channels(first + OFFSET, LANES)
    inverse = _own(of_x, of_skip, channel, first, C1, SOURCE)
    zero = _own(zero_x, zero_skip, channel, first, C1, SOURCE)
    pieces = _pieces(tile, PIECES)
    for i in tl.static_range(PIECES):
        if i > 0:
            # Written before the next is begun: else what is to be written fills the registers.
            tl.debug_barrier()
        pixel = start + i * LINES + tl.arange(0, LINES)[:, None]
        inside = _inside(pixel, first, pixels, C1 + C2, OFFSET, LANES, WIDTH, EVEN)
        place = _place(raw_x, raw_skip, image, pixel, channel, first, pixels, C1, C2, SOURCE)
        q = _stored(pieces[i].to(tl.float32) * inverse, zero, qmax)
        tl.store(place, q, mask=inside)


@triton.jit
def _finish(
    tile, mean, rstd, weight, bias, inverse, image, start, first, pixels, C, codes, zero_point,
    qmax, OFFSET: tl.constexpr, WIDTH: tl.constexpr, PIECES: tl.constexpr, EVEN: tl.constexpr,
    GROUP: tl.constexpr, SILU: tl.constexpr, QUANTIZE: tl.constexpr,
):  # fmt: skip
    """Write what a program holds, normalized by the moments of its groups."""
    LANES: tl.constexpr = tile.shape[1]
    LINES: tl.constexpr = tile.shape[0] // PIECES
    # Behind the last group is padding, of which nothing is written.
    group = tl.minimum((OFFSET + tl.arange(0, LANES)) // GROUP, mean.shape[0] - 1)
    a = tl.gather(rstd, group, 0) * weight
    b = bias - tl.gather(mean, group, 0) * a
    if SILU:
        # Of -log2(e) v: the exponent that SiLU wants.
        a = a * -_LOG2E
        b = b * -_LOG2E
    channel = _channels(first + OFFSET, LANES)
    pieces = _pieces(tile, PIECES)
    for i in tl.static_range(PIECES):
        if i > 0:
            # Written before the next is begun: else what is to be written fills the registers.
            tl.debug_barrier()
        pixel = start + i * LINES + tl.arange(0, LINES)[:, None]
        inside = _inside(pixel, first, pixels, C, OFFSET, LANES, WIDTH, EVEN)
        _write(
            pieces[i], a[None, :], b[None, :], inverse, image, pixel, channel, inside, pixels, C,
            codes, zero_point, qmax, True, SILU, QUANTIZE,
        )  # fmt: skip


@triton.jit
def _vector(of_channel, first, C, OFFSET: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Return what a slab's channels have of a vector (C,)."""
    lane = OFFSET + tl.arange(0, LANES)
    return tl.load(of_channel + first + lane, mask=(lane < WIDTH) & (first + lane < C), other=0.0)


@triton.jit(do_not_specialize=["zero", *_VARYING])
def normalize_resident(
    x, skip, gamma, beta, eps, scale, raw_scale, raw_row, bucket, codes, raw_x, raw_skip, partial,
    counters, zero, slabs, chunks, pixels, C1, C2, per_entry, zero_point, qmax, raw_zero_x,
    raw_zero_skip, raw_qmax, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    REST: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, SOURCE: tl.constexpr, SILU: tl.constexpr,
    QUANTIZE: tl.constexpr, RAW: tl.constexpr, MANY: tl.constexpr,
    RAW_MANY: tl.constexpr, PIECES: tl.constexpr, APART: tl.constexpr, PHASE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Normalize one (image, chunk of BLOCK_P pixels, slab of WIDTH channels, whole groups).

        M2_g = sum_k M2_k + n_k (mean_k - mean_g)^2      mean_g = sum_k n_k mean_k / sum_k n_k

    (Chan), first over the units k of UNIT channels of a group within the chunk, each of n_k values,
    then over the chunks. A slab is BLOCK_C channels and, where a power of two would be padded,
    REST more. partial: float32 (N, slabs, 2, GROUPS, 1 or 2 parts, CHUNKS), mean and M2 of each
    chunk's part of a group. SOURCE: as `portable`.

    Error: of the mean at most about 50 roundings of float32, relative to mean |x|; of M2 as many,
    relative to itself, since it is of centred values and nothing cancels.
    Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Updating formulae and a pairwise algorithm for
    computing sample variances, 1979.
    """
    if EARLY:
        wait_for_predecessor()
    KEEP: tl.constexpr = PHASE == 0
    program = tl.program_id(0)
    slab = program % slabs
    chunk = (program // slabs) % chunks
    image = program // slabs // chunks
    first = slab * WIDTH
    start = chunk * BLOCK_P
    pixel = start + tl.arange(0, BLOCK_P)[:, None]
    tile = _fetch(x, skip, image, pixel, first, pixels, C1, C2, 0, BLOCK_C, WIDTH, EVEN, SOURCE)
    if REST:
        rest = _fetch(
            x, skip, image, pixel, first, pixels, C1, C2, BLOCK_C, REST, WIDTH, EVEN, SOURCE
        )
    barrier = image * slabs + slab
    counter = counters + barrier * APART
    PARTS: tl.constexpr = 2 if REST else 1
    here = partial + barrier * (2 * GROUPS * PARTS * CHUNKS)
    if PHASE != 2:
        count = tl.minimum(pixels - start, BLOCK_P)
        target = here + tl.arange(0, GROUPS) * (PARTS * CHUNKS) + chunk
        members = _left(tl.arange(0, GROUPS), BLOCK_C, GROUP)
        mean, m2 = _moments(tile, count, zero, members, 0, UNIT, GROUP, EVEN, KEEP)
        tl.store(target, mean)
        tl.store(target + GROUPS * PARTS * CHUNKS, m2)
        if REST:
            mean, m2 = _moments(
                rest, count, zero, GROUP - members, BLOCK_C, UNIT, GROUP, EVEN, KEEP
            )
            tl.store(target + CHUNKS, mean)
            tl.store(target + CHUNKS + GROUPS * PARTS * CHUNKS, m2)
    if PHASE == 0:
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        _arrive(counter, 2 * chunks - 1, "release")
    if PHASE != 1:
        # What needs no moments is done while the others arrive.
        inverse = _inverse(scale, bucket, image, per_entry, QUANTIZE, MANY)
        if RAW:
            of_x = _inverse(raw_scale, bucket, image, per_entry, RAW, RAW_MANY)
            of_skip = of_x
            if SOURCE != 0:
                of_skip = _inverse(raw_row, bucket, image, per_entry, RAW, RAW_MANY)
            _write_raw(
                _opaque(tile, zero, "xor.b32", KEEP), image, start, first, pixels, C1, C2, raw_x,
                raw_skip, of_x, of_skip, raw_zero_x, raw_zero_skip, raw_qmax, 0, WIDTH, PIECES,
                EVEN, SOURCE,
            )  # fmt: skip
            if REST:
                _write_raw(
                    _opaque(rest, zero, "xor.b32", KEEP), image, start, first, pixels, C1, C2,
                    raw_x, raw_skip, of_x, of_skip, raw_zero_x, raw_zero_skip, raw_qmax, BLOCK_C,
                    WIDTH, 1, EVEN, SOURCE,
                )  # fmt: skip
        if PHASE == 0:
            _grid_barrier(counter, chunks)
            # The last that leaves finds 2 chunks - 1, and puts back the 0 that all began with.
            _arrive(counter, 2 * chunks - 1, "relaxed")
        # Not sooner: a thread has many of each.
        weight = _vector(gamma, first, C1 + C2, 0, BLOCK_C, WIDTH)
        bias = _vector(beta, first, C1 + C2, 0, BLOCK_C, WIDTH)
        mean, m2 = _together(here, chunks, pixels, BLOCK_P, BLOCK_C, CHUNKS, GROUP, GROUPS, PARTS)
        rstd = tl.rsqrt(m2 / (pixels * GROUP).to(tl.float32) + eps)
        _finish(
            _opaque(tile, zero, "sub.s32", KEEP), mean, rstd, weight, bias, inverse, image, start,
            first, pixels, C1 + C2, codes, zero_point, qmax, 0, WIDTH, PIECES, EVEN, GROUP, SILU,
            QUANTIZE,
        )  # fmt: skip
        if REST:
            weight = _vector(gamma, first, C1 + C2, BLOCK_C, REST, WIDTH)
            bias = _vector(beta, first, C1 + C2, BLOCK_C, REST, WIDTH)
            _finish(
                _opaque(rest, zero, "sub.s32", KEEP), mean, rstd, weight, bias, inverse, image,
                start, first, pixels, C1 + C2, codes, zero_point, qmax, BLOCK_C, WIDTH, 1, EVEN,
                GROUP, SILU, QUANTIZE,
            )  # fmt: skip


def run(call: Normalization, results: Results, plan: CooperativePlan) -> None:
    """Normalize into `results`; the call was checked, and has at least one group."""
    x, channels = call.x, call.channels
    batch, _, height, width = x.shape
    pixels, group = height * width, channels // call.groups
    slabs, chunks = -(-channels // plan.width), -(-pixels // plan.block_p)
    norm, tensors, numbers, constants = shared_arguments(call, results, plan.width)
    lines, parts = power_of_two(plan.width // group), 2 if plan.rest else 1
    counters = stream_counters(x.device)
    assert batch * slabs * APART <= counters.numel()
    size = (batch, slabs, 2, lines, parts, power_of_two(chunks))
    partial = torch.empty(size, dtype=torch.float32, device=x.device)
    soon = early(x.device)
    for phase in plan.phases:
        normalize_resident[(batch * slabs * chunks,)](
            x, call.skip, *norm, *tensors, partial, counters, 0, slabs, chunks, pixels, *numbers,
            WIDTH=plan.width, BLOCK_P=plan.block_p, BLOCK_C=plan.block_c, REST=plan.rest,
            CHUNKS=power_of_two(chunks), EVEN=pixels % plan.block_p == 0, UNIT=gcd(group, 8),
            GROUP=group, GROUPS=lines, **constants,
            PIECES=2 if plan.block_p * plan.block_c > _WHOLE * 32 * plan.warps else 1,
            APART=APART, PHASE=phase, EARLY=soon, num_warps=plan.warps, maxnreg=plan.registers,
            launch_cooperative_grid=True, launch_pdl=soon,
        )  # fmt: skip
