"""Choose the blocks of a network that run fused, and set their forwards.

What a fused block does is an engine's own; which blocks may be one, and how far the activations
between them are nobody else's, is the same question for every engine and is answered here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from quantempo.models.fusion_transformer import (
    TokenAttentionParts,
    TransformerBlockParts,
    TransformerParts,
)
from quantempo.models.fusion_unet import (
    AttentionParts,
    DownsampleParts,
    HeadParts,
    Parts,
    ResnetParts,
    UpBlockParts,
    UpsampleParts,
    fusable_parts,
    wants_original,
)
from quantempo.models.layers import skip_segments
from quantempo.quantized import Int12Linear, QConv2d, QLayer, QLinear, StepClock, find_clock

__all__ = ["FusedUpBlock", "Kit", "fuse", "fused_layers", "fused_modules", "same", "unfuse"]

_FUSED = "_quantempo_fused"

Forward = Callable[..., Tensor]
# name of the module -> it and its forward
Forwards = dict[str, tuple[nn.Module, Forward]]


@dataclass(frozen=True)
class Kit:
    """The fused blocks of one engine.

    backend: of the kernels they are built on; missing: returns why they cannot be had here, or
    None; eager: constants are made when the engine is attached, by `prepare(device)` of kernels
    and forwards, not by the first call; norm: returns why it cannot run a GroupNorm, or
    None; shifts: made of the float layers that read the time embedding; resnet(parts, shifts or
    None, index) -> forward with `takes(x)`, `run(x, skip, temb)` and `accept((C1, C2))`, told of
    the two inputs of an up block; attention, downsample, upsample: parts -> forward; ends(head,
    closed, clock) -> [(module, forward)], closed if fused blocks alone stand between stem and head;
    contexts: of all attention layers that read a context -> what transformer blocks share;
    transformer_block: parts, that or None -> forward, transformer: parts, the forwards of its
    blocks (None where not fused) -> forward; None: the engine has no such blocks.

    A forward that only calls other blocks for a part of its module names the children that it runs
    itself in `own`.
    """

    backend: str
    missing: Callable[[], str | None]
    eager: bool
    norm: Callable[[nn.GroupNorm], str | None]
    shifts: Callable[[list[Any]], Any]
    resnet: Callable[[ResnetParts, Any, int], Any]
    attention: Callable[[AttentionParts], Forward]
    downsample: Callable[[DownsampleParts], Forward]
    upsample: Callable[[UpsampleParts], Forward]
    ends: Callable[[HeadParts, bool, StepClock], list[tuple[nn.Module, Forward]]]
    contexts: Callable[[list[TokenAttentionParts]], Any] | None = None
    transformer_block: Callable[[TransformerBlockParts, Any], Any] | None = None
    transformer: Callable[[TransformerParts, list[Any]], Forward] | None = None


class FusedUpBlock:
    """An up block whose residual blocks read the two halves of their input where they are."""

    own: tuple[str, ...] = ()

    def __init__(self, parts: UpBlockParts, resnets: list[Any]) -> None:
        self.parts, self.resnets = parts, resnets

    def __call__(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Run the block; the arguments are diffusers'."""
        parts, x = self.parts, hidden_states
        if wants_original(parts) or not self.resnets[0].takes(x):
            module = parts.module
            return type(module).forward(module, x, res_hidden_states_tuple, temb, *args, **kwargs)
        more = dict(zip(parts.more, args, strict=False)) | kwargs
        upsample_size = more.pop("upsample_size", None)
        for i, resnet in enumerate(self.resnets):
            x = resnet.run(x, res_hidden_states_tuple[-1 - i], temb)
            if parts.cross:
                x = parts.attentions[i](x, **more, return_dict=False)[0]
            elif parts.attentions:
                x = parts.attentions[i](x)
        for upsampler in parts.upsamplers:
            x = upsampler(x, upsample_size)
        return x


def fuse(denoiser: nn.Module, kit: Kit) -> None:
    """Set `forward` on the instances of all blocks that can be fused."""
    clock = find_clock(denoiser)
    assert clock is not None
    parts = [p for p in fusable_parts(denoiser) if _refusal(p, kit) is None]
    forwards = _inner(denoiser, parts, kit)
    for part in parts:
        if isinstance(part, HeadParts):
            names = {id(module): name for name, module in denoiser.named_modules()}
            closed = _closed(part, names, forwards)
            for module, forward in kit.ends(part, closed, clock):
                forwards[names[id(module)]] = (module, forward)
    for module, forward in forwards.values():
        module.forward = forward
    object.__setattr__(denoiser, _FUSED, {name: module for name, (module, _) in forwards.items()})


def same(x: Tensor) -> Tensor:
    """Return x: the forward of an activation that the norm before it includes."""
    return x


def unfuse(denoiser: nn.Module) -> None:
    """Give all blocks their own `forward` back."""
    for module in denoiser.__dict__.pop(_FUSED, {}).values():
        module.__dict__.pop("forward", None)


def fused_modules(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have a fused forward, by name."""
    found: dict[str, nn.Module] = getattr(denoiser, _FUSED, {})
    return found


def fused_layers(denoiser: nn.Module) -> list[str]:
    """Return the names of the modules whose layers all run inside a fused forward."""
    found = fused_modules(denoiser)
    return _whole({name: (module, module.forward) for name, module in found.items()})


def _whole(forwards: Forwards) -> list[str]:
    return [
        f"{name}.{child}" if child else name
        for name, (_, forward) in forwards.items()
        for child in getattr(forward, "own", ("",))
    ]


def _inner(denoiser: nn.Module, parts: list[Parts], kit: Kit) -> Forwards:
    """Return the forwards of all blocks between the ends of the network."""
    timed = [p for p in parts if isinstance(p, ResnetParts) and _is_float(p.time)]
    shifts = kit.shifts([p.time for p in timed]) if timed else None
    blocks = [p for p in parts if isinstance(p, TransformerBlockParts)]
    crossed = [a for block in blocks for a in block.attentions if a.cross]
    contexts = kit.contexts(crossed) if crossed and kit.contexts is not None else None
    halves = dict(skip_segments(denoiser))
    resnets: dict[int, Any] = {}
    layers: dict[int, Any] = {}
    forwards: Forwards = {}
    for part in parts:
        forward: Any
        if isinstance(part, ResnetParts):
            index = next((i for i, p in enumerate(timed) if p is part), None)
            forward = kit.resnet(part, None if index is None else shifts, index or 0)
            if f"{part.name}.conv_shortcut" in halves:
                forward.accept(halves[f"{part.name}.conv_shortcut"])
            resnets[id(part.module)] = forward
        elif isinstance(part, UpBlockParts):
            if any(id(resnet) not in resnets for resnet in part.resnets):
                continue
            forward = FusedUpBlock(part, [resnets[id(resnet)] for resnet in part.resnets])
        elif isinstance(part, AttentionParts):
            forward = kit.attention(part)
        elif isinstance(part, TransformerBlockParts):
            assert kit.transformer_block is not None
            forward = layers[id(part.module)] = kit.transformer_block(part, contexts)
        elif isinstance(part, TransformerParts):
            assert kit.transformer is not None
            forward = kit.transformer(part, [layers.get(id(block)) for block in part.blocks])
        elif isinstance(part, DownsampleParts):
            forward = kit.downsample(part)
        elif isinstance(part, UpsampleParts):
            forward = kit.upsample(part)
        else:
            continue
        forwards[part.name] = (part.module, forward)
    return forwards


def _closed(head: HeadParts, names: dict[int, str], inner: Forwards) -> bool:
    """Return whether every layer between stem and head is inside a fused block."""
    ends = (names[id(module)] for module in (head.stem, head.norm, head.out))
    prefix = f"{head.name}." if head.name else ""
    known = (*_whole(inner), *ends, *(prefix + name for name in head.apart))
    passed = [
        name
        for name, module in head.module.named_modules(prefix=head.name)
        if next(module.parameters(recurse=False), None) is not None or isinstance(module, QLayer)
    ]
    return all(any(f"{name}.".startswith(f"{block}.") for block in known) for name in passed)


def _is_float(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear | Int12Linear) and layer.bias is not None


def _refusal(parts: Parts, kit: Kit) -> str | None:
    """Return why a block is not fused, or None."""
    backend = kit.backend
    if isinstance(parts, UpBlockParts):
        return None
    if isinstance(parts, HeadParts):
        plain = isinstance(parts.stem, nn.Conv2d) and isinstance(parts.out, nn.Conv2d)
        return None if plain else "its first or last layer is quantized"
    if isinstance(parts, AttentionParts):
        layers = (parts.q, parts.k, parts.v, parts.out)
        return _first([_linear(layer, backend) for layer in layers] + [_norm(parts.norm, kit)])
    if isinstance(parts, TransformerBlockParts):
        if kit.transformer_block is None:
            return "the engine has no fused transformers"
        inside = [layer for a in parts.attentions for layer in (a.q, a.k, a.v, a.out)]
        return _first([_linear(layer, backend) for layer in (*inside, parts.up, parts.down)])
    if isinstance(parts, TransformerParts):
        if kit.transformer is None:
            return "the engine has no fused transformers"
        ends = (parts.proj_in, parts.proj_out)
        return _first([_rows(layer, backend) for layer in ends] + [_norm(parts.norm, kit)])
    if isinstance(parts, ResnetParts):
        shortcut = parts.shortcut
        return _first(
            [
                _conv(parts.conv1, backend),
                _conv(parts.conv2, backend),
                _norm(parts.norm1, kit),
                _norm(parts.norm2, kit),
                None if shortcut is None else _conv(shortcut, backend, (1, 1), parts=2),
            ]
        )
    if isinstance(parts, UpsampleParts):
        return _conv(parts.conv, backend)
    if isinstance(parts.conv, QConv2d):
        conv = parts.conv
        return _conv(conv, backend, conv.kernel_size, conv.stride, padding=None)
    return "its convolution is in float"


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _conv(
    layer: nn.Module,
    backend: str,
    kernel: tuple[int, ...] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: bool | None = True,
    parts: int = 1,
) -> str | None:
    """Return why a convolution is not a plain one of this kernel and stride, or None."""
    if not isinstance(layer, QConv2d):
        return "a convolution in it is in float"
    same = tuple(size // 2 for size in kernel)
    plain = (
        layer.kernel_size == kernel
        and layer.stride == stride
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and len(layer.segments) <= parts
        and (padding is None or layer.padding == same)
        and getattr(layer.kernel, "backend", None) == backend
    )
    return None if plain else f"a convolution in it is not a plain {kernel[0]}x{kernel[1]}"


def _linear(layer: nn.Module, backend: str) -> str | None:
    if not isinstance(layer, QLinear):
        return "a projection in it is in float"
    plain = len(layer.segments) == 1 and getattr(layer.kernel, "backend", None) == backend
    return None if plain else "a projection in it is not a plain linear layer"


def _rows(layer: nn.Module, backend: str) -> str | None:
    """Return why a layer does not multiply each pixel by one matrix, or None."""
    one = isinstance(layer, QConv2d)
    return _conv(layer, backend, (1, 1)) if one else _linear(layer, backend)


def _norm(norm: nn.GroupNorm, kit: Kit) -> str | None:
    return kit.norm(norm) if norm.affine else "its norm has no weight"
