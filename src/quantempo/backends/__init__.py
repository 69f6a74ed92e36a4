"""Backends run one layer, engines a whole denoiser; importing this registers all (layer L3)."""

# Engines in the order of preference (batches of 8 and 16, `make bench`): the first that can run on
# a device, and has all it is fast with, is its default.
from quantempo.backends import onednn, simulated, triton  # noqa: I001
from quantempo.backends import layerwise
from quantempo.backends import openvino
from quantempo.backends.engine import ENGINES, attach, attached, detach

__all__ = [
    "ENGINES",
    "attach",
    "attached",
    "detach",
    "layerwise",
    "onednn",
    "openvino",
    "simulated",
    "triton",
]
