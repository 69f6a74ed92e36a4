"""The registry of roundings, what a rounding sees of a block and its inputs, the nearest codes.

A rounding says what it `needs` and turns a `Unit` into integers; only integers leave it, so
packing, backends and files never know how they were found.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quantempo.core import Format, Grid, quantize
from quantempo.engines.base import channel_dim
from quantempo.errors import QuantempoError
from quantempo.quantized import QLayer
from quantempo.recipe import RoundingSettings
from quantempo.registry import Registry

__all__ = [
    "ROUNDINGS", "Needs", "Rounding", "Unit", "check_start", "dequantized_input", "nearest",
    "round_by_weights",
]  # fmt: skip

Needs = Literal["weights", "hessian", "block"]


@dataclass(frozen=True)
class Unit:
    """What a rounding sees of one block.

    weights: float weight (O, ...) of each integer layer by name, in order of execution; scales:
    (O,) float32 of each; specs: its signed grid; block: the block and its recorded inputs (a
    `BlockRun`), None for roundings that need weights alone; settings: of the recipe; notes: what
    a rounding wants said of this block in the log.
    """

    weights: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    specs: Mapping[str, Format]
    settings: RoundingSettings
    block: Any = None
    notes: list[str] = field(default_factory=list)


class Rounding(Protocol):
    """What every rounding offers.

    needs: "weights", or "hessian" (second moments of layer inputs) or "block" (inputs and output
    of whole blocks): both of these run the network on the trace.
    """

    needs: Needs

    def __call__(self, unit: Unit) -> dict[str, Tensor]:
        """Return layer name -> codes, int8, the shape of the weight, in [qmin, qmax]."""


ROUNDINGS: Registry[Rounding] = Registry("rounding")


def check_start(settings: RoundingSettings) -> None:
    """Raise QuantempoError unless `start` is a rounding that one which learns can start from."""
    if ROUNDINGS.get(settings.start).needs == "block":
        known = [n for n in ROUNDINGS.names() if ROUNDINGS.get(n).needs != "block"]
        raise QuantempoError(
            f"got rounding.start = '{settings.start}', which needs a start itself; expected one "
            f"of: {', '.join(known)}"
        )


def round_by_weights(
    name: str,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    specs: Mapping[str, Format],
) -> dict[str, Tensor]:
    """Return the codes of layers by a rounding that looks at weights alone.

    Args:
        weights: (O, ...) of each layer; scales: (O,), on any device; specs: their grids.

    Raises:
        QuantempoError: unknown name, or the rounding needs the network's inputs.
    """
    rounding = ROUNDINGS.get(name)
    if rounding.needs != "weights":
        usable = [n for n in ROUNDINGS.names() if ROUNDINGS.get(n).needs == "weights"]
        raise QuantempoError(
            f"rounding '{name}' needs the network's inputs, which are not at hand here; expected "
            f"one of: {', '.join(usable)}"
        )
    near = {key: scales[key].to(weight.device) for key, weight in weights.items()}
    return rounding(Unit(weights, near, specs, RoundingSettings(name=name)))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def dequantized_input(
    layer: QLayer, x: Tensor, scale_at: Callable[[int, Tensor], Tensor] | None = None
) -> Tensor:
    """Return x_hat = s (clamp(round(x / s) + z, 0, qmax) - z), float32, a grid for each segment.

    The gradient of round is 1. scale_at: (segment, x) -> s; by default that of the layer's clock.

    Source of the gradient: Bengio et al. 2013 (straight through).
    """
    axis, zero, parts = channel_dim(layer), layer.act_zero_point, []
    for i, part in enumerate(x.float().split(layer.segments, axis)):
        scale = (scale_at or layer.scale_now)(i, x)
        codes = (_Round.apply(part / scale) + zero[i]).clamp(0, layer.act_qmax) - zero[i]
        parts.append(codes * scale)
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def nearest(weight: Tensor, scale: Tensor, spec: Format) -> Tensor:
    """Return clamp(round(w / scale[o]), qmin, qmax) as int8, the shape of the weight.

    weight: (O, ...) floating; scale: (O,) float32, > 0; spec: signed grid of at most 8 bits.

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
