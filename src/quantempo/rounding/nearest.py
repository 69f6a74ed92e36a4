"""Round each weight to the nearest code (layer L4)."""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.core import QParams, QuantSpec, quantize
from quantempo.rounding.base import ROUNDINGS

__all__ = ["nearest"]


@ROUNDINGS.register("nearest")
def nearest(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Return clamp(round(w / scale[o]), qmin, qmax) as int8, the shape of the weight.

    Args:
        weight: (O, ...) floating.
        scale: (O,) float32, > 0.
        spec: signed grid of at most 8 bits.

    Error: |w - scale q| <= scale / 2 inside the range.
    """
    grid = QParams(scale, torch.zeros_like(scale, dtype=torch.int32))
    return quantize(weight, grid, spec, axis=0).to(torch.int8)
