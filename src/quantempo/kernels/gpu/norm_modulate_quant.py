"""Launch `kernels.ops.norm_modulate_quant` on a GPU: tokens are read once and written as codes.

A program owns whole tokens of one image, which stay in its registers, as does what modulates them:
mean, then the centred sum of squares, then the largest magnitude. Many are computed in turns.
"""

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.gpu.contraction.tiles import multiprocessors
from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.gpu.group_norm.portable import stored
from quantempo.kernels.ops.norm_modulate_quant import SMALLEST_SCALE, Tokens

__all__ = ["MAGIC", "launch", "quantize_tokens", "scale_of", "tiles"]

_SMALLEST = tl.constexpr(SMALLEST_SCALE)
# 1.5 * 2^23: float32 of this size hold integers only, the lowest byte of which is the code.
MAGIC = tl.constexpr(12582912.0)
# So many values at most are computed on a multiprocessor, and as many on their way, if in turns.
_VALUES = 12800


@triton.jit
def scale_of(top):
    """Return the scale of the bits of a largest magnitude: NaN, if that is not finite."""
    top = top.to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.math.div_rn(top, 127.0), _SMALLEST)
    return tl.where(top < float("inf"), scale, float("nan"))


@triton.jit
def _float(part):
    """Return float32; the upper half of a word is one instruction so, as a conversion two."""
    if part.dtype == tl.bfloat16:
        return (part.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return part.to(tl.float32)


@triton.jit
def _pieces(pointer, row, c, more, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a row as it is stored, WIDTH channels in each, if more; nothing of no matrix."""
    parts = ()
    if pointer is not None:
        for start in tl.static_range(0, CHANNELS, WIDTH):
            mask = more if start + WIDTH <= CHANNELS else (c + start < CHANNELS) & more
            parts += (tl.load(pointer + row + (c + start), mask=mask, other=0.0),)
    return parts


@triton.jit
def _total(parts):
    """Return the sums (R, 1) of rows."""
    total = parts[0]
    for i in tl.static_range(1, len(parts)):
        total += parts[i]
    return tl.sum(total, 1)[:, None]


@triton.jit
def _symmetric_scale(parts):
    """Return the scales (R, 1) of rows, NaN where a value is not finite."""
    top = tl.abs(parts[0])
    for i in tl.static_range(1, len(parts)):
        top = tl.maximum(top, tl.abs(parts[i]), propagate_nan=tl.PropagateNan.ALL)
    # Of magnitudes the bits are ordered as the values are, and those of a NaN come last.
    return scale_of(tl.max(top.to(tl.int32, bitcast=True), 1)[:, None])


@triton.jit
def _write(tile, row, c, given, NORM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Write the codes of the tokens of a tile, and their scales if there is no act_scale."""
    scales, shifts, weight, bias, act_scale, ratio, codes, row_scale, eps, zero_point, qmax = given
    parts = [_float(part) for part in tile]
    if NORM == "layer":
        mean = _total(parts) * (1.0 / CHANNELS)
        centred = ()
        for i in tl.static_range(len(tile)):
            inside = c + i * WIDTH < CHANNELS if (i + 1) * WIDTH > CHANNELS else True
            centred += (tl.where(inside, parts[i] - mean, 0.0),)
        parts = centred
    inverse = 1.0
    if NORM != "none":
        square = _total([part * part for part in parts]) * (1.0 / CHANNELS) + eps
        # Of squares beyond float32 too the row is to be NaN, not 0.
        inverse = tl.where(square < float("inf"), tl.rsqrt(square), float("nan"))
    weights = _pieces(weight, 0, c, True, CHANNELS, WIDTH)
    biases = _pieces(bias, 0, c, True, CHANNELS, WIDTH)
    values = ()
    for i in tl.static_range(len(tile)):
        v, factor = parts[i], inverse
        if weight is not None:
            factor = factor * _float(weights[i])
        if bias is not None:
            v = v * factor + _float(biases[i])
            factor = 1.0
        if len(scales) > 0:
            factor = factor * _float(scales[i]) + factor
        v = v * factor
        if len(shifts) > 0:
            v += _float(shifts[i])
        values += (v,)
    if act_scale is None:
        own = _symmetric_scale(values)
        tl.store(row_scale + row, own)
        ratio = tl.math.div_rn(1.0, own)
    for i in tl.static_range(len(tile)):
        inside = c + i * WIDTH < CHANNELS if (i + 1) * WIDTH > CHANNELS else True
        target = codes + (row * CHANNELS + c + i * WIDTH)
        if act_scale is None:
            q = (values[i] * ratio + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
            # Two stores, of which one is skipped, instead of a selection of each value.
            tl.store(target, q, mask=(own == own) & inside)
            tl.store(target, tl.zeros_like(q), mask=(own != own) & inside)
        else:
            tl.store(target, stored(values[i] * ratio, zero_point, qmax), mask=inside)


@triton.jit(do_not_specialize=["tokens", "splits", "per_entry", "zero_point", "qmax"])
def quantize_tokens(
    x, weight, bias, scale, shift, act_scale, bucket, codes, row_scale, tokens, splits,
    image_stride, token_stride, scale_stride, shift_stride, per_entry, eps, zero_point, qmax,
    NORM: tl.constexpr, MANY: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, LOOP: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write the codes of ROWS tokens, LOOP: of more in turns; MANY: act_scale by bucket."""
    image = tl.program_id(0) // splits
    first = (tl.program_id(0) - image * splits) * ROWS
    r = tl.arange(0, ROWS)[:, None]
    # Eight values of two bytes are a load; of the codes too, which then need no other threads.
    # By token too, so that each thread loads what it uses.
    c = tl.max_contiguous(tl.arange(0, WIDTH), 8)[None, :] + 0 * r
    if EARLY:
        wait_for_predecessor()
    n = image.to(tl.int64)
    x += n * image_stride
    # Beyond the last token it is written once more.
    t = tl.minimum(first + r, tokens - 1)
    tile = _pieces(x, t.to(tl.int64) * token_stride, c, True, CHANNELS, WIDTH)
    scales = _pieces(scale, n * scale_stride, c, True, CHANNELS, WIDTH)
    shifts = _pieces(shift, n * shift_stride, c, True, CHANNELS, WIDTH)
    ratio = 1.0
    if act_scale is not None:
        entry = tl.load(bucket + image // per_entry) if MANY else 0
        ratio = tl.math.div_rn(1.0, tl.load(act_scale + entry))
    given = scales, shifts, weight, bias, act_scale, ratio, codes, row_scale, eps, zero_point, qmax
    if LOOP:
        while first < tokens:
            here, row = tile, n * tokens + t
            first += splits * ROWS
            t = tl.minimum(first + r, tokens - 1)
            tile = _pieces(x, t.to(tl.int64) * token_stride, c, first < tokens, CHANNELS, WIDTH)
            _write(here, row, c, given, NORM, CHANNELS, WIDTH)
    else:
        _write(tile, n * tokens + t, c, given, NORM, CHANNELS, WIDTH)


def tiles(channels: int) -> tuple[int, int, int]:
    """Return (WIDTH, ROWS, warps): the least padding, 24 to 40 values a thread of 128 or more."""
    padded, count = min((n * triton.next_power_of_2(-(-channels // n)), n) for n in (3, 4, 5, 9))
    width = max(padded // count, 16)
    # In nine pieces a thread has 4 values of each, and a program one warp or more, else 8 and 4.
    rows = max(1, (128 if count == 9 else 1024) // width)
    return width, rows, max(1, width * rows // (128 if count == 9 else 256))


def launch(call: Tokens) -> tuple[Tensor, Tensor]:
    """Return the results of a call, which was checked."""
    x, (codes, row_scale) = call.x, call.empty()
    count, tokens, channels = x.shape
    if codes.numel() == 0:
        return codes, row_scale
    width, rows, warps = tiles(channels)
    blocks, fit = triton.cdiv(tokens, rows), _VALUES // (-(-channels // width) * width * rows)
    turns = triton.cdiv(count * blocks, max(1, fit) * multiprocessors(x.device))
    # A few turns wait for more than they save, and one program a multiprocessor has none beside it.
    splits = triton.cdiv(blocks, turns) if turns > 3 and fit > 1 else blocks
    placed = {"EARLY": True, "launch_pdl": True} if early(x.device) else {}
    quantize_tokens[(count * splits,)](
        x, call.weight, call.bias, call.scale, call.shift, call.act_scale, call.bucket, codes,
        row_scale, tokens, splits, x.stride(0), x.stride(1),
        *(0 if v is None else v.stride(0) for v in (call.scale, call.shift)),
        count // call.bucket.numel(), call.eps, call.zero_point, call.qmax, NORM=call.norm,
        MANY=call.act_scale is not None and len(call.act_scale) > 1, CHANNELS=channels,
        WIDTH=width, ROWS=rows, LOOP=splits < blocks, num_warps=warps, **placed,
    )  # fmt: skip
    return codes, row_scale
