"""What a denoiser is called with: x_t, the time-step and the rest.

The names that diffusers gives to the arguments of its denoisers live here and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError

__all__ = ["DenoiserInputs", "bind_inputs"]

_TIMESTEP = "timestep"
# How the answer is wrapped; says nothing about the network's input.
_WRAPPING = ("return_dict",)


@dataclass(frozen=True)
class DenoiserInputs:
    """One call of a denoiser, by argument name.

    Args:
        sample: (B, ...) x_t as the network receives it.
        timestep: (B,) int64, or floating point as received.
        conditioning: the other arguments by name, as received; defaults are not filled in.
        sample_name: name of the first argument ("sample", "hidden_states").
        timestep_name: name of the time-step argument.
    """

    sample: Tensor
    timestep: Tensor
    conditioning: dict[str, Any]
    sample_name: str
    timestep_name: str = _TIMESTEP


def bind_inputs(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> DenoiserInputs:
    """Name the arguments of one call of `denoiser`.

    The time-step may come as a number or as a tensor of shape (), (1,) or (B,); it is repeated
    to (B,) and its value is not changed: integers become int64, Python floats float32.

    Raises:
        QuantempoError: the denoiser takes no time-step, got none, or got one of another shape.
    """
    # A compiled module hides the signature; an engine may have replaced `forward` on the instance.
    module = getattr(denoiser, "_orig_mod", denoiser)
    signature = inspect.signature(type(module).forward)
    given = dict(signature.bind(module, *args, **kwargs).arguments)
    names = list(signature.parameters)
    given.pop(names[0])
    sample_name = names[1]
    sample = given.pop(sample_name, None)
    if not isinstance(sample, Tensor) or given.get(_TIMESTEP) is None:
        raise QuantempoError(
            f"{type(module).__name__} was called with ({', '.join(names[1:])}); expected x_t "
            f"first and an argument '{_TIMESTEP}'; only denoisers called like this can be traced"
        )
    timestep = _rows(given.pop(_TIMESTEP), sample)
    for name in _WRAPPING:
        given.pop(name, None)
    return DenoiserInputs(sample, timestep, given, sample_name)


def _rows(timestep: Any, sample: Tensor) -> Tensor:
    if isinstance(timestep, float):
        timestep = torch.tensor(timestep, dtype=torch.float32)
    t = torch.as_tensor(timestep, device=sample.device)
    if not t.is_floating_point():
        t = t.to(torch.int64)
    if t.numel() != 1 and t.shape != sample.shape[:1]:
        raise QuantempoError(
            f"got a time-step of shape {tuple(t.shape)} for x_t of shape {tuple(sample.shape)}; "
            "expected (), (1,) or (B,)"
        )
    return t.reshape(-1).expand(sample.shape[0])
