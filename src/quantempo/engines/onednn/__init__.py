"""The CPU engine: oneDNN products and fused blocks."""

from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.onednn.blocks import BLOCKS
from quantempo.engines.select import ENGINES
from quantempo.kernels.cpu import fused

__all__: list[str] = []

ENGINES.register("onednn")(
    LayerwiseEngine(
        "onednn",
        ("cpu",),
        BLOCKS,
        copies=2,
        holds=lambda layer: "as bytes" if layer.unpack or fused.missing() else "packed",
    )
)
