"""The registry of roundings (layer L4).

A rounding is a function (weight (O, ...) float, scale (O,) float32, spec) -> codes (O, ...) int8 in
[qmin, qmax]. Packing, backends and files never know how the integers were found.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quantempo.core import QuantSpec
from quantempo.registry import Registry

__all__ = ["ROUNDINGS", "Rounding"]

Rounding = Callable[[Tensor, Tensor, QuantSpec], Tensor]

ROUNDINGS: Registry[Rounding] = Registry("rounding")
