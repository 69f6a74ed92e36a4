"""Affine quantization, elementwise.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x_hat = scale * (q - zero_point)

Rounding is to nearest, ties to even. Source: Jacob et al. 2018, eq. 1; PTQ4DM eq. 1 with its
zero point's sign turned (there z is subtracted before the clamp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantempo.core.formats import Format
from quantempo.errors import QuantempoError

__all__ = ["Grid", "dequantize", "fake_quantize", "quantize"]


@dataclass(frozen=True)
class Grid:
    """Hold P grids: x_hat = scale * (q - zero_point).

    Args:
        scale: (P,) float32, > 0 and finite.
        zero_point: (P,) int32.

    Raises:
        QuantempoError: wrong dtype or shape, or a scale that is not positive and finite.
    """

    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise QuantempoError(
                f"got scale {self.scale.dtype} and zero_point {self.zero_point.dtype}; "
                "expected float32 and int32"
            )
        if self.scale.ndim != 1 or self.scale.shape != self.zero_point.shape:
            raise QuantempoError(
                f"got scale {tuple(self.scale.shape)} and zero_point "
                f"{tuple(self.zero_point.shape)}; expected the same shape (P,)"
            )
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise QuantempoError("got a scale that is not positive and finite; recalibrate")


def _rows(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """Shape (P,) parameters so that they broadcast along `axis` of x; P must be 1 without one."""
    if axis is None:
        if values.numel() != 1:
            raise QuantempoError(
                f"got {values.numel()} scales without an axis; expected 1, or give axis="
            )
        return values.reshape(())
    if values.numel() not in (1, x.shape[axis]):
        raise QuantempoError(
            f"got scale of shape ({values.numel()},) for {x.shape[axis]} channels on axis {axis}; "
            "expected one each; recalibrate"
        )
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, grid: Grid, spec: Format, axis: int | None = None) -> Tensor:
    """Return the int32 codes of x: clamp(round(x / scale) + zero_point, qmin, qmax).

    Args:
        x: floating, any shape.
        grid: P grids; P = 1, or one for each index of `axis`.
        spec: the format of the codes.
        axis: dimension of x that the P grids run along; None for one grid.

    Raises:
        QuantempoError: x is not floating or holds NaN; P does not fit.
    """
    if not x.is_floating_point():
        raise QuantempoError(f"got {x.dtype}; expected a floating tensor to quantize")
    if bool(x.isnan().any()):
        raise QuantempoError("got NaN in a tensor to quantize; check the checkpoint")
    scale, zero = _rows(grid.scale, x, axis), _rows(grid.zero_point, x, axis)
    # The clamp precedes the cast: a float beyond int32 has no defined integer value.
    codes = torch.round(x.float() / scale) + zero
    return codes.clamp(spec.qmin, spec.qmax).to(torch.int32)


def dequantize(q: Tensor, grid: Grid, axis: int | None = None) -> Tensor:
    """Return x_hat = scale * (q - zero_point) in float32; same shape as q."""
    return (q - _rows(grid.zero_point, q, axis)).float() * _rows(grid.scale, q, axis)


def fake_quantize(x: Tensor, grid: Grid, spec: Format, axis: int | None = None) -> Tensor:
    """Return dequantize(quantize(x)) in the dtype of x.

    Error: |x - x_hat| <= scale / 2 for x inside [scale*(qmin - z), scale*(qmax - z)], plus the
    rounding of the dtype; outside, the distance to the nearest end of that range.
    """
    return dequantize(quantize(x, grid, spec, axis), grid, axis).to(x.dtype)
