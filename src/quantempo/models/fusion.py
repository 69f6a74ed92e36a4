"""Blocks that one fused pass can run: a registry from the exact type of a module to its parts.

To add a block: a dataclass of parts, and a function under `@matches(parts, its class)` that returns
their fields, or why the block is not a plain one. What runs the parts is in `engines`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Annotated, Any, get_type_hints

from torch import nn

__all__ = ["Conv", "Need", "Parts", "attending", "drops", "find_parts", "matches", "needs", "no"]


@dataclass(frozen=True)
class Conv:
    """An integer convolution (`floating`: or a float one), not dilated, one group; None: any.

    padded: by half of the kernel on each side; operands: most segments of its input.
    """

    kernel: tuple[int, int] | None = (3, 3)
    stride: tuple[int, int] | None = (1, 1)
    padded: bool = True
    operands: int = 1
    floating: bool = False


class Need(Enum):
    """What a part must be, if not a convolution."""

    LINEAR = "an integer linear layer of one segment"
    PARALLEL = "an integer linear layer of two segments"
    ROWS = "an integer layer that multiplies each pixel or token by one matrix, linear or 1x1"
    NORM = "an affine group normalisation"


# Types of the fields of parts; what an engine must be able to run is read from them.
Conv3x3 = Annotated[nn.Module, Conv()]
Shortcut = Annotated[nn.Module | None, Conv((1, 1), operands=2, floating=True)]
Sampler = Annotated[nn.Module, Conv(kernel=None, stride=None, padded=False)]
Linear = Annotated[nn.Module, Need.LINEAR]
MaybeLinear = Annotated[nn.Module | None, Need.LINEAR]
Parallel = Annotated[nn.Module, Need.PARALLEL]
Rows = Annotated[nn.Module, Need.ROWS]
Norm = Annotated[nn.GroupNorm, Need.NORM]


@dataclass(frozen=True)
class Parts:
    """Sub-modules of one block in the denoiser, and how it is called.

    by_token: whether what runs them fused takes layers with a scale for every token; piece: whether
    they are of a block, and have a fused forward of their own where that block has none.
    """

    by_token = False
    piece = False

    name: str
    module: nn.Module

    def given(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """Return the arguments of the fused `run`, both after the first; None: an unusual call."""
        return ()

    def inside(self) -> list[nn.Module]:
        """Return the modules that a fused `run` does not call."""
        return list(self.module.modules())[1:]


def needs(parts: Any) -> Iterator[tuple[Any, Conv | Need]]:
    """Yield (module, what it must be) of all annotated fields, those of nested parts included."""
    for name, kind in get_type_hints(type(parts), include_extras=True).items():
        value = getattr(parts, name)
        for need in getattr(kind, "__metadata__", ()):
            if value is not None:
                yield value, need
        for inner in value if isinstance(value, tuple) else ():
            if is_dataclass(inner):
                yield from needs(inner)


# From a module to the fields of its parts after `module`, or why there are none (one clause), or
# None if it is part of a block and not one by itself, or one of another kind of parts.
Match = Callable[[Any], tuple[Any, ...] | str | None]
_MATCHES: dict[type, list[tuple[type[Parts], Match]]] = {}


def matches(parts: type[Parts], *kinds: type) -> Callable[[Match], Match]:
    """Register what gets the parts of modules of exactly these types, no subclasses."""

    def add(match: Match) -> Match:
        for kind in kinds:
            _MATCHES.setdefault(kind, []).append((parts, match))
        return match

    return add


def find_parts(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, Parts | str]]:
    """Yield (name, module, parts or reason) of known blocks, inner ones before outer ones."""
    for name, module in reversed(list(denoiser.named_modules())):
        for kind, match in _MATCHES.get(type(module), ()):
            found = match(module)
            if found is not None:
                yield name, module, found if isinstance(found, str) else kind(name, module, *found)


def attending(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by name whose attention a fused block over one sequence runs itself."""
    found: set[Any] = set()
    for _, _, parts in find_parts(denoiser):
        every = [a for s in getattr(parts, "streams", ()) for a in s.attentions]
        found |= {a.module for a in [*every, *getattr(parts, "projections", ())]}
    return {name: module for name, module in denoiser.named_modules() if module in found}


def no(*checks: tuple[bool, str]) -> str | None:
    """Return the reason of the first check that does not hold, or None."""
    return next((reason for holds, reason in checks if not holds), None)


def drops(module: nn.Module) -> bool:
    """Return whether a dropout in a module is active."""
    return any(m.p > 0 and m.training for m in module.modules() if isinstance(m, nn.Dropout))
