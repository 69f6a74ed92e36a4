"""Engines: what executes a packed denoiser, behind one contract.

An engine attaches to a quantized denoiser by setting attributes of that instance (each layer's
`kernel`, the `forward` of blocks or of the whole network) and detaches by deleting them. Weights
and files never depend on it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from quantempo.core.instance import drop, keep, reset_forward, set_forward
from quantempo.errors import QuantempoError
from quantempo.quantized import find_clock
from quantempo.registry import Registry

__all__ = ["ENGINES", "Engine", "attach", "attach_lazily", "attached", "choose", "detach"]

log = logging.getLogger("quantempo")

_MARK = "_quantempo_engine"


class Engine:
    """What every engine offers.

    devices: torch device types it runs on; the fastest engine of a device is registered first.
    """

    name: str
    devices: tuple[str, ...]

    def missing(self) -> str | None:
        """Return why it cannot run here (one clause), or None."""
        return None

    def handicap(self) -> str | None:
        """Return why it is slower here than it should be (one clause), or None."""
        return None

    def attach(self, denoiser: nn.Module) -> None:
        """Make `denoiser(...)` run on this engine."""
        raise NotImplementedError

    def detach(self, denoiser: nn.Module) -> None:
        """Undo `attach`."""
        raise NotImplementedError


ENGINES: Registry[Engine] = Registry("engine")


def choose(device: str) -> Engine:
    """Return the fastest engine that can run on a device type; log what was passed over, and why.

    Raises:
        QuantempoError: none can.
    """
    found: list[tuple[str, Engine, str | None]] = []
    for name in ENGINES.names():
        engine = ENGINES.get(name)
        if device not in engine.devices and "any" not in engine.devices:
            continue
        reason = engine.missing()
        if reason is None:
            found.append((name, engine, engine.handicap()))
        else:
            log.warning("engine %s is not used: %s", name, reason)
    if not found:
        raise QuantempoError(f"no engine can run on device '{device}'")
    # Sorting is stable: registration order decides among equals.
    chosen = sorted(found, key=lambda item: item[2] is not None)[0]
    for name, _, reason in found[: found.index(chosen)]:
        log.warning("engine %s is not the default here: %s", name, reason)
    return chosen[1]


def attach(denoiser: nn.Module, engine: str = "auto") -> str:
    """Attach an engine to a quantized denoiser and return its name.

    Args:
        engine: a registered name, or "auto" for the fastest that is installed for its device.

    Raises:
        QuantempoError: not quantized, unknown engine, or the engine cannot run here.
    """
    if find_clock(denoiser) is None:
        raise QuantempoError(
            f"{type(denoiser).__name__} is not quantized; run `quantempo quantize`"
        )
    device = next(denoiser.parameters()).device.type
    chosen = choose(device) if engine == "auto" else ENGINES.get(engine)
    reason = chosen.missing()
    if reason is None and device not in chosen.devices and "any" not in chosen.devices:
        reason = f"it runs on {', '.join(chosen.devices)}, the model is on {device}"
    if reason is not None:
        raise QuantempoError(f"engine '{chosen.name}' cannot run this model here: {reason}")
    detach(denoiser)
    chosen.attach(denoiser)
    keep(denoiser, _MARK, chosen.name)
    log.debug("engine: %s", chosen.name)
    return chosen.name


def attached(denoiser: nn.Module) -> str | None:
    """Return the name of the attached engine, or None."""
    return getattr(denoiser, _MARK, None)


def detach(denoiser: nn.Module) -> None:
    """Remove the attached engine, if any (also a lazy one)."""
    name = attached(denoiser)
    if name is not None:
        ENGINES.get(name).detach(denoiser)
        drop(denoiser, _MARK)
    reset_forward(denoiser)


class _AtFirstCall:
    """Stand in for `forward` until the engine is known; survives a deep copy of the denoiser."""

    def __init__(self, denoiser: nn.Module, engine: str) -> None:
        self.denoiser, self.engine = denoiser, engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise QuantempoError(
                "the engine is attached by the first call, which a compiler cannot follow; call "
                "quantempo.attach(denoiser) before torch.compile"
            )
        attach(self.denoiser, self.engine)
        return self.denoiser.forward(*args, **kwargs)


def attach_lazily(denoiser: nn.Module, engine: str = "auto") -> None:
    """Attach at the first call: only then is it known on which device the model ended up."""
    set_forward(denoiser, _AtFirstCall(denoiser, engine))
