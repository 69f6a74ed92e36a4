"""Affine quantization, elementwise.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x_hat = scale * (q - zero_point)

Rounding is to nearest, ties to even. Source: Jacob et al. 2018, eq. 1; PTQ4DM eq. 1 with its
zero point's sign turned (there z is subtracted before the clamp).
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.core.spec import QParams, QuantSpec
from quantempo.errors import QuantempoError

__all__ = ["dequantize", "fake_quantize", "quantize"]


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


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec, axis: int | None = None) -> Tensor:
    """Return the int32 codes of x: clamp(round(x / scale) + zero_point, qmin, qmax).

    Args:
        x: floating, any shape.
        qparams: P grids; P = 1, or one for each index of `axis`.
        spec: the grid.
        axis: dimension of x that the P grids run along; None for one grid.

    Raises:
        QuantempoError: x is not floating or holds NaN; P does not fit.
    """
    if not x.is_floating_point():
        raise QuantempoError(f"got {x.dtype}; expected a floating tensor to quantize")
    if bool(x.isnan().any()):
        raise QuantempoError("got NaN in a tensor to quantize; check the checkpoint")
    scale, zero = _rows(qparams.scale, x, axis), _rows(qparams.zero_point, x, axis)
    # The clamp precedes the cast: a float beyond int32 has no defined integer value.
    codes = torch.round(x.float() / scale) + zero
    return codes.clamp(spec.qmin, spec.qmax).to(torch.int32)


def dequantize(q: Tensor, qparams: QParams, axis: int | None = None) -> Tensor:
    """Return x_hat = scale * (q - zero_point) in float32; same shape as q."""
    return (q - _rows(qparams.zero_point, q, axis)).float() * _rows(qparams.scale, q, axis)


def fake_quantize(x: Tensor, qparams: QParams, spec: QuantSpec, axis: int | None = None) -> Tensor:
    """Return dequantize(quantize(x)) in the dtype of x.

    Error: |x - x_hat| <= scale / 2 for x inside [scale*(qmin - z), scale*(qmax - z)], plus the
    rounding of the dtype; outside, the distance to the nearest end of that range.
    """
    return dequantize(quantize(x, qparams, spec, axis), qparams, axis).to(x.dtype)
