"""Core numerics: integer grids, packing, seeds."""

from quantempo.core.affine import dequantize, fake_quantize, quantize
from quantempo.core.packing import (
    check_codes,
    pack_int4,
    unpack_int4,
    unpack_int12,
)
from quantempo.core.random import generators
from quantempo.core.spec import ACTIVATION, WEIGHT, QParams, QuantSpec

__all__ = [
    "ACTIVATION",
    "WEIGHT",
    "QParams",
    "QuantSpec",
    "check_codes",
    "dequantize",
    "fake_quantize",
    "generators",
    "pack_int4",
    "quantize",
    "unpack_int4",
    "unpack_int12",
]
