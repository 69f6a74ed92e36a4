"""`kernels.ops.epilogue` on Hopper: NHWC stores of a few pixels of a [channels, pixels] tile."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quantempo.kernels.gpu.contraction.records import border_row, pixel, row_of

__all__ = [
    "channels_of", "prefetch_residual", "read_channel_terms", "scale_of", "side_scales_of",
    "write_tile",
]  # fmt: skip


@gluon.jit
def prefetch_residual(
    residual, place, s, WINDOW: gl.constexpr, BLOCK: gl.constexpr, num_warps: gl.constexpr
):
    """Prefetch the tile's part of the residual (N, H, W, O) into L2."""
    LINE: gl.constexpr = 128 // (residual.dtype.element_ty.primitive_bitwidth // 8)
    LINES: gl.constexpr = max(BLOCK.OUTS // LINE, 1)
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, num_warps], [1, 0])
    p = gl.arange(0, BLOCK.PIXELS, gl.SliceLayout(0, flat))
    line = gl.arange(0, LINES, gl.SliceLayout(1, flat))
    n, h, w = pixel(p, place, s, WINDOW, BLOCK)
    row = row_of(n, h, w, s)[0]
    o = gl.minimum(place.o + line * LINE, s.outs - 1)
    at = gl.expand_dims(row.to(gl.int64) * s.outs, 0) + gl.expand_dims(o, 1)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [residual + at], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def scale_of(
    scales, bucket, row, rows_per_bucket, BUCKETS: gl.constexpr, MIXED: gl.constexpr,
    ROWS: gl.constexpr = False,
):  # fmt: skip
    """Return the scale of each pixel [1, P], or one for all if the batch is at one time."""
    if ROWS:
        scale = gl.expand_dims(gl.load(scales + row), 0)
    elif BUCKETS == 1:
        scale = gl.load(scales)
    elif MIXED:
        scale = gl.expand_dims(gl.load(scales + gl.load(bucket + row // rows_per_bucket)), 0)
    else:
        scale = gl.load(scales + gl.load(bucket))
    return scale


@gluon.jit
def side_scales_of(side: gl.constexpr, terms, s, FORM: gl.constexpr):
    """Return where the scales of a side begin."""
    if FORM.ROWS:
        scales = terms.side_scales + side * s.images * s.out_h * s.out_w
    else:
        scales = terms.side_scales + side * FORM.SIDE_BUCKETS
    return scales


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
def _store_layout(OUTS, num_warps, GATED):
    """Return the layout of what is written: 8 channels of a pixel a thread, or 8 and 8 gates."""
    across = min(OUTS // (16 if GATED else 8), 32)
    return gl.BlockedLayout([8, 1], [across, 32 // across], [1, num_warps], [0, 1])


@gluon.jit
def channels_of(here, place, outs, FORM: gl.constexpr, BLOCK: gl.constexpr):
    """Return the channels of rows `here` of a tile, whose second half may be gates."""
    if FORM.GATED:
        # All gates follow all values.
        gates = (here >= BLOCK.OUTS // 2).to(gl.int32)
        o = (place.o + gates * (outs - BLOCK.OUTS)) // 2 + here
    else:
        o = place.o + here
    return o


@gluon.jit
def read_channel_terms(
    place, terms, s, FORM: gl.constexpr, BLOCK: gl.constexpr, num_warps: gl.constexpr
):
    """Return what each channel of a tile has: weight scale, inner correction, bias, time shift."""
    # Loaded before the sums are made, so that nothing waits for them after.
    rows: gl.constexpr = _store_layout(BLOCK.OUTS, num_warps, FORM.GATED)
    here = gl.arange(0, BLOCK.OUTS, gl.SliceLayout(1, rows))
    o = channels_of(here, place, s.outs, FORM, BLOCK)
    known = o < s.outs
    factor = gl.load(terms.weight_scale + o, mask=known, other=0.0)
    inner = gl.load(terms.table + o, mask=known, other=0)
    add = factor
    if terms.bias is not None:
        add = gl.load(terms.bias + o, mask=known, other=0.0)
    late = factor
    if terms.shift is not None and BLOCK.N == 1:
        # One image, one row of shifts.
        late = gl.load(terms.shift + place.n * s.shift_stride + o, mask=known, other=0.0)
    return factor, inner, add, late


@gluon.jit
def write_tile(
    sums, residual, partial, tile, place, vectors, scale, inverse, y, terms, s,
    FORM: gl.constexpr, WINDOW: gl.constexpr, BLOCK: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Scale, correct, add, quantize and store a tile.

    sums: [O, P] integers, or with sides floats that hold all but the border's part; with split-K
    they lie in `partial` instead and are added here, in a fixed order.
    residual: in shared memory, both halves of the pixels [P / 2, O], or nothing.
    vectors: of `read_channel_terms`; scale, inverse: s and 1 / s_y, if the batch is at one time.
    """
    PIXELS: gl.constexpr = BLOCK.PIXELS
    OUTS: gl.constexpr = BLOCK.OUTS
    SPLITS: gl.constexpr = BLOCK.SPLITS
    CHUNK: gl.constexpr = min(PIXELS, 32)
    PIECES: gl.constexpr = PIXELS // CHUNK
    SLOTS: gl.constexpr = SPLITS + FORM.SIDES
    rows: gl.constexpr = _store_layout(OUTS, num_warps, FORM.GATED)
    here = gl.expand_dims(gl.arange(0, OUTS, gl.SliceLayout(1, rows)), 1)
    mask_o = channels_of(here, place, s.outs, FORM, BLOCK) < s.outs
    factor, inner, bias_o, shift_o = vectors
    add = gl.full([OUTS], 0.0, gl.float32, gl.SliceLayout(1, rows))
    if terms.bias is not None:
        add += bias_o
    if terms.shift is not None and BLOCK.N == 1:
        add += shift_o.to(gl.float32)
    gain = factor * scale
    if not FORM.MIXED and not FORM.ROWS and (FORM.SIDES == 0 or SPLITS > 1):
        # The constant part in float: one multiply-add a pixel, an error of 2^-24 |acc| s.
        add -= inner.to(gl.float32) * gain
    vectors = (
        here, mask_o, gl.expand_dims(gain, 1), gl.expand_dims(inner, 1), gl.expand_dims(add, 1),
    )  # fmt: skip
    pieces = (sums,)
    # Halved once for 2 pieces, twice for 4, three times for 8.
    for _ in gl.static_range(PIECES.bit_length() - 1 if SPLITS == 1 else 0):
        parts = ()
        for i in gl.static_range(len(pieces)):
            parts += _halves(pieces[i])
        pieces = parts
    for i in gl.static_range(PIECES):
        p = i * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(0, rows))
        at = partial
        if SPLITS > 1:
            at = partial + (tile * SLOTS).to(gl.int64) * (OUTS * PIXELS)
            at = at + (gl.expand_dims(p * OUTS, 0) + here)
            v = gl.load(at, cache_modifier=".cg")
            for slot in gl.static_range(1, SPLITS):
                v += gl.load(at + slot * OUTS * PIXELS, cache_modifier=".cg")
        else:
            v = gl.convert_layout(pieces[i], rows)
        r = inner
        if len(residual) > 0:
            half = residual[i // (PIECES // 2)]
            r = half.slice(i % (PIECES // 2) * CHUNK, CHUNK).permute((1, 0)).load(rows)
        _write_piece(
            v, r, at, p, vectors, place, inverse, y, terms, s, i * CHUNK, FORM, WINDOW, BLOCK,
            len(residual) > 0,
        )  # fmt: skip


@gluon.jit
def _side_terms(at, o, mask_o, row, terms, s, FORM: gl.constexpr, BLOCK: gl.constexpr):
    """Return the sum of the side terms, whose sums lie behind those of the splits at `at`."""
    SIDES: gl.constexpr = FORM.SIDES
    AREA: gl.constexpr = BLOCK.OUTS * BLOCK.PIXELS
    factor = gl.load(terms.side_weight_scale + o, mask=mask_o, other=0.0)
    f = 0.0
    for side in gl.static_range(SIDES):
        u = gl.load(at + (BLOCK.SPLITS + side) * AREA, cache_modifier=".cg")
        u -= gl.load(terms.side_table + side * s.outs + o, mask=mask_o, other=0)
        scale = scale_of(
            side_scales_of(side, terms, s, FORM), terms.bucket, row, s.rows_per_bucket,
            FORM.SIDE_BUCKETS, FORM.MIXED, FORM.ROWS,
        )  # fmt: skip
        f += u.to(gl.float32) * (scale * factor)
    return f


@gluon.jit
def _opaque_zero():
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
    """Return x Phi(x), x finite, without erf's divisions and branches; off by 8e-7 |x| at most.

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
def _sigmoid2(x):
    """Return 1 / (1 + 2^-x), a square root for the quotient as in `_gelu`."""
    root = gl.rsqrt(1.0 + gl.exp2(0.0 - x))
    return root * root


@gluon.jit
def _gates_of(first, row, o, mask_o, inside, terms, s, FORM: gl.constexpr):
    """Return the gates [O, CHUNK] of rows from `first` on, or [O, 1] where all have the same."""
    if FORM.RUNS:
        last = s.images * s.out_h * s.out_w - 1
        image = gl.minimum(first, last) // s.rows_per_gate
        gates = gl.load(terms.gate + image * s.gate_stride + o, mask=mask_o, other=0.0)
    else:
        image = gl.expand_dims(row // s.rows_per_gate * s.gate_stride, 0)
        gates = gl.load(terms.gate + image + o, mask=inside, other=0.0)
    return gates.to(gl.float32)


@gluon.jit
def _corner(place, first, s, width, UPSAMPLE: gl.constexpr):
    """Return how far the first value of a tile is from that of an image (N, H, W, O)."""
    h = place.h
    w = place.w
    if UPSAMPLE:
        h = 2 * h + place.phase_h
        w = 2 * w + place.phase_w
    return ((place.n * s.out_h + h) * s.out_w + w).to(gl.int64) * width + first


@gluon.jit
def _write_piece(
    v, r, at, p, vectors, place, inverse, y, terms, s, BEGIN: gl.constexpr, FORM: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, LOADED: gl.constexpr,
):  # fmt: skip
    """Finish the sums [O, CHUNK] of pixels p of a tile, from BEGIN on; r: residual if LOADED."""
    here, mask_o, gain, inner, add = vectors
    WHOLE: gl.constexpr = FORM.SIDES == 0 or BLOCK.SPLITS > 1
    STEP: gl.constexpr = 2 if WINDOW.UPSAMPLE else 1
    o = place.o + here
    n, h, w = pixel(p, place, s, WINDOW, BLOCK)
    row, seen = row_of(n, h, w, s)
    inside = gl.expand_dims(seen, 0) & mask_o
    first = place.o
    width = s.outs
    if FORM.GATED:
        # What is written has half as many channels: those of the values.
        first = first // 2
        width = s.outs // 2
        layout: gl.constexpr = here.type.layout
        here = gl.arange(0, here.shape[0] // 2, gl.SliceLayout(1, layout))
        here = gl.expand_dims(here, 1)
        inside = gl.expand_dims(seen, 0) & (first + here < width)
    # From the corner of the tile: 32 bits do. The same for all tiles, but not kept in registers.
    hidden = _opaque_zero()
    away = p // (BLOCK.H * BLOCK.W) * s.out_h + (p // BLOCK.W) % BLOCK.H * STEP + hidden
    away = (away * s.out_w + (p % BLOCK.W + hidden) * STEP) * width
    where = gl.expand_dims(away, 0) + here
    corner = _corner(place, first, s, width, WINDOW.UPSAMPLE)
    t = inner
    if WINDOW.KERNEL > 1:
        # Few pixels are at the border: only they read their row of the table, the others 0.
        edge = gl.where(seen, border_row(h, w, s, WINDOW), 0)
        rim = gl.expand_dims(edge > 0, 0) & inside
        t = gl.load(terms.table + gl.expand_dims(edge * s.outs, 0) + o, mask=rim, other=0)
        if WHOLE:
            v -= t
    if y.dtype.element_ty == gl.int32:
        gl.store(y + corner + where, v - inner, mask=inside)
    else:
        if FORM.MIXED or FORM.ROWS:
            gain = gain * scale_of(
                terms.act_scale, terms.bucket, row, s.rows_per_bucket, FORM.BUCKETS, True,
                FORM.ROWS,
            )  # fmt: skip
            if WHOLE:
                v -= inner
        if not WHOLE:
            f = v + add
            if WINDOW.KERNEL > 1:
                f -= t.to(gl.float32) * gain
        else:
            f = v.to(gl.float32) * gain + add
        if FORM.SIDES > 0 and BLOCK.SPLITS > 1:
            f += _side_terms(at, o, mask_o, row, terms, s, FORM, BLOCK)
        if terms.shift is not None and BLOCK.N > 1:
            if BLOCK.H * BLOCK.W % p.shape[0] == 0:
                # All these pixels are of one image.
                image = place.n + BEGIN // (BLOCK.H * BLOCK.W)
                at_image = gl.minimum(image, s.images - 1) * s.shift_stride
                f += gl.load(terms.shift + at_image + o, mask=mask_o, other=0.0).to(gl.float32)
            else:
                each = gl.expand_dims(gl.where(seen, n, 0) * s.shift_stride, 0)
                f += gl.load(terms.shift + each + o, mask=inside, other=0.0).to(gl.float32)
        if FORM.ACTIVATION == "gelu":
            f = _gelu(f)
        elif FORM.ACTIVATION == "gelu_tanh":
            # v / (1 + exp(-2 u)), u = sqrt(2 / pi) (v + 0.044715 v^3), both times log2(e).
            f = f * _sigmoid2(f * (f * f * 0.1029432397 + 2.302208198))
        elif FORM.ACTIVATION == "silu":
            f = f / (1.0 + gl.exp(-f))
        elif FORM.ACTIVATION == "geglu":
            value, gate = _with_gates(f)
            f = value * _gelu(gate)
        elif FORM.ACTIVATION == "swiglu":
            value, gate = _with_gates(f)
            f = value * gate * _sigmoid2(gate * 1.4426950408889634)
        if terms.gate is not None:
            f *= _gates_of(place.w + BEGIN, row, o, mask_o, inside, terms, s, FORM)
        if LOADED:
            f += r.to(gl.float32)
        elif terms.residual is not None:
            f += gl.load(terms.residual + corner + where, mask=inside, other=0.0).to(gl.float32)
        if terms.out_scale is not None:
            if FORM.MIXED:
                scale = scale_of(
                    terms.out_scale, terms.bucket, row, s.rows_per_bucket, FORM.OUT_BUCKETS, True
                )
                inverse = gl.div_rn(1.0, scale)
            gl.store(
                y + corner + where, _requantize(f * inverse, s.out_zero, s.out_qmax), mask=inside
            )
        else:
            gl.store(y + corner + where, f.to(y.dtype.element_ty), mask=inside)
