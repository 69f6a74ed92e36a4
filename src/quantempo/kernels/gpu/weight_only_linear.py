"""Launch `kernels.ops.weight_only_linear` on a GPU: codes are read once, for all rows.

Several rows are tiles of matrix instructions, in tf32: a code is exact, x is two parts of 11 bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.ops.weight_only_linear import FloatRows

__all__ = ["launch", "multiply"]

# float32 1.5 * 2^23 and its bits: an integer added to these is added to it, faster than converted.
_VALUE, _BITS = tl.constexpr(12582912.0), tl.constexpr(0x4B400000)


@triton.jit(do_not_specialize=["rows", "outs"])
def multiply(
    x, weight, weight_scale, bias, groups, y, rows, outs, width, pitch, count,
    ROWS: tl.constexpr, OUTS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Write OUTS channels (of `pitch` bytes, `count` groups) of ROWS rows, in steps of WIDTH."""
    blocks = tl.cdiv(rows, ROWS)
    # Programs that read the same codes are neighbours.
    o = (tl.program_id(0) // blocks) * OUTS + tl.arange(0, OUTS)
    m = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, WIDTH)
    far = tl.minimum(o, outs - 1).to(tl.int64)[:, None]
    codes = weight + far * pitch
    values = x + tl.minimum(m, rows - 1).to(tl.int64) * width
    # Of one row the sums of 16 neighbours, which one thread has loaded.
    total = tl.zeros((OUTS, WIDTH // 16 if ROWS == 1 else ROWS), tl.float32)
    for start in range(0, width, WIDTH):
        c = start + k
        if GROUP == 0:
            w = tl.load(codes + c[None, :], mask=(c < width)[None, :], other=0)
            w = (w.to(tl.int32) + _BITS).to(tl.float32, bitcast=True) - _VALUE
        else:
            byte = start // 2 + tl.arange(0, WIDTH // 2)
            q = tl.load(codes + byte[None, :], mask=(byte < pitch)[None, :], other=0).to(tl.int32)
            # 16 neighbours share s and z.
            g = (start + 16 * tl.arange(0, WIDTH // 16)) // GROUP
            each = tl.load(groups + far * count + g[None, :], mask=(g < count)[None, :], other=0)
            s = ((each.to(tl.int32) >> 4) + 1)[:, :, None]
            zero = _BITS - (each.to(tl.int32) & 15)[:, :, None] * s
            q = tl.reshape(tl.interleave(q & 15, q >> 4), (OUTS, WIDTH // 16, 16)) * s + zero
            w = tl.reshape(q.to(tl.float32, bitcast=True) - _VALUE, (OUTS, WIDTH))
        if ROWS == 1:
            v = tl.load(values + c, mask=c < width, other=0.0).to(tl.float32)
            total += tl.sum(tl.reshape(w * v[None, :], (OUTS, WIDTH // 16, 16)), 2)
        else:
            here = values[None, :] + c[:, None]
            v = tl.load(here, mask=(c < width)[:, None], other=0.0).to(tl.float32)
            # All that a matrix instruction reads of a value.
            high = (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
            total = tl.dot(w, high, total, input_precision="tf32")
            total = tl.dot(w, v - high, total, input_precision="tf32")
    if ROWS == 1:
        total = tl.sum(total, 1)[:, None]
    known = o < outs
    total *= tl.load(weight_scale + o, mask=known, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + o, mask=known, other=0.0)[:, None]
    to = y + m.to(tl.int64)[None, :] * outs + o[:, None]
    tl.store(to, total.to(y.dtype.element_ty), mask=(m < rows)[None, :] & known[:, None])


def launch(call: FloatRows) -> Tensor:
    """Return the result of a call, which was checked."""
    y, (rows, width), group = call.empty(), call.x.shape, call.group
    tile, out, step = (1, 32, 256) if rows == 1 else (16 if rows <= 16 else 32, 128, 64)
    # Of half the bytes twice the channels.
    how = {"ROWS": tile, "OUTS": 2 * out if group and rows == 1 else out, "WIDTH": step}
    sizes = (rows, y.shape[1], width, call.weight.shape[-1], -(-width // group) if group else 0)
    if y.numel():
        grid = triton.cdiv(y.shape[1], how["OUTS"]) * triton.cdiv(rows, tile)
        multiply[(grid,)](*call, y, *sizes, **how, GROUP=group, num_warps=4)
    return y
