"""The Triton kernels behind `gn_act_quant.launch`.

Names: N images of P pixels and C1 + C2 channels in channels_last memory; a program owns one image,
a slab of WIDTH channels, whole groups, padded to BLOCK_C, and sees BLOCK_P pixels at a time.
"""

from collections import namedtuple
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.gpu.dependent_launch import wait_for_predecessor
from quantempo.kernels.ops.gn_act_quant import Normalization

__all__ = [
    "Form", "Numbers", "Results", "Tensors", "apply", "channel_moments", "inverse_of",
    "one_launch", "raw_grid", "shared_arguments", "stored",
]  # fmt: skip

Results = tuple[Tensor, Tensor, Tensor]
Tensors = namedtuple("Tensors", "scale raw_scale raw_row bucket codes raw_x raw_skip")
# per_entry: images of a bucket entry.
Numbers = namedtuple("Numbers", "C1 C2 per_entry zero_point qmax raw_zero_x raw_zero_skip raw_qmax")


class Form(NamedTuple):
    """What kernels are compiled for; RAW: codes of x and skip too; MANY, RAW_MANY: by bucket.

    SOURCE: 0 no skip, 1 every slab lies in x or in skip, 2 a slab may lie in both.
    """

    SOURCE: int
    SILU: bool
    QUANTIZE: bool
    RAW: bool
    MANY: bool
    RAW_MANY: bool


def shared_arguments(call: Normalization, results: Results, width: int) -> tuple[Any, ...]:
    """Return (gamma, beta, eps), tensors, numbers, form of a call of slabs of `width` channels."""
    x, skip, scale, raw = call.x, call.skip, call.scale, call.raw_scales
    c1, c2 = x.shape[1], 0 if skip is None else skip.shape[1]
    points = tuple(call.raw_zero_points) or (0,)
    raw_row = raw if raw is None or skip is None else raw[-1]
    zeros = call.zero_point, call.qmax, points[0], points[-1], call.raw_qmax
    many = scale is not None and len(scale) > 1, raw is not None and raw.shape[1] > 1
    source = 0 if skip is None else 2 if c1 % width else 1
    return (
        (call.gamma, call.beta, call.eps),
        Tensors(scale, raw, raw_row, call.bucket, *results),
        Numbers(c1, c2, len(x) // call.bucket.numel(), *zeros),
        Form(source, call.silu, scale is not None, raw is not None, *many),
    )


# 1.5 * 2^23: float32 of this size hold integers only, so adding it rounds, ties to even.
_MAGIC = tl.constexpr(12582912.0)
_MAGIC_BITS = tl.constexpr(0x4B400000)
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)

_VARYING = [
    "slabs", "chunks", "pixels", "per_entry", "zero_point", "qmax", "raw_zero_x", "raw_zero_skip",
    "raw_qmax",
]  # fmt: skip


@triton.jit
def _place(x, skip, image, pixel, channel, first, pixels, C1, C2, SOURCE: tl.constexpr):
    """Return where the (P, C) tile of torch.cat([x, skip]) is, each channel in its own tensor."""
    base = image.to(tl.int64) * pixels
    if SOURCE == 1:
        # One pointer for the slab, chosen once: a branch around the load would keep the compiler
        # from moving loads ahead.
        right = first >= C1
        stride = tl.where(right, C2, C1)
        place = tl.where(right, skip + base * C2 - C1, x + base * C1) + (pixel * stride + channel)
    else:
        place = x + base * C1 + (pixel * C1 + channel)
        if SOURCE == 2:
            there = skip + base * C2 + (pixel * C2 + (channel - C1))
            place = tl.where(channel < C1, place, there)
    return place


@triton.jit
def stored(scaled, zero_point, qmax):
    """Return the codes of a / scale: clamp(rne + z, 0, qmax) - 128, int8."""
    # Beyond the integers that the sum holds exactly it and its bits are still monotone, those of
    # negative sums first: clamp after rounding. An addition and a minimum are one instruction.
    bits = tl.maximum((scaled + _MAGIC).to(tl.int32, bitcast=True), _MAGIC_BITS - zero_point)
    return tl.minimum(bits + (zero_point - 128 - _MAGIC_BITS), qmax - 128).to(tl.int8)


@triton.jit
def _own(of_x, of_skip, channel, first, C1, SOURCE: tl.constexpr):
    """Return the one of two numbers that belongs to the tensor a channel lies in."""
    own = of_x
    if SOURCE == 1:
        own = tl.where(first < C1, of_x, of_skip)
    if SOURCE == 2:
        own = tl.where(channel < C1, of_x, of_skip)
    return own


@triton.jit
def inverse_of(scale, image, t, s, MANY: tl.constexpr):
    """Return 1 / scale of an image; 1 without a scale."""
    inverse = 1.0
    if scale is not None:
        entry = 0
        if MANY:
            entry = tl.load(t.bucket + image // s.per_entry)
        inverse = 1.0 / tl.load(scale + entry)
    return inverse


@triton.jit
def raw_grid(image, channel, first, t, s, FORM: tl.constexpr):
    """Return 1 / scale and zero point of the codes of x and skip themselves, if asked for."""
    inverse = inverse_of(t.raw_scale, image, t, s, FORM.RAW_MANY)
    zero = s.raw_zero_x
    if FORM.RAW and FORM.SOURCE != 0:
        of_skip = inverse_of(t.raw_row, image, t, s, FORM.RAW_MANY)
        inverse = _own(inverse, of_skip, channel, first, s.C1, FORM.SOURCE)
        zero = _own(s.raw_zero_x, s.raw_zero_skip, channel, first, s.C1, FORM.SOURCE)
    return inverse, zero


@triton.jit
def _write(
    tile, a, b, inverse, raw, image, pixel, channel, first, inside, pixels, t, s,
    NORM: tl.constexpr, FORM: tl.constexpr, MAIN: tl.constexpr = True,
):  # fmt: skip
    """Write act(v), v = a tile + b, quantized or not, and with RAW the codes of the tile itself.

    With SILU, a and b give -log2(e) v.
    """
    if MAIN:
        value = tile.to(tl.float32)
        if NORM:
            value = value * a + b
        elif FORM.SILU:
            value = value * -_LOG2E
        if FORM.SILU:
            # v / (1 + exp(-v)) with a square root: the chip's approximate one needs no guard
            # instructions, its approximate division needs three.
            root = tl.rsqrt(1.0 + tl.exp2(value))
            value = (value * (-_LN2 * inverse)) * root * root
        elif FORM.QUANTIZE:
            value = value * inverse
        C = s.C1 + s.C2
        target = t.codes + image.to(tl.int64) * pixels * C + pixel * C + channel
        if FORM.QUANTIZE:
            tl.store(target, stored(value, s.zero_point, s.qmax), mask=inside)
        else:
            tl.store(target, value.to(t.codes.dtype.element_ty), mask=inside)
    if FORM.RAW:
        to = _place(
            t.raw_x, t.raw_skip, image, pixel, channel, first, pixels, s.C1, s.C2, FORM.SOURCE
        )
        tl.store(to, stored(tile.to(tl.float32) * raw[0], raw[1], s.raw_qmax), mask=inside)


@triton.jit
def _affine(
    mean, m2, channel, known, gamma, beta, eps, pixels, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    SILU: tl.constexpr,
):  # fmt: skip
    """Return (a, b) (1, C) of a slab of whole groups from its channels' means and M2.

    v = a x + b; with SILU, both times -log2(e), the exponent that SiLU wants. Chan's formula over
    the channels of a group: M2_g = sum_c M2_c + P (mean_c - mean_g)^2.
    """
    if channel.shape[0] == GROUP * GROUPS:
        # (C,) is (groups, channels of a group): a third fewer registers than with masks (sm_90).
        grouped = tl.reshape(mean, (GROUPS, GROUP))
        mean_g = (tl.sum(grouped, axis=1) / GROUP)[:, None]
        off = grouped - mean_g
        spread = tl.reshape(m2, (GROUPS, GROUP)) + off * off * pixels
        m2_g = tl.sum(spread, axis=1)[:, None]
        rstd_g = tl.rsqrt(m2_g / (pixels * GROUP).to(tl.float32) + eps)
        centre = tl.reshape(tl.broadcast_to(mean_g, (GROUPS, GROUP)), (GROUPS * GROUP,))
        rstd = tl.reshape(tl.broadcast_to(rstd_g, (GROUPS, GROUP)), (GROUPS * GROUP,))
    else:
        group = tl.arange(0, GROUPS)
        member = (tl.arange(0, channel.shape[0]) // GROUP)[:, None] == group[None, :]
        mean_g = tl.sum(tl.where(member, mean[:, None], 0.0), axis=0) / GROUP
        centre = tl.sum(tl.where(member, mean_g[None, :], 0.0), axis=1)
        spread = m2 + (mean - centre) * (mean - centre) * pixels
        m2_g = tl.sum(tl.where(member, spread[:, None], 0.0), axis=0)
        rstd_g = tl.rsqrt(m2_g / (pixels * GROUP).to(tl.float32) + eps)
        rstd = tl.sum(tl.where(member, rstd_g[None, :], 0.0), axis=1)
    a = rstd * tl.load(gamma + channel, mask=known, other=0.0)
    b = tl.load(beta + channel, mask=known, other=0.0) - centre * a
    if SILU:
        a = a * -_LOG2E
        b = b * -_LOG2E
    return a[None, :], b[None, :]


@triton.jit(do_not_specialize=_VARYING)
def one_launch(
    x, skip, gamma, beta, eps, t, slabs, pixels, C1, C2, per_entry, zero_point, qmax, raw_zero_x,
    raw_zero_skip, raw_qmax, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    RESIDENT: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    FORM: tl.constexpr, STAGES: tl.constexpr, UNROLL: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Normalize one (image, slab of whole groups), BLOCK_P pixels at a time.

    RESIDENT: these are all pixels, and stay in registers. Otherwise the slab is read again to be
    normalized, out of the caches. Each of the BLOCK_P x BLOCK_C places keeps mean and M2 of the
    pixels it saw (Welford); Chan's formula puts the places together.
    """
    if EARLY:
        wait_for_predecessor()
    program = tl.program_id(0)
    image = program // slabs
    first = (program % slabs) * WIDTH
    lane = tl.arange(0, BLOCK_C)
    column = first + lane
    channel = column[None, :]
    row = tl.arange(0, BLOCK_P)[:, None]
    known = (lane < WIDTH) & (column < C1 + C2)
    s = Numbers(C1, C2, per_entry, zero_point, qmax, raw_zero_x, raw_zero_skip, raw_qmax)
    inverse = inverse_of(t.scale, image, t, s, FORM.MANY)
    raw = raw_grid(image, channel, first, t, s, FORM)
    if RESIDENT:
        inside = (row < pixels) & known[None, :]
        place = _place(x, skip, image, row, channel, first, pixels, C1, C2, FORM.SOURCE)
        tile = tl.load(place, mask=inside, other=0.0)
        mean = tl.sum(tile.to(tl.float32), axis=0) / pixels
        centred = tile.to(tl.float32) - mean[None, :]
        if not EVEN:
            centred = tl.where(inside, centred, 0.0)
        m2 = tl.sum(centred * centred, axis=0)
    else:
        means = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        m2s = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        seen = 0.0
        for start in tl.range(0, pixels, BLOCK_P, num_stages=STAGES, loop_unroll_factor=UNROLL):
            pixel = start + row
            inside = ((pixel < pixels) | EVEN) & known[None, :]
            place = _place(x, skip, image, pixel, channel, first, pixels, C1, C2, FORM.SOURCE)
            value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            seen += 1.0
            delta = value - means
            if not EVEN:
                delta = tl.where(inside, delta, 0.0)
            means += delta * (1.0 / seen)
            m2s += delta * (value - means)
        count = ((pixels - row + (BLOCK_P - 1)) // BLOCK_P).to(tl.float32)
        mean = tl.sum(means * count, axis=0) / pixels
        off = means - mean[None, :]
        m2 = tl.sum(m2s + off * off * count, axis=0)
    a, b = _affine(mean, m2, column, known, gamma, beta, eps, pixels, GROUP, GROUPS, FORM.SILU)
    if RESIDENT:
        _write(
            tile, a, b, inverse, raw, image, row, channel, first, inside, pixels, t, s, True, FORM
        )
    else:
        for start in tl.range(0, pixels, BLOCK_P, num_stages=STAGES, loop_unroll_factor=UNROLL):
            pixel = start + row
            inside = ((pixel < pixels) | EVEN) & known[None, :]
            place = _place(x, skip, image, pixel, channel, first, pixels, C1, C2, FORM.SOURCE)
            tile = tl.load(place, mask=inside, other=0.0)
            _write(
                tile, a, b, inverse, raw, image, pixel, channel, first, inside, pixels, t, s, True,
                FORM,
            )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING[:3])
def channel_moments(
    x, skip, moments, slabs, chunks, pixels, C1, C2,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, SOURCE: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write mean and M2 of each channel of a chunk of an image to moments (N, chunks, 2, C)."""
    if EARLY:
        wait_for_predecessor()
    program = tl.program_id(0)
    first = (program % slabs) * BLOCK_C
    part = program // slabs
    chunk = part % chunks
    image = part // chunks
    channel = first + tl.arange(0, BLOCK_C)
    pixel = chunk * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    known = channel < C1 + C2
    inside = (pixel < pixels) & known[None, :]
    place = _place(x, skip, image, pixel, channel[None, :], first, pixels, C1, C2, SOURCE)
    tile = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - chunk * BLOCK_P, BLOCK_P)
    mean = tl.sum(tile, axis=0) / count
    centred = tl.where(inside, tile - mean[None, :], 0.0)
    m2 = tl.sum(centred * centred, axis=0)
    target = moments + part.to(tl.int64) * 2 * (C1 + C2) + channel
    tl.store(target, mean, mask=known)
    tl.store(target + (C1 + C2), m2, mask=known)


@triton.jit(do_not_specialize=["slabs", "stat_chunks", "pixels"])
def channel_affine(
    moments, gamma, beta, eps, affine, slabs, stat_chunks, pixels, C,
    WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, STAT_P: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, SILU: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write a and b of each channel of one (image, slab of whole groups): norm(x) = a x + b.

    Puts the moments of all chunks together, BLOCK_S at a time; affine: float32 (N, 2, C).
    """
    if EARLY:
        wait_for_predecessor()
    program = tl.program_id(0)
    image = program // slabs
    lane = tl.arange(0, BLOCK_C)
    column = (program % slabs) * WIDTH + lane
    known = (lane < WIDTH) & (column < C)
    here = moments + image.to(tl.int64) * stat_chunks * (2 * C) + column[None, :]
    line = tl.arange(0, BLOCK_S)[:, None]
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in tl.range(0, stat_chunks, BLOCK_S):
        chunk = start + line
        seen = (chunk < stat_chunks) & known[None, :]
        count = tl.maximum(tl.minimum(pixels - chunk * STAT_P, STAT_P), 0).to(tl.float32)
        total += tl.sum(tl.load(here + chunk * (2 * C), mask=seen, other=0.0) * count, axis=0)
    mean = total / pixels
    m2 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for start in tl.range(0, stat_chunks, BLOCK_S):
        chunk = start + line
        seen = (chunk < stat_chunks) & known[None, :]
        count = tl.maximum(tl.minimum(pixels - chunk * STAT_P, STAT_P), 0).to(tl.float32)
        off = tl.load(here + chunk * (2 * C), mask=seen, other=0.0) - mean[None, :]
        m2s = tl.load(here + chunk * (2 * C) + C, mask=seen, other=0.0)
        m2 += tl.sum(m2s + off * off * count, axis=0)
    a, b = _affine(mean, m2, column, known, gamma, beta, eps, pixels, GROUP, GROUPS, SILU)
    target = affine + image.to(tl.int64) * (2 * C) + column[None, :]
    tl.store(target, a, mask=known[None, :])
    tl.store(target + C, b, mask=known[None, :])


@triton.jit(do_not_specialize=_VARYING)
def apply(
    x, skip, affine, t, slabs, chunks, pixels, C1, C2, per_entry, zero_point, qmax, raw_zero_x,
    raw_zero_skip, raw_qmax, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr, NORM: tl.constexpr, MAIN: tl.constexpr, FORM: tl.constexpr,
    EARLY: tl.constexpr = False,
):  # fmt: skip
    """Map (NORM: by `affine`), activate and quantize one (image, chunk of pixels, slab)."""
    if EARLY:
        wait_for_predecessor()
    program = tl.program_id(0)
    first = (program % slabs) * WIDTH
    part = program // slabs
    image = part // chunks
    lane = tl.arange(0, BLOCK_C)
    column = first + lane
    channel = column[None, :]
    pixel = (part % chunks) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    known = (lane < WIDTH) & (column < C1 + C2)
    inside = ((pixel < pixels) | EVEN) & known[None, :]
    place = _place(x, skip, image, pixel, channel, first, pixels, C1, C2, FORM.SOURCE)
    tile = tl.load(place, mask=inside, other=0.0)
    s = Numbers(C1, C2, per_entry, zero_point, qmax, raw_zero_x, raw_zero_skip, raw_qmax)
    inverse = inverse_of(t.scale, image, t, s, FORM.MANY)
    raw = raw_grid(image, channel, first, t, s, FORM)
    a = 0.0
    b = 0.0
    if NORM:
        where = affine + image.to(tl.int64) * (2 * (C1 + C2)) + channel
        a = tl.load(where, mask=known[None, :], other=0.0)
        b = tl.load(where + (C1 + C2), mask=known[None, :], other=0.0)
    _write(
        tile, a, b, inverse, raw, image, pixel, channel, first, inside, pixels, t, s, NORM, FORM,
        MAIN,
    )  # fmt: skip
