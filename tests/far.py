"""A second device on the host: tensors that no operation mixes with the host's, as a GPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FAR", "Far", "far_device"]

FAR = torch.device("meta")
_aten = torch.ops.aten
# What a GPU takes beside tensors of the host: copies, and indices.
_MIXES = (_aten._to_copy, _aten.copy_, _aten.index, _aten.index_put_)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
    far = {id(v.near): v for v in given if isinstance(v, Far)}
    host = any(v.ndim for v in given if not isinstance(v, Far))
    if far and host and func.overloadpacket not in _MIXES:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    there, kwargs = bool(far), dict(kwargs or {})
    if kwargs.get("device") is not None:
        there, kwargs["device"] = kwargs["device"] == FAR, "cpu"
    args, kwargs = pytree.tree_map_only(Far, lambda v: v.near, (args, kwargs))
    made = func(*args, **kwargs)

    def wrapped(value: Tensor) -> Tensor:
        return far[id(value)] if id(value) in far else Far(value)

    return pytree.tree_map_only(Tensor, wrapped, made) if there else made


class Far(Tensor):
    """A tensor of the second device, its values in `near`."""

    @staticmethod
    def __new__(cls, near: Tensor) -> "Far":
        """Wrap a tensor of the host."""
        how: Any = {"strides": near.stride(), "dtype": near.dtype, "device": FAR}
        made = Tensor._make_wrapper_subclass(cls, near.shape, **how)
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run on the host what is of one device."""
        return _run(func, args, kwargs)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs)


class _Literals(TorchFunctionMode):
    """Tensors of numbers: torch makes them below a dispatch mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor and isinstance(args[0], Far):
            return func(args[0].near, *args[1:], **kwargs).to(FAR)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == FAR:
            made = isinstance(args[0], Tensor)
            host = args[0] if made else func(*args, **kwargs | {"device": "cpu"})
            return host.to(FAR, kwargs.get("dtype"))
        return func(*args, **kwargs)


@contextmanager
def far_device(network: nn.Module) -> Iterator[None]:
    """Move a network there, without gradients; within, tensors can be made there."""
    no_autocast = mock.patch("torch.is_autocast_enabled", lambda *kind: False)
    with no_autocast, _Dispatch(), _Literals():
        for module in network.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(value.detach().to(FAR), False)
            for name, value in module._buffers.items():
                module._buffers[name] = None if value is None else value.to(FAR)
        yield
