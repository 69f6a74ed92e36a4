"""Parts of transformers inside U-Nets, and of feed-forward layers of any, see `fusion`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GEGLU, GELU, SwiGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward, LuminaFeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_z_image
from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowFeedForward
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_hidream_image import HiDreamImageFeedForwardSwiGLU
from torch import nn

from quantempo.models.fusion import Linear, MaybeLinear, Norm, Parts, Rows, drops, matches, no

__all__ = [
    "MODULATED", "AttentionParts", "FeedForwardParts", "TokenAttentionParts",
    "TransformerBlockParts", "TransformerParts", "activation_of", "heads_of", "token_attention",
]  # fmt: skip

# Norms of the blocks of `fusion_dit`.
MODULATED = ("ada_norm_zero", "ada_norm_single")


@dataclass(frozen=True)
class AttentionParts:
    """out(attention(norm_q(q(x)), norm_k(k(x)), v(x))) of a module; norms are RMSNorms or None."""

    q: Linear
    k: Linear
    v: Linear
    heads: int
    norm_q: Any = None
    norm_k: Any = None
    out: MaybeLinear = None
    module: Any = None


@dataclass(frozen=True)
class TokenAttentionParts(AttentionParts):
    """The same on tokens (B, T, C): norm is theirs, if any; cross: k and v are of a context."""

    norm: Any = None
    cross: bool = False


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
    """x + proj_out(blocks(proj_in(norm(x)))) on the pixels of x (B, C, H, W), as output(sample)."""

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


@dataclass(frozen=True)
class FeedForwardParts(Parts):
    """down(activation(up(x))) on tokens (..., C).

    activation: of the epilogue; a gated one is of the halves of up(x), or of up(x) and gate(x).
    """

    by_token = True
    piece = True

    activation: str
    up: Linear
    gate: MaybeLinear
    down: Linear

    def given(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """Return (), or None with anything that the class does not read."""
        return None if args or kwargs else ()


# Layers of those with a gate of its own: up, gate, down.
_LAYERS: dict[type, tuple[str, ...]] = {
    AuraFlowFeedForward: ("linear_2", "linear_1", "out_projection"),
    HiDreamImageFeedForwardSwiGLU: ("w3", "w1", "w2"),
    LuminaFeedForward: ("linear_3", "linear_1", "linear_2"),
    transformer_z_image.FeedForward: ("w3", "w1", "w2"),
}


@matches(FeedForwardParts, *_LAYERS)
def _gated(module: Any) -> tuple[Any, ...]:
    return "swiglu", *(getattr(module, name) for name in _LAYERS[type(module)])


@matches(FeedForwardParts, FeedForward)
def _feed_forward(module: Any) -> tuple[Any, ...] | None:
    activation = activation_of(module)
    known = activation is not None and not drops(module)
    return (activation, module.net[0].proj, None, module.net[2]) if known else None


def activation_of(layer: Any) -> str | None:
    """Return that of a layer that is linear, activation, linear, with no more than dropout."""
    if type(layer) is not FeedForward or any(
        type(other) is not nn.Dropout for other in (layer.net[1], *layer.net[3:])
    ):
        return None
    first = layer.net[0]
    if type(first) is GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(first.approximate)
    return {GEGLU: "geglu", SwiGLU: "swiglu"}.get(type(first))


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
        (activation_of(block.ff) == "geglu", "its feed-forward layer is not a plain GEGLU"),
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


def token_attention(
    norm: Any, attention: Any, cross: bool, processor: type = AttnProcessor2_0, *norms: type
) -> TokenAttentionParts | str:
    """Return the parts of an attention, or why there are none; norms: what q and k may have."""
    a = attention
    if norm is not None and type(norm) is not nn.LayerNorm:
        return "the norm of an attention in it is not a LayerNorm"
    if type(a) is not Attention or type(a.processor) is not processor:
        return "an attention in it has a class or processor of its own"
    plain = (
        a.group_norm is a.spatial_norm is a.norm_cross is None
        and {type(a.norm_q), type(a.norm_k)} <= {type(None), *norms}
        and a.added_kv_proj_dim is None
        and a.inner_kv_dim == a.inner_dim
        and not a.residual_connection
        and a.rescale_output_factor == 1.0
        and a.is_cross_attention == cross
    )
    if not plain:
        return "an attention in it does more than softmax(q k^T) v"
    return TokenAttentionParts(**vars(heads_of(a)), norm=norm, cross=cross)


def heads_of(a: Any, text: bool = False) -> AttentionParts:
    """Return the parts of an attention, or what it does to the text."""
    if text:
        q, k, v, norms = a.add_q_proj, a.add_k_proj, a.add_v_proj, (a.norm_added_q, a.norm_added_k)
        return AttentionParts(q, k, v, a.heads, *norms, a.to_add_out, a)
    return AttentionParts(a.to_q, a.to_k, a.to_v, a.heads, a.norm_q, a.norm_k, a.to_out[0], a)
