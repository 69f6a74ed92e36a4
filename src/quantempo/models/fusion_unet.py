"""Parts of diffusers blocks that one fused pass can run.

Names of sub-modules and of the arguments of their `forward` live here; what runs them is in
`backends`. A block is listed only if nothing in its configuration departs from the plain case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from quantempo.models.fusion_transformer import (
    TransformerBlockParts,
    TransformerParts,
    transformer,
    transformer_block,
)

__all__ = [
    "AttentionParts",
    "DownsampleParts",
    "HeadParts",
    "Parts",
    "ResnetParts",
    "UpBlockParts",
    "UpsampleParts",
    "fusable_parts",
    "wants_original",
]

# Of CrossAttnUpBlock2D after temb, in their order.
_CROSS_ARGUMENTS = (
    "encoder_hidden_states",
    "cross_attention_kwargs",
    "upsample_size",
    "attention_mask",
    "encoder_attention_mask",
)


@dataclass(frozen=True)
class ResnetParts:
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time(silu(temb))))), x through `shortcut`.

    Called as module(x, temb).
    """

    name: str
    module: nn.Module
    norm1: nn.GroupNorm
    conv1: nn.Module
    time: nn.Module | None
    norm2: nn.GroupNorm
    conv2: nn.Module
    shortcut: nn.Module | None


@dataclass(frozen=True)
class AttentionParts:
    """x + out(softmax(q k^T scale) v), q, k and v of norm(x), over the pixels of an image.

    Called as module(x) on (B, C, H, W).
    """

    name: str
    module: nn.Module
    norm: nn.GroupNorm
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    heads: int


@dataclass(frozen=True)
class DownsampleParts:
    """conv(x inside `border` = (top, bottom, left, right) zeros). Called as module(x)."""

    name: str
    module: nn.Module
    conv: nn.Module
    border: tuple[int, int, int, int]


@dataclass(frozen=True)
class UpsampleParts:
    """conv(x with every pixel repeated 2 x 2). Called as module(x, output_size=None)."""

    name: str
    module: nn.Module
    conv: nn.Module


@dataclass(frozen=True)
class UpBlockParts:
    """For each resnet: x = attention(resnet(torch.cat([x, skip], 1), temb)); then upsample.

    Called as module(x, skips, temb, ...), the last skip first.

    more: names of the arguments after temb; cross: the attentions are whole transformers, given
    all of them but upsample_size.
    """

    name: str
    module: nn.Module
    resnets: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    upsamplers: tuple[nn.Module, ...]
    more: tuple[str, ...] = ("upsample_size",)
    cross: bool = False


@dataclass(frozen=True)
class HeadParts:
    """out(silu(norm(x))), the end of the network; `stem` is its first layer, reading x_t.

    apart: names of its children that images do not pass through.
    """

    name: str
    module: nn.Module
    stem: nn.Module
    norm: nn.GroupNorm
    activation: nn.Module
    out: nn.Module
    apart: tuple[str, ...]


Parts = (
    ResnetParts
    | AttentionParts
    | TransformerBlockParts
    | TransformerParts
    | DownsampleParts
    | UpsampleParts
    | UpBlockParts
    | HeadParts
)


def fusable_parts(denoiser: nn.Module) -> Iterator[Parts]:
    """Yield the fusable blocks of a denoiser, inner ones before those that hold them."""
    found = [_parts(name, module) for name, module in denoiser.named_modules()]
    yield from reversed([parts for parts in found if parts is not None])


def wants_original(parts: UpBlockParts) -> bool:
    """Return whether an up block was told to scale its inputs (FreeU) since it was listed."""
    return all(getattr(parts.module, name, None) for name in ("s1", "s2", "b1", "b2"))


def _parts(name: str, module: nn.Module) -> Parts | None:
    # Exact types: a subclass may have another forward.
    build: Any = {
        ResnetBlock2D: _resnet,
        Attention: _attention,
        BasicTransformerBlock: transformer_block,
        Transformer2DModel: transformer,
        Downsample2D: _downsample,
        Upsample2D: _upsample,
        UpBlock2D: _up_block,
        AttnUpBlock2D: _up_block,
        CrossAttnUpBlock2D: _up_block,
        UNet2DModel: _head,
        UNet2DConditionModel: _head,
    }.get(type(module))
    return None if build is None else build(name, module)


def _resnet(name: str, block: Any) -> ResnetParts | None:
    plain = (
        block.time_embedding_norm == "default"
        and block.upsample is None
        and block.downsample is None
        and not block.skip_time_act
        and block.output_scale_factor == 1.0
        and isinstance(block.nonlinearity, nn.SiLU)
        and (block.dropout.p == 0 or not block.training)
    )
    if not plain:
        return None
    return ResnetParts(
        name,
        block,
        block.norm1,
        block.conv1,
        block.time_emb_proj,
        block.norm2,
        block.conv2,
        block.conv_shortcut,
    )


def _attention(name: str, block: Any) -> AttentionParts | None:
    plain = (
        type(block.processor) is AttnProcessor2_0
        and block.group_norm is not None
        and block.spatial_norm is None
        and block.norm_q is None
        and block.norm_k is None
        and block.residual_connection
        and block.rescale_output_factor == 1.0
        and not block.norm_cross
        and not block.is_cross_attention
        and (block.to_out[1].p == 0 or not block.training)
    )
    if not plain:
        return None
    return AttentionParts(
        name,
        block,
        block.group_norm,
        block.to_q,
        block.to_k,
        block.to_v,
        block.to_out[0],
        block.heads,
    )


def _downsample(name: str, block: Any) -> DownsampleParts | None:
    if not block.use_conv or block.norm is not None:
        return None
    # With padding 0 the block itself appends one row and one column of zeros.
    border = (0, 1, 0, 1) if block.padding == 0 else (block.padding,) * 4
    return DownsampleParts(name, block, block.conv, border)


def _upsample(name: str, block: Any) -> UpsampleParts | None:
    if not block.use_conv or block.use_conv_transpose or block.norm is not None:
        return None
    if not block.interpolate:
        return None
    return UpsampleParts(name, block, block.conv if block.name == "conv" else block.Conv2d_0)


def _up_block(name: str, block: Any) -> UpBlockParts | None:
    attentions = tuple(getattr(block, "attentions", ()))
    upsamplers = tuple(block.upsamplers or ())
    if any(type(upsampler) is not Upsample2D for upsampler in upsamplers):
        return None
    parts = (name, block, tuple(block.resnets), attentions, upsamplers)
    if type(block) is not CrossAttnUpBlock2D:
        return UpBlockParts(*parts)
    return UpBlockParts(*parts, _CROSS_ARGUMENTS, cross=True)


def _head(name: str, model: Any) -> HeadParts | None:
    if model.conv_norm_out is None or not isinstance(model.conv_act, nn.SiLU):
        return None
    return HeadParts(
        name,
        model,
        model.conv_in,
        model.conv_norm_out,
        model.conv_act,
        model.conv_out,
        (
            "time_proj",
            "time_embedding",
            "class_embedding",
            "add_time_proj",
            "add_embedding",
            "encoder_hid_proj",
        ),
    )
