"""Backends run one layer, engines a whole denoiser; importing this registers all."""

# Engines in the order of preference (batches of 8 and 16, `make bench`): the first that can run on
# a device, and has all it is fast with, is its default.
from quantempo.engines.onednn import layer as onednn  # noqa: I001
from quantempo.engines import simulated
from quantempo.engines.cuda import layer as triton
from quantempo.engines import layerwise
from quantempo.engines.openvino import engine as openvino
from quantempo.engines.select import ENGINES, attach, attached, detach

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
