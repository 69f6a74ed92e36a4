"""Transformers inside a U-Net, and feed-forward layers of any, as few launches on a GPU.

Pixels of a channels_last image are the rows of a matrix: nothing is ever copied to another layout.
The last product of the last block writes the codes that the output projection reads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import Prepared, last, rows_of
from quantempo.engines.cuda.constants import (
    FLOATS,
    ActivationGrid,
    LayerConstants,
    Norm,
    constant,
    constants_of,
    quantize_rows,
)
from quantempo.engines.cuda.joint import add
from quantempo.engines.cuda.unet import BLOCKS, GpuBlock
from quantempo.engines.fusion import Network
from quantempo.engines.per_forward import PerForward
from quantempo.kernels.ops.epilogue import GATED
from quantempo.models import fusion_transformer

__all__ = ["FusedFeedForward", "FusedTransformer", "FusedTransformerBlock", "SharedContext"]


class SharedContext(Prepared, PerForward):
    """Keys and values of the context, of all attention layers that read it: one product a grid."""

    def __init__(self, attentions: list[fusion_transformer.TokenAttentionParts]) -> None:
        super().__init__(len(attentions))
        self.attentions = attentions

    @classmethod
    def of(cls, network: Network) -> "SharedContext":
        """Return that of all attention layers that read a context."""
        found = (a for parts in network.parts for a in getattr(parts, "attentions", ()))
        kind = fusion_transformer.TokenAttentionParts
        return cls([a for a in found if isinstance(a, kind) and a.cross])

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
            text = f"got a context of {context.shape[2]} channels"
            raise ValueError(f"{text}; expected {self.attentions[index].k.weight_shape[1]}")
        return found[2 * index].to(dtype), found[2 * index + 1].to(dtype)


class _LayerNorm:
    """A LayerNorm in the type of its input, whatever that is: weights are kept in all of them."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.eps, weights = norm.normalized_shape, norm.eps, (norm.weight, norm.bias)
        self.weights = {
            dtype: [None if value is None else constant(value.to(dtype)) for value in weights]
            for dtype in FLOATS
        }

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, *self.weights[x.dtype], self.eps)


class _TokenAttention(Prepared):
    """x + attention(norm(x)) on tokens."""

    def __init__(
        self, parts: fusion_transformer.TokenAttentionParts, contexts: SharedContext
    ) -> None:
        self.parts = parts
        self.contexts = contexts if parts.cross else None
        self.index = contexts.attentions.index(parts) if parts.cross else 0

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.norm, self.out = _LayerNorm(parts.norm), constants_of(parts.out, device)
        q, k, v = (constants_of(layer, device) for layer in (parts.q, parts.k, parts.v))
        self.of_tokens = [q] if parts.cross else LayerConstants.together([q, k, v])

    def __call__(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return (B, T, C); x alike, context (B, S, C') where the layer reads one."""
        y, parts, width = self.norm(x), [], self.parts.q.out_features
        for layer in self.of_tokens:
            columns = layer.gemm(dtype=x.dtype, bias=layer.bias, **layer.read(y))
            parts += columns.view(*x.shape[:2], -1, width).unbind(2)
        if self.contexts is not None and context is not None:
            parts += self.contexts(self.index, context, x.dtype)
        q, k, v = (part.unflatten(2, (self.parts.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return add(self.out, [self.out.read(y)], None, x)


@BLOCKS.build(fusion_transformer.TransformerBlockParts)
class FusedTransformerBlock(GpuBlock):
    """Attention layers and a gated feed-forward layer, each added to its input as it is written."""

    def __init__(self, parts: fusion_transformer.TransformerBlockParts, network: Network) -> None:
        super().__init__(parts, network)
        contexts = network.once(SharedContext.of)
        self.attentions = [_TokenAttention(attention, contexts) for attention in parts.attentions]
        self.cross = any(attention.cross for attention in parts.attentions)

    def _prepare(self, device: torch.device) -> None:
        self.norm = _LayerNorm(self.parts.norm)
        self.up, self.down = (constants_of(p, device) for p in (self.parts.up, self.parts.down))

    def takes(self, x: Tensor, context: Any) -> bool:
        """Return whether `run` can be given these."""
        # A tuple holds the images of an adapter; a block for a context that gets none reads x.
        fits = isinstance(context, Tensor) and context.ndim == 3 if self.cross else True
        return x.dtype in FLOATS and x.ndim == 3 and fits

    def unfused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward of the class in the type of its weights."""
        y: Tensor = super().unfused(_like(x, self.parts.norm.weight), *args, **kwargs)
        return y.to(x.dtype)

    def run(self, x: Tensor, context: Any, grid: ActivationGrid | None = None) -> Tensor:
        """Return (B, T, C), or its codes on a grid, (B T, C) int8."""
        self.here(x.device)
        x = x.contiguous()
        for attention in self.attentions:
            x = attention(x, context if attention.parts.cross else None)
        up, down = self.up, self.down
        codes = quantize_rows(self.norm(x), up.grids[0])
        codes = up.gemm(codes, x.dtype, bias=up.bias, activation="geglu", grid=down.grids[0])
        if grid is None:
            return add(down, [{"codes": codes}], None, x)
        return down.gemm(codes, x.dtype, bias=down.bias, residual=x.flatten(0, 1), grid=grid)


@BLOCKS.build(fusion_transformer.FeedForwardParts)
class FusedFeedForward(GpuBlock):
    """A product that activates and writes codes, and one that reads them; of any block."""

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        layers = [constants_of(p, device) for p in (parts.up, parts.gate) if p is not None]
        self.ups, self.down = (
            LayerConstants.together(layers),
            constants_of(parts.down, device),
        )

    def takes(self, x: Tensor) -> bool:
        """Return whether `run` can be given x."""
        return x.dtype in FLOATS and x.ndim > 1 and not self.parts.up.clock.by_token

    def run(self, x: Tensor) -> Tensor:
        """Return (..., C') of x (..., C)."""
        self.here(x.device)
        down, activation, shape = self.down, self.parts.activation, x.shape[:-1]
        how: dict[str, Any] = {"grid": None if down.layer.dynamic else down.grids[0]}
        how = {} if self.ups[1:] else how | {"activation": activation}
        every = [u.gemm(dtype=x.dtype, bias=u.bias, **how, **u.read(x)) for u in self.ups]
        y = every[0] if not every[1:] else every[0] * getattr(F, GATED[activation])(every[1])
        read = {"codes": y} if y.dtype == torch.int8 else down.read(y.view(*shape, -1))
        return down.gemm(dtype=x.dtype, bias=down.bias, **read).view(*shape, -1)


def _like(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return x in the type of the network, which the stream between fused blocks need not have."""
    return x if weight is None else x.to(weight.dtype)


@BLOCKS.build(fusion_transformer.TransformerParts)
class FusedTransformer(GpuBlock):
    """A transformer over the pixels of an image, whose projections read and write pixel rows."""

    # The blocks inside are fused, or not, on their own.
    own: tuple[str, ...] = ("norm", "proj_in", "proj_out")

    def __init__(self, parts: fusion_transformer.TransformerParts, network: Network) -> None:
        super().__init__(parts, network)
        # None where a block is not fused.
        self.blocks = [network.forward_of(block) for block in parts.blocks]

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.norm = Norm(parts.norm)
        self.proj_in = constants_of(parts.proj_in, device).pixelwise()
        self.proj_out = constants_of(parts.proj_out, device).pixelwise()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the transformer on (B, C, H, W); the arguments are diffusers'."""
        return_dict = kwargs.pop("return_dict", True)
        y = super().__call__(*args, **kwargs)
        return self.parts.output(sample=y) if return_dict else (y,)

    def unfused(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the forward of the class in the type of its weights."""
        x_own = _like(x, self.parts.norm.weight)
        y: Tensor = super().unfused(x_own, *args, return_dict=False, **kwargs)[0]
        return y.to(x.dtype)

    def run(self, x: Tensor, context: Any, arguments: dict[str, Any]) -> Tensor:
        """Return (B, C, H, W), channels_last; arguments: of blocks that are not fused."""
        self.here(x.device)
        x = last(x)
        batch, _, height, width = x.shape
        first, final = self.proj_in, self.proj_out
        bucket = first.layer.clock.bucket
        codes, _ = self.norm(x, bucket=bucket, silu=False, grid=first.grids[0])
        tokens = first.gemm(rows_of(codes), x.dtype, bias=first.bias)
        tokens = tokens.view(batch, height * width, -1)
        rows: Tensor | None = None
        for i, (module, block) in enumerate(zip(self.parts.blocks, self.blocks, strict=True)):
            if block is None or not block.takes(tokens, context):
                tokens = module(tokens, encoder_hidden_states=context, **arguments)
            elif i + 1 < len(self.blocks):
                tokens = block.run(tokens, context)
            else:
                rows = block.run(tokens, context, final.grids[0])
        if rows is None:
            rows = quantize_rows(tokens, final.grids[0])
        y = final.gemm(rows, x.dtype, bias=final.bias, residual=rows_of(x))
        return y.view(batch, height, width, -1).permute(0, 3, 1, 2)
