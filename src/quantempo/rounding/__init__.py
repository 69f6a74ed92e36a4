"""Choose integer weights; only integers leave a rounding."""

from quantempo.rounding.base import ROUNDINGS, check_start, nearest, round_by_weights

# Registered by import, nearest first: it is the default.
from quantempo.rounding.gptq import gptq, round_alone  # isort: skip
from quantempo.rounding.reconstruct import round_denoiser  # isort: skip

__all__ = [
    "ROUNDINGS", "check_start", "gptq", "nearest", "round_alone", "round_by_weights",
    "round_denoiser",
]  # fmt: skip
