"""Stateful modules: the step clock, quantized layers, replacing layers in place."""

from quantempo.quantized.attention import (
    INT8_ATTENTION,
    Int8Attention,
    install_int8_attention,
    int8_attention,
    int8_attention_blocks,
    restore_int8_attention,
)
from quantempo.quantized.clock import CLOCK_NAME, StepClock
from quantempo.quantized.features import features_of
from quantempo.quantized.layers import Int12Linear, QConv2d, QLayer, QLinear
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
    "INT8_ATTENTION",
    "SITES",
    "Int8Attention",
    "Int12Linear",
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
    "features_of",
    "fill",
    "find_clock",
    "find_sites",
    "install_clock",
    "install_int8_attention",
    "install_output_side",
    "install_sites",
    "int8_attention",
    "int8_attention_blocks",
    "measured_sites",
    "output_part",
    "output_side_layers",
    "quantized_layers",
    "restore_int8_attention",
    "swap_layers",
]
