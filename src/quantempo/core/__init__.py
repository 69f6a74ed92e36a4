"""Core numerics: formats of integers, affine grids, seeds."""

from quantempo.core.formats import (
    ACTIVATION,
    FORMATS,
    WEIGHT,
    Format,
    Grid,
    activation_format,
    dequantize,
    fake_quantize,
    quantize,
    token_scale,
    unpack_int12,
    weight_format,
)
from quantempo.core.random import generators

__all__ = [
    "ACTIVATION", "FORMATS", "WEIGHT", "Format", "Grid", "activation_format", "dequantize",
    "fake_quantize", "generators", "quantize", "token_scale", "unpack_int12", "weight_format",
]  # fmt: skip
