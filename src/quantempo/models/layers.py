"""What a denoiser looks like: its layers, their roles, how a pipeline holds it.

All name strings of architectures live in `models/`; the rest of the program sees roles. A role is
decided by structure and name, never by position in a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from quantempo.errors import QuantempoError

__all__ = [
    "ROLES",
    "Site",
    "check_roles",
    "denoiser_of",
    "sites",
    "skip_segments",
    "timestep_of",
]

ROLES = {
    "input": "first layer, reads x_t itself",
    "output": "last layer, writes the network's output",
    "time": "acts on the time-step (and class) embedding alone",
    "shortcut": "1x1 convolution around a residual block",
    "attention": "projection of an attention block",
    "conv": "other convolution",
    "linear": "other linear layer",
}

_DENOISERS = ("unet", "transformer", "prior")
_INPUT = {"conv_in", "pos_embed.proj", "x_embedder", "img_in", "proj_in"}
_OUTPUT = {"conv_out", "proj_out", "proj_out_2", "final_layer.linear"}
# Anywhere in the dotted name.
_TIME = (
    "time_embedding",
    "time_emb_proj",
    "timestep_embedder",
    "class_embedding",
    "class_embedder",
    "add_embedding",
    "adaln",
    "time_text_embed",
    "guidance_embedder",
)
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "query", "key", "value", "proj_attn", "to_qkv")


@dataclass(frozen=True)
class Site:
    """One Conv2d or Linear of the denoiser and what the plan needs to know of it.

    role: a key of ROLES; segments: input channels of each half of a concatenated skip input, or
    () for one tensor; unsupported: why no integer kernel can take it, or None.
    """

    name: str
    layer: nn.Module
    role: str
    segments: tuple[int, ...] = ()
    unsupported: str | None = None


def check_roles(names: tuple[str, ...]) -> None:
    """Raise QuantempoError when a recipe names a role that does not exist."""
    for name in names:
        if name not in ROLES:
            raise QuantempoError(
                f"unknown role '{name}' in layers.float_roles (known: {', '.join(ROLES)})"
            )


def denoiser_of(pipe: Any) -> tuple[str, nn.Module]:
    """Return (component name, module) of the network a pipeline calls at each step.

    Raises:
        QuantempoError: the pipeline has none of the known components.
    """
    for name in _DENOISERS:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return name, module
    raise QuantempoError(
        f"{type(pipe).__name__} has no denoiser; expected a component called one of: "
        f"{', '.join(_DENOISERS)}"
    )


def timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the time-step among the arguments of a denoiser call, as the pipeline passed it.

    Raises:
        QuantempoError: there is none (some single-step networks are not conditioned on time).
    """
    if "timestep" in kwargs:
        return kwargs["timestep"]
    if len(args) > 1:
        return args[1]
    raise QuantempoError("the denoiser was called without a time-step; expected `timestep`")


def sites(denoiser: nn.Module) -> list[Site]:
    """Return every Conv2d and Linear (and any other convolution) in module order."""
    halves = dict(skip_segments(denoiser))
    found = []
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent = denoiser.get_submodule(name.rpartition(".")[0])
            segments = halves.get(name, ())
            role = _role(name, layer, parent)
            found.append(Site(name, layer, role, segments, _unsupported(layer)))
        elif isinstance(layer, nn.modules.conv._ConvNd):
            found.append(Site(name, layer, "conv", (), f"no kernel for {type(layer).__name__}"))
    return found


def _role(name: str, layer: nn.Module, parent: nn.Module) -> str:
    if name in _INPUT:
        return "input"
    if name in _OUTPUT:
        return "output"
    # proj_out_1 of a DiT is the modulation of its last norm: it reads the conditioning only.
    if any(key in name for key in _TIME) or name == "proj_out_1":
        return "time"
    if type(parent).__name__.startswith("AdaLayerNorm"):
        return "time"
    if name.endswith(("conv_shortcut", "nin_shortcut")):
        return "shortcut"
    if name.endswith(_ATTENTION) and isinstance(layer, nn.Linear):
        return "attention"
    return "conv" if isinstance(layer, nn.Conv2d) else "linear"


def _unsupported(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"padding {layer.padding_mode}/{layer.padding} has no integer kernel"
        if layer.groups != 1 and layer.groups == layer.in_channels:
            return "depthwise convolution: too little work for an integer kernel"
    return None


def skip_segments(denoiser: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield the shortcut convolutions of a U-Net that read torch.cat([hidden, skip]).

    The hidden half is as wide as the output of the block before, walking upwards from the middle.
    """
    up_blocks = getattr(denoiser, "up_blocks", None)
    mid = getattr(getattr(denoiser, "mid_block", None), "resnets", None)
    if up_blocks is None or not mid:
        return
    hidden = mid[-1].conv2.out_channels
    for i, block in enumerate(up_blocks):
        for j, resnet in enumerate(getattr(block, "resnets", ())):
            skip = resnet.conv1.in_channels - hidden
            if skip > 0 and getattr(resnet, "conv_shortcut", None) is not None:
                yield f"up_blocks.{i}.resnets.{j}.conv_shortcut", (hidden, skip)
            hidden = resnet.conv2.out_channels
