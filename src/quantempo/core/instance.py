"""State of modules: forwards and attributes set on one, not on its class; types that stay."""

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

__all__ = [
    "FixedTypes", "Forward", "PerThread", "drop", "keep", "own_forward", "put_buffer",
    "put_forward", "reset_forward", "set_forward", "touched",
]  # fmt: skip

_OWN = "_quantempo_forward"


class FixedTypes(nn.Module):
    """A module whose tensors are moved, but not cast, by `to`, `half` and the like."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(move, recurse)


class PerThread(threading.local):
    """Attributes that each thread has for itself, at first (in a copy too) those given."""

    def __init__(self, **first: Any) -> None:
        self.__dict__.update(first, first=first)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(PerThread, **self.first), ()


class _Seen:
    """A module as its own `forward` sees it, with attributes that are slow to ask for (`dtype`)."""

    def __init__(self, module: nn.Module, **known: Any) -> None:
        # What `.to` changes in place.
        some = next((p for p in module.parameters() if p.is_floating_point()), None)
        self.__dict__.update(
            known, module=module, _known=(known, some, getattr(some, "dtype", None))
        )

    __class__ = property(lambda self: type(self.module))  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.module, name, value)


class Forward:
    """The `forward` of one module: `active`, or without one what the module had before.

    It stays when others wrap it; copies and pickles have none active. Attributes: of `active`.
    """

    # No dictionary: who wraps a function takes over what is in its dictionary.
    __slots__ = ("active", "before", "fixed", "module", "seen")

    def __init__(self, module: nn.Module, before: Any = None) -> None:
        self.module, self.before, self.seen = module, before, cast(Any, module)
        self.active: Callable[..., Any] | None = None
        # Whether it stays when nothing is active.
        self.fixed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run what is there to run."""
        return (self.active or self.before or self.plain)(*args, **kwargs)

    def know(self, name: str) -> None:
        """Ask the module for an attribute now, and not in each call."""
        if hasattr(self.module, name):
            self.seen = _Seen(self.module, **{name: getattr(self.module, name)})

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """Run the `forward` of the class."""
        seen = self.module if torch.compiler.is_compiling() else self.seen
        if (
            seen is not self.module
            and (was := seen._known)[1] is not None
            and was[1].dtype != was[2]
        ):
            for name in was[0]:
                self.know(name)
            seen = self.seen
        return type(self.module).forward(seen, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Forward.__slots__:
            raise AttributeError(name)
        return getattr(self.active, name)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.before)


def own_forward(module: nn.Module) -> Any:
    """Return the `Forward` of a module, or None."""
    return module.__dict__.get(_OWN)


def _set_by_others(module: nn.Module) -> Any:
    """Return what others have set as the `forward` of a module, or None."""
    found, own = module.__dict__.get("forward"), own_forward(module)
    # Who takes a hook off may leave the method of the class behind.
    plain = getattr(found, "__func__", None) is type(module).forward
    return (own and own.before) if found is own else None if plain else found


def put_forward(module: nn.Module, kind: type[Forward] = Forward) -> Any:
    """Return the `Forward` of a module, one of this kind put there now if it has none."""
    found = _set_by_others(module)
    if own_forward(module) is None or (found is None and module.forward is not own_forward(module)):
        own = kind(module, found)
        module.__dict__["forward"] = module.__dict__[_OWN] = own
    return own_forward(module)


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module(...)` call `forward` instead of the method of its class."""
    put_forward(module).active = forward


def reset_forward(module: nn.Module) -> None:
    """Undo `set_forward`, if it was done; what others have wrapped around it stays."""
    own = own_forward(module)
    if own is None:
        return
    own.active = None
    if not own.fixed and module.__dict__.get("forward") is own:
        del module.__dict__[_OWN], module.__dict__["forward"]
        if own.before is not None:
            module.__dict__["forward"] = own.before


def touched(module: nn.Module, hooks: int = 1) -> bool:
    """Return whether others have set the `forward` of a module, or so many hooks on it; 0: any."""
    hung = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return _set_by_others(module) is not None or 0 < hooks <= hung


def keep(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that is not registered: a module in it is no child, and is not saved."""
    object.__setattr__(module, name, value)


def drop(module: nn.Module, name: str, default: Any = None) -> Any:
    """Remove an attribute set by `keep` and return it, or the default."""
    return module.__dict__.pop(name, default)


def put_buffer(root: nn.Module, name: str, value: Tensor) -> None:
    """Exchange the buffer or parameter called `name` (dotted) for one of any type and shape."""
    owner, _, leaf = name.rpartition(".")
    module = root.get_submodule(owner)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value
