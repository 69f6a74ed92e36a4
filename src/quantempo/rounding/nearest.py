"""Round each weight to the nearest code."""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.core import Format, Grid, quantize
from quantempo.rounding.base import ROUNDINGS, Needs, Unit

__all__ = ["NearestRounding", "nearest"]


def nearest(weight: Tensor, scale: Tensor, spec: Format) -> Tensor:
    """Return clamp(round(w / scale[o]), qmin, qmax) as int8, the shape of the weight.

    Args:
        weight: (O, ...) floating.
        scale: (O,) float32, > 0.
        spec: signed grid of at most 8 bits.

    Error: |w - scale q| <= scale / 2 inside the range.
    """
    grid = Grid(scale, torch.zeros_like(scale, dtype=torch.int32))
    return quantize(weight, grid, spec, axis=0).to(torch.int8)


class NearestRounding:
    """Round every layer of a unit by `nearest`."""

    needs: Needs = "weights"

    def __call__(self, unit: Unit) -> dict[str, Tensor]:
        """Return the nearest codes of each layer."""
        return {
            name: nearest(weight, unit.scales[name], unit.specs[name])
            for name, weight in unit.weights.items()
        }


ROUNDINGS.register("nearest")(NearestRounding())
