"""Units of reconstruction: parts of a denoiser that are rounded together.

A residual block, a self-attention block or a transformer block is one unit; every other Conv2d or
Linear is a unit of its own. Their order is that of execution, known by structure and name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["Block", "blocks", "is_unit"]

# In the name of a class.
_UNITS = ("ResnetBlock", "ResBlock", "TransformerBlock")
# Children that do not run where they are defined; all others run in between, as defined.
_RANK = {
    "time_proj": 0,
    "time_embedding": 0,
    "class_embedding": 0,
    "add_time_proj": 0,
    "add_embedding": 0,
    "encoder_hid_proj": 0,
    "down_blocks": 2,
    "transformer_blocks": 3,
    "mid_block": 3,
    "single_transformer_blocks": 4,
    "up_blocks": 5,
    "norm_out": 6,
    "conv_norm_out": 6,
    "conv_out": 6,
    "proj_out": 6,
    "proj_out_1": 6,
    "proj_out_2": 6,
}


@dataclass(frozen=True)
class Block:
    """One unit.

    name: of the module; module: what is called; layers: full names of the Conv2d and Linear in it,
    as defined.
    """

    name: str
    module: nn.Module
    layers: tuple[str, ...]


def blocks(denoiser: nn.Module) -> list[Block]:
    """Return the units of a float denoiser in the order in which its forward runs them.

    Every Conv2d and Linear is in exactly one of them. After packing the same names hold the
    quantized layers. The order is that of diffusers' U-Nets and of transformers whose blocks stand
    in a list; whoever needs it of another network compares with a run.
    """
    found = []
    for name, module in _units(denoiser, ""):
        inner = module.named_modules(prefix=name)
        layers = tuple(n for n, layer in inner if isinstance(layer, nn.Conv2d | nn.Linear))
        if layers:
            found.append(Block(name, module, layers))
    return found


def _units(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Conv2d | nn.Linear) or (name and is_unit(module)):
        yield name, module
        return
    for child, part in _in_order(module):
        yield from _units(part, f"{name}.{child}" if name else child)


def is_unit(module: nn.Module) -> bool:
    """Return whether a module is an attention, residual or transformer block, by its class."""
    kind = type(module).__name__
    return kind.endswith("Attention") or any(part in kind for part in _UNITS)


def _in_order(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of a module as its forward calls them."""
    children = dict(module.named_children())
    resnets, attentions = children.pop("resnets", None), children.get("attentions")
    if resnets is None:
        yield from sorted(children.items(), key=lambda item: _RANK.get(item[0], 1))
        return
    # A level of a U-Net: residual block and attention in turns, the sampler last.
    children.pop("attentions", None)
    turns = [(int(i), 0, f"resnets.{i}", part) for i, part in resnets.named_children()]
    if attentions is not None:
        turns += [(int(i), 1, f"attentions.{i}", p) for i, p in attentions.named_children()]
    yield from ((name, part) for _, _, name, part in sorted(turns, key=lambda turn: turn[:2]))
    yield from children.items()
