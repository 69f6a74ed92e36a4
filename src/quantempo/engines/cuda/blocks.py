"""What all fused blocks for GPUs share: their registry, their constants, what they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantempo.engines.cuda.constants import FLOATS
from quantempo.engines.fusion import Blocks, FusedBlock, FusedUpBlock
from quantempo.errors import QuantempoError
from quantempo.models.fusion_unet import UpBlockParts

__all__ = ["BLOCKS", "GpuBlock", "Prepared"]

BLOCKS = Blocks("triton", eager=True)
BLOCKS.build(UpBlockParts)(FusedUpBlock)


class Prepared:
    """Constants of one device, built in `prepare`, outside of any trace."""

    device: torch.device | None = None

    def prepare(self, device: torch.device) -> None:
        """Make the constants (again)."""
        with torch.inference_mode(False), torch.no_grad():
            self._prepare(device)
        self.device = device

    def _prepare(self, device: torch.device) -> None:
        raise NotImplementedError

    def here(self, x: Tensor) -> None:
        """Make the constants if they are not on the device of x."""
        if self.device != x.device:
            if torch.compiler.is_compiling():
                raise QuantempoError("the model was moved; attach the engine, then compile")
            self.prepare(x.device)


class GpuBlock(Prepared, FusedBlock):
    """A fused block on images (B, C, H, W) of any floating type that the operators read."""

    def takes(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether `run` can be given these."""
        return x.dtype in FLOATS and x.ndim == 4
