"""Backends run one layer, engines a whole denoiser; each package registers what it has.

In the order of preference (`make bench`): the first that can run on a device, and fast, is chosen.
"""

from quantempo.engines import onednn  # noqa: I001
from quantempo.engines import cuda
from quantempo.engines import simulated
from quantempo.engines import openvino
from quantempo.engines.select import ENGINES, attach, attached, detach

__all__ = ["ENGINES", "attach", "attached", "cuda", "detach", "onednn", "openvino", "simulated"]
