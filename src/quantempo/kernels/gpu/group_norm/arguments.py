"""Launch arguments shared by all GroupNorm kernels."""

from typing import Any, NamedTuple

from torch import Tensor

from quantempo.kernels.ops.gn_act_quant import Normalization

__all__ = ["Arguments", "Results", "shared_arguments"]

Results = tuple[Tensor, Tensor, Tensor]


class Arguments(NamedTuple):
    """What all kernels are given, in their order.

    Attributes:
        norm: gamma, beta, eps.
        tensors: scale, raw scales, those of skip, bucket, codes, raw codes of x, of skip.
        numbers: C1, C2, images a bucket entry, zero point and qmax, raw zero points of x and of
            skip, raw qmax.
        constants: SOURCE and what is computed; SOURCE: 0 there is no skip, 1 every slab of `width`
            channels lies in x or in skip, 2 a slab may lie in both.
    """

    norm: tuple[Any, ...]
    tensors: tuple[Any, ...]
    numbers: tuple[int, ...]
    constants: dict[str, Any]


def shared_arguments(call: Normalization, results: Results, width: int) -> Arguments:
    """Return the arguments of a call whose slabs are `width` channels."""
    x, skip, scale, raw = call.x, call.skip, call.scale, call.raw_scales
    c1, c2 = x.shape[1], 0 if skip is None else skip.shape[1]
    points = tuple(call.raw_zero_points) or (0,)
    return Arguments(
        (call.gamma, call.beta, call.eps),
        (scale, raw, raw if raw is None or skip is None else raw[-1], call.bucket, *results),
        (
            c1, c2, x.shape[0] // call.bucket.numel(), call.zero_point, call.qmax, points[0],
            points[-1], call.raw_qmax,
        ),
        {
            "SOURCE": 0 if skip is None else 2 if c1 % width else 1,
            "SILU": call.silu, "QUANTIZE": scale is not None, "RAW": raw is not None,
            "MANY": scale is not None and scale.shape[0] > 1,
            "RAW_MANY": raw is not None and raw.shape[1] > 1,
        },
    )  # fmt: skip
