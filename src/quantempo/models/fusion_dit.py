"""Parts of the blocks of DiT and PixArt, see `fusion`."""

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.normalization import AdaLayerNormZero
from torch import Tensor

from quantempo.models.fusion import Parts, drops, matches, no
from quantempo.models.fusion_joint import AttentionParts, StreamParts, are_bare, is_mlp
from quantempo.models.fusion_transformer import MODULATED, TokenAttentionParts, token_attention

__all__ = ["ModulatedBlockParts"]


@dataclass(frozen=True)
class ModulatedBlockParts(Parts):
    """One stream; between its attention and its feed-forward layer x + attention(x, context).

    streams: the one; attentions: none, or that on the context.
    """

    by_token = True

    streams: tuple[StreamParts, ...]
    attentions: tuple[TokenAttentionParts, ...]

    def given(
        self,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> tuple[Any, ...] | None:
        """Return (context, its mask, timestep, class labels), None with what processors read."""
        plain = attention_mask is None and not cross_attention_kwargs
        given = encoder_hidden_states, encoder_attention_mask, timestep, class_labels
        return given if plain else None

    def modulates(self, x: Tensor, timestep: Any, labels: Any) -> bool:
        """Return whether `modulation` can be given these for x (B, T, C)."""
        if not isinstance(timestep, Tensor):
            return False
        if self.module.norm_type == "ada_norm_single":
            return timestep.numel() == 6 * len(x) * x.shape[2]
        known = isinstance(labels, Tensor) and labels.ndim == timestep.ndim == 1
        return known and all(len(value) in (1, len(x)) for value in (timestep, labels))

    def modulation(self, x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
        """Return that of the stream, (B, 6 C), or (1, 6 C) where images have it in common.

        timestep: of each image, with its class; or what the table of the block is added to.
        """
        block: Any = self.module
        if block.norm_type == "ada_norm_single":
            return block.scale_shift_table.flatten() + timestep.reshape(len(x), -1)
        norm = block.norm1
        y: Tensor = norm.linear(norm.silu(norm.emb(timestep, labels, hidden_dtype=x.dtype)))
        return y


@matches(ModulatedBlockParts, BasicTransformerBlock)
def _modulated(block: Any) -> tuple[Any, ...] | str | None:
    b, zero = block, block.norm_type == "ada_norm_zero"
    if b.norm_type not in MODULATED:
        return None
    norm1, norm2 = (getattr(b.norm1, "norm", None), b.norm3) if zero else (b.norm1, b.norm2)
    own: Any = token_attention(None, b.attn1, cross=False)
    # PixArt has no norm there.
    norm = b.norm2 if zero else None
    context = () if b.attn2 is None else (token_attention(norm, b.attn2, cross=True),)
    odd = (found for found in (own, *context) if isinstance(found, str))
    reason = next(odd, None) or no(
        (b.pos_embed is None, "it adds an embedding of positions"),
        (not hasattr(b, "fuser"), "it is grounded by boxes (GLIGEN)"),
        (not b.only_cross_attention, "its first attention reads the context"),
        (not zero or type(b.norm1) is AdaLayerNormZero, "a norm in it is unknown"),
        (are_bare(norm1, norm2), "a norm in it is unknown"),
        (is_mlp(b.ff), "its feed-forward layer is not a plain GELU by tanh"),
        (not drops(b), "its dropout is active"),
    )
    if reason is not None:
        return reason
    heads = AttentionParts(own.q, own.k, own.v, own.heads, None, None, own.out)
    stream = StreamParts(norm1, (heads,), norm2, b.ff.net[0].proj, b.ff.net[2])
    return (stream,), context
