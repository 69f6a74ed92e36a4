"""Blocks that one fused pass can run: a registry from the exact type of a module to its parts.

A match gets the parts of a block, or says why the block is not a plain one. Names of sub-modules
and arguments of diffusers live in these files; what runs the parts is in `engines`. To add a block:
a dataclass of parts with `needs` and `given`, and a function under `@matches(its class)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

__all__ = [
    "Conv",
    "Linear",
    "Need",
    "Norm",
    "Parts",
    "Rows",
    "drops",
    "find_parts",
    "matches",
    "no",
]


@dataclass(frozen=True)
class Conv:
    """An integer convolution, not dilated, one group.

    kernel, stride: None for any; padded: by half of the kernel on each side; operands: most
    segments of its input.
    """

    layer: nn.Module
    kernel: tuple[int, int] | None = (3, 3)
    stride: tuple[int, int] | None = (1, 1)
    padded: bool = True
    operands: int = 1


@dataclass(frozen=True)
class Linear:
    """An integer linear layer of one segment."""

    layer: nn.Module


@dataclass(frozen=True)
class Rows:
    """An integer layer that multiplies each pixel or token by one matrix: linear or 1x1."""

    layer: nn.Module


@dataclass(frozen=True)
class Norm:
    """An affine group normalisation."""

    layer: nn.GroupNorm


Need = Conv | Linear | Rows | Norm


class Parts(Protocol):
    """Sub-modules of one block, and how it is called.

    name, module: of the block in the denoiser.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def module(self) -> nn.Module: ...  # noqa: D102

    def needs(self) -> Sequence[Need]:
        """Return what an engine must be able to run for the block to be fused."""

    def given(self, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """Return the arguments of the fused `run` after the first, None for an unusual call.

        args, kwargs: of the module's own `forward`, after its first argument.
        """


Match = Callable[[str, Any], Parts | str | None]
_MATCHES: dict[type, Match] = {}


def matches(*kinds: type) -> Callable[[Match], Match]:
    """Register a match for modules of exactly these types: a subclass may have another forward.

    It is called with the name and the module, and returns the parts, or why there are none (one
    clause), or None if the module is part of a block and not one by itself.
    """

    def add(match: Match) -> Match:
        _MATCHES.update(dict.fromkeys(kinds, match))
        return match

    return add


def find_parts(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module, Parts | str]]:
    """Yield (name, module, parts or reason) of known blocks, inner ones before outer ones."""
    for name, module in reversed(list(denoiser.named_modules())):
        match = _MATCHES.get(type(module))
        found = None if match is None else match(name, module)
        if found is not None:
            yield name, module, found


def no(*checks: tuple[bool, str]) -> str | None:
    """Return the reason of the first check that does not hold, or None."""
    return next((reason for holds, reason in checks if not holds), None)


def drops(module: nn.Module) -> bool:
    """Return whether a dropout in a module is active."""
    return any(m.p > 0 and m.training for m in module.modules() if isinstance(m, nn.Dropout))
