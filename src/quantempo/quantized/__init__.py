"""Stateful modules: the step clock, quantized layers, replacing layers in place."""

from quantempo.quantized import clock, layers, swap, weight_only
from quantempo.quantized.clock import *  # noqa: F403
from quantempo.quantized.layers import *  # noqa: F403
from quantempo.quantized.swap import *  # noqa: F403
from quantempo.quantized.weight_only import *  # noqa: F403

__all__ = clock.__all__ + layers.__all__ + swap.__all__ + weight_only.__all__
