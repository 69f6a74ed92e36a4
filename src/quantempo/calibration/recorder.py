"""The hook that keeps the denoiser calls nearest to given times, which `trace` decides."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.calibration.dataset import TraceBatch
from quantempo.calibration.rows import LISTED, Law, alike, dump, join, measure, take
from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs
from quantempo.models.sampling import call_pipeline
from quantempo.quantized import Times

__all__ = ["NeverCalledError", "Recorder", "answered", "probe"]


class NeverCalledError(QuantempoError):
    """The pipeline does not run the network."""

    def __init__(self) -> None:
        super().__init__("the pipeline never called the denoiser; pass the one it denoises with")


@contextmanager
def answered(denoiser: nn.Module, see: Callable[[Any], None] = lambda _: None) -> Iterator[None]:
    """Run the network at its first call of so many rows only; others get that output again."""
    outputs, forward = dict[int, Any](), denoiser.forward

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        inputs = bind_inputs(denoiser, args, kwargs)
        see(inputs)
        if len(inputs.sample) not in outputs:
            outputs[len(inputs.sample)] = forward(*args, **kwargs)
        return copy.deepcopy(outputs[len(inputs.sample)])

    with patch.object(denoiser, "forward", answer):
        yield


def probe(
    pipe: Any, denoiser: nn.Module, places: Sequence[int], *, steps: int, seed: int, call: Any
) -> tuple[Law, list[Tensor]]:
    """Return where the rows of a `TraceBatch` are, under `x_t` an image's, and each call's time.

    The pipeline runs for the images at `places`, and for one more that has the prompt of the first,
    so that no length that follows the longest caption changes; the network, at the first call only.
    Raises QuantempoError: the denoiser is called in a way that cannot be recorded, or not at all.
    """
    runs, times = [], list[Tensor]()
    count, law = len(places), Law()
    for asked in (list(places), [*places, places[0]]):
        found: dict[str, TraceBatch] = {}

        def see(inputs: Any, found: dict[str, TraceBatch] = found) -> None:
            kept = pytree.tree_map_only(Tensor, Tensor.clone, TraceBatch(*inputs[:3]))
            times.append(kept.t.cpu())
            law.update({LISTED: None} if inputs.listed else {})
            found.setdefault(str(pytree.tree_structure(kept)), kept)

        how: dict[str, Any] = {"steps": steps, "output_type": "latent", "places": asked}
        with answered(denoiser, see):
            call_pipeline(pipe, range(seed, seed + len(asked)), **how, **call)
        runs.append(list(found.values()))
    if not runs[0]:
        raise NeverCalledError
    if len(runs[0]) != len(runs[1]):
        raise QuantempoError("the names of the denoiser's arguments change from run to run")
    for one, two in zip(*runs, strict=True):
        dump(one.cond, {}, "")
        image = measure(one.x_t, two.x_t, torch.arange(count), count + 1)[""]
        if image is None or image.dim:
            raise QuantempoError(
                f"the denoiser received x_t of shape {tuple(one.x_t.shape)} for {count} images and "
                f"{tuple(two.x_t.shape)} for one more; expected more rows"
            )
        rows = take({"": image}, torch.arange(len(two.x_t)), torch.arange(count))
        # Calls with and without guidance: the one with more rows says how they lie.
        most = max(image, law.get("x_t") or image, key=lambda place: place.each)
        law |= measure(one, two, rows, len(two.x_t)) | {"x_t": most}
    return law, times


@dataclass
class _Slot:
    """The call a target holds: its rows (a half each, with its key), how far from the target."""

    distance: float = float("inf")
    ties: int = 1
    call: int = 0
    rows: list[tuple[str, TraceBatch]] = field(default_factory=list)


class Recorder:
    """Keep, for every target of a batch of chains, the denoiser call nearest to it in time.

    law: from `probe`; targets: (b, k) places among `times`; seed: decides between equally near
    calls.
    """

    def __init__(
        self, law: Law, times: Times, targets: Tensor, first: int, seed: int, bar: Any
    ) -> None:
        self.law, self.times, self.targets = law, times, targets
        self.first, self.bar, self.calls = first, bar, 0
        self.slots = [[_Slot() for _ in row] for row in targets]
        self.argument_names = ("", "")
        self.chance = Generator().manual_seed(seed ^ 0x71E5)

    def see(self, _: str, denoiser: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep what one call has for the targets; a hook before the denoiser."""
        inputs = bind_inputs(denoiser, args, kwargs)
        rows, chains = inputs.sample.shape[0], len(self.slots)
        if rows % chains:
            raise QuantempoError(f"the denoiser got {rows} rows for {chains} images: no multiple")
        self.argument_names = (inputs.sample_name, inputs.timestep_name)
        image, rows_of = self.law["x_t"], torch.arange(rows)
        tiled = image is not None and image.tiled
        rows_of = rows_of.view(-1, chains).T if tiled else rows_of.view(chains, -1)
        places = self.times.noisiest(inputs.timestep.detach().cpu())[rows_of[:, 0]]
        distances = (places[:, None] - self.targets).abs().tolist()
        taken = [
            (chain, slot)
            for chain, (slots, near) in enumerate(zip(self.slots, distances, strict=True))
            for slot, distance in zip(slots, near, strict=True)
            if self._takes(slot, distance)
        ]
        if taken:
            self._keep(taken, TraceBatch(*inputs[:3]), rows_of)
        self.calls += 1
        self.bar.update(1)

    def _keep(self, taken: list[tuple[int, _Slot]], batch: TraceBatch, rows_of: Tensor) -> None:
        """Copy the rows of (chain, slot) pairs, all with one wait for the device."""
        index = rows_of[[chain for chain, _ in taken]]
        found = alike(self.law, batch, rows_of.numel())
        keys = {row: key for key, part in found for row in part.tolist()}
        # A copy also of what all rows share: the pipeline may overwrite it.
        kept = pytree.tree_map_only(
            Tensor, lambda v: v.detach().cpu().clone(), take(self.law, batch, index.flatten())
        )
        kept = kept._replace(x_t=kept.x_t.float())
        rows, halves = enumerate(index.flatten().tolist()), index.shape[1]
        own = [(keys[row], take(self.law, kept, torch.tensor([i]))) for i, row in rows]
        for number, (_, slot) in enumerate(taken):
            slot.call, slot.rows = self.calls, own[number * halves :][:halves]

    def _takes(self, slot: _Slot, distance: float) -> bool:
        if distance > slot.distance:
            return False
        slot.ties = slot.ties + 1 if distance == slot.distance else 1
        slot.distance = distance
        # Reservoir sampling: the n-th call at this distance replaces the others with chance 1/n.
        return slot.ties == 1 or float(torch.rand((), generator=self.chance)) * slot.ties < 1

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the kept tensors, and how rows were passed, by group, chain, pick, half."""
        groups: dict[str, list[tuple[dict[str, Tensor], TraceBatch]]] = {}
        for chain, (slots, targets) in enumerate(zip(self.slots, self.targets, strict=True)):
            for pick, (slot, target) in enumerate(zip(slots, targets, strict=True)):
                if not slot.rows:
                    raise NeverCalledError
                for k, (key, batch) in enumerate(slot.rows):
                    at = {"chain": self.first + chain, "pick": pick, "call": slot.call, "half": k}
                    columns = {name: torch.tensor([number]) for name, number in at.items()}
                    columns |= {"place": self.times.noisiest(batch.t), "target": target[None]}
                    groups.setdefault(key, []).append((columns, batch))
        columns_of = [columns for group in groups.values() for columns, _ in group]
        tensors = {name: torch.cat([c[name] for c in columns_of]) for name in columns_of[0]}
        joined = [join(self.law, [batch for _, batch in group]) for group in groups.values()]
        tensors |= {name: torch.cat([getattr(b, name) for b in joined]) for name in ("x_t", "t")}
        found = [
            {"key": key, "rows": len(b.t), "arguments": dump(b.cond, tensors, f"cond{i}")}
            for i, (key, b) in enumerate(zip(groups, joined, strict=True))
        ]
        names = dict(zip(("sample_name", "timestep_name"), self.argument_names, strict=True))
        return tensors, {**names, "law": self.law, "times": asdict(self.times), "groups": found}
