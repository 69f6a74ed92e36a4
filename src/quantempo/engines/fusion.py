"""Fuse the blocks of a network: which can be, what each becomes, and why the others are left.

`models.fusion` finds the parts of a block or a reason; an engine registers a builder for each kind
of parts it has a fused forward for (`Blocks.build`). All reasons are kept: see `report`.
"""

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

from torch import Tensor, nn

from quantempo.core.instance import drop, keep, reset_forward, set_forward, touched
from quantempo.errors import log
from quantempo.models import fusion_dit, fusion_joint, fusion_transformer, fusion_unet
from quantempo.models.fusion import Conv, Need, Parts, find_parts, needs
from quantempo.models.fusion_unet import HeadParts, UpBlockParts
from quantempo.models.layers import is_unit, skip_segments
from quantempo.quantized import CLOCK_NAME, QConv2d, QLayer, QLinear, quantized_layers

__all__ = [
    "BlockRow", "Blocks", "FusedBlock", "FusedUpBlock", "Network", "fuse", "report", "unfuse",
]  # fmt: skip

# Importing them registers what they know.
FAMILIES = (fusion_dit, fusion_joint, fusion_transformer, fusion_unet)
_FUSED = "_quantempo_fused"
# Child of a layer: the branch beside it.
LORA = "quantempo_lora"
T = TypeVar("T")

# One forward for the block, or forwards for some modules in it, or why there is none (one clause).
Built: TypeAlias = "FusedBlock | list[tuple[nn.Module, Callable[..., Any]]] | str"
Builder = Callable[[Any, "Network"], Built]


@dataclass(frozen=True)
class BlockRow:
    """One block: its name, its class, and why it is not fused, or None if it is."""

    name: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class Blocks:
    """The fused blocks of one engine: kind of parts -> builder.

    backend: of the integer layers in them; missing, norm: why they, or a GroupNorm, cannot be run
    here, or None; eager: constants are made when the engine is attached, not by the first call;
    carries: whether fused parts do not leave out a LoRA beside a layer in them.
    """

    backend: str
    missing: Callable[[], str | None] = lambda: None
    norm: Callable[[nn.GroupNorm], str | None] = lambda norm: None
    eager: bool = False
    carries: Callable[[Any, nn.Module], bool] = lambda parts, layer: False
    builders: dict[type, Builder] = field(default_factory=dict)

    def build(self, kind: type) -> Callable[[T], T]:
        """Register the builder of a kind of parts: a subclass of FusedBlock, or a function."""

        def add(builder: T) -> T:
            self.builders[kind] = cast(Builder, builder)
            return builder

        return add

    def refusal(self, parts: Parts) -> str | None:
        """Return why this engine cannot fuse a block, or None."""
        if type(parts) not in self.builders:
            return f"engine {self.backend} has no fused form of it"
        reasons = (self._lacks(module, need, parts.by_token) for module, need in needs(parts))
        return next((reason for reason in reasons if reason is not None), None)

    def _lacks(self, module: nn.Module, need: Conv | Need, by_token: bool) -> str | None:
        if need is Need.NORM:
            assert isinstance(module, nn.GroupNorm)
            return self.norm(module) if module.affine else "its norm has no weight"
        floating = isinstance(need, Conv) and need.floating and isinstance(module, nn.Conv2d)
        if not floating and not isinstance(module, QLayer):
            what = "convolution" if isinstance(need, Conv) else "projection"
            return f"a {what} in it is in float"
        found = getattr(getattr(module, "kernel", None), "backend", None)
        if not floating and found != self.backend:
            return f"a layer in it runs on {found}"
        dynamic = isinstance(module, QLayer) and module.dynamic
        if dynamic and not (by_token and module.act_bits == 8):
            return "a layer in it has a scale for every token"
        if need is Need.ROWS and isinstance(module, QConv2d):
            need = Conv((1, 1))
        if isinstance(need, Conv):
            plain = isinstance(module, QConv2d | nn.Conv2d) and _is_plain(module, need)
            size = "x".join(map(str, need.kernel)) if need.kernel else "one"
            return None if plain else f"a convolution in it is not a plain {size}"
        segments = 2 if need is Need.PARALLEL else 1
        plain = isinstance(module, QLinear) and len(module.segments) == segments
        return None if plain else "a projection in it is not a plain linear layer"


def _is_plain(layer: QConv2d | nn.Conv2d, need: Conv) -> bool:
    border = tuple(size // 2 for size in layer.kernel_size)
    return (
        need.kernel in (None, layer.kernel_size)
        and need.stride in (None, layer.stride)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and len(getattr(layer, "segments", ())) <= need.operands
        and (not need.padded or layer.padding == border)
    )


class Network:
    """What builders may ask of the network around their block, while it is fused."""

    def __init__(self, denoiser: nn.Module, parts: list[Parts]) -> None:
        self.clock: Any = denoiser.get_submodule(CLOCK_NAME)
        # Of all blocks that the engine can fuse, inner ones first.
        self.parts = parts
        self.halves: dict[str, tuple[int, int]] = dict(skip_segments(denoiser))
        self.forwards: dict[str, tuple[nn.Module, Any]] = {}
        self._names = {module: name for name, module in denoiser.named_modules()}
        self._shared: dict[Any, Any] = {}

    def add(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Note what a module will run."""
        self.forwards[self._names[module]] = module, forward

    def forward_of(self, module: nn.Module) -> Any:
        """Return the fused forward of a block inside the one that is being built, or None."""
        return self.forwards.get(self._names[module], (None, None))[1]

    def of(self, kind: type[T]) -> list[T]:
        """Return the parts of one kind."""
        return [parts for parts in self.parts if isinstance(parts, kind)]

    def once(self, make: Callable[["Network"], T]) -> T:
        """Return make(self), called once for all blocks that share its result."""
        if make not in self._shared:
            self._shared[make] = make(self)
        result: T = self._shared[make]
        return result

    def closed(self, head: HeadParts) -> bool:
        """Return whether every layer between stem and head is inside a fused block."""
        ends = (self._names[module] for module in (head.stem, head.norm, head.out))
        prefix = f"{head.name}." if head.name else ""
        inner = _whole((name, forward) for name, (_, forward) in self.forwards.items())
        known = (*inner, *ends, *(prefix + name for name in head.apart))
        return all(
            _inside(name, known)
            for name, module in head.module.named_modules(prefix=head.name)
            if next(module.parameters(recurse=False), None) is not None
            or isinstance(module, QLayer)
        )


class FusedBlock:
    """The forward of a block: `run` where `takes` agrees, else that of its class."""

    # Names of the children that it runs itself, "" for all.
    own: tuple[str, ...] = ("",)

    def __init__(self, parts: Any, network: Network) -> None:
        self.parts = parts
        # The name of x, which a compiler could not find.
        self.first = list(inspect.signature(type(parts.module).forward).parameters)[1]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block; the arguments are those of its class, x by its place or its name there."""
        if not args:
            args = (kwargs.pop(self.first),)
        x, *rest = args
        given = self.parts.given(*rest, **kwargs)
        if given is None or not self.takes(x, *given):
            return self.unfused(x, *rest, **kwargs)
        return self.run(x, *given)

    def unfused(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the class."""
        module = self.parts.module
        return type(module).forward(module, x, *args, **kwargs)

    def takes(self, *args: Any, **kwargs: Any) -> bool:
        """Return whether `run` can be given these: x, then what `parts.given` returned."""
        raise NotImplementedError

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block fused."""
        raise NotImplementedError


class FusedUpBlock(FusedBlock):
    """An up block whose residual blocks read the two halves of their input where they are."""

    own: tuple[str, ...] = ()

    def __init__(self, parts: UpBlockParts, network: Network) -> None:
        super().__init__(parts, network)
        self.resnets = [network.forward_of(resnet) for resnet in parts.resnets]

    @classmethod
    def build(cls, parts: UpBlockParts, network: Network) -> Built:
        """Return the forward, or why there is none."""
        made = cls(parts, network)
        return "a residual block in it is not fused" if None in made.resnets else made

    def takes(self, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Return whether the first residual block takes x."""
        return self.resnets[0].takes(x)

    def run(
        self, x: Tensor, skips: tuple[Tensor, ...], temb: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor:
        """Run the block, the last of `skips` first."""
        parts, more = self.parts, dict(arguments)
        upsample_size = more.pop("upsample_size", None)
        for i, resnet in enumerate(self.resnets):
            x = resnet.run(x, temb, skips[-1 - i])
            if parts.cross:
                x = parts.attentions[i](x, **more, return_dict=False)[0]
            elif parts.attentions:
                x = parts.attentions[i](x)
        for upsampler in parts.upsamplers:
            x = upsampler(x, upsample_size)
        return x


def same(x: Tensor) -> Tensor:
    """Return x: the forward of an activation that the norm before it includes."""
    return x


@dataclass(frozen=True)
class _Record:
    """What `fuse` did: modules with a forward set on them by name, and a row for each block."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    rows: list[BlockRow] = field(default_factory=list)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has no engine until it is called.
        return _Record, ()


def fuse(denoiser: nn.Module, blocks: Blocks) -> None:
    """Set `forward` on the instances of all blocks that can be fused; log how many, and why not."""
    reasons: dict[str, str | None] = {}
    found = list(find_parts(denoiser))
    for name, module, parts in found:
        reasons[name] = parts if isinstance(parts, str) else blocks.refusal(parts)
        wrapped = module is not denoiser and touched(module, hooks=0)
        inside = [] if isinstance(parts, str) else parts.inside()
        others = wrapped or any(touched(m, 1 + (LORA in m._modules)) for m in inside)
        if not isinstance(parts, str) and others:
            reasons[name] = "others have hooks or forwards in it"
        if any(LORA in m._modules and not blocks.carries(parts, m) for m in inside):
            reasons[name] = "a LoRA is loaded beside a layer in it"
    pieces = {name for name, _, parts in found if not isinstance(parts, str) and parts.piece}
    whole = [name for name in reasons if name not in pieces]
    fused = [name for name in whole if reasons[name] is None]
    known = {name for name, _, parts in found if type(parts) in blocks.builders}
    pieces = {name for name in pieces & known if _around(name, whole) not in fused}
    found = [row for row in found if row[0] in {*whole, *pieces}]
    able = [p for name, _, p in found if not isinstance(p, str) and reasons[name] is None]
    network = Network(denoiser, able)
    for parts in able:
        built = blocks.builders[type(parts)](parts, network)
        if isinstance(built, str):
            reasons[parts.name] = built
            continue
        for module, forward in built if isinstance(built, list) else [(parts.module, built)]:
            network.add(module, forward)
    for module, forward in network.forwards.values():
        set_forward(module, forward)
    rows = [BlockRow(name, type(module).__name__, reasons[name]) for name, module, _ in found]
    record = _Record({name: module for name, (module, _) in network.forwards.items()})
    record.rows.extend([*reversed(rows), *_unknown(denoiser, whole, pieces)])
    keep(denoiser, _FUSED, record)
    _log_summary(denoiser, record.rows, blocks)


def unfuse(denoiser: nn.Module) -> None:
    """Give all blocks their own `forward` back."""
    for module in drop(denoiser, _FUSED, _Record()).modules.values():
        reset_forward(module)


def report(denoiser: nn.Module) -> list[BlockRow]:
    """Return a row for each block of a denoiser whose engine fuses; [] of any other denoiser."""
    record: _Record = getattr(denoiser, _FUSED, _Record())
    return record.rows


def fused_modules(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that have a fused forward, by name."""
    record: _Record = getattr(denoiser, _FUSED, _Record())
    return record.modules


def fused_layers(denoiser: nn.Module) -> list[str]:
    """Return the names of the modules whose layers all run inside a fused forward."""
    found = fused_modules(denoiser)
    return _whole((name, module.forward) for name, module in found.items())


def _whole(forwards: Any) -> list[str]:
    return [
        f"{name}.{child}" if child else name
        for name, forward in forwards
        for child in getattr(forward, "own", ("",))
    ]


def _inside(name: str, blocks: Any) -> bool:
    return any(f"{name}.".startswith(f"{block}.") for block in blocks)


def _around(name: str, blocks: list[str]) -> str | None:
    """Return the innermost of these blocks that a module is in, or None."""
    return max((block for block in blocks if _inside(name, [block])), key=len, default=None)


def _unknown(denoiser: nn.Module, known: list[str], pieces: set[str]) -> Iterator[BlockRow]:
    """Yield the units around integer layers of which no class is known, once each."""
    # Blocks that hold others say nothing of the layers around these.
    runs = [name for name in known if not any(other.startswith(f"{name}.") for other in known)]
    runs = [*filter(None, runs), *pieces]
    seen: set[str] = set()
    for layer, _ in quantized_layers(denoiser):
        path = layer.split(".")
        names = [".".join(path[:i]) for i in range(1, len(path))]
        units = [n for n in names if is_unit(denoiser.get_submodule(n))]
        # Else the outermost entry of a list of modules.
        unit = next(iter(units or [n for n in names if n.rpartition(".")[2].isdigit()]), None)
        if unit is not None and unit not in seen and not _inside(layer, runs):
            seen.add(unit)
            kind = type(denoiser.get_submodule(unit)).__name__
            yield BlockRow(unit, kind, "no fused form is known")


def _log_summary(denoiser: nn.Module, rows: list[BlockRow], blocks: Blocks) -> None:
    left = Counter(f"{row.kind}: {row.reason}" for row in rows if row.reason is not None)
    fused = len(rows) - left.total()
    why = "; ".join(f"{reason} ({n})" for reason, n in left.most_common())
    said = f"fused {fused} of {len(rows)} blocks of {type(denoiser).__name__}"
    level = logging.INFO if fused else logging.WARNING
    log.log(level, "%s%s", said, f"; {left.total()} not: {why}" if left else "")
