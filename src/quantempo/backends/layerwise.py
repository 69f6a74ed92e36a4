"""Engines that keep the denoiser a torch module and run it layer by layer (layer L3).

`onednn` lowers each layer to an int8 kernel and fuses the blocks around them where a compiled
library is at hand; `simulated` runs anywhere. A layer that the first backend cannot take is run by
`simulated`: logged, and listed by `execution`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.backends.base import BACKENDS
from quantempo.backends.delta import lower_delta
from quantempo.backends.engine import ENGINES
from quantempo.backends.folded import TimeShifts
from quantempo.backends.fused import (
    FusedAttention,
    FusedDownsample,
    FusedHead,
    FusedResnet,
    FusedStem,
    FusedUpBlock,
    FusedUpsample,
)
from quantempo.kernels import fused_cpu, onednn
from quantempo.models.fusion import (
    AttentionParts,
    DownsampleParts,
    HeadParts,
    Parts,
    ResnetParts,
    UpBlockParts,
    UpsampleParts,
    fusable_parts,
)
from quantempo.quantizers import (
    DELTA,
    INT8_ATTENTION,
    Int12Linear,
    QConv2d,
    QLayer,
    QLinear,
    delta_layers,
    int8_attention_blocks,
    quantized_layers,
)

__all__ = ["LayerwiseEngine", "execution", "fuse", "unfuse"]

log = logging.getLogger("quantempo")

_FUSED = "_quantempo_fused"


class LayerwiseEngine:
    """Run every integer layer with one backend, and what is around them fused if asked for.

    Args:
        name: of the engine and of its backend.
        devices: torch device types, or ("any",).
        fused: fuse blocks where the compiled kernels can be had.
    """

    def __init__(self, name: str, devices: tuple[str, ...], fused: bool) -> None:
        self.name, self.devices, self.fused = name, devices, fused
        self.features: tuple[str, ...] = (DELTA, INT8_ATTENTION)

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return BACKENDS.get(self.name).missing()

    def handicap(self) -> str | None:
        """Return why it is slower than it should be here, or None."""
        if self.name == "simulated":
            return "it computes the integers in float arithmetic"
        return fused_cpu.missing() if self.fused else None

    def attach(self, denoiser: nn.Module) -> None:
        """Give every integer layer its kernel, then fuse."""
        backend, fallback = BACKENDS.get(self.name), BACKENDS.get("simulated")
        for name, layer in quantized_layers(denoiser):
            reason = backend.unsupported(layer)
            if reason is not None:
                log.warning("%s runs on 'simulated': %s", name, reason)
            chosen = backend if reason is None else fallback
            if layer.delta_rate is None:
                layer.kernel = chosen.lower(layer)
            else:
                layer.kernel = lower_delta(layer, chosen.name)
        if not self.fused:
            return
        _log_unfused(denoiser)
        reason = fused_cpu.missing()
        if reason is None:
            fuse(denoiser)
        else:
            log.warning("no fused kernels, torch operations instead (slower): %s", reason)

    def detach(self, denoiser: nn.Module) -> None:
        """Remove kernels and fused blocks."""
        unfuse(denoiser)
        for _, layer in quantized_layers(denoiser):
            layer.kernel = None


def _log_unfused(denoiser: nn.Module) -> None:
    """Say which layers the fused blocks do without, because of what they keep or compute."""
    blocks, layers = int8_attention_blocks(denoiser), list(delta_layers(denoiser))
    if blocks:
        log.info("%d attention blocks are not fused: their products are integers", len(blocks))
    if layers:
        log.info("blocks of %d layers are not fused: these quantize changes", len(layers))


def execution(denoiser: nn.Module) -> dict[str, str]:
    """Return for each integer layer what runs it: "onednn, fused", "onednn" or "simulated"."""
    # An up block only hands its input to the blocks inside, fused or not.
    fused = [
        block
        for block, module in getattr(denoiser, _FUSED, {}).items()
        if not isinstance(module.forward, FusedUpBlock)
    ]
    table = {}
    for name, layer in quantized_layers(denoiser):
        inside = any(name.startswith(f"{block}.") for block in fused)
        table[name] = getattr(layer.kernel, "backend", "none") + (", fused" if inside else "")
    return table


def fuse(denoiser: nn.Module) -> None:
    """Set `forward` on the instances of all blocks that can be fused."""
    parts = [p for p in fusable_parts(denoiser) if _refusal(p) is None]
    timed = [p for p in parts if isinstance(p, ResnetParts) and _is_float(p.time)]
    shifts = TimeShifts([p.time for p in timed])
    resnets: dict[int, FusedResnet] = {}
    forwards: Forwards = {}
    for part in parts:
        forward: Forward
        if isinstance(part, ResnetParts):
            index = next((i for i, p in enumerate(timed) if p is part), None)
            forward = FusedResnet(part, None if index is None else shifts, index or 0)
            resnets[id(part.module)] = forward
        elif isinstance(part, UpBlockParts):
            if any(id(resnet) not in resnets for resnet in part.resnets):
                continue
            forward = FusedUpBlock(part, [resnets[id(resnet)] for resnet in part.resnets])
        elif isinstance(part, HeadParts):
            continue
        else:
            forward = _SIMPLE[type(part)](part)
        forwards[part.name] = (part.module, forward)
    for part in parts:
        if isinstance(part, HeadParts):
            forwards |= _ends(part, denoiser, forwards)
    for module, forward in forwards.values():
        module.forward = forward
    object.__setattr__(denoiser, _FUSED, {name: module for name, (module, _) in forwards.items()})


def unfuse(denoiser: nn.Module) -> None:
    """Give all blocks their own `forward` back."""
    for module in denoiser.__dict__.pop(_FUSED, {}).values():
        module.__dict__.pop("forward", None)


Forward = Callable[..., Tensor]
Forwards = dict[str, tuple[nn.Module, Forward]]
_SIMPLE: dict[type, Callable[[Any], Forward]] = {
    AttentionParts: FusedAttention,
    DownsampleParts: FusedDownsample,
    UpsampleParts: FusedUpsample,
}


def _ends(head: HeadParts, denoiser: nn.Module, inner: Forwards) -> Forwards:
    """Return the forwards of the first convolution, the last norm and its activation.

    Between them the activations are bfloat16 if every layer they pass is inside a fused block and
    the CPU has bfloat16.
    """
    names = {id(module): name for name, module in denoiser.named_modules()}
    stem, norm, activation, out = (
        names[id(module)] for module in (head.stem, head.norm, head.activation, head.out)
    )
    prefix = f"{head.name}." if head.name else ""
    whole = [name for name, (_, forward) in inner.items() if not isinstance(forward, FusedUpBlock)]
    known = (*whole, stem, norm, out, *(prefix + name for name in head.apart))
    passed = [
        name
        for name, module in head.module.named_modules(prefix=head.name)
        if next(module.parameters(recurse=False), None) is not None or isinstance(module, QLayer)
    ]
    closed = all(any(f"{name}.".startswith(f"{block}.") for block in known) for name in passed)
    dtype = torch.bfloat16 if closed and onednn.native_bfloat16() else torch.float32
    return {
        stem: (head.stem, FusedStem(head.stem, dtype)),
        norm: (head.norm, FusedHead(head)),
        activation: (head.activation, _same),
    }


def _same(x: Tensor) -> Tensor:
    return x


def _is_float(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear | Int12Linear) and layer.bias is not None


def _refusal(parts: Parts) -> str | None:
    """Return why a block is not fused, or None."""
    if isinstance(parts, UpBlockParts):
        return None
    if isinstance(parts, HeadParts):
        plain = isinstance(parts.stem, nn.Conv2d) and isinstance(parts.out, nn.Conv2d)
        return None if plain else "its first or last layer is quantized"
    if isinstance(parts, AttentionParts):
        return _first(
            [_linear(layer) for layer in (parts.q, parts.k, parts.v, parts.out)]
            + [_norm_refusal(parts.norm)]
        )
    if isinstance(parts, ResnetParts):
        return _first(
            [
                _conv(parts.conv1),
                _conv(parts.conv2),
                _norm_refusal(parts.norm1),
                _norm_refusal(parts.norm2),
                None if parts.shortcut is None else _conv(parts.shortcut, (1, 1), parts=2),
            ]
        )
    if isinstance(parts, UpsampleParts):
        return _conv(parts.conv)
    if isinstance(parts.conv, QConv2d):
        return _conv(parts.conv, parts.conv.kernel_size, parts.conv.stride, padding=None)
    return "its convolution is in float"


def _first(reasons: list[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _conv(
    layer: nn.Module,
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
        and getattr(layer.kernel, "backend", None) == "onednn"
    )
    return None if plain else f"a convolution in it is not a plain {kernel[0]}x{kernel[1]}"


def _linear(layer: nn.Module) -> str | None:
    if not isinstance(layer, QLinear):
        return "a projection in it is in float"
    plain = len(layer.segments) == 1 and getattr(layer.kernel, "backend", None) == "onednn"
    return None if plain else "a projection in it is not a plain linear layer"


def _norm_refusal(norm: nn.GroupNorm) -> str | None:
    if not norm.affine or norm.num_channels > fused_cpu.MAX_CHANNELS:
        return "its norm has no weight or too many channels"
    return None


ENGINES.register("onednn")(LayerwiseEngine("onednn", ("cpu",), fused=True))
ENGINES.register("simulated")(LayerwiseEngine("simulated", ("any",), fused=False))
