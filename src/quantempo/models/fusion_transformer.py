"""Parts of diffusers' transformers inside U-Nets, see `fusion`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from quantempo.models.fusion import Linear, Norm, Parts, Rows, drops, matches, no

__all__ = [
    "MODULATED", "TokenAttentionParts", "TransformerBlockParts", "TransformerParts",
    "token_attention",
]  # fmt: skip

# Norms of the blocks of `fusion_dit`.
MODULATED = ("ada_norm_zero", "ada_norm_single")


@dataclass(frozen=True)
class TokenAttentionParts:
    """out(softmax(q k^T scale) v) on tokens (B, T, C), q of them, k and v of them or a context.

    norm: of the tokens, before, if any; cross: k and v are of a context (B, S, C'); norm_q, norm_k:
    RMSNorms of q and k, or None.
    """

    norm: Any
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    heads: int
    cross: bool
    norm_q: Any = None
    norm_k: Any = None


@dataclass(frozen=True)
class TransformerBlockParts(Parts):
    """x = x + attention(norm(x)) for each; then x + down(value * gelu(gate)) on tokens (B, T, C).

    value and gate: the halves of up(norm(x)).
    """

    attentions: tuple[TokenAttentionParts, ...]
    norm: nn.LayerNorm
    up: Linear
    down: Linear

    def given(
        self, attention_mask: Any = None, encoder_hidden_states: Any = None, **kwargs: Any
    ) -> tuple[Any, ...] | None:
        """Return (context,), or None with a mask."""
        plain = attention_mask is None and _plain(kwargs)
        return (encoder_hidden_states,) if plain else None


@dataclass(frozen=True)
class TransformerParts(Parts):
    """x + proj_out(blocks(proj_in(norm(x)))) on the pixels of x (B, C, H, W) as tokens.

    output: called as output(sample=y), makes what is returned; (y,) is without `return_dict`.
    """

    norm: Norm
    proj_in: Rows
    blocks: tuple[nn.Module, ...]
    proj_out: Rows
    output: Callable[..., Any]

    def given(
        self, encoder_hidden_states: Any = None, timestep: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...] | None:
        """Return (context, {name: argument} for blocks that are not fused), None with a mask."""
        plain = not args and _plain(kwargs)
        return (encoder_hidden_states, {"timestep": timestep, **kwargs}) if plain else None


def _plain(arguments: dict[str, Any]) -> bool:
    """Return whether a transformer, or a block of one, was called with tokens and context alone."""
    # Read by other norms than layer_norm only.
    unread = ("timestep", "class_labels", "added_cond_kwargs")
    # {} says nothing either; masks are tensors, which have no truth.
    return all(
        value is None or (isinstance(value, dict) and not value)
        for name, value in arguments.items()
        if name not in unread
    )


@matches(TransformerBlockParts, BasicTransformerBlock)
def _block(block: Any) -> tuple[Any, ...] | str | None:
    net = block.ff.net
    if block.norm_type in MODULATED:
        return None
    reason = no(
        (block.norm_type == "layer_norm", f"its norm is '{block.norm_type}', not 'layer_norm'"),
        (block.pos_embed is None, "it adds an embedding of positions"),
        (not hasattr(block, "fuser"), "it is grounded by boxes (GLIGEN)"),
        (not block.only_cross_attention, "its first attention reads the context"),
        (type(getattr(block, "norm3", None)) is nn.LayerNorm, "its last norm is not a LayerNorm"),
        (
            type(block.ff) is FeedForward
            and type(net[0]) is GEGLU
            and all(type(layer) is nn.Dropout for layer in (net[1], *net[3:])),
            "its feed-forward layer is not a plain GEGLU",
        ),
        (not drops(block), "its dropout is active"),
    )
    attentions = [token_attention(block.norm1, block.attn1, cross=False)]
    if block.attn2 is not None:
        attentions.append(token_attention(block.norm2, block.attn2, cross=True))
    found = tuple(a for a in attentions if isinstance(a, TokenAttentionParts))
    reason = reason or next((a for a in attentions if isinstance(a, str)), None)
    return reason or (found, block.norm3, net[0].proj, net[2])


@matches(TransformerParts, Transformer2DModel)
def _transformer(model: Any) -> tuple[Any, ...] | str:
    blocks, norm = tuple(model.transformer_blocks), model.config.norm_type
    known = all(type(block) is BasicTransformerBlock for block in blocks)
    return no(
        (model.is_input_continuous, "its input is no image"),
        (norm == "layer_norm", f"its norm is '{norm}', not 'layer_norm'"),
        (model.in_channels == model.out_channels, "it changes the number of channels"),
        (known, "its blocks are unknown"),
    ) or (model.norm, model.proj_in, blocks, model.proj_out, Transformer2DModelOutput)


def token_attention(norm: Any, attention: Any, cross: bool) -> TokenAttentionParts | str:
    """Return the parts of an attention, its norm a LayerNorm or None, or why there are none."""
    a = attention
    if norm is not None and type(norm) is not nn.LayerNorm:
        return "the norm of an attention in it is not a LayerNorm"
    if type(a) is not Attention or type(a.processor) is not AttnProcessor2_0:
        return "an attention in it has a class or processor of its own"
    plain = (
        a.group_norm is a.spatial_norm is a.norm_q is a.norm_k is a.norm_cross is None
        and a.added_kv_proj_dim is None
        and a.inner_kv_dim == a.inner_dim
        and not a.residual_connection
        and a.rescale_output_factor == 1.0
        and a.is_cross_attention == cross
    )
    if not plain:
        return "an attention in it does more than softmax(q k^T) v"
    return TokenAttentionParts(norm, a.to_q, a.to_k, a.to_v, a.to_out[0], a.heads, cross)
