"""Round a block of columns one after the other, as `rounding.gptq` does: one launch, not 1,000."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch"]

_OUTS = 32


@triton.jit
def columns(
    rest, codes, errors, factor, scale, step, low, high, outs, count,
    COUNT: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """Round `count` columns of OUTS output channels; a column is a row of each operand."""
    o, i = tl.program_id(0) * OUTS + tl.arange(0, OUTS), tl.arange(0, COUNT)
    known = o < outs
    here = (i < count)[:, None] & known[None, :]
    w = tl.load(rest + i[:, None] * outs + o[None, :], mask=here, other=0.0)
    s = tl.load(scale + o, mask=known, other=1.0)
    for j in range(count):
        at = j * outs + o
        column = tl.sum(tl.where(i[:, None] == j, w, 0.0), 0)
        unit = tl.load(step + at, mask=known, other=1.0)
        least = tl.load(low + at, mask=known, other=0.0)
        most = tl.load(high + at, mask=known, other=0.0)
        ratio = tl.div_rn(tl.div_rn(column, s), unit)
        # 1.5 * 2^23: what is added to it is rounded to an integer, halves to even.
        ratio = (tl.minimum(tl.maximum(ratio, -4096.0), 4096.0) + 12582912.0) - 12582912.0
        code = tl.minimum(tl.maximum(ratio, least), most) * unit
        error = tl.div_rn(column - code * s, tl.load(factor + j * count + j))
        tl.store(codes + at, code, mask=known)
        tl.store(errors + at, error, mask=known)
        later = tl.load(factor + j * count + i, mask=(i > j) & (i < count), other=0.0)
        w -= later[:, None] * error[None, :]


def launch(
    rest: Tensor, codes: Tensor, errors: Tensor, factor: Tensor, scale: Tensor,
    grid: tuple[Tensor | float, Tensor | float, Tensor | float],
) -> None:  # fmt: skip
    """Write codes and errors (k, O) of columns `rest`, float32, in the order of a CPU's arithmetic.

    factor: (k, k), upper, of any strides; scale: (O,); grid: step, low and high of the codes,
    numbers or (O, k). Results have the bits of torch's operators.
    """
    count, outs = rest.shape
    given = (torch.as_tensor(v, dtype=rest.dtype, device=rest.device) for v in grid)
    rows = (v.expand(outs, count).t().contiguous() for v in given)
    columns[(triton.cdiv(outs, _OUTS),)](
        rest, codes, errors, factor.contiguous(), scale, *rows, outs, count,
        COUNT=triton.next_power_of_2(count), OUTS=_OUTS,
        # A fused product and sum would round once.
        enable_fp_fusion=False,
    )  # fmt: skip
