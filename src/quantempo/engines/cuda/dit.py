"""Blocks of DiT and PixArt as few launches on a GPU, around int8 products.

Keys and values of a context are one product for all blocks; the modulation is each block's own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.engines.cuda.constants import FLOATS
from quantempo.engines.cuda.joint import Stream
from quantempo.engines.cuda.per_forward import SharedContext
from quantempo.engines.cuda.transformer import TokenAttention
from quantempo.engines.cuda.unet import BLOCKS, GpuBlock
from quantempo.engines.fusion import Network
from quantempo.models.fusion_dit import ModulatedBlockParts

__all__ = ["FusedModulatedBlock"]


@BLOCKS.build(ModulatedBlockParts)
class FusedModulatedBlock(GpuBlock):
    """Attention of the tokens, attention on the context where there is one, feed-forward layer."""

    def __init__(self, parts: ModulatedBlockParts, network: Network) -> None:
        super().__init__(parts, network)
        contexts = network.once(SharedContext.of)
        (self.stream,) = map(Stream, parts.streams)
        self.attentions = [TokenAttention(attention, contexts) for attention in parts.attentions]

    def _prepare(self, device: torch.device) -> None:
        for part in (self.stream, *self.attentions):
            part.prepare(device)

    def takes(self, x: Tensor, context: Any, mask: Any, timestep: Any, labels: Any) -> bool:
        """Return whether `run` can be given these."""
        if x.dtype not in FLOATS or x.ndim != 3 or not self.parts.modulates(x, timestep, labels):
            return False
        if not self.attentions:
            return True
        if not isinstance(context, Tensor) or context.ndim != 3 or len(context) != len(x):
            return False
        # The bias that models make of a mask.
        shape = (len(x), 1, context.shape[1])
        known = isinstance(mask, Tensor) and mask.shape == shape and mask.dtype == x.dtype
        return mask is None or known

    def run(self, x: Tensor, context: Any, mask: Any, timestep: Any, labels: Any) -> Tensor:
        """Return (B, T, C); mask (B, 1, S) is added to the logits of the context."""
        self.here(x.device)
        x, stream = x.contiguous(), self.stream
        given = self.parts.modulation(x, timestep, labels).expand(len(x), -1).split(x.shape[2], 1)
        heads = (y.transpose(1, 2) for y in stream.before(x, given))
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = stream.add(x, [y], given)
        for attention in self.attentions:
            x = attention(x, context, mask)
        return stream.feed(x, given)
