"""The studies themselves, one file a table or figure of the paper; importing registers them."""

from quantempo.study.items import (
    activations,
    inputs,
    laws,
    legacy,
    metrics,
    operations,
    samplers,
    single_step,
)

__all__ = [
    "activations",
    "inputs",
    "laws",
    "legacy",
    "metrics",
    "operations",
    "samplers",
    "single_step",
]
