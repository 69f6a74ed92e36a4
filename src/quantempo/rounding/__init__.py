"""Choose integer weights; only integers leave a rounding (layer L4)."""

from quantempo.rounding.base import ROUNDINGS
from quantempo.rounding.nearest import nearest

__all__ = ["ROUNDINGS", "nearest"]
