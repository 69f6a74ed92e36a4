"""Notice that a network is no longer the one that an engine was attached to."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn

from quantempo.core.instance import touched
from quantempo.quantized import QLayer

__all__ = ["Watch"]

_version = attrgetter("_version")


class Watch:
    """What an engine has decided on, cheap to compare at each call.

    Seen are changes of parameters and buffers, in place or by others; of children, attributes
    (processors, modes, FreeU), hooks and forwards. Not seen: what is written to `tensor.data`.
    """

    def __init__(self, denoiser: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._modules = list(dict.fromkeys(modules))
        # An engine sets attributes of integer layers itself.
        layers = [module for module in self._modules if isinstance(module, QLayer)]
        others = [module for module in self._modules if not isinstance(module, QLayer)]
        # What is offloaded comes and goes.
        held = [module for module in self._modules if not touched(module, hooks=False)]
        tensors = [d for m in held for d in (m._parameters, m._buffers) if d]
        found = (tensor for owned in tensors for tensor in owned.values())
        self._tensors = [t for t in found if t is not None and not t.is_inference()]
        self._layers = [layer.__dict__ for layer in layers]
        self._owned = [denoiser._modules, *tensors]
        self._owned += [d for module in others for d in (module._modules, module.__dict__)]
        hooks = ((m._forward_hooks, m._forward_pre_hooks) for m in self._modules)
        self._hooks = [hung for pair in hooks for hung in pair]
        self._state = self._now()

    def changed(self) -> bool:
        """Return whether anything is not what it was when this was made."""
        try:
            return self._now() != self._state
        except RuntimeError:
            # Another tensor: a comparison of several elements is neither true nor false.
            return True

    def _now(self) -> list[Any]:
        return [
            list(map(_version, self._tensors)),
            [state.get("forward") for state in self._layers],
            list(map(type, self._modules)),
            list(map(len, self._hooks)),
            list(map(tuple, map(dict.values, self._owned))),
        ]
