"""State set on one module and not on its class: forwards, attributes that are no children."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["drop", "keep", "put_buffer", "put_child", "reset_forward", "set_forward"]


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module(...)` call `forward` instead of the method of its class."""
    module.__dict__["forward"] = forward


def reset_forward(module: nn.Module) -> None:
    """Undo `set_forward`, if it was done."""
    module.__dict__.pop("forward", None)


def keep(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that is not registered: a module in it is no child, and is not saved."""
    object.__setattr__(module, name, value)


def drop(module: nn.Module, name: str, default: Any = None) -> Any:
    """Remove an attribute set by `keep` and return it, or the default."""
    return module.__dict__.pop(name, default)


def put_child(root: nn.Module, name: str, module: nn.Module) -> None:
    """Exchange the module called `name` (dotted) for another one of any type."""
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._modules[leaf] = module


def put_buffer(root: nn.Module, name: str, value: Tensor) -> None:
    """Exchange the buffer called `name` (dotted) for a tensor of any type and shape."""
    owner, _, leaf = name.rpartition(".")
    root.get_submodule(owner)._buffers[leaf] = value
