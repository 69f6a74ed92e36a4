"""What is asked and noticed at every call of a packed denoiser, whatever engine runs it."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from quantempo.core.instance import touched
from quantempo.errors import QuantempoError
from quantempo.models.fusion import drops
from quantempo.quantized import QLayer, StoredLinear
from quantempo.quantized.swap import PADDED, odd_padding

__all__ = ["Watch", "check_call", "check_network", "keep_nan", "one_row", "tensors_of"]

_version = attrgetter("_version")


def check_network(denoiser: nn.Module) -> None:
    """Raise QuantempoError for a change that integer layers cannot follow."""
    for name in sorted(odd_padding(denoiser) - getattr(denoiser, PADDED, set())):
        text = f"the padding of '{name}' was changed, which the integer convolutions around it"
        raise QuantempoError(f"{text} cannot follow; set it on the float model and quantize that")
    found = dict(denoiser.named_parameters())
    for owner, module in denoiser.named_modules():
        if isinstance(module, QLayer | StoredLinear):
            found |= dict(module.named_buffers(owner))
    for name, value in found.items():
        # float8, to which others may have cast a weight, cannot be asked.
        known = value.is_floating_point() and value.itemsize > 1 and not value.is_meta
        if known and not bool(value.isfinite().all()):
            raise QuantempoError(f"'{name}' holds NaN or infinity, which codes would hide; load it")


def check_call(denoiser: nn.Module, given: list[Tensor]) -> None:
    """Raise QuantempoError for a call that asks what integer layers do not do."""
    if torch.is_grad_enabled() and any(value.requires_grad for value in given):
        text = "got an input that requires a gradient, which integer layers do not have"
        raise QuantempoError(f"{text}; call the float model, or this one under torch.no_grad()")
    if denoiser.training and drops(denoiser):
        text = "the quantized model is in training mode and has dropout"
        raise QuantempoError(f"{text}, which integer layers leave out; call .eval()")


def tensors_of(args: Any, kwargs: dict[str, Any], lists: list[list[Tensor]]) -> list[Tensor]:
    """Return the tensors in arguments but masks; of `lists` of rows the sums of entries, (B, 1)."""
    found: list[Any] = list(args)
    for name, value in kwargs.items():
        if "mask" not in name and not any(value is known for known in lists):
            inner = value.values() if isinstance(value, dict) else value
            found += inner if isinstance(value, dict | list | tuple) else [value]
    sums = [torch.stack([v.sum(dtype=torch.float32) for v in rows])[:, None] for rows in lists]
    return sums + [value for value in found if isinstance(value, Tensor)]


def one_row(value: Tensor) -> Tensor:
    """Return a row of zeros in the place of none: engines take no empty batch."""
    return value if value.ndim == 0 or len(value) else value.new_zeros((1, *value.shape[1:]))


def keep_nan(output: Any, given: list[Tensor], listed: bool) -> Any:
    """Return the output, NaN for samples that got NaN or infinity; listed: lists may be samples."""
    rows = next((len(value) for value in given if value.ndim), 1)
    # 0 of a finite sum, else NaN; nothing waits for a GPU.
    zero = torch.zeros((), device=given[0].device)
    for value in given:
        if value.is_floating_point():
            whole = value.flatten(1) if value.ndim > 1 and len(value) == rows else value.flatten()
            zero = zero + whole.sum(-1, dtype=torch.float32) * 0
    if zero.device.type == "cpu" and not bool(zero.isnan().any()):
        return output

    def spread(y: Any, zero: Tensor = zero) -> Any:
        if isinstance(y, list):
            return list(map(spread, y, zero if listed and len(y) == rows else [zero] * len(y)))
        if not isinstance(y, Tensor) or not y.is_floating_point() or not y.ndim:
            return y
        term = zero if zero.ndim == 0 or len(y) == rows else zero.sum()
        return y + term.reshape(-1, *[1] * (y.ndim - 1)).to(y.dtype)

    return tree_map(spread, output, is_leaf=lambda y: isinstance(y, list))


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
        held = [module for module in self._modules if not touched(module, hooks=0)]
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
