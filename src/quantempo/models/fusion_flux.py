"""Parts of the blocks of FLUX and Stable Diffusion 3, see `fusion`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward, JointTransformerBlock
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle, RMSNorm
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.models.fusion import Linear, Parallel, Parts, drops, matches, no

__all__ = [
    "FluxDoubleParts", "FluxParts", "FluxSingleParts", "JointParts", "ProjectionParts",
    "StreamParts",
]  # fmt: skip


@dataclass(frozen=True)
class ProjectionParts:
    """norm_q(q(x)), norm_k(k(x)) and v(x), by heads; a norm (an RMSNorm) may be None."""

    q: Linear
    k: Linear
    v: Linear
    norm_q: Any
    norm_k: Any
    heads: int


@dataclass(frozen=True)
class StreamParts(ProjectionParts):
    """One stream x (B, T, C) of a double block; m(y) = y (1 + scale) + shift of `modulation`.

    x = x + gate out(attention(m(norm1(x)))); x = x + gate down(gelu_tanh(up(m(norm2(x)))))

    modulation: of silu(temb): shift, scale and gate of the attention, then those of the rest.
    """

    modulation: nn.Module
    norm1: nn.LayerNorm
    out: Linear
    norm2: nn.LayerNorm
    up: Linear
    down: Linear


@dataclass(frozen=True)
class FluxParts(Parts):
    """What both kinds of blocks have: one attention over the tokens of the text and the image."""

    by_token = True

    def given(
        self,
        encoder_hidden_states: Any = None,
        temb: Any = None,
        image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Any, ...] | None:
        """Return (text, temb, rotary embedding), None with arguments for processors."""
        plain = not joint_attention_kwargs and _plain(self.module.attn)
        return (encoder_hidden_states, temb, image_rotary_emb) if plain else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(dim)) v by the backend that was chosen for the block.

        All (B, T, heads, dim).
        """
        how = self.module.attn.processor
        backend, parallel = how._attention_backend, how._parallel_config
        y: Tensor = dispatch_attention_fn(q, k, v, backend=backend, parallel_config=parallel)
        return y


@dataclass(frozen=True)
class FluxDoubleParts(FluxParts):
    """streams: of the text and of the image, in the order of their tokens."""

    streams: tuple[StreamParts, ...]
    image_first = False


@dataclass(frozen=True)
class JointParts(FluxDoubleParts):
    """A block of Stable Diffusion 3, without rotary embedding."""

    image_first = True

    def given(  # type: ignore[override]
        self,
        encoder_hidden_states: Any = None,
        temb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Any, ...] | None:
        """Return (text, temb, None), None with arguments for processors."""
        plain = not joint_attention_kwargs and _plain(self.module.attn)
        return (encoder_hidden_states, temb, None) if plain else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(dim)) v, all (B, T, heads, dim)."""
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2)


@dataclass(frozen=True)
class FluxSingleParts(FluxParts):
    """x + gate out([attention(y), gelu_tanh(up(y))]), y = norm(x) (1 + scale) + shift.

    modulation: of silu(temb): shift, scale, gate.
    """

    projections: tuple[ProjectionParts, ...]
    modulation: nn.Module
    norm: nn.LayerNorm
    up: Linear
    out: Parallel


_OTHER = "its attention has a class, processor or layers of its own"
_NORM = "a norm in it is unknown"


def _plain(attention: Any) -> bool:
    kinds = type(attention), type(attention.processor)
    known = (FluxAttention, FluxAttnProcessor), (Attention, JointAttnProcessor2_0)
    return kinds in known and not attention.fused_projections


def _is_mlp(layer: Any) -> bool:
    net: Any = getattr(layer, "net", ())
    return (
        type(layer) is FeedForward
        and type(net[0]) is GELU
        and net[0].approximate == "tanh"
        and all(type(other) is nn.Dropout for other in (net[1], *net[3:]))
    )


def _are_bare(*norms: Any) -> bool:
    return _are(nn.LayerNorm, *norms) and all(norm.weight is norm.bias is None for norm in norms)


def _are_rms(*norms: Any) -> bool:
    kinds = (type(None), nn.RMSNorm, RMSNorm)
    return all(type(norm) in kinds and getattr(norm, "bias", None) is None for norm in norms)


def _are(kind: type[nn.Module], *modules: Any) -> bool:
    return all(type(module) is kind for module in modules)


@matches(JointParts, JointTransformerBlock)
def _joint(block: Any) -> tuple[Any, ...] | str | None:
    reason = no(
        (not block.use_dual_attention, "it has a second attention"),
        (not block.context_pre_only, "its text is read and not written"),
        (block._chunk_size is None, "its feed-forward layer runs in chunks"),
    )
    found = _double(block) if reason is None else reason
    return (found[0][::-1],) if isinstance(found, tuple) else found


@matches(FluxDoubleParts, FluxTransformerBlock)
def _double(block: Any) -> tuple[Any, ...] | str:
    b, a = block, block.attn
    first, second = (b.norm1_context, b.norm1), (b.norm2_context, b.norm2)
    reason = no(
        (_plain(a) and a.added_kv_proj_dim is not None, _OTHER),
        (_are(AdaLayerNormZero, *first) and first[0].emb is first[1].emb is None, _NORM),
        (_are_bare(*second, *(norm.norm for norm in first)), _NORM),
        (_are_rms(a.norm_added_q, a.norm_added_k, a.norm_q, a.norm_k), _NORM),
        (_is_mlp(b.ff) and _is_mlp(b.ff_context), "its feed-forward layer is not a plain GELU"),
        (not drops(block), "its dropout is active"),
    )
    if reason is not None:
        return reason
    text = (a.add_q_proj, a.add_k_proj, a.add_v_proj, a.norm_added_q, a.norm_added_k, a.heads)
    image = (a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k, a.heads)
    rest = zip((text, image), first, (a.to_add_out, a.to_out[0]), second, strict=True)
    return (
        tuple(
            StreamParts(*heads, norm1.linear, norm1.norm, out, norm2, ff.net[0].proj, ff.net[2])
            for (heads, norm1, out, norm2), ff in zip(rest, (b.ff_context, b.ff), strict=True)
        ),
    )


@matches(FluxSingleParts, FluxSingleTransformerBlock)
def _single(block: Any) -> tuple[Any, ...] | str:
    b, a, gelu = block, block.attn, block.act_mlp
    tanh = type(gelu) is nn.GELU and gelu.approximate == "tanh"
    return no(
        (_plain(a) and a.pre_only and a.added_kv_proj_dim is None, _OTHER),
        (_are(AdaLayerNormZeroSingle, b.norm) and _are_bare(b.norm.norm), _NORM),
        (_are_rms(a.norm_q, a.norm_k), _NORM),
        (tanh, f"its activation is {type(gelu).__name__}, not GELU by tanh"),
    ) or (
        (ProjectionParts(a.to_q, a.to_k, a.to_v, a.norm_q, a.norm_k, a.heads),),
        b.norm.linear, b.norm.norm, b.proj_mlp, b.proj_out,
    )  # fmt: skip
