"""The CPU engine: oneDNN products and fused blocks."""

from quantempo.engines.base import BACKENDS
from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.onednn.blocks import BLOCKS
from quantempo.engines.onednn.layer import OneDNNBackend
from quantempo.engines.select import ENGINES
from quantempo.kernels.cpu import packed

__all__: list[str] = []

BACKENDS.register("onednn")(OneDNNBackend())
ENGINES.register("onednn")(
    LayerwiseEngine(
        "onednn", ("cpu",), BLOCKS, holds=lambda layer: "as bytes" if packed.missing() else "packed"
    )
)
