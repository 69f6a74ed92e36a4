"""The engine for NVIDIA GPUs: int8 products, fused blocks, CUDA graphs."""

from quantempo.engines.base import BACKENDS
from quantempo.engines.cuda import transformer, unet
from quantempo.engines.cuda.layer import TritonBackend
from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.select import ENGINES

__all__ = ["transformer", "unet"]

BACKENDS.register("triton")(TritonBackend())
ENGINES.register("triton")(LayerwiseEngine("triton", ("cuda",), unet.BLOCKS))
