"""Stateful modules: the step clock, quantized layers, replacing layers in place."""

from quantempo.quantized.clock import CLOCK_NAME, StepClock
from quantempo.quantized.layers import Float16Linear, QConv2d, QLayer, QLinear
from quantempo.quantized.output_side import install_output_side, output_side_layers
from quantempo.quantized.sites import (
    SITES,
    SiteQuantizer,
    attach_sampler_site,
    attach_scheduler_sites,
    attach_variance_site,
    check_sites,
    find_sites,
    install_sites,
    measured_sites,
    output_part,
)
from quantempo.quantized.swap import (
    LayerPlan,
    bits_of,
    fill,
    find_clock,
    install_clock,
    quantized_layers,
    swap_layers,
)

__all__ = [
    "CLOCK_NAME",
    "SITES",
    "Float16Linear",
    "LayerPlan",
    "QConv2d",
    "QLayer",
    "QLinear",
    "SiteQuantizer",
    "StepClock",
    "attach_sampler_site",
    "attach_scheduler_sites",
    "attach_variance_site",
    "bits_of",
    "check_sites",
    "fill",
    "find_clock",
    "find_sites",
    "install_clock",
    "install_output_side",
    "install_sites",
    "measured_sites",
    "output_part",
    "output_side_layers",
    "quantized_layers",
    "swap_layers",
]
