"""Exchange the two matrix products inside attention blocks.

Names of the parts of diffusers' `Attention` live here; what computes the products instead is given
by the caller. A block is listed only if it runs diffusers' plain processor, whose result is

    out(softmax(q k^T / sqrt(d) + mask) v), plus the input where the block says so
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Products", "ProductsProcessor", "attention_blocks", "set_products"]

# (q (B, H, L, d), k (B, H, S, d), v (B, H, S, d), mask or None) -> (B, H, L, d)
Products = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class ProductsProcessor:
    """Run an attention block with products of the caller's.

    Args:
        products: computes softmax(q k^T / sqrt(d) + mask) v.
    """

    def __init__(self, products: Products) -> None:
        self.products = products

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Return the block's output, shaped like its input; the arguments are diffusers'."""
        x = hidden_states
        image = x.shape if x.ndim == 4 else None
        if image is not None:
            # (B, C, H, W) -> (B, tokens, C)
            x = x.flatten(2).transpose(1, 2)
        batch = x.shape[0]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        source = x if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, source.shape[1], batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        q, k, v = (
            layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, tokens in ((attn.to_q, x), (attn.to_k, source), (attn.to_v, source))
        )
        y = self.products(q, k, v, mask).transpose(1, 2).flatten(2).to(q.dtype)
        y = attn.to_out[1](attn.to_out[0](y))
        if image is not None:
            y = y.transpose(1, 2).reshape(image)
        return y + hidden_states if attn.residual_connection else y


def attention_blocks(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, block) of the attention blocks whose products can be exchanged."""
    # Not above: `quantizers` needs this module, and is imported while diffusers itself is.
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    own = (AttnProcessor2_0, ProductsProcessor)
    for name, module in denoiser.named_modules():
        # Exact types: a subclass may have another forward.
        if type(module) is Attention and type(module.processor) in own and _plain(module):
            yield name, module


def set_products(block: nn.Module, products: Products | None) -> None:
    """Let a block use these products, or diffusers' own again for None."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    processor = AttnProcessor2_0() if products is None else ProductsProcessor(products)
    block.set_processor(processor)  # type: ignore[operator]


def _plain(block: Any) -> bool:
    return (
        block.spatial_norm is None
        and block.norm_q is None
        and block.norm_k is None
        and not block.norm_cross
        and block.rescale_output_factor == 1.0
        and (block.to_out[1].p == 0 or not block.training)
    )
