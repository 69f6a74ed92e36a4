"""Parts of the blocks of diffusers' U-Nets, see `fusion`; transformers in `fusion_transformer`."""

from dataclasses import dataclass
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from quantempo.models import fusion
from quantempo.models.layers import EMBEDDINGS

__all__ = [
    "AttentionParts", "DownsampleParts", "HeadParts", "ResnetParts", "UpBlockParts",
    "UpsampleParts",
]  # fmt: skip

# Of CrossAttnUpBlock2D after temb, in their order.
_CROSS_ARGUMENTS = (
    *("encoder_hidden_states", "cross_attention_kwargs", "upsample_size"),
    *("attention_mask", "encoder_attention_mask"),
)


@dataclass(frozen=True)
class ResnetParts(fusion.Parts):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time(silu(temb))))), x through `shortcut`."""

    norm1: fusion.Norm
    conv1: fusion.Conv3x3
    time: nn.Module | None
    norm2: fusion.Norm
    conv2: fusion.Conv3x3
    shortcut: fusion.Shortcut

    def given(self, temb: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return (temb,)."""
        return (temb,)


@dataclass(frozen=True)
class AttentionParts(fusion.Parts):
    """x + out(softmax(q k^T scale) v), q, k and v of norm(x), over the pixels of (B, C, H, W)."""

    norm: fusion.Norm
    q: fusion.Linear
    k: fusion.Linear
    v: fusion.Linear
    out: fusion.Linear
    heads: int

    def given(self, *args: Any, **kwargs: Any) -> tuple[()] | None:
        """Return (), or None with a context or a mask."""
        plain = not args and all(v is None for k, v in kwargs.items() if k != "temb")
        return () if plain else None


@dataclass(frozen=True)
class DownsampleParts(fusion.Parts):
    """conv(x inside `border` = (top, bottom, left, right) zeros)."""

    conv: fusion.Sampler
    border: tuple[int, int, int, int]


@dataclass(frozen=True)
class UpsampleParts(fusion.Parts):
    """conv(x with every pixel repeated 2 x 2)."""

    conv: fusion.Conv3x3

    def given(self, output_size: Any = None, *args: Any, **kwargs: Any) -> tuple[()] | None:
        """Return (), or None for another size than twice that of x."""
        return () if output_size is None else None


@dataclass(frozen=True)
class UpBlockParts(fusion.Parts):
    """For each resnet: x = attention(resnet(torch.cat([x, skip], 1), temb)); then upsample.

    more: names of the arguments after temb; cross: the attentions are transformers.
    """

    resnets: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    upsamplers: tuple[nn.Module, ...]
    more: tuple[str, ...]
    cross: bool

    def given(
        self, res_hidden_states_tuple: Any, temb: Any = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...] | None:
        """Return (skips, temb, {name: argument}), the last skip first to be read; FreeU: None."""
        if all(getattr(self.module, name, None) for name in ("s1", "s2", "b1", "b2")):
            return None
        more = dict(zip(self.more, args, strict=False)) | kwargs
        return res_hidden_states_tuple, temb, more


@dataclass(frozen=True)
class HeadParts(fusion.Parts):
    """out(silu(norm(x))), the end of the network; `stem`: its first layer; apart: see `_APART`."""

    stem: nn.Conv2d
    norm: nn.GroupNorm
    activation: nn.Module
    out: nn.Conv2d
    apart: tuple[str, ...]

    def inside(self) -> list[nn.Module]:
        """Return the modules at both ends."""
        return [self.stem, self.norm, self.activation, self.out]


@fusion.matches(ResnetParts, ResnetBlock2D)
def _resnet(block: Any) -> tuple[Any, ...] | str:
    time, act = block.time_embedding_norm, type(block.nonlinearity).__name__
    fields = (block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2)
    return fusion.no(
        (time == "default" and not block.skip_time_act, f"its time embedding is '{time}'"),
        (block.upsample is None and block.downsample is None, "it changes the size of its input"),
        (block.output_scale_factor == 1.0, "its output is scaled"),
        (isinstance(block.nonlinearity, nn.SiLU), f"its activation is {act}, not SiLU"),
        (not fusion.drops(block), "its dropout is active"),
    ) or (*fields, block.conv_shortcut)


@fusion.matches(AttentionParts, Attention)
def _attention(block: Any) -> tuple[Any, ...] | str | None:
    b, kind = block, type(block.processor)
    if b.group_norm is None:
        # Of a transformer block, where the norm is outside.
        return None
    plain = b.residual_connection and b.rescale_output_factor == 1.0
    return fusion.no(
        (kind is AttnProcessor2_0, f"its processor is {kind.__name__}"),
        (b.spatial_norm is b.norm_q is b.norm_k is None, "it has a second norm"),
        (not b.norm_cross and not b.is_cross_attention, "it reads a context"),
        (plain, "its output is scaled or not added to its input"),
        (not fusion.drops(b), "its dropout is active"),
    ) or (b.group_norm, b.to_q, b.to_k, b.to_v, b.to_out[0], b.heads)


@fusion.matches(DownsampleParts, Downsample2D)
def _downsample(block: Any) -> tuple[Any, ...] | str | None:
    if not block.use_conv:
        return None
    # With padding 0 the block itself appends one row and one column of zeros.
    border = (0, 1, 0, 1) if block.padding == 0 else (block.padding,) * 4
    return "it has a norm" if block.norm is not None else (block.conv, border)


@fusion.matches(UpsampleParts, Upsample2D)
def _upsample(block: Any) -> tuple[Any, ...] | str | None:
    if not block.use_conv:
        return None
    plain = not block.use_conv_transpose and block.norm is None and block.interpolate
    conv = block.conv if block.name == "conv" else block.Conv2d_0
    return (conv,) if plain else "it does more than repeat pixels"


@fusion.matches(UpBlockParts, UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D)
def _up_block(block: Any) -> tuple[Any, ...] | str:
    upsamplers, cross = tuple(block.upsamplers or ()), type(block) is CrossAttnUpBlock2D
    if any(type(upsampler) is not Upsample2D for upsampler in upsamplers):
        return "it upsamples by a residual block"
    attentions = tuple(getattr(block, "attentions", ()))
    more = _CROSS_ARGUMENTS if cross else ("upsample_size",)
    return tuple(block.resnets), attentions, upsamplers, more, cross


@fusion.matches(HeadParts, UNet2DModel, UNet2DConditionModel)
def _head(model: Any) -> tuple[Any, ...] | str:
    m = model
    plain = isinstance(m.conv_norm_out, nn.GroupNorm) and isinstance(m.conv_act, nn.SiLU)
    in_float = isinstance(m.conv_in, nn.Conv2d) and isinstance(m.conv_out, nn.Conv2d)
    return fusion.no(
        (plain, "it does not end in a norm and SiLU"),
        (in_float, "its first or last layer is quantized"),
    ) or (m.conv_in, m.conv_norm_out, m.conv_act, m.conv_out, EMBEDDINGS)
