"""What every block of a forward reads, computed once for all of them on a GPU.

The first block to ask computes it for all, the last one lets go of it; each reads its part once.
Blocks run alone, or a forward that was broken off, leave nothing that a forward would use: it is at
a time of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.engines.cuda.operands import Operands, Prepared, constant, operands_of, quantize_rows
from quantempo.models.fusion_transformer import TokenAttentionParts
from quantempo.quantized import Int12Linear

__all__ = ["SharedContext", "SharedShifts"]


class _Shared(Prepared):
    """A value made of one input, of which each of `readers` reads its part once a forward."""

    def __init__(self, readers: int) -> None:
        self._all = (1 << readers) - 1
        self._unread = 0
        self._given: Tensor | None = None
        self._now: Tensor | None = None
        self._value: Any = None

    def _of(self, index: int, given: Tensor, now: Tensor | None, *how: Any) -> Any:
        """Return the value for reader `index`, made now unless it was for this input and time.

        now: the time bucket, another tensor in each forward.
        """
        self.here(given)
        bit, value = 1 << index, self._value
        old = value is None or self._given is not given or self._now is not now
        if old or not self._unread & bit:
            value = self._make(given, *how)
            self._given, self._now, self._value, self._unread = given, now, value, self._all
        self._unread &= ~bit
        if not self._unread:
            self._given = self._now = self._value = None
        return value

    def _make(self, given: Tensor, *how: Any) -> Any:
        raise NotImplementedError


class SharedShifts(_Shared):
    """What the time embedding adds to each residual block, of all blocks in one matmul.

    Args:
        layers: float layers (C_i, E) with `weight` and `bias`, applied to silu(temb).
        dtype: of the product, whatever the model was loaded in: float16 has an eighth of the error
            of bfloat16. Where a float32 model has a block that cannot be fused, and its stream is
            float32 therefore, shifts have these 11 bits all the same.
    """

    def __init__(self, layers: list[Any], dtype: torch.dtype = torch.float16) -> None:
        super().__init__(len(layers))
        self.layers, self.dtype = layers, dtype
        sizes = [len(layer.bias) for layer in layers]
        self._start = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def _prepare(self, device: torch.device) -> None:
        weights = [
            layer.unpack() if isinstance(layer, Int12Linear) else layer.weight
            for layer in self.layers
        ]
        self.weight = constant(torch.cat([weight.to(self.dtype) for weight in weights]))
        self.bias = constant(torch.cat([layer.bias.to(self.dtype) for layer in self.layers]))

    def _make(self, temb: Tensor, *how: Any) -> Tensor:
        return F.linear(F.silu(temb.float()).to(self.dtype), self.weight, self.bias)

    def __call__(self, index: int, temb: Tensor) -> Tensor:
        """Return (B, C_index) in `dtype`, rows not contiguous; temb (B, E)."""
        # An embedding is made anew in each forward: no other sign of the time is needed.
        value: Tensor = self._of(index, temb, None)
        return value[:, self._start[index] : self._start[index + 1]]


class SharedContext(_Shared):
    """Keys and values of the context, of all attention layers that read it, in one product.

    Or in as many as there are grids: layers calibrated on one context have one.

    Args:
        attentions: all that read a context.
    """

    def __init__(self, attentions: list[TokenAttentionParts]) -> None:
        super().__init__(len(attentions))
        self.attentions = attentions

    def _prepare(self, device: torch.device) -> None:
        layers = [operands_of(layer, device) for a in self.attentions for layer in (a.k, a.v)]
        self.sizes = [len(layer.weight_scale) for layer in layers]
        groups: list[list[int]] = []
        for i, layer in enumerate(layers):
            for group in groups:
                if layers[group[0]].reads_the_same(layer):
                    group.append(i)
                    break
            else:
                groups.append([i])
        self.groups = [(Operands.joined([layers[i] for i in group]), group) for group in groups]

    def _make(self, context: Tensor, *how: Any) -> dict[int, Tensor]:
        batch, tokens, width = context.shape
        found: dict[int, Tensor] = {}
        for layer, group in self.groups:
            # Layers of another width read another context.
            if layer.weights[0].shape[1] == width:
                codes = quantize_rows(context, layer.grids[0])
                y = layer.gemm(codes, *how, bias=layer.bias).view(batch, tokens, -1)
                parts = y.split([self.sizes[i] for i in group], 2)
                found |= dict(zip(group, parts, strict=True))
        return found

    def __call__(self, index: int, context: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return k (B, S, C) and v of the attention `index`, in `dtype`; context (B, S, C')."""
        found = self._of(index, context, self.attentions[index].k.clock.bucket, dtype)
        if 2 * index not in found:
            raise ValueError(
                f"got a context of {context.shape[2]} channels; expected "
                f"{self.attentions[index].k.weight_shape[1]}"
            )
        return found[2 * index].to(dtype), found[2 * index + 1].to(dtype)
