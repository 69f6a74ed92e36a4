"""Core numerics: formats of integers."""

from quantempo.core.formats import (
    ACTIVATION,
    FORMATS,
    GROUPS,
    WEIGHT,
    Format,
    Grid,
    GroupFormat,
    activation_format,
    channels_last,
    restore,
    token_scale,
    unpack_int12,
    weight_format,
)

__all__ = [
    "ACTIVATION", "FORMATS", "GROUPS", "WEIGHT", "Format", "Grid", "GroupFormat",
    "activation_format", "channels_last", "restore", "token_scale", "unpack_int12",
    "weight_format",
]  # fmt: skip
