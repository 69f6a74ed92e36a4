"""Engines that keep the denoiser a torch module and run it layer by layer.

Each lowers every layer with the backend of its name and fuses the blocks around them. A layer that
the backend cannot take is run by `simulated`: logged, counted, and listed by `execution`.
"""

from collections.abc import Callable, Iterator

from torch import nn

from quantempo.engines.base import BACKENDS
from quantempo.engines.fusion import Blocks, fuse, fused_layers, fused_modules, unfuse
from quantempo.engines.select import Engine
from quantempo.errors import log
from quantempo.kernels import ops
from quantempo.quantized import QLayer, quantized_layers

__all__ = ["LayerwiseEngine", "execution"]


class LayerwiseEngine(Engine):
    """Run every integer layer with the backend `name`, and the blocks around them fused.

    slow: why it is slower than it should be wherever it runs, or None; others: see `Engine`.
    """

    def __init__(
        self, name: str, devices: tuple[str, ...], blocks: Blocks | None = None,
        slow: str | None = None, copies: int = 1,
        holds: Callable[[QLayer], str] = lambda q: "packed" if q.aside > q.unpack else "as bytes",
    ) -> None:  # fmt: skip
        self.name, self.devices, self.blocks, self.slow = name, devices, blocks, slow
        self.holds, self.copies = holds, copies  # type: ignore[assignment,method-assign]

    def missing(self) -> str | None:
        """Return why it cannot run here, or None."""
        return BACKENDS.get(self.name).missing()

    def handicap(self) -> str | None:
        """Return why it is slower than it should be here, or None."""
        return self.slow if self.blocks is None else self.blocks.missing()

    def attach(self, denoiser: nn.Module) -> None:
        """Give every integer layer its kernel, then fuse."""
        self._lower(denoiser)
        if self.blocks is None:
            return
        reason = self.blocks.missing()
        if reason is None:
            fuse(denoiser, self.blocks)
        else:
            log.warning("no fused kernels, torch operations instead (slower): %s", reason)
        if self.blocks.eager:
            _prepare(denoiser)

    def attach_layers(self, module: nn.Module) -> None:
        """Give integer layers of any module their kernels, ready to be compiled."""
        self._lower(module)
        if self.blocks is not None and self.blocks.eager:
            _prepare(module)

    def watched(self, denoiser: nn.Module) -> Iterator[nn.Module]:
        """Yield the integer layers and all modules of fused blocks."""
        yield from super().watched(denoiser)
        for module in fused_modules(denoiser).values():
            yield from module.modules()

    def _lower(self, denoiser: nn.Module) -> None:
        """Lower every layer; say which ones the backend cannot take, and how many these are."""
        backend, fallback = BACKENDS.get(self.name), BACKENDS.get("simulated")
        layers, left = list(quantized_layers(denoiser)), 0
        for name, layer in layers:
            reason = backend.unsupported(layer)
            if reason is not None:
                log.warning("%s runs on 'simulated': %s", name, reason)
                left += 1
            layer.kernel = (backend if reason is None else fallback).lower(layer)
        if left:
            log.warning(
                "%d of %d integer layers cannot run on '%s'; they run in float arithmetic",
                left, len(layers), self.name,
            )  # fmt: skip

    def forget(self, denoiser: nn.Module) -> None:
        """Remove kernels and fused blocks."""
        unfuse(denoiser)
        for _, layer in quantized_layers(denoiser):
            layer.kernel = layer._unpacked = None

    def detach(self, denoiser: nn.Module) -> None:
        """Remove them, and give weights their own layout back."""
        self.forget(denoiser)
        for _, layer in quantized_layers(denoiser):
            layer.release()


def _prepare(denoiser: nn.Module) -> None:
    """Make all constants now: a compiled network and a CUDA graph read them, and make none."""
    held = [layer for _, layer in quantized_layers(denoiser) if not layer.weight_scale.is_meta]
    if not held:
        # Offloaded, each is there for its own call only.
        return
    forwards = [module.forward for module in fused_modules(denoiser).values()]
    device = held[0].weight_scale.device
    ops.reserve(device)
    for part in (*(layer.kernel for layer in held), *forwards):
        if hasattr(part, "prepare"):
            part.prepare(device)


def execution(denoiser: nn.Module) -> dict[str, str]:
    """Return for each integer layer what runs it: "onednn, fused", "onednn" or "simulated"."""
    inner = fused_layers(denoiser)
    table = {}
    for name, layer in quantized_layers(denoiser):
        inside = any(f"{name}.".startswith(f"{block}.") for block in inner)
        table[name] = getattr(layer.kernel, "backend", "none") + (", fused" if inside else "")
    return table
