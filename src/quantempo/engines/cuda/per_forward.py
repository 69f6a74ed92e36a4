"""Computed once a forward: all time shifts; keys and values of the context."""

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.engines.base import Prepared
from quantempo.engines.cuda.constants import LayerConstants, alone, constant, constants_of
from quantempo.engines.fusion import Network
from quantempo.engines.per_forward import PerForward, TimeShifts, float_rows
from quantempo.models.fusion_transformer import TokenAttentionParts
from quantempo.quantized import Float16Linear

__all__ = ["SharedContext", "SharedShifts"]


class SharedShifts(Prepared, TimeShifts):
    """Time shifts in float16: an eighth of the error of bfloat16, in a float32 stream too."""

    dtype = torch.float16

    def _prepare(self, device: torch.device) -> None:
        self.weight, self.bias = map(constant, float_rows(self.layers, self.dtype))
        for layer, part in zip(self.layers, self.weight.split(self._sizes), strict=True):
            # One copy in memory serves both, where the layer's own loses nothing.
            if isinstance(layer, Float16Linear) and torch.equal(layer.weight.float(), part.float()):
                layer.weight.data = alone(part)

    def make(self, given: Tensor) -> Tensor:
        """Return (B, sum C_i) of temb (B, E)."""
        self.here(given.device)
        with torch.autocast(given.device.type, enabled=False):
            return F.linear(F.silu(given.float()).to(self.weight.dtype), self.weight, self.bias)


class SharedContext(Prepared, PerForward):
    """Keys and values of the context, of all attention layers that read it: one product a grid."""

    def __init__(self, attentions: list[TokenAttentionParts]) -> None:
        super().__init__(len(attentions))
        self.attentions = attentions

    @classmethod
    def of(cls, network: Network) -> "SharedContext":
        """Return that of all attention layers that read a context."""
        found = (a for parts in network.parts for a in getattr(parts, "attentions", ()))
        return cls([a for a in found if isinstance(a, TokenAttentionParts) and a.cross])

    def _prepare(self, device: torch.device) -> None:
        layers = [constants_of(layer, device) for a in self.attentions for layer in (a.k, a.v)]
        self.sizes = [len(layer.weight_scale) for layer in layers]
        groups: list[list[int]] = []
        for i, layer in enumerate(layers):
            for group in groups:
                # Branches of a product are zero outside their layers.
                few = layer.adapters is None or len(group) < 32
                if few and layers[group[0]].reads_the_same(layer):
                    group.append(i)
                    break
            else:
                groups.append([i])
        self.groups = [(LayerConstants.joined([layers[i] for i in own]), own) for own in groups]

    def make(self, given: Tensor, dtype: torch.dtype) -> dict[int, Tensor]:
        """Return keys and values of a context (B, S, C') by the place of their layer."""
        self.here(given.device)
        batch, tokens, width = given.shape
        found: dict[int, Tensor] = {}
        for layer, group in self.groups:
            # Layers of another width read another context.
            if layer.layer.weight_shape[1] == width:
                y = layer.gemm(dtype=dtype, bias=layer.bias, **layer.read(given))
                y = y.view(batch, tokens, -1)
                parts = y.split([self.sizes[i] for i in group], 2)
                found |= dict(zip(group, parts, strict=True))
        return found

    def __call__(self, index: int, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return k (B, S, C) and v of the attention `index`, in `dtype`; context (B, S, C')."""
        found = self.read(index, context, self.attentions[index].k.clock.bucket, dtype)
        if 2 * index not in found:
            raise ValueError(
                f"got a context of {context.shape[2]} channels; expected "
                f"{self.attentions[index].k.weight_shape[1]}"
            )
        return found[2 * index].to(dtype), found[2 * index + 1].to(dtype)
