"""The hook that keeps the denoiser calls nearest to given times.

Separate from `trace`, which decides the times, runs the pipeline and writes files.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs, hooked
from quantempo.models.sampling import schedule_times

__all__ = ["CHANGES", "Recorder"]

CHANGES = (
    "the denoiser's arguments change between the calls of one run in a way that cannot be "
    "recorded ({name}); use a pipeline call that keeps them constant"
)


@dataclass
class _Slot:
    """The call a target holds: its rows (one a half) and how far its time is from the target."""

    distance: float = float("inf")
    ties: int = 1
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Keep, for every target of a batch of chains, the denoiser call nearest to it in time.

    Memory holds the kept rows only, never a trajectory.

    Args:
        indices: (b, k) step indices in [0, steps), the targets of each chain.
        seed: decides between calls at the same time.

    Attributes:
        calls: how often the denoiser was called.
        per_unit: units of the schedule in one unit of the time-step the denoiser receives.
    """

    def __init__(
        self, pipe: Any, indices: Tensor, first: int, steps: int, seed: int, bar: tqdm
    ) -> None:
        self.pipe = pipe
        self.indices = indices
        self.first = first
        self.steps = steps
        self.bar = bar
        self.calls = 0
        self.targets: Tensor | None = None
        self.per_unit = 1.0
        self.slots = [[_Slot() for _ in row] for row in indices]
        # How the other arguments are put together again, see `TraceSet`.
        self.details: dict[str, Any] | None = None
        self.shared: dict[str, Tensor] = {}
        self.argument_names = ("", "")
        self.chance = Generator().manual_seed(seed ^ 0x71E5)

    def listening(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """Hook into `denoiser` for a while."""
        return hooked({"": denoiser}, self._hook, before=True)

    def _hook(
        self, _: str, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        inputs = bind_inputs(denoiser, args, kwargs)
        rows, chains = inputs.sample.shape[0], len(self.slots)
        if rows % chains:
            raise QuantempoError(
                f"the denoiser received {rows} rows for {chains} images; expected a multiple"
            )
        self.argument_names = (inputs.sample_name, inputs.timestep_name)
        tensors = {"x_t": inputs.sample.detach().float(), "t": inputs.timestep}
        tensors.update(self._conditioning(inputs.conditioning, rows))
        # (halves, b): row h * b + c of the batch is half h of chain c
        times = inputs.timestep.detach().cpu().double().view(-1, chains)
        if self.targets is None:
            self.targets = self._target_times(float(times[0, 0]))
        distances = (times[0, :, None] - self.targets).abs().tolist()
        taken = [
            (chain, slot)
            for chain, (slots, near) in enumerate(zip(self.slots, distances, strict=True))
            for slot, distance in zip(slots, near, strict=True)
            if self._takes(slot, distance)
        ]
        if taken:
            self._keep(taken, tensors, rows // chains)
        self.calls += 1
        self.bar.update(1)

    def _keep(
        self, taken: list[tuple[int, _Slot]], tensors: dict[str, Tensor], halves: int
    ) -> None:
        """Copy the rows of (chain, slot) pairs, all with one wait for the device."""
        chains = len(self.slots)
        rows = [half * chains + chain for chain, _ in taken for half in range(halves)]
        index = torch.tensor(rows)
        copies = {name: value.detach()[index.to(value.device)].cpu() for name, value in
                  tensors.items()}  # fmt: skip
        for i, (_, slot) in enumerate(taken):
            mine = slice(i * halves, (i + 1) * halves)
            slot.tensors = {name: value[mine].clone() for name, value in copies.items()}
            slot.tensors["call"] = torch.full((halves,), self.calls)

    def _takes(self, slot: _Slot, distance: float) -> bool:
        if distance > slot.distance:
            return False
        slot.ties = slot.ties + 1 if distance == slot.distance else 1
        slot.distance = distance
        # Reservoir sampling: the n-th call at this distance replaces the others with chance 1/n.
        return slot.ties == 1 or float(torch.rand((), generator=self.chance)) * slot.ties < 1

    def _target_times(self, received: float) -> Tensor:
        """Turn step indices into times, in the unit the denoiser receives: (b, k) float64."""
        times = schedule_times(self.pipe)
        # Some pipelines hand the denoiser t / T; the first call tells.
        if not (times == received).any() and times[-1] != 0:
            self.per_unit = float(times[-1]) / received
            times = times * (received / times[-1])
        return times[(2 * self.indices + 1) * len(times) // (2 * self.steps)]

    def _conditioning(self, given: dict[str, Any], rows: int) -> dict[str, Tensor]:
        """Split the other arguments into per-row tensors, shared tensors and constants."""
        batched, found = {}, []
        leaves, tree = pytree.tree_flatten_with_path(given)
        for path, value in leaves:
            place, kind = pytree.keystr(path), "constant"
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == rows:
                kind, batched[f"cond{place}"] = "cond", value
            elif isinstance(value, Tensor):
                kind = "shared"
                old = self.shared.setdefault(f"shared{place}", value.detach().cpu().clone())
                if old.shape != value.shape or not torch.equal(old, value.detach().cpu()):
                    raise QuantempoError(CHANGES.format(name=place))
            elif not (value is None or isinstance(value, bool | int | float | str)):
                raise QuantempoError(
                    f"the denoiser's argument {place} is a {type(value).__name__}, which cannot "
                    "be recorded; expected tensors, numbers, text, or containers of them"
                )
            found.append([kind, place, value if kind == "constant" else None])
        details = {"leaves": found, "tree": pytree.treespec_dumps(tree)}
        if self.details is not None and details != self.details:
            raise QuantempoError(CHANGES.format(name=", ".join(given)))
        self.details = details
        return batched

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the kept tensors, rows ordered by chain, pick, half, and how they were passed."""
        if self.targets is None or self.details is None:
            raise QuantempoError(
                "the pipeline never called the denoiser; pass the network it denoises with"
            )
        parts: list[dict[str, Tensor]] = []
        for chain, slots in enumerate(self.slots):
            for pick, slot in enumerate(slots):
                halves = len(slot.tensors["x_t"])
                place = {
                    "chain": torch.full((halves,), self.first + chain),
                    "pick": torch.full((halves,), pick),
                    "half": torch.arange(halves),
                    "target": self.targets[chain, pick].expand(halves),
                }
                parts.append({**slot.tensors, **place})
        if any(part.keys() != parts[0].keys() for part in parts):
            raise QuantempoError(CHANGES.format(name="conditioning"))
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        names = dict(zip(("sample_name", "timestep_name"), self.argument_names, strict=True))
        return {**tensors, **self.shared}, {**names, **self.details}
