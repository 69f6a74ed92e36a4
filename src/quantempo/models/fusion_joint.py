"""Parts of the blocks of transformers over text and image (FLUX, SD3), see `fusion`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models import normalization
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.transformers import transformer_flux as flux
from diffusers.models.transformers import transformer_qwenimage as qwen
from torch import Tensor, nn

from quantempo.models.fusion import Linear, MaybeLinear, Parallel, Parts, drops, matches, no
from quantempo.models.fusion_transformer import AttentionParts, activation_of, heads_of

__all__ = [
    "NOT_MLP", "FluxDoubleParts", "FluxSingleParts", "JointBlockParts", "JointParts",
    "QwenParts", "StreamParts", "by_default",
]  # fmt: skip


@dataclass(frozen=True)
class StreamParts:
    """One stream x (B, T, C) of a block; m(y) = y (1 + scale) + shift.

        x = x + gate out(attention(m(norm1(x)))); x = x + gate down(gelu_tanh(up(m(norm2(x)))))

    Its modulation is shift, scale and gate of the attention, then those of the rest; without a
    rest, scale and shift alone. attentions: that of all streams; with one of this stream alone both
    are added, and the modulation ends with that one's.
    """

    norm1: nn.LayerNorm
    attentions: tuple[AttentionParts, ...]
    norm2: nn.LayerNorm | None
    up: MaybeLinear
    down: MaybeLinear


@dataclass(frozen=True)
class JointParts(Parts):
    """What all have: one attention over the tokens of the text and the image.

    modulations: the layer of silu(temb) of each stream; clips: of which its class clips values.
    """

    by_token = True
    clips = (False, False)

    modulations: tuple[nn.Module, ...]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(dim)) v by the backend that was chosen for the block."""
        return softmax_v(self.module.attn.processor, q, k, v)


@dataclass(frozen=True)
class JointBlockParts(JointParts):
    """streams: of the text and of the image; the last block of a network ends the first."""

    streams: tuple[StreamParts, ...]

    def given(  # type: ignore[override]
        self, encoder_hidden_states: Any, temb: Any, joint_attention_kwargs: Any = None
    ) -> tuple[Any, ...] | None:
        """Return (text, temb, no rotary embedding), None with arguments for processors."""
        attentions = [getattr(self.module, name) for name in ("attn", "attn2")]
        plain = not joint_attention_kwargs and all(a is None or _is_sd3(a) for a in attentions)
        return (encoder_hidden_states, temb, None) if plain else None


@dataclass(frozen=True)
class FluxParts(JointParts):
    """What both kinds of blocks of FLUX have."""

    clips = (True, False)

    def given(
        self, encoder_hidden_states: Any = None, temb: Any = None, image_rotary_emb: Any = None,
        joint_attention_kwargs: Any = None,
    ) -> tuple[Any, ...] | None:  # fmt: skip
        """Return (text, temb, rotary embedding), None with arguments for processors."""
        plain = not joint_attention_kwargs and _is_plain(self.module.attn)
        return (encoder_hidden_states, temb, image_rotary_emb) if plain else None


@dataclass(frozen=True)
class FluxDoubleParts(FluxParts):
    """streams: of the text and of the image, in the order of their tokens."""

    streams: tuple[StreamParts, ...]


@dataclass(frozen=True)
class QwenParts(FluxDoubleParts):
    """The same of Qwen-Image."""

    clips = (True, True)

    def given(  # type: ignore[override]
        self, encoder_hidden_states: Any, encoder_hidden_states_mask: Any, temb: Any,
        image_rotary_emb: Any, joint_attention_kwargs: Any = None, modulate_index: Any = None,
    ) -> tuple[Any, ...] | None:  # fmt: skip
        """Return (text, temb, rotary embedding), None with a mask or two times in an image."""
        found = super().given(encoder_hidden_states, temb, None, joint_attention_kwargs)
        odd = encoder_hidden_states_mask is not None or modulate_index is not None
        if found is None or odd or not image_rotary_emb or not image_rotary_emb[0].is_complex():
            return None
        # Of the image and of the text.
        tables = torch.view_as_real(torch.cat(image_rotary_emb[::-1]))
        return *found[:2], tables.repeat_interleave(2, 1).unbind(2)


@dataclass(frozen=True)
class FluxSingleParts(FluxParts):
    """x + gate out([attention(y), gelu_tanh(up(y))]), y = norm(x) (1 + scale) + shift."""

    projections: tuple[AttentionParts, ...]
    norm: nn.LayerNorm
    up: Linear
    out: Parallel


_OTHER = "its attention has a class, processor or layers of its own"
_NORM = "a norm in it is unknown"
NOT_MLP = "its feed-forward layer is not a plain GELU by tanh"
_RMS = (nn.RMSNorm, normalization.RMSNorm, type(None))
_PLAIN = (
    (flux.FluxAttention, flux.FluxAttnProcessor),
    (Attention, qwen.QwenDoubleStreamAttnProcessor2_0),
)


def _is_plain(a: Any) -> bool:
    return (type(a), type(a.processor)) in _PLAIN and not a.fused_projections


def _is_sd3(attention: Any) -> bool:
    return type(attention) is Attention and type(attention.processor) is JointAttnProcessor2_0


def softmax_v(processor: Any, q: Tensor, k: Tensor, v: Tensor, alone: bool = True) -> Tensor:
    """Return `attend` by the backend of a processor; alone: q, k and v are of the same tokens."""
    backend = getattr(processor, "_attention_backend", "native")
    parallel = getattr(processor, "_parallel_config", None) if alone else None
    y: Tensor = dispatch.dispatch_attention_fn(q, k, v, backend=backend, parallel_config=parallel)
    return y


def by_default(attention: Any) -> bool:
    """Return whether no one has chosen how an attention is computed: a backend, several devices."""
    processor = attention.processor
    own = [getattr(processor, name, None) for name in ("_attention_backend", "_parallel_config")]
    active, _ = dispatch._AttentionBackendRegistry.get_active_backend()
    return own == [None, None] and active == dispatch.AttentionBackendName.NATIVE


def are_bare(*norms: Any, kind: type[nn.Module] = nn.LayerNorm) -> bool:
    """Return whether all are LayerNorms without weights."""
    return all(type(norm) is kind and norm.weight is norm.bias is None for norm in norms)


def _double(block: Any, *own: Any) -> tuple[Any, ...] | str:
    """Return `_streams` of a block whose attention is known; own: those of the image alone."""
    b, first = block, (block.norm1_context, block.norm1)
    rest = [(b.norm2_context, b.ff_context), (b.norm2, b.ff)]
    every = ((heads_of(b.attn, text=True),), tuple(heads_of(a) for a in (b.attn, *own)))
    ends = every[0][0].out is None
    kinds = (
        normalization.AdaLayerNormContinuous if ends else normalization.AdaLayerNormZero,
        normalization.SD35AdaLayerNormZeroX if own else normalization.AdaLayerNormZero,
    )
    known = all(type(norm) is kind for norm, kind in zip(first, kinds, strict=True))
    if not known or any(getattr(norm, "emb", None) is not None for norm in first):
        return _NORM
    norms = [(norm.norm, norm.linear) for norm in first]
    return _streams(block, norms, every, rest)


def _streams(block: Any, first: Any, every: Any, rest: Any) -> tuple[Any, ...] | str:
    """Return modulations and streams of a block of known norms, or why there are none.

    Of each stream: first norm and modulation, attentions, second norm and feed-forward layer.
    """
    ends = every[0][0].out is None
    bare = [*(norm for norm, _ in first), *(norm for norm, _ in rest[ends:])]
    heads = [norm for each in every for a in each for norm in (a.norm_q, a.norm_k)]
    reason = no(
        (are_bare(*bare), _NORM),
        (all(type(n) in _RMS and getattr(n, "bias", None) is None for n in heads), _NORM),
        (all(activation_of(ff) == "gelu_tanh" for _, ff in rest[ends:]), NOT_MLP),
        (not drops(block), "its dropout is active"),
    )
    if reason is not None:
        return reason
    mlps = [(None, None) if ff is None else (ff.net[0].proj, ff.net[2]) for _, ff in rest]
    streams = tuple(
        StreamParts(norm1, each, norm2, *mlp)
        for (norm1, _), each, (norm2, _), mlp in zip(first, every, rest, mlps, strict=True)
    )
    return tuple(layer for _, layer in first), streams


@matches(QwenParts, qwen.QwenImageTransformerBlock)
def _qwen(block: Any) -> tuple[Any, ...] | str:
    b, every = block, [(heads_of(block.attn, text=True),), (heads_of(block.attn),)]
    first = [(b.txt_norm1, b.txt_mod[1]), (b.img_norm1, b.img_mod[1])]
    rest = [(b.txt_norm2, b.txt_mlp), (b.img_norm2, b.img_mlp)]
    return _streams(b, first, every, rest) if _is_plain(b.attn) else _OTHER


@matches(FluxDoubleParts, flux.FluxTransformerBlock)
def _flux_double(block: Any) -> tuple[Any, ...] | str:
    plain = _is_plain(block.attn) and block.attn.added_kv_proj_dim is not None
    return _double(block) if plain else _OTHER


@matches(JointBlockParts, JointTransformerBlock)
def _joint(b: Any) -> tuple[Any, ...] | str:
    own = (b.attn2,) if b.use_dual_attention else ()
    plain = (
        all(map(_is_sd3, (b.attn, *own)))
        and b.attn.added_kv_proj_dim is not None
        and b.attn.context_pre_only is b.context_pre_only
        and all(a.added_kv_proj_dim is None for a in own)
    )
    reason = no((plain, _OTHER), (b._chunk_size is None, "its feed-forward layer runs in chunks"))
    return reason or _double(b, *own)


@matches(FluxSingleParts, flux.FluxSingleTransformerBlock)
def _single(block: Any) -> tuple[Any, ...] | str:
    b, a, gelu = block, block.attn, block.act_mlp
    tanh = type(gelu) is nn.GELU and gelu.approximate == "tanh"
    return no(
        (_is_plain(a) and a.pre_only and a.added_kv_proj_dim is None, _OTHER),
        (type(b.norm) is normalization.AdaLayerNormZeroSingle and are_bare(b.norm.norm), _NORM),
        (type(a.norm_q) is type(a.norm_k) is nn.RMSNorm, _NORM),
        (tanh, f"its activation is {type(gelu).__name__}, not GELU by tanh"),
    ) or (
        (b.norm.linear,),
        (AttentionParts(a.to_q, a.to_k, a.to_v, a.heads, a.norm_q, a.norm_k, module=a),),
        b.norm.norm, b.proj_mlp, b.proj_out,
    )  # fmt: skip
