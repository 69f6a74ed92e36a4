"""Stateful modules: the step clock, quantized layers, replacing layers in place."""

from quantempo.quantized.clock import CLOCK_NAME, StepClock, Times, token_rows
from quantempo.quantized.layers import Float16Linear, QConv2d, QLayer, QLinear, StoredLinear
from quantempo.quantized.swap import (
    LayerPlan,
    bits_of,
    check_bits,
    fill,
    find_clock,
    install_clock,
    named_bits,
    plan_layers,
    quantized_layers,
    swap_layers,
    weight_only_layers,
)
from quantempo.quantized.weight_only import WeightOnlyLinear

__all__ = [
    "CLOCK_NAME", "Float16Linear", "LayerPlan", "QConv2d", "QLayer", "QLinear",
    "StepClock", "StoredLinear", "Times", "WeightOnlyLinear", "bits_of", "check_bits", "fill",
    "find_clock", "install_clock", "named_bits", "plan_layers", "quantized_layers", "swap_layers",
    "token_rows", "weight_only_layers",
]  # fmt: skip
