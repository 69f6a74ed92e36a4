"""What a rounding is, and what it sees of a block: weights, and the block on its recorded inputs.

A rounding says what it `needs` and turns a `Unit` into integers, and nothing else. To record the
inputs of a block the network is stopped there: it costs what comes before and no more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.calibration.rows import Law, by_row, join, kind_of, take
from quantempo.core import Format, Grid, loaded, spilled, told
from quantempo.engines.base import BACKENDS, channel_dim
from quantempo.errors import QuantempoError
from quantempo.models.layers import hooked, input_of
from quantempo.quantized import QLayer, StepClock
from quantempo.recipe import RoundingSettings
from quantempo.registry import Registry, check_known
from quantempo.rounding.chain import Link, steps

__all__ = [
    "ROUNDINGS", "BlockRun", "Inputs", "Rounding", "Unit", "UnreachedError", "check_start",
    "dequantized_input", "nearest", "record", "round_by_weights", "run_until",
]  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What a rounding sees of one block.

    weights: float weight (O, ...) of each integer layer by name, in order of execution; scales:
    (O,) float32 of each; specs: its format; block: a `BlockRun`, None for roundings that need
    weights alone; notes: what it wants said of this block in the log; groups: where there are any.
    """

    weights: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    specs: Mapping[str, Format]
    settings: RoundingSettings
    block: Any = None
    notes: list[str] = field(default_factory=list)
    groups: Mapping[str, Tensor] | None = None

    def grid(self, name: str) -> Grid:
        """Return the codes that each weight of a layer may take."""
        return self.specs[name].grid(self.weights[name].shape, (self.groups or {}).get(name))


class Rounding(NamedTuple):
    """What a rounding is.

    needs: "weights", or "hessian" (second moments of layer inputs) or "block" (inputs and output
    of whole blocks): both of these run the network on the trace; codes: return layer name -> int8,
    the shape of the weight, in [qmin, qmax]; scales and groups of a unit may be changed in place.
    """

    needs: Literal["weights", "hessian", "block"]
    codes: Callable[[Unit], dict[str, Tensor]]


ROUNDINGS: Registry[Rounding] = Registry("rounding")


def check_start(settings: RoundingSettings) -> None:
    """Raise QuantempoError unless `start` is a rounding that one which learns can start from."""
    ROUNDINGS.get(settings.start)
    known = [n for n in ROUNDINGS.names() if ROUNDINGS.get(n).needs != "block"]
    check_known([settings.start], known, "rounding.start needs a start itself:")


def round_by_weights(
    name: str, weights: Mapping[str, Tensor], scales: Mapping[str, Tensor],
    specs: Mapping[str, Format], groups: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the codes of layers by a rounding that looks at weights alone, else QuantempoError.

    weights: (O, ...) of each layer; scales, groups: see `Unit`, of any device; specs: formats.
    """
    rounding = ROUNDINGS.get(name)
    usable = [n for n in ROUNDINGS.names() if ROUNDINGS.get(n).needs == "weights"]
    check_known([name], usable, "the network's inputs, not at hand here, are needed by rounding")
    both, own = (scales, groups or {}), {name: loaded(w) for name, w in weights.items()}
    near, cut = ({n: v[n].to(w.device) for n, w in own.items() if n in v} for v in both)
    return rounding.codes(Unit(own, near, specs, RoundingSettings(name=name), groups=cut))


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def dequantized_input(layer: QLayer, x: Tensor) -> Tensor:
    """Return x_hat = s (clamp(round(x / s) + z, 0, qmax) - z), float32, a grid for each segment.

    The gradient of round is 1 (straight through).
    """
    axis, zero, parts = channel_dim(layer), layer.act_zero_point, []
    for i, part in enumerate(x.float().split(layer.segments, axis)):
        scale = layer.scale_now(i, part)
        codes = (_Round.apply(part / scale) + zero[i]).clamp(0, layer.act_qmax) - zero[i]
        parts.append(codes * scale)
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def nearest(weight: Tensor, scale: Tensor, spec: Format | Grid) -> Tensor:
    """Return clamp(round(w / scale[o]), qmin, qmax) as int8, the shape of the weight.

    weight: (O, ...) floating; scale: (O,) float32, > 0; spec: of at most 8 bits, signed, or a grid.
    Raises QuantempoError: NaN in the weight, or a scale that is not positive and finite.
    Error: |w - scale q| <= scale / 2 inside the range, in groups s scale / 2.
    """
    if bool(weight.isnan().any()) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise QuantempoError("got NaN in a weight, or a scale that is not positive and finite")
    ratio = weight.float() / scale.reshape(-1, *[1] * (weight.ndim - 1))
    return Grid.of(spec).round(ratio).to(torch.int8)


def _nearest_codes(unit: Unit) -> dict[str, Tensor]:
    return {n: nearest(w, unit.scales[n], unit.grid(n)) for n, w in unit.weights.items()}


ROUNDINGS.register("nearest")(Rounding("weights", _nearest_codes))


class UnreachedError(QuantempoError):
    """A module that the network's forward did not run."""


class _StopError(Exception):
    """Raised by a hook to end a forward early."""


def run_until(
    modules: Mapping[str, nn.Module], call: Callable[[], Any], see: Callable[..., None]
) -> None:
    """Run `call` until all modules were called; see(name, args, kwargs) gets their first calls."""
    waiting = set(modules)

    def stop(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in waiting:
            see(name, args, kwargs)
            waiting.remove(name)
        if not waiting:
            raise _StopError

    with hooked(modules, stop, before=True), suppress(_StopError):
        call()
        raise UnreachedError("a block was not reached by the network's forward; exclude its layers")


class Inputs:
    """The arguments of a block for N rows of the calibration set.

    budget: bytes kept on the device; what would be more lies on the host, in half precision (values
    beyond its range are clipped to it); laws: of each kind of call, see `calibration.rows.laws`;
    folder: where calls that are halved here are kept as they were.
    """

    def __init__(self, rows: int, budget: int, *laws: Law, folder: Path | None = None) -> None:
        self.rows, self.budget, self.laws, self.folder = rows, budget, laws, folder
        self.halved = False
        self._whole: list[Any] = []
        self._parts: list[tuple[tuple[int, str], int, Any]] = []
        # The calls that could be joined; the group of each row, and its place there.
        self._groups: list[tuple[Law, Any]] = []
        self._group = self._place = torch.zeros(0, dtype=torch.int64)

    def add(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Append a call of `count` rows."""
        call = (args, kwargs)
        if not self._parts:
            size = sum(v.nbytes for v in pytree.tree_leaves(call) if isinstance(v, Tensor))
            self.halved = size / count * self.rows > self.budget
        if self.halved and self.folder is not None:
            leaves, tree = pytree.tree_flatten(call)
            tensors = {str(i): v for i, v in enumerate(leaves) if isinstance(v, Tensor)}
            found = spilled(tensors, self.folder / f"{len(self._whole)}.safetensors")
            leaves = [found.get(str(i), leaf) for i, leaf in enumerate(leaves)]
            self._whole.append(pytree.tree_unflatten(leaves, tree))
        kept = pytree.tree_map_only(Tensor, self._keep, call)
        self._parts.append((kind_of(self.laws, call, count), count, kept))

    def _keep(self, value: Tensor) -> Tensor:
        value = value.detach()
        if self.halved and value.dtype == torch.float32:
            top = torch.finfo(torch.float16).max
            return value.clamp(-top, top).half().cpu()
        return value.cpu() if self.halved else value.clone()

    @property
    def expected_bytes(self) -> float:
        """Bytes that all rows will take, from those of the calls so far."""
        rows = sum(count for _, count, _ in self._parts)
        tensors = [v for v in pytree.tree_leaves(self._parts) if isinstance(v, Tensor)]
        return sum(v.nbytes for v in tensors) / max(1, rows) * self.rows

    def close(self) -> None:
        """Join the calls; nothing can be added afterwards."""
        keys = list(dict.fromkeys(key for key, _, _ in self._parts))
        self._group = torch.tensor([keys.index(k) for k, n, _ in self._parts for _ in range(n)])
        self._place = torch.zeros_like(self._group)
        for number, key in enumerate(keys):
            law = self.laws[key[0]]
            self._groups.append((law, join(law, [v for k, _, v in self._parts if k == key])))
            here = self._group == number
            self._place[here] = torch.arange(int(here.sum()))
        self._parts.clear()

    def groups(self) -> list[Tensor]:
        """Return the numbers of the rows that can be in one call, (k,) int64 each."""
        return [(self._group == n).nonzero()[:, 0] for n in range(len(self._groups))]

    def alike(self, index: Tensor) -> Tensor:
        """Return `index` with rows that cannot be in one call with the first one replaced."""
        if len(self._groups) == 1:
            return index
        own = self._group.to(index.device)
        mine = (own == own[index[0]]).nonzero()[:, 0]
        return torch.where(own[index] == own[index[0]], index, mine[index % len(mine)])

    def law(self, index: Tensor) -> Law:
        """Return the law of rows `index` (k,), all of one of the groups."""
        return self._groups[0 if len(self._groups) == 1 else self._group[index[0].item()]][0]

    def call(self, number: int, index: Tensor, device: torch.device) -> Any:
        """Return the call of this number, of rows `index`, as it was added; None: it is halved."""
        if not self.halved:
            return self.take(index, device)
        whole = self._whole[number] if self._whole else None
        return pytree.tree_map_only(Tensor, loaded, whole)

    def take(self, index: Tensor, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of rows `index` (k,), float32; all of one of the groups."""
        number = 0
        if len(self._groups) > 1:
            (number,) = set(self._group[index.cpu()].tolist())
            index = self._place[index.cpu()]

        def given(value: Tensor) -> Tensor:
            value = value.to(device, non_blocking=True)
            return value.float() if value.dtype == torch.float16 and self.halved else value

        call = take(*self._groups[number], index)
        return pytree.tree_map_only(Tensor, given, call)


@torch.no_grad()
def record(
    modules: Mapping[str, nn.Module], calls: list[tuple[int, Callable[[], Any]]], budget: int,
    laws: Mapping[str, Sequence[Law]], place: Callable[[str], Path | None] = lambda _: None,
) -> dict[str, Inputs] | None:  # fmt: skip
    """Return what each of `calls` = (rows, forward) first gives modules; None beyond the budget."""
    total = sum(rows for rows, _ in calls)
    found = {n: Inputs(total, budget, *laws[n], folder=place(n)) for n in modules}
    for rows, call in calls:

        def see(name: str, args: Any, kwargs: Any, rows: int = rows) -> None:
            found[name].add(rows, args, kwargs)

        run_until(modules, call, see)
        if len(found) > 1 and sum(part.expected_bytes for part in found.values()) > budget:
            return None
    for inputs in found.values():
        inputs.close()
    return found


@dataclass
class BlockRun:
    """One block, float (`module`) and with quantized layers (`copied`), with the inputs of both.

    floats, copies: its integer layers by full name, in order of execution; exact, quantized: inputs
    of the float block, and of the quantized one behind the already quantized part of the network;
    times: (N,) of each row, as received; clock: of the quantized denoiser; batch: rows of a call.
    """

    name: str
    module: nn.Module
    copied: nn.Module
    floats: Mapping[str, nn.Module]
    copies: Mapping[str, QLayer]
    exact: Inputs
    quantized: Inputs
    times: Tensor
    clock: StepClock
    batch: int

    def __post_init__(self) -> None:
        self.device = self.clock.bucket_of.device
        self.times = self.times.to(self.device)

    def __len__(self) -> int:
        return self.exact.rows

    def batches(self) -> Iterator[Tensor]:
        """Yield the numbers of all rows, (k,) int64, a batch that fits one call at a time."""
        for rows in self.exact.groups():
            yield from rows.to(self.device).split(self.batch)

    def run(self, index: Tensor, *, exact: bool) -> list[Tensor]:
        """Return the outputs of the block, float or quantized, on its own inputs of some rows."""
        inputs = self.exact if exact else self.quantized
        return self.call(index, inputs.take(index, self.device), exact=exact)

    def call(self, index: Tensor, arguments: Any, *, exact: bool) -> list[Tensor]:
        """Return the block's floating outputs (k, n) on (args, kwargs), at the times of rows."""
        self.clock.set(self.times.index_select(0, index))
        module, (args, kwargs) = self.module if exact else self.copied, arguments
        return by_row(self.exact.law(index), module(*args, **kwargs), len(index), "[2]")

    @torch.no_grad()
    def follow(self, link: Link, sizes: Sequence[int], into: Inputs, *, exact: bool) -> bool:
        """Add the next block's inputs to `into`, in calls of these sizes; False: unknown."""
        inputs, module = (self.exact, self.module) if exact else (self.quantized, self.copied)
        for number, index in enumerate(torch.arange(inputs.rows).split([*sizes])):
            self.clock.set(self.times[index.to(self.device)])
            given = inputs.call(number, index, self.device)
            after = given and link.follow(module(*given[0], **given[1]), given)
            if after is None:
                return False
            into.add(len(index), *after)
        into.close()
        return True

    def layer_inputs(self, names: Sequence[str], exact: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the inputs of some layers, quantized or float, for all rows, a batch at a time.

        The block's integers are as they are; the clock stands at the times of what was yielded.
        """
        layers: Mapping[str, nn.Module] = self.floats if exact else self.copies
        for index in self.batches() if names else []:
            seen = dict[str, Tensor]()

            def see(name: str, *call: Any, seen: dict[str, Tensor] = seen) -> None:
                seen[name] = input_of(*call)

            run_until({n: layers[n] for n in names}, partial(self.run, index, exact=exact), see)
            yield seen

    @cached_property
    def steps(self) -> list[list[str]]:
        """The layers in steps, see `chain.steps`, of one row of the float block."""
        index = next(self.batches())[:1]
        return told(steps(self.floats, partial(self.run, index, exact=True)))

    def assign(self, name: str, codes: Tensor) -> None:
        """Give one quantized layer its integers, and the simulated kernel that reads them."""
        layer = self.copies[name]
        layer.set_codes(codes)
        layer.kernel = BACKENDS.get("simulated").lower(layer)

    @torch.no_grad()
    def powers(self) -> list[Tensor]:
        """Return (N,) for each output: mean square of the float block's at the row's time-step."""
        place = torch.cat(list(self.batches())).argsort()
        runs = (self.run(index, exact=True) for index in self.batches())
        rows = [[y.square().mean(1) for y in outputs] for outputs in runs]
        _, group = self.times.unique(dim=0, return_inverse=True)
        result = []
        for parts in zip(*rows, strict=True):
            power = torch.cat(parts)[place]
            sums = power.new_zeros(len(power)).index_add_(0, group, power)
            counts = power.new_zeros(len(power)).index_add_(0, group, torch.ones_like(power))
            mean = (sums / counts.clamp_min(1)).index_select(0, group)
            result.append(mean.clamp_min(torch.finfo(torch.float32).tiny * 2**20))
        return result

    def error(
        self, got: list[Tensor], wanted: list[Tensor], powers: list[Tensor], index: Tensor
    ) -> Tensor:
        """Return () mean over rows and outputs of |got - wanted|^2 / power at the time-step."""
        terms = [
            ((y - target).square().mean(1) / power.index_select(0, index)).mean()
            for y, target, power in zip(got, wanted, powers, strict=True)
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def loss(self, powers: list[Tensor]) -> float:
        """Return the error of the quantized block over all rows, its integers as they are."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in self.batches():
            wanted = self.run(index, exact=True)
            error = self.error(self.run(index, exact=False), wanted, powers, index)
            total += error.double() * len(index)
        return float(total) / len(self)
