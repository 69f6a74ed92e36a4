"""What all fused blocks for GPUs share: their registry, their constants, what they take."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantempo.engines.base import Prepared
from quantempo.engines.cuda.constants import FLOATS
from quantempo.engines.fusion import Blocks, FusedBlock, FusedUpBlock
from quantempo.models.fusion_unet import UpBlockParts

__all__ = ["BLOCKS", "GpuBlock"]

BLOCKS = Blocks("triton", eager=True)
BLOCKS.build(UpBlockParts)(FusedUpBlock.build)


class GpuBlock(Prepared, FusedBlock):
    """A fused block on images (B, C, H, W) of any floating type that the operators read."""

    def takes(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether `run` can be given these."""
        return x.dtype in FLOATS and x.ndim == 4
