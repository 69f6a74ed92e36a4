"""Parts of the blocks of DiT, PixArt, Latte, Sana and Wan, see `fusion`."""

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZero, FP32LayerNorm, RMSNorm
from diffusers.models.transformers import sana_transformer as sana
from diffusers.models.transformers import transformer_wan as wan
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.models import fusion_transformer as base
from quantempo.models.fusion import Parts, Rows, drops, matches, no
from quantempo.models.fusion_joint import NOT_MLP, StreamParts, are_bare, softmax_v

__all__ = ["ModulatedBlockParts", "SanaBlockParts", "WanBlockParts"]

# Of BasicTransformerBlock, after the tokens.
_ARGUMENTS = (
    "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "timestep",
    "cross_attention_kwargs", "class_labels", "added_cond_kwargs",
)  # fmt: skip
_OF_SANA = (*_ARGUMENTS[:4], "height", "width")
_NORM = "a norm in it is unknown"


@dataclass(frozen=True)
class ModulatedBlockParts(Parts):
    """One stream; x + attention(x, context), if any, between its attention and the rest."""

    by_token = True

    streams: tuple[StreamParts, ...]
    attentions: tuple[base.TokenAttentionParts, ...]

    def given(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """Return (context, its mask, rotary embedding, timestep, class labels), or None."""
        how = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        mask, context, context_mask, timestep, more, labels, _ = map(how.get, _ARGUMENTS)
        plain = mask is None and not more and how.keys() <= set(_ARGUMENTS)
        return (context, context_mask, None, timestep, labels) if plain else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cross: bool, mask: Tensor | None) -> Tensor:
        """Return softmax(q k^T / sqrt(dim) + mask (B, 1, S)) v; cross: k, v are of the context."""
        heads = (y.transpose(1, 2) for y in (q, k, v))
        bias = None if mask is None else mask[:, None]
        return F.scaled_dot_product_attention(*heads, bias).transpose(1, 2)

    def modulates(self, x: Tensor, timestep: Any, labels: Any) -> bool:
        """Return whether `modulation` can be given these for x (B, T, C)."""
        if not isinstance(timestep, Tensor):
            return False
        if hasattr(self.module, "scale_shift_table"):
            # Not a time for every token.
            return timestep.numel() == 6 * len(x) * x.shape[2]
        known = isinstance(labels, Tensor) and labels.ndim == timestep.ndim == 1
        return known and all(len(value) in (1, len(x)) for value in (timestep, labels))


@dataclass(frozen=True)
class SanaBlockParts(ModulatedBlockParts):
    """A block of Sana: its attention is linear, its feed-forward layer has a convolution inside.

    x = x + gate down(value silu(other)), the halves of depth(silu(up(m(norm2(x)))))
    """

    up: Rows
    down: Rows

    def given(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return (context, its mask, no rotary embedding, timestep, (height, width))."""
        # The class does not read a mask of the image.
        how = dict(zip(_OF_SANA, args, strict=False)) | kwargs
        _, context, mask, timestep, *size = map(how.get, _OF_SANA)
        return context, mask, None, timestep, size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cross: bool, mask: Tensor | None) -> Tensor:
        """Return relu(q) (relu(k)^T v) by the sum of its weights, softmax of the context."""
        if cross:
            return super().attend(q, k, v, cross, mask)
        heads = (y.transpose(1, 2).float() for y in (q.relu(), k.relu(), F.pad(v, (0, 1), value=1)))
        asked, keys, values = heads
        y = asked @ (keys.mT @ values)
        return (y[..., :-1] / (y[..., -1:] + 1e-15)).transpose(1, 2).to(q.dtype)


@matches(SanaBlockParts, sana.SanaTransformerBlock)
def _sana(block: Any) -> tuple[Any, ...] | str:
    b, ff = block, block.ff
    own: Any = base.token_attention(None, b.attn1, False, SanaLinearAttnProcessor2_0, RMSNorm)
    text: Any = base.token_attention(None, b.attn2, True, sana.SanaAttnProcessor2_0, RMSNorm)
    odd = next((found for found in (own, text) if isinstance(found, str)), None)
    plain = type(ff) is sana.GLUMBConv and ff.norm is None and not ff.residual_connection
    reason = odd or no(
        (type(b.norm1) is type(b.norm2) is nn.LayerNorm, _NORM),
        (plain and type(ff.nonlinearity) is nn.SiLU, "its feed-forward layer is not a plain one"),
        (not drops(b), "its dropout is active"),
    )
    stream = StreamParts(b.norm1, (own,), b.norm2, None, None)
    return reason or ((stream,), (text,), ff.conv_inverted, ff.conv_point)


@dataclass(frozen=True)
class WanBlockParts(ModulatedBlockParts):
    """A block of Wan."""

    def given(self, encoder_hidden_states: Any, temb: Any, rotary_emb: Any) -> Any:  # type: ignore[override]
        """Return (context, no mask, rotary embedding, time, no labels), or None."""
        plain = _is_wan(self.module.attn1) and _is_wan(self.module.attn2)
        return (encoder_hidden_states, None, rotary_emb, temb, None) if plain else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cross: bool, mask: Tensor | None) -> Tensor:
        """Return softmax(q k^T / sqrt(dim)) v by the backend that was chosen for the block."""
        processor = getattr(self.module, "attn2" if cross else "attn1").processor
        return softmax_v(processor, q, k, v, alone=not cross)


def _is_wan(a: Any) -> bool:
    known = (type(a), type(a.processor)) == (wan.WanAttention, wan.WanAttnProcessor)
    return known and a.add_k_proj is None and not getattr(a, "fused_projections", False)


@matches(WanBlockParts, wan.WanTransformerBlock)
def _wan(block: Any) -> tuple[Any, ...] | str:
    b, a, c = block, block.attn1, block.attn2
    norms = (a.norm_q, a.norm_k, c.norm_q, c.norm_k)
    middle = None if type(b.norm2) is nn.Identity else b.norm2
    reason = no(
        (_is_wan(a) and _is_wan(c), "an attention in it reads an image or is not Wan's own"),
        (are_bare(b.norm1, b.norm3, kind=FP32LayerNorm), _NORM),
        (middle is None or type(middle) is FP32LayerNorm, _NORM),
        (all(type(norm) is nn.RMSNorm for norm in norms), _NORM),
        (base.activation_of(b.ffn) == "gelu_tanh", NOT_MLP),
        (not drops(b), "its dropout is active"),
    )
    if reason is not None:
        return reason
    heads = base.heads_of(a)
    text = base.TokenAttentionParts(**vars(base.heads_of(c)), norm=middle, cross=True)
    stream = StreamParts(b.norm1, (heads,), b.norm3, b.ffn.net[0].proj, b.ffn.net[2])
    return (stream,), (text,)


@matches(ModulatedBlockParts, BasicTransformerBlock)
def _modulated(block: Any) -> tuple[Any, ...] | str | None:
    b, zero = block, block.norm_type == "ada_norm_zero"
    if b.norm_type not in base.MODULATED:
        return None
    norm1, norm2 = (getattr(b.norm1, "norm", None), b.norm3) if zero else (b.norm1, b.norm2)
    own: Any = base.token_attention(None, b.attn1, cross=False)
    norm = b.norm2 if zero else None
    context = () if b.attn2 is None else (base.token_attention(norm, b.attn2, cross=True),)
    odd = (found for found in (own, *context) if isinstance(found, str))
    reason = next(odd, None) or no(
        (b.pos_embed is None, "it adds an embedding of positions"),
        (not hasattr(b, "fuser"), "it is grounded by boxes (GLIGEN)"),
        (not b.only_cross_attention, "its first attention reads the context"),
        (not zero or type(b.norm1) is AdaLayerNormZero, _NORM),
        (are_bare(norm1, norm2), _NORM),
        (base.activation_of(b.ff) == "gelu_tanh", NOT_MLP),
        (not drops(b), "its dropout is active"),
    )
    if reason is not None:
        return reason
    return (StreamParts(norm1, (own,), norm2, b.ff.net[0].proj, b.ff.net[2]),), context
