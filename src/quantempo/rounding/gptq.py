"""Round column by column and let later columns make up for the error of earlier ones.

    minimise ||(W - s q) X||^2 over integers q, greedily, given H = X X^T

Source: Frantar et al. 2022, "GPTQ", algorithm 1, with columns in the order of descending diag(H).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from quantempo.core import Format
from quantempo.errors import QuantempoError
from quantempo.rounding.base import ROUNDINGS, Needs, Unit
from quantempo.rounding.hessian import input_hessian

__all__ = ["GptqRounding", "gptq"]

log = logging.getLogger("quantempo")

# Factors on the damping that are tried in float64, one after the other.
_HARDER = (1.0, 10.0, 100.0)


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    spec: Format,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Return codes (O, K) int8 in [qmin, qmax] that minimise tr((W - s q) H (W - s q)^T), greedily.

    With U the upper Cholesky factor of (H + damping mean(diag H) I)^-1 and columns j in order:
    q_j = clamp(round(w_j / s)), then w_k -= (w_j - s q_j) U_jk / U_jj for all later k.
    A diagonal H gives the nearest codes exactly. Float32; float64 where H is near singular.

    Args:
        weight: (O, K) floating.
        hessian: (K, K) = X X^T up to a factor, on the same device; not changed.
        scale: (O,) float32, > 0.
        spec: signed grid of at most 8 bits.
        damping: added to the diagonal, as a fraction of its mean.
        block: columns updated together; changes the order of sums only.

    Raises:
        QuantempoError: shapes that do not fit, or H is not finite or not positive semi-definite.
    """
    out, width = weight.shape
    if hessian.shape != (width, width) or scale.shape != (out,):
        raise QuantempoError(
            f"got a hessian {tuple(hessian.shape)} and scales {tuple(scale.shape)} for a weight "
            f"{tuple(weight.shape)}; expected ({width}, {width}) and ({out},)"
        )
    if not bool(hessian.isfinite().all()):
        raise QuantempoError("got a hessian that is not finite; check the checkpoint and the trace")
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order].float(), damping)
    # Columns as rows: each step reads and writes whole contiguous rows.
    rest = weight.float()[:, order].t().contiguous()
    step = scale.float()
    codes = torch.empty_like(rest)
    for first in range(0, width, block):
        last = min(first + block, width)
        here = factor[first:last, first:last]
        errors = torch.empty_like(rest[first:last])
        for j in range(last - first):
            column = rest[first + j]
            code = torch.round(column / step).clamp_(spec.qmin, spec.qmax)
            codes[first + j] = code
            errors[j] = (column - code * step) / here[j, j]
            rest[first + j + 1 : last] -= torch.outer(here[j, j + 1 :], errors[j])
        rest[last:] -= factor[first:last, last:].t() @ errors
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().to(torch.int8).contiguous()


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped hessian (changed), float32."""
    diagonal = hessian.diagonal()
    # A column that no input ever reaches: any value does, and its row holds zeros alone.
    diagonal[diagonal <= 0] = 1.0 if not bool((diagonal > 0).any()) else float(diagonal.mean())
    mean = float(diagonal.mean())
    damped = hessian.clone()
    damped.diagonal().add_(damping * mean)
    factor = _factor(damped)
    if factor is not None:
        return factor
    for harder in _HARDER:
        damped = hessian.double()
        damped.diagonal().add_(harder * damping * mean)
        factor = _factor(damped)
        if factor is not None:
            log.warning(
                "gptq: a hessian of %d columns is near singular; float64 with damping %g instead "
                "of float32 with %g", len(hessian), harder * damping, damping,
            )  # fmt: skip
            return factor.float()
    raise QuantempoError(
        f"no Cholesky factor of a hessian of {len(hessian)} columns even with damping "
        f"{_HARDER[-1] * damping}; take more samples of the trace, or rounding 'nearest'"
    )


def _factor(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) or not bool(upper.isfinite().all()) else upper


class GptqRounding:
    """Round the layers of a block in order of execution, each on the inputs it will really get."""

    needs: Needs = "hessian"

    def __call__(self, unit: Unit) -> dict[str, Tensor]:
        """Return the codes; the block's layers hold them afterwards.

        Inputs of a layer come from the block whose earlier layers are rounded already. Groups of
        a convolution are rounded apart.
        """
        codes = {}
        for name, weight in unit.weights.items():
            layer, spec = unit.block.twins[name], unit.specs[name]
            hessian = input_hessian(unit.block, name)
            flat = weight.detach().flatten(1)
            rows = len(flat) // len(hessian)
            parts = [
                gptq(part, h, s, spec)
                for part, h, s in zip(
                    flat.split(rows), hessian, unit.scales[name].split(rows), strict=True
                )
            ]
            codes[name] = torch.cat(parts).reshape(layer.weight_shape)
            unit.block.assign(name, codes[name])
        return codes


ROUNDINGS.register("gptq")(GptqRounding())
