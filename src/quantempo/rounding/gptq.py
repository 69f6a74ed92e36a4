"""Round column by column and let later columns make up for the error of earlier ones.

    minimise ||(W - s q) X||^2 over integers q, greedily, given H = X X^T

Source: Frantar et al. 2022, "GPTQ", algorithm 1, with columns in the order of descending diag(H).
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import Format, Grid
from quantempo.errors import QuantempoError, log
from quantempo.quantized import QConv2d, QLayer
from quantempo.rounding.base import ROUNDINGS, BlockRun, Rounding, Unit, dequantized_input

__all__ = ["gptq", "input_hessian", "moments"]

# Factors on the damping that are tried in float64, one after the other.
_HARDER = (1.0, 10.0, 100.0)
# Bytes of unfolded patches at a time.
_PATCH_BYTES = 2**28


@torch.no_grad()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    spec: Format | Grid,
    damping: float = 0.01,
    block: int = 128,
) -> Tensor:
    """Return codes (O, K) int8 in [qmin, qmax] that minimise tr((W - s q) H (W - s q)^T), greedily.

    With U the upper Cholesky factor of (H + damping mean(diag H) I)^-1 and columns j in order:
    q_j = clamp(round(w_j / s)), then w_k -= (w_j - s q_j) U_jk / U_jj for all later k.
    A diagonal H gives the nearest codes exactly. Float32; float64 where H is near singular.

    Args:
        weight, scale: (O, K) floating and (O,) float32, > 0.
        hessian: (K, K) = X X^T up to a factor, on the same device; not changed.
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
    step, grid = scale.float(), Grid.of(spec)[:, order]
    codes = torch.empty_like(rest)
    for first in range(0, width, block):
        last = min(first + block, width)
        here = factor[first:last, first:last]
        errors = torch.empty_like(rest[first:last])
        for j in range(last - first):
            column = rest[first + j]
            code = grid[:, first + j].round(column / step)
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


def moments(layer: QLayer, x: Tensor) -> Tensor:
    """Return X X^T of an input, (groups, K, K) float32, K in the order of weight.flatten(1).

    Args:
        layer: gives the kernel size, stride, padding and groups.
        x: (B, C, H, W), or (..., C) for a linear layer; already on the layer's grid.

    Memory: patches of a convolution are made for a few images at a time, 256 MB of them.
    """
    if not isinstance(layer, QConv2d):
        flat = x.reshape(-1, x.shape[-1])
        return (flat.t() @ flat)[None]
    width = math.prod(layer.weight_shape[1:])
    total = x.new_zeros(layer.groups, width, width)
    positions = 1
    for i in (0, 1):
        span = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
        positions *= (x.shape[2 + i] + 2 * layer.padding[i] - span) // layer.stride[i] + 1
    rows = max(1, _PATCH_BYTES // (4 * layer.groups * width * positions))
    for part in x.split(rows):
        patches = F.unfold(part, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        # (b, groups K, L) -> (groups, K, b L)
        patches = patches.unflatten(1, (layer.groups, width)).permute(1, 2, 0, 3).flatten(2)
        total.baddbmm_(patches, patches.transpose(1, 2))
    return total


@torch.no_grad()
def input_hessian(block: BlockRun, name: str) -> Tensor:
    """Return (groups, K, K): moments of one layer's quantized input over all recorded rows.

    The block runs with its integers as they are now, up to that layer.
    """
    layer = block.copies[name]
    total: Tensor | None = None
    count = 0
    for x in block.layer_inputs(name):
        term = moments(layer, dequantized_input(layer, layer.operand(x)))
        total, count = term if total is None else total.add_(term), count + x.shape[0]
    assert total is not None
    # A mean, so that the numbers do not grow with the set.
    return total / count


def _gptq_codes(unit: Unit) -> dict[str, Tensor]:
    """Round the layers of a block in order of execution, each on the inputs it will really get.

    Those come from the block whose earlier layers are rounded already; its layers hold the codes
    afterwards. Groups of a convolution are rounded apart.
    """
    codes = {}
    for name, weight in unit.weights.items():
        layer, grid = unit.block.copies[name], unit.grid(name)
        hessian = input_hessian(unit.block, name)
        rows = len(weight) // len(hessian)
        flat, scales = (v.split(rows) for v in (weight.detach().flatten(1), unit.scales[name]))
        parts = [
            gptq(part, h, scale, grid[i * rows : (i + 1) * rows])
            for i, (part, h, scale) in enumerate(zip(flat, hessian, scales, strict=True))
        ]
        codes[name] = torch.cat(parts).reshape(layer.weight_shape)
        unit.block.assign(name, codes[name])
    return codes


ROUNDINGS.register("gptq")(Rounding("hessian", _gptq_codes))
