"""Make a torch operator of the record of its arguments, or of a function that returns one.

The record can check them, compute the result exactly on a CPU, and say what it looks like. Its
signature, or that of the function, is the only one there is: the schema is inferred from it.
Exact sums of integers, below 2^53, are exact in float64 in any order.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from quantempo.kernels import layout

__all__ = ["Call", "channels_last", "entries", "image", "operator", "reserve", "to_codes"]

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("quantempo", "DEF")


class Call(Protocol):
    """The record of one call."""

    def check(self, strides: bool) -> None:
        """Raise ValueError on other shapes, types or, with `strides`, memory layouts and devices.

        Strides of fake tensors are not final. Values are not looked at: nothing waits for a GPU.
        """

    def exact(self) -> Any:
        """Return the results, from float64 arithmetic on the CPU."""

    def empty(self) -> Any:
        """Return uninitialised results of the same shapes, types, strides and device."""


def image(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised image (N, C, H, W), channels_last."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def entries(table: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Return table[bucket[n // (N / B)]] of N = `count` images or rows, table[0] if G = 1."""
    if table.shape[0] == 1:
        return table.expand(count)
    return table[bucket.reshape(-1)].repeat_interleave(count // bucket.numel())


def to_codes(x: Tensor, scale: Tensor, zero_point: int, qmax: int) -> Tensor:
    """Return clamp(rne(x * (1 / scale)) + z, 0, qmax) - 128, int8; x, scale, 1 / scale float32."""
    ratio = x.float() * scale.float().reciprocal()
    # The clamp also ends overflow.
    return ((ratio.round() + zero_point).clamp(0, qmax) - layout.OFFSET).to(torch.int8)


def channels_last(x: Tensor) -> Tensor:
    """Return a copy of x (N, C, H, W) with the strides that torch gives a new channels_last one."""
    # `contiguous` keeps other strides where sizes of 1 make them equivalent; fake kernels cannot.
    return image(x.shape, x.dtype, x.device).copy_(x)


def operator(returns: type[R], module: str) -> Callable[[Callable[P, Call]], Callable[P, R]]:
    """Register `quantempo::NAME` for CPU, CUDA and fake tensors; return the function that calls it.

    CUDA calls are handed to `launch` of `module` in `kernels.gpu`, imported at the first of them;
    returns: a type of which a schema can be inferred. That of a record has the name of the module.
    """

    def register(describe: Callable[P, Call]) -> Callable[P, R]:
        title = module if isinstance(describe, type) else describe.__name__
        signature = inspect.signature(describe, eval_str=True)
        # Lists may be empty, which a schema cannot say.
        defaults = {
            key: [] if p.default == () else p.default for key, p in signature.parameters.items()
        }
        names = [*defaults]

        # Inductor does not keep the strides of keyword arguments (torch 2.13).
        def positional(*args: Any) -> Any:
            describing: Any = describe
            return describing(**dict(zip(names, args, strict=True)))

        kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
        parameters = [p.replace(default=empty, kind=kind) for p in signature.parameters.values()]
        signature = signature.replace(parameters=parameters, return_annotation=returns)
        positional.__signature__ = signature  # type: ignore[attr-defined]

        def cpu(*args: Any) -> Any:
            call = positional(*args)
            call.check(strides=True)
            # No gradients: not those that its torch functions happen to have either.
            with torch.no_grad():
                return call.exact()

        def cuda(*args: Any) -> Any:
            call = positional(*args)
            call.check(strides=True)
            device = (args[0][0] if isinstance(args[0], list) else args[0]).device
            if device.index == torch.cuda.current_device():
                return _launcher(module)(call)
            # Triton launches on the current device.
            with torch.cuda.device(device):
                return _launcher(module)(call)

        def fake(*args: Any) -> Any:
            call = positional(*args)
            call.check(strides=False)
            return call.empty()

        # A compiler must not change the strides of the inputs.
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        schema = torch.library.infer_schema(positional, mutates_args=())
        _library.define(title + schema, tags=tags)
        _library.impl(title, cpu, "CPU")
        _library.impl(title, cuda, "CUDA")
        torch.library.register_fake(f"quantempo::{title}", fake, lib=_library)
        overload = getattr(torch.ops.quantempo, title).default

        @functools.wraps(describe, updated=())
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = defaults | kwargs
            if len(given) != len(defaults) or any(key in kwargs for key in names[: len(args)]):
                raise TypeError(
                    f"got {len(args)} arguments and {sorted(kwargs)}; expected each of {names} once"
                )
            result: R = overload(*args, *[*given.values()][len(args) :])
            return result

        call.__name__ = call.__qualname__ = title
        return call

    return register


@functools.cache
def _launcher(module: str) -> Callable[[Call], Any]:
    found = importlib.import_module(f"quantempo.kernels.gpu.{module}")
    launch: Callable[[Call], Any] = found.launch
    return launch


def reserve(device: torch.device) -> None:
    """Make what the operators keep on a GPU between calls, before a graph is recorded there."""
    if device.type == "cuda":
        importlib.import_module("quantempo.kernels.gpu.contraction.launch").reserve(device)
