"""What all GroupNorm kernels are given."""

from collections import namedtuple
from typing import Any, NamedTuple

from torch import Tensor

from quantempo.kernels.ops.gn_act_quant import Normalization

__all__ = ["Form", "Numbers", "Results", "Tensors", "shared_arguments"]

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
