"""GroupNorm, SiLU and quantization on Hopper, with the slab in shared memory.

What `portable.one_launch` does, with one difference: TMA loads the slab of a program into shared
memory once, a box of pixels at a time. Statistics start with the first box, and what is normalized
is read from shared memory, not a second time out of the caches.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.gpu.group_norm import portable
from quantempo.kernels.gpu.group_norm.plan import SharedPlan
from quantempo.kernels.gpu.group_norm.portable import Numbers, Results, inverse_of, raw_grid
from quantempo.kernels.ops.gn_act_quant import Normalization

__all__ = ["normalize_slab", "run"]

# 1.5 * 2^23: float32 of this size hold integers only, so adding it rounds, ties to even.
_MAGIC = gl.constexpr(12582912.0)
_MAGIC_BITS = gl.constexpr(0x4B400000)
_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _pooled(mean_a, var_a, mean_b, var_b):
    """Return mean and variance of two samples of one size, put together (Chan)."""
    # For reductions across threads only, which are balanced trees.
    off = mean_b - mean_a
    return 0.5 * (mean_a + mean_b), 0.5 * (var_a + var_b) + 0.25 * off * off


@gluon.jit
def _float(values):
    """Return 16-bit values as float32; bfloat16 in one instruction each, a pair at a time."""
    if values.dtype == gl.bfloat16:
        wide = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r", [values], dtype=gl.int32, is_pure=True, pack=2,
        ).to(gl.float32, bitcast=True)  # fmt: skip
    else:
        wide = values.to(gl.float32)
    return wide


@gluon.jit
def _codes(value, factor, zero_point, qmax, ALL: gl.constexpr):
    """Return the codes of value factor: clamp(rne + z, 0, qmax) - 128, int8."""
    # ALL: qmax is 255, the largest stored code 127, and packing saturates.
    rounded = gl.fma(value, factor, _MAGIC)
    rounded = gl.maximum(rounded, (0 - zero_point).to(gl.float32) + _MAGIC)
    if not ALL:
        rounded = gl.minimum(rounded, (qmax - zero_point).to(gl.float32) + _MAGIC)
    whole = rounded.to(gl.int32, bitcast=True) + (zero_point - 128 - _MAGIC_BITS)
    return gl.inline_asm_elementwise(
        "{ .reg .b32 upper; cvt.pack.sat.s8.s32.b32 upper, $4, $3, 0;"
        " cvt.pack.sat.s8.s32.b32 $0, $2, $1, upper; }",
        "=r,r,r,r,r", [whole], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _approximate(of: gl.constexpr, value):
    """Return 2^value ("ex2") or 1 / value ("rcp"), off by 2^-22 of itself, tiny results 0."""
    return gl.inline_asm_elementwise(
        of + ".approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _place(x, skip, row, channel, C1, C2, SOURCE: gl.constexpr):
    """Return where rows x channels of torch.cat([x, skip], 1) are, each in its own tensor."""
    place = x + row.to(gl.int64) * C1 + channel
    if SOURCE != 0:
        place = gl.where(channel < C1, place, skip + row.to(gl.int64) * C2 + (channel - C1))
    return place


@gluon.jit
def _group(mean, var, eps, GROUP: gl.constexpr, tile: gl.constexpr):
    """Return mean and 1 / deviation of each channel's group (1, C) from (P, C) equal samples."""
    COLS: gl.constexpr = mean.shape[1]
    if COLS % GROUP == 0:
        # Over the channels first, which a thread holds itself: few values go between threads. By
        # sums, in any order: a thread adds up its values one by one, not in pairs of equal weight.
        cut: gl.constexpr = [mean.shape[0], COLS // GROUP, GROUP]
        share: gl.constexpr = 1.0 / (mean.shape[0] * GROUP)
        mean = mean.reshape(cut)
        centre = gl.sum(gl.sum(mean, axis=2), axis=0) * share
        centre = gl.expand_dims(gl.expand_dims(centre, 0), 2)
        off = mean - centre
        var = gl.sum(gl.sum(var.reshape(cut) + off * off, axis=2), axis=0) * share
        rstd = gl.expand_dims(gl.expand_dims(gl.rsqrt(var + eps), 0), 2)
        blank = gl.full([1, COLS], 0.0, gl.float32, tile).reshape([1, COLS // GROUP, GROUP])
        centre += blank
        rstd += blank
        centre = gl.convert_layout(centre.reshape([1, COLS]), tile)
        rstd = gl.convert_layout(rstd.reshape([1, COLS]), tile)
    else:
        # Who belongs together is a matrix; a column of it goes down the lanes of a warp.
        mean, var = gl.reduce((mean, var), 0, _pooled)
        matrix: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, gl.num_warps()], [0, 1])
        other = gl.arange(0, COLS, gl.SliceLayout(1, matrix)) // GROUP
        own = gl.arange(0, COLS, gl.SliceLayout(0, matrix)) // GROUP
        same = gl.expand_dims(other, 1) == gl.expand_dims(own, 0)
        means = gl.expand_dims(gl.convert_layout(mean, gl.SliceLayout(1, matrix)), 1)
        centre = gl.sum(gl.where(same, means, 0.0), axis=0) * (1.0 / GROUP)
        off = means - gl.expand_dims(centre, 0)
        variances = gl.expand_dims(gl.convert_layout(var, gl.SliceLayout(1, matrix)), 1)
        spread = gl.sum(gl.where(same, variances + off * off, 0.0), axis=0)
        flat: gl.constexpr = gl.SliceLayout(0, tile)
        rstd = gl.convert_layout(gl.rsqrt(spread * (1.0 / GROUP) + eps), flat)
        rstd = gl.expand_dims(rstd, 0)
        centre = gl.expand_dims(gl.convert_layout(centre, flat), 0)
    return centre, rstd


@gluon.jit
def _copy_slab(
    slab, from_x, from_skip, row, first, C1, C2, WIDTH: gl.constexpr, PIECE: gl.constexpr,
    tile: gl.constexpr,
):  # fmt: skip
    """Load a slab that begins in x and ends in skip, for which no box fits, by the threads."""
    COLS: gl.constexpr = slab.shape[2]
    ROWS: gl.constexpr = slab.shape[1]
    lane = gl.expand_dims(gl.arange(0, COLS, gl.SliceLayout(0, tile)), 0)
    line = gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(1, tile)), 1)
    known = (lane < WIDTH) & (first + lane < C1 + C2)
    for i in range(slab.shape[0]):
        for j in gl.static_range(ROWS // PIECE):
            pixel = row + i * ROWS + j * PIECE + line
            place = _place(from_x, from_skip, pixel, first + lane, C1, C2, 2)
            values = gl.load(place, mask=known, other=0.0)
            slab.index(i).slice(j * PIECE, PIECE).store(values)
    gl.thread_barrier()


@gluon.jit
def _tma_load(slab, bars, x, skip, row, first, C1, SOURCE: gl.constexpr, across):
    """Start the TMA loads of a slab that lies in x or in skip; none where it is across both."""
    BOXES: gl.constexpr = slab.shape[0]
    ROWS: gl.constexpr = slab.shape[1]
    right = False
    if SOURCE != 0:
        right = first >= C1
    left = (not right) & (not across)
    for i in gl.static_range(BOXES):
        bar = bars.index(i)
        mbarrier.expect(bar, x.block_type.nbytes, pred=not across)
        tma.async_copy_global_to_shared(x, [row + i * ROWS, first], bar, slab.index(i), pred=left)
        if SOURCE != 0:
            there = [row + i * ROWS, first - C1]
            tma.async_copy_global_to_shared(skip, there, bar, slab.index(i), pred=right)


@gluon.jit(do_not_specialize=["slabs", "per_entry", "zero_point", "qmax", "raw_zero_x",
                              "raw_zero_skip", "raw_qmax"])  # fmt: skip
def normalize_slab(
    x, skip, from_x, from_skip, gamma, beta, eps, t, slabs, C1, C2, per_entry, zero_point, qmax,
    raw_zero_x, raw_zero_skip, raw_qmax, PIXELS: gl.constexpr, WIDTH: gl.constexpr,
    COLS: gl.constexpr, ROWS: gl.constexpr, GROUP: gl.constexpr, EVEN: gl.constexpr,
    FORM: gl.constexpr, ALL: gl.constexpr, RAW_ALL: gl.constexpr, EARLY: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Normalize one (image, slab of WIDTH channels, whole groups), padded to COLS.

    x, skip: descriptors of boxes (ROWS, COLS) of (N P, C); from_x, from_skip: the same tensors.
    EVEN: WIDTH = COLS divides the channels. A thread holds 8 channels of one pixel in PIECE; of its
    pixels it sums x - x0 and (x - x0)^2, x0 its first, whence mean and variance: at most n of them
    lose the bits of n, and n is a few. Samples of one size are put together by Chan's formula.
    """
    s = Numbers(C1, C2, per_entry, zero_point, qmax, raw_zero_x, raw_zero_skip, raw_qmax)
    SOURCE: gl.constexpr = FORM.SOURCE
    ACROSS: gl.constexpr = COLS // 8
    PIECE: gl.constexpr = 32 // ACROSS * num_warps
    PIECES: gl.constexpr = ROWS // PIECE
    BOXES: gl.constexpr = PIXELS // ROWS
    tile: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])
    flat: gl.constexpr = gl.SliceLayout(0, tile)
    slab = gl.allocate_shared_memory(x.dtype, [BOXES, ROWS, COLS], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [BOXES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BOXES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    if EARLY:
        wait_for_predecessor()
    image = gl.program_id(0) // slabs
    first = (gl.program_id(0) % slabs) * WIDTH
    row = image * PIXELS
    across = False
    if SOURCE == 2:
        across = (first < C1) & (first + WIDTH > C1)
    _tma_load(slab, bars, x, skip, row, first, C1, SOURCE, across)
    coming = not across
    if SOURCE == 2:  # noqa: SIM102 - decided while compiling, so not together with the other
        if across:
            _copy_slab(slab, from_x, from_skip, row, first, C1, C2, WIDTH, PIECE, tile)
    # What does not depend on the slab arrives while it is under way.
    lane = gl.arange(0, COLS, flat)
    known = (lane < WIDTH) & (first + lane < C1 + C2)
    if EVEN:
        known = lane < COLS
    weight = gl.load(gamma + first + lane, mask=known, other=0.0)
    bias = gl.load(beta + first + lane, mask=known, other=0.0)
    inverse = inverse_of(t.scale, image, t, s, FORM.MANY)
    mbarrier.wait(bars.index(0), 0, pred=coming)
    shift = _float(slab.index(0).slice(0, PIECE).load(tile))
    sums = gl.full([PIECE, COLS], 0.0, gl.float32, tile)
    squares = gl.full([PIECE, COLS], 0.0, gl.float32, tile)
    for i in range(BOXES):
        mbarrier.wait(bars.index(i), 0, pred=coming)
        for j in gl.static_range(PIECES):
            off = _float(slab.index(i).slice(j * PIECE, PIECE).load(tile)) - shift
            sums += off
            squares = gl.fma(off, off, squares)
    # What goes between threads may lie where the barriers did: until they are invalidated, the chip
    # writes there (of 60 equal calls all differed, on an H200).
    for i in gl.static_range(BOXES):
        mbarrier.invalidate(bars.index(i))
    off = sums * (1.0 / (BOXES * PIECES))
    var = gl.maximum(squares * (1.0 / (BOXES * PIECES)) - off * off, 0.0)
    centre, rstd = _group(shift + off, var, eps, GROUP, tile)
    a = rstd * gl.expand_dims(weight, 0)
    b = gl.expand_dims(bias, 0) - centre * a
    if FORM.SILU:
        # Of -log2(e) v: the exponent that SiLU wants.
        a = a * -_LOG2E
        b = b * -_LOG2E
    channel = gl.expand_dims(first + lane, 0)
    line = gl.expand_dims(gl.arange(0, PIECE, gl.SliceLayout(1, tile)), 1)
    inside = gl.expand_dims(known, 0)
    if FORM.RAW:
        raw_inverse, raw_zero = raw_grid(image, channel, first, t, s, FORM)
        raw_step = C1
        if SOURCE != 0:
            raw_step = gl.where(channel < C1 if SOURCE == 2 else first < C1, C1, C2)
        raw_target = _place(t.raw_x, t.raw_skip, row + line, channel, C1, C2, SOURCE)
    target = t.codes + row.to(gl.int64) * (C1 + C2) + (line * (C1 + C2) + channel)
    for i in range(BOXES):
        for j in gl.static_range(PIECES):
            value = _float(slab.index(i).slice(j * PIECE, PIECE).load(tile))
            if FORM.RAW:
                q = _codes(value, raw_inverse, raw_zero, raw_qmax, RAW_ALL)
                gl.store(raw_target + (i * ROWS + j * PIECE) * raw_step, q, mask=inside)
            value = gl.fma(value, a, b)
            factor = inverse
            if FORM.SILU:
                factor = _approximate("rcp", 1.0 + _approximate("ex2", value))
                value = value * (-_LN2 * inverse)
            place = target + (i * ROWS + j * PIECE) * (C1 + C2)
            if FORM.QUANTIZE:
                q = _codes(value, factor, zero_point, qmax, ALL)
                gl.store(place, q, mask=inside)
            else:
                gl.store(place, (value * factor).to(t.codes.dtype.element_ty), mask=inside)


def run(call: Normalization, results: Results, plan: SharedPlan) -> None:
    """Normalize into `results`; the call was checked, and has at least one group."""
    x, channels = call.x, call.channels
    batch, _, height, width = x.shape
    pixels, slabs, soon = height * width, -(-channels // plan.width), early(x.device)
    norm, tensors, numbers, form = portable.shared_arguments(call, results, plan.width)
    box = [plan.rows, plan.cols]
    kind = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(box, kind)

    def describe(image: Tensor | None) -> TensorDescriptor | None:
        if image is None:
            return None
        wide = image.shape[1]
        return TensorDescriptor(image, [batch * pixels, wide], [wide, 1], box, layout)

    normalize_slab[(batch * slabs,)](
        describe(x), describe(call.skip), x, call.skip, *norm, tensors, slabs, *numbers,
        PIXELS=pixels, WIDTH=plan.width, COLS=plan.cols, ROWS=plan.rows,
        GROUP=channels // call.groups, EVEN=plan.width == plan.cols and channels % plan.width == 0,
        FORM=form, ALL=call.qmax == 255, RAW_ALL=call.raw_qmax == 255, EARLY=soon,
        num_warps=plan.warps, launch_pdl=soon,
    )  # fmt: skip
