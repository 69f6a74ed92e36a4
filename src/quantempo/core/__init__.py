"""Core numerics: formats of integers, seeds."""

from quantempo.core.formats import (
    ACTIVATION,
    FORMATS,
    WEIGHT,
    Format,
    activation_format,
    token_scale,
    unpack_int12,
    weight_format,
)
from quantempo.core.random import generators

__all__ = [
    "ACTIVATION", "FORMATS", "WEIGHT", "Format", "activation_format", "generators", "token_scale",
    "unpack_int12", "weight_format",
]  # fmt: skip
