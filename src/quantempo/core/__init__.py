"""Core numerics: formats of integers."""

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

__all__ = [
    "ACTIVATION", "FORMATS", "WEIGHT", "Format", "activation_format", "token_scale",
    "unpack_int12", "weight_format",
]  # fmt: skip
