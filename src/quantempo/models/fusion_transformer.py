"""Parts of diffusers' transformers inside U-Nets that one fused pass can run.

See `fusion`, which lists them with all others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

__all__ = [
    "TokenAttentionParts",
    "TransformerBlockParts",
    "TransformerParts",
    "plain_transformer",
    "transformer",
    "transformer_block",
]


@dataclass(frozen=True)
class TokenAttentionParts:
    """out(softmax(q k^T scale) v) on tokens (B, T, C), q of them, k and v of them or a context.

    norm: of the tokens, before; cross: k and v are of a context (B, S, C').
    """

    norm: nn.LayerNorm
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    heads: int
    cross: bool


@dataclass(frozen=True)
class TransformerBlockParts:
    """x = x + attention(norm(x)) for each; then x + down(value * gelu(gate)) on tokens (B, T, C).

    value and gate: the halves of up(norm(x)). Called as module(x, **arguments), see
    `plain_transformer`.
    """

    name: str
    module: nn.Module
    attentions: tuple[TokenAttentionParts, ...]
    norm: nn.LayerNorm
    up: nn.Module
    down: nn.Module


@dataclass(frozen=True)
class TransformerParts:
    """x + proj_out(blocks(proj_in(norm(x)))) on the pixels of x (B, C, H, W) as tokens.

    Projections are linear layers or 1x1 convolutions. Called as module(x, **arguments,
    return_dict=True), see `plain_transformer`.

    output: called as output(sample=y), makes what is returned; (y,) is without `return_dict`.
    """

    name: str
    module: nn.Module
    norm: nn.GroupNorm
    proj_in: nn.Module
    blocks: tuple[nn.Module, ...]
    proj_out: nn.Module
    output: Callable[..., Any]


def plain_transformer(arguments: dict[str, Any]) -> bool:
    """Return whether a transformer, or a block of one, was called with tokens and context alone.

    arguments: those of its `forward` but hidden_states, encoder_hidden_states and return_dict.
    """
    # Read by other norms than layer_norm only.
    unread = ("timestep", "class_labels", "added_cond_kwargs")
    # {} says nothing either; masks are tensors, which have no truth.
    return all(
        value is None or (isinstance(value, dict) and not value)
        for name, value in arguments.items()
        if name not in unread
    )


def transformer_block(name: str, block: Any) -> TransformerBlockParts | None:
    """Return the parts of a BasicTransformerBlock, or None if it is not a plain one."""
    attentions = [_token_attention(block.norm1, block.attn1, cross=False)]
    if block.attn2 is not None:
        attentions.append(_token_attention(block.norm2, block.attn2, cross=True))
    net = block.ff.net
    plain = (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and not hasattr(block, "fuser")
        and not block.only_cross_attention
        and type(block.norm3) is nn.LayerNorm
        and type(block.ff) is FeedForward
        and type(net[0]) is GEGLU
        and all(type(layer) is nn.Dropout for layer in (net[1], *net[3:]))
        and (net[1].p == 0 or not net.training)
    )
    found = tuple(attention for attention in attentions if attention is not None)
    if not plain or len(found) < len(attentions):
        return None
    return TransformerBlockParts(name, block, found, block.norm3, net[0].proj, net[2])


def transformer(name: str, model: Any) -> TransformerParts | None:
    """Return the parts of a Transformer2DModel, or None if it is not a plain one."""
    plain = (
        model.is_input_continuous
        and model.config.norm_type == "layer_norm"
        and model.in_channels == model.out_channels
        and all(type(block) is BasicTransformerBlock for block in model.transformer_blocks)
    )
    if not plain:
        return None
    blocks = tuple(model.transformer_blocks)
    parts = (model.norm, model.proj_in, blocks, model.proj_out)
    return TransformerParts(name, model, *parts, Transformer2DModelOutput)


def _token_attention(norm: Any, attention: Any, cross: bool) -> TokenAttentionParts | None:
    plain = (
        type(norm) is nn.LayerNorm
        and type(attention) is Attention
        and type(attention.processor) is AttnProcessor2_0
        and attention.group_norm is None
        and attention.spatial_norm is None
        and attention.norm_q is None
        and attention.norm_k is None
        and attention.norm_cross is None
        and attention.added_kv_proj_dim is None
        and attention.inner_kv_dim == attention.inner_dim
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
        and attention.is_cross_attention == cross
        and (attention.to_out[1].p == 0 or not attention.training)
    )
    if not plain:
        return None
    a = attention
    return TokenAttentionParts(norm, a.to_q, a.to_k, a.to_v, a.to_out[0], a.heads, cross)
