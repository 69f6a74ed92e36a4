"""What follows the sums of a tile on Hopper: rows of channels, a few pixels at a time.

The formula of `epilogue`, in the order of `kernels.ops.qconv2d`. Tiles are [channels, pixels] here.
"""

# What a kernel gets is a Triton value, which has no Python type.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["after_predecessor", "pixel", "prefetch_rows", "read_vectors", "scale_of", "write_rows"]


@gluon.jit
def after_predecessor():
    """Wait for the kernel before this one, and let the one after it be put in place.

    Launched early (programmatic dependent launch) a program finds its place and sets up its
    barriers while the kernel before it ends; it must not touch what that one writes any sooner.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def pixel(
    p, place, images, out_h, out_w, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    UPSAMPLE: gl.constexpr,
):  # fmt: skip
    """Return (image, row, column, number of the pixel, whether it exists) of pixels p of a tile."""
    n = place[0] + p // (BLOCK_H * BLOCK_W)
    h = place[1] + (p // BLOCK_W) % BLOCK_H
    w = place[2] + p % BLOCK_W
    if UPSAMPLE:
        h = 2 * h + place[3]
        w = 2 * w + place[4]
    seen = (n < images) & (h < out_h) & (w < out_w)
    return n, h, w, gl.where(seen, (n * out_h + h) * out_w + w, 0), seen


@gluon.jit
def prefetch_rows(
    source, place, images, out_h, out_w, outs, BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr,
    BLOCK_O: gl.constexpr, PIXELS: gl.constexpr, UPSAMPLE: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Ask for the tile's part of an image (N, H, W, O), so that it lies in L2 when it is read."""
    LINE: gl.constexpr = 128 // (source.dtype.element_ty.primitive_bitwidth // 8)
    LINES: gl.constexpr = max(BLOCK_O // LINE, 1)
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, num_warps], [1, 0])
    p = gl.arange(0, PIXELS, gl.SliceLayout(0, flat))
    line = gl.arange(0, LINES, gl.SliceLayout(1, flat))
    row = pixel(p, place, images, out_h, out_w, BLOCK_H, BLOCK_W, UPSAMPLE)[3]
    o = gl.minimum(place[5] + line * LINE, outs - 1)
    at = gl.expand_dims(row.to(gl.int64) * outs, 0) + gl.expand_dims(o, 1)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [source + at], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _border(
    h, w, seen, in_h, in_w, KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr,
    LEFT: gl.constexpr, UPSAMPLE: gl.constexpr,
):  # fmt: skip
    """Return the row of the border table: 4 (above + 2 below) + (left + 2 right)."""
    if UPSAMPLE:
        in_h = 2 * in_h
        in_w = 2 * in_w
    top = h * STRIDE - TOP
    left = w * STRIDE - LEFT
    edge = 4 * ((top < 0).to(gl.int32) + 2 * (top + KERNEL > in_h).to(gl.int32))
    edge += (left < 0).to(gl.int32) + 2 * (left + KERNEL > in_w).to(gl.int32)
    return gl.where(seen, edge, 0)


@gluon.jit
def scale_of(scales, bucket, row, rows_per_bucket, BUCKETS: gl.constexpr, MIXED: gl.constexpr):
    """Return the scale of each pixel [1, P], or one for all if the batch is at one time."""
    if BUCKETS == 1:
        scale = gl.load(scales)
    elif MIXED:
        scale = gl.expand_dims(gl.load(scales + gl.load(bucket + row // rows_per_bucket)), 0)
    else:
        scale = gl.load(scales + gl.load(bucket))
    return scale


@gluon.jit
def _requantize(v, zero, qmax):
    """Return the stored codes, int8, of v in units of the scale."""
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, in the low bits of the sum.
    # Where it holds no integers exactly it is still monotone: clamping after it is right.
    low = (0 - zero).to(gl.float32) + 12582912.0
    high = (qmax - zero).to(gl.float32) + 12582912.0
    v = gl.minimum(gl.maximum(v + 12582912.0, low), high)
    return (v.to(gl.int32, bitcast=True) + (zero - 128)).to(gl.int8)


@gluon.jit
def _halves(x):
    """Return the two halves of the pixels of a tile; no data moves."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.constexpr_function
def rows_layout(BLOCK_O, num_warps, ACTIVATION):
    """Return the layout of what is written: 8 channels of a pixel a thread, or 8 and 8 gates."""
    across = min(BLOCK_O // (16 if ACTIVATION == "geglu" else 8), 32)
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, num_warps], [0, 1])


@gluon.jit
def _channels(here, place, outs, BLOCK_O: gl.constexpr, ACTIVATION: gl.constexpr):
    """Return the channels of rows `here` of a tile, whose second half are gates with geglu."""
    if ACTIVATION == "geglu":
        # All gates follow all values.
        gates = (here >= BLOCK_O // 2).to(gl.int32)
        o = (place[5] + gates * (outs - BLOCK_O)) // 2 + here
    else:
        o = place[5] + here
    return o


@gluon.jit
def read_vectors(
    place, weight_scale, table, bias, shift, outs, shift_stride, ACTIVATION: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_O: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Return what each channel of a tile has: weight scale, inner correction, bias, time shift.

    Asked for before the sums are made, so that nothing waits for it after.
    """
    rows: gl.constexpr = rows_layout(BLOCK_O, num_warps, ACTIVATION)
    here = gl.arange(0, BLOCK_O, gl.SliceLayout(1, rows))
    o = _channels(here, place, outs, BLOCK_O, ACTIVATION)
    known = o < outs
    factor = gl.load(weight_scale + o, mask=known, other=0.0)
    inner = gl.load(table + o, mask=known, other=0)
    add = factor
    if bias is not None:
        add = gl.load(bias + o, mask=known, other=0.0)
    late = factor
    if shift is not None and BLOCK_N == 1:
        # One image, one row of shifts.
        late = gl.load(shift + place[0] * shift_stride + o, mask=known, other=0.0)
    return factor, inner, add, late


@gluon.jit
def write_rows(
    sums, held, partial, tile, place, vectors, scale, inverse, y, act_scale, table, bucket, bias,
    shift, residual, side_scales, side_weight_scale, side_table, out_scale, images, in_h, in_w,
    out_h, out_w, outs, rows_per_bucket, shift_stride, out_zero, out_qmax,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BUCKETS: gl.constexpr,
    SIDE_BUCKETS: gl.constexpr, OUT_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    BORDER: gl.constexpr, RAW: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, BLOCK_O: gl.constexpr, PIXELS: gl.constexpr,
    SPLITS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Scale, correct, add, quantize and store a tile.

    sums: [O, P] integers, or with SIDES > 0 floats that hold all but the border's part; with
    SPLITS > 1 they lie in `partial` instead and are added here, in a fixed order.
    held: the residual in shared memory, both halves of the pixels [P / 2, O], or nothing.
    vectors: of `read_vectors`; scale, inverse: s and 1 / s_y, if the batch is at one time.
    """
    CHUNK: gl.constexpr = min(PIXELS, 32)
    PIECES: gl.constexpr = PIXELS // CHUNK
    SLOTS: gl.constexpr = SPLITS + SIDES
    WHOLE: gl.constexpr = SIDES == 0 or SPLITS > 1
    rows: gl.constexpr = rows_layout(BLOCK_O, num_warps, ACTIVATION)
    here = gl.expand_dims(gl.arange(0, BLOCK_O, gl.SliceLayout(1, rows)), 1)
    mask_o = _channels(here, place, outs, BLOCK_O, ACTIVATION) < outs
    factor, inner, bias_o, shift_o = vectors
    add = gl.full([BLOCK_O], 0.0, gl.float32, gl.SliceLayout(1, rows))
    if bias is not None:
        add += bias_o
    if shift is not None and BLOCK_N == 1:
        add += shift_o.to(gl.float32)
    gain = factor * scale
    if not MIXED and WHOLE:
        # The constant part in float: one multiply-add a pixel, an error of 2^-24 |acc| s.
        add -= inner.to(gl.float32) * gain
    terms = (
        here, mask_o, gl.expand_dims(gain, 1), gl.expand_dims(inner, 1), gl.expand_dims(add, 1),
    )  # fmt: skip
    pieces = (sums,)
    if SPLITS == 1 and PIECES == 2:
        pieces = _halves(sums)
    elif SPLITS == 1 and PIECES == 4:
        low, high = _halves(sums)
        pieces = _halves(low) + _halves(high)
    elif SPLITS == 1 and PIECES == 8:
        low, high = _halves(sums)
        a, b = _halves(low)
        c, d = _halves(high)
        pieces = _halves(a) + _halves(b) + _halves(c) + _halves(d)
    for i in gl.static_range(PIECES):
        p = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, rows))
        image = place[0] + i * CHUNK // (BLOCK_H * BLOCK_W)
        at = partial
        if SPLITS > 1:
            at = partial + (tile * SLOTS).to(gl.int64) * (BLOCK_O * PIXELS)
            at = at + (gl.expand_dims(p * BLOCK_O, 0) + here)
            v = gl.load(at, cache_modifier=".cg")
            for slot in gl.static_range(1, SPLITS):
                v += gl.load(at + slot * BLOCK_O * PIXELS, cache_modifier=".cg")
        else:
            v = gl.convert_layout(pieces[i], rows)
        r = inner
        if len(held) > 0:
            half = held[i // (PIECES // 2)]
            r = half.slice(i % (PIECES // 2) * CHUNK, CHUNK).permute((1, 0)).load(rows)
        _write_piece(
            v, r, at, p, image, terms, place, inverse, y, act_scale, table, bucket, shift, residual,
            side_scales, side_weight_scale, side_table, out_scale, images, in_h, in_w, out_h,
            out_w, outs, rows_per_bucket, shift_stride, out_zero, out_qmax,
            KERNEL, STRIDE, TOP, LEFT, UPSAMPLE, SIDES, BUCKETS, SIDE_BUCKETS, OUT_BUCKETS, MIXED,
            BORDER, RAW, ACTIVATION, BLOCK_N, BLOCK_H, BLOCK_W, BLOCK_O * PIXELS, SPLITS,
            len(held) > 0,
        )  # fmt: skip


@gluon.jit
def _side_terms(
    at, o, mask_o, row, side_scales, side_weight_scale, side_table, bucket, outs, rows_per_bucket,
    SIDES: gl.constexpr, SPLITS: gl.constexpr, SIDE_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    AREA: gl.constexpr,
):  # fmt: skip
    """Return the sum of the side terms, whose sums lie behind those of the splits at `at`."""
    factor = gl.load(side_weight_scale + o, mask=mask_o, other=0.0)
    f = 0.0
    for side in gl.static_range(SIDES):
        u = gl.load(at + (SPLITS + side) * AREA, cache_modifier=".cg")
        u -= gl.load(side_table + side * outs + o, mask=mask_o, other=0)
        s = scale_of(
            side_scales + side * SIDE_BUCKETS, bucket, row, rows_per_bucket, SIDE_BUCKETS, MIXED
        )
        f += u.to(gl.float32) * (s * factor)
    return f


@gluon.jit
def _unknown_zero():
    """Return 0 in a way that the compiler does not see through, nor move out of a loop."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _with_gates(x):
    """Return the values and the gates of a tile, in the same layout; no data moves."""
    value, gate = x.reshape([2, x.shape[0] // 2, x.shape[1]]).permute((1, 2, 0)).split()
    return (
        gl.convert_layout(value, x.type.layout, assert_trivial=True),
        gl.convert_layout(gate, x.type.layout, assert_trivial=True),
    )


@gluon.jit
def _gelu(x):
    """Return x Phi(x), x finite, without erf's divisions and branches.

    Off by 8e-7 |x| at most, of which rsqrt is the most.

    Phi(-a) = P(t) exp(-a^2 / 2), t = 1 / (1 + p a): Abramowitz and Stegun, 7.1.26.
    """
    a = gl.abs(x)
    # A square root for the quotient: the chip's approximate one needs no guard instructions.
    root = gl.rsqrt(a * 0.23164189 + 1.0)
    t = root * root
    tail = (
        (((0.530702715 * t - 0.726576013) * t + 0.710706871) * t - 0.142248368) * t + 0.127414796
    ) * t
    return gl.maximum(x, 0.0) - a * tail * gl.exp2(a * a * -0.72134752)


@gluon.jit
def _corner(place, first, out_h, out_w, outs, UPSAMPLE: gl.constexpr):
    """Return how far the first value of a tile is from that of an image (N, H, W, O)."""
    h = place[1]
    w = place[2]
    if UPSAMPLE:
        h = 2 * h + place[3]
        w = 2 * w + place[4]
    return ((place[0] * out_h + h) * out_w + w).to(gl.int64) * outs + first


@gluon.jit
def _write_piece(
    v, r, at, p, image, terms, place, inverse, y, act_scale, table, bucket, shift, residual,
    side_scales, side_weight_scale, side_table, out_scale, images, in_h, in_w, out_h, out_w, outs,
    rows_per_bucket, shift_stride, out_zero, out_qmax,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, TOP: gl.constexpr, LEFT: gl.constexpr,
    UPSAMPLE: gl.constexpr, SIDES: gl.constexpr, BUCKETS: gl.constexpr,
    SIDE_BUCKETS: gl.constexpr, OUT_BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    BORDER: gl.constexpr, RAW: gl.constexpr, ACTIVATION: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_H: gl.constexpr, BLOCK_W: gl.constexpr, AREA: gl.constexpr, SPLITS: gl.constexpr,
    HELD: gl.constexpr,
):  # fmt: skip
    """Finish the sums [O, CHUNK] of pixels p, the first of which is of `image`.

    r: their residual if HELD.
    """
    here, mask_o, gain, inner, add = terms
    WHOLE: gl.constexpr = SIDES == 0 or SPLITS > 1
    STEP: gl.constexpr = 2 if UPSAMPLE else 1
    o = place[5] + here
    n, h, w, row, seen = pixel(p, place, images, out_h, out_w, BLOCK_H, BLOCK_W, UPSAMPLE)
    inside = gl.expand_dims(seen, 0) & mask_o
    first = place[5]
    width = outs
    if ACTIVATION == "geglu":
        # What is written has half as many channels: those of the values.
        first = first // 2
        width = outs // 2
        layout: gl.constexpr = here.type.layout
        here = gl.arange(0, here.shape[0] // 2, gl.SliceLayout(1, layout))
        here = gl.expand_dims(here, 1)
        inside = gl.expand_dims(seen, 0) & (first + here < width)
    # From the corner of the tile: 32 bits do. The same for all tiles, but not kept in registers.
    hidden = _unknown_zero()
    away = p // (BLOCK_H * BLOCK_W) * out_h + (p // BLOCK_W) % BLOCK_H * STEP + hidden
    away = (away * out_w + (p % BLOCK_W + hidden) * STEP) * width
    where = gl.expand_dims(away, 0) + here
    corner = _corner(place, first, out_h, out_w, width, UPSAMPLE)
    t = inner
    if BORDER:
        # Few pixels are at the border: only they read their row of the table, the others 0.
        edge = _border(h, w, seen, in_h, in_w, KERNEL, STRIDE, TOP, LEFT, UPSAMPLE)
        rim = gl.expand_dims(edge > 0, 0) & inside
        t = gl.load(table + gl.expand_dims(edge * outs, 0) + o, mask=rim, other=0)
        if WHOLE:
            v -= t
    if RAW:
        gl.store(y + corner + where, v - inner, mask=inside)
    else:
        if MIXED:
            gain = gain * scale_of(act_scale, bucket, row, rows_per_bucket, BUCKETS, True)
            if WHOLE:
                v -= inner
        if not WHOLE:
            f = v + add
            if BORDER:
                f -= t.to(gl.float32) * gain
        else:
            f = v.to(gl.float32) * gain + add
        if SIDES > 0 and SPLITS > 1:
            f += _side_terms(
                at, o, mask_o, row, side_scales, side_weight_scale, side_table, bucket, outs,
                rows_per_bucket, SIDES, SPLITS, SIDE_BUCKETS, MIXED, AREA,
            )  # fmt: skip
        if shift is not None and BLOCK_N > 1:
            if BLOCK_H * BLOCK_W % p.shape[0] == 0:
                # All these pixels are of one image.
                at_image = gl.minimum(image, images - 1) * shift_stride
                f += gl.load(shift + at_image + o, mask=mask_o, other=0.0).to(gl.float32)
            else:
                each = gl.expand_dims(gl.where(seen, n, 0) * shift_stride, 0)
                f += gl.load(shift + each + o, mask=inside, other=0.0).to(gl.float32)
        if ACTIVATION == "gelu":
            f = _gelu(f)
        elif ACTIVATION == "silu":
            f = f / (1.0 + gl.exp(-f))
        elif ACTIVATION == "geglu":
            value, gate = _with_gates(f)
            f = value * _gelu(gate)
        if HELD:
            f += r.to(gl.float32)
        elif residual is not None:
            f += gl.load(residual + corner + where, mask=inside, other=0.0).to(gl.float32)
        if out_scale is not None:
            if MIXED:
                s = scale_of(out_scale, bucket, row, rows_per_bucket, OUT_BUCKETS, True)
                inverse = gl.div_rn(1.0, s)
            gl.store(
                y + corner + where, _requantize(f * inverse, out_zero, out_qmax),
                mask=inside,
            )  # fmt: skip
        else:
            gl.store(y + corner + where, f.to(y.dtype.element_ty), mask=inside)
