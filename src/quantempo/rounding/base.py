"""The registry of roundings, and what a rounding sees.

A rounding says what it `needs` and turns a `Unit` into integers; only integers leave it, so
packing, backends and files never know how they were found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from quantempo.core import Format
from quantempo.errors import QuantempoError
from quantempo.recipe import RoundingSettings
from quantempo.registry import Registry

__all__ = ["ROUNDINGS", "Needs", "Rounding", "Unit", "check_start", "round_by_weights"]

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
        name: of a registered rounding.
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
