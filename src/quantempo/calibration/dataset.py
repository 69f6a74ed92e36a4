"""Calibration data: recorded denoiser inputs, from a trace folder or in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs
from quantempo.run_folder import RunFolder, hash_of, read_tensors

__all__ = ["CalibrationData", "MemorySet", "TraceBatch", "TraceSet", "index_of"]


def index_of(folder: str | Path) -> Path:
    """Return the table of contents of a trace folder: `trace.json` beside `trace/`."""
    return Path(folder).with_name(f"{Path(folder).name}.json")


class TraceBatch(NamedTuple):
    """Rows of a calibration set.

    x_t: (b, ...) float32, what the network received; t: (b,) int64 or float32, the time-step it
    received with it; cond: its other arguments by name, tensors (b, ...), as received.
    """

    x_t: Tensor
    t: Tensor
    cond: dict[str, Any]


class CalibrationData(Protocol):
    """What calibration reads: N denoiser calls of one row each."""

    @property
    def timesteps(self) -> Tensor:
        """(N,) time-step of every row, int64 or floating point as received."""

    @property
    def num_train_timesteps(self) -> int:
        """Number of training time-steps T of the model."""

    @property
    def per_unit(self) -> float:
        """Training time-steps in one unit of the recorded time: 1, or T for t in [0, 1]."""

    def __len__(self) -> int:
        """Return N."""

    def batches(self, batch_size: int = 32) -> Iterator[TraceBatch]:
        """Yield all rows in order, at most `batch_size` at a time."""

    def rows(self, index: Tensor) -> TraceBatch:
        """Return the rows at `index` (k,) int64, in that order, repeats allowed."""

    def replay(self, denoiser: nn.Module, batch: TraceBatch) -> Tensor:
        """Call `denoiser` as it was called, on the device and in the dtype it has; its output."""


class _Calls:
    """Implement what does not depend on where the rows are."""

    # What the denoiser calls its arguments x_t and t.
    names: tuple[str, str]
    timesteps: Any
    num_train_timesteps: Any

    @cached_property
    def per_unit(self) -> float:
        """Training time-steps in one unit of the recorded time: 1, or T for t in [0, 1]."""
        t = self.timesteps
        fraction = t.is_floating_point() and float(t.max()) <= 1
        return float(self.num_train_timesteps) if fraction else 1.0

    def arguments(self, batch: TraceBatch, like: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the recorded call, on the device of `like`.

        Only x_t takes its dtype; the rest stays as it was received.
        """
        sample, timestep = self.names
        cond = pytree.tree_map_only(Tensor, lambda value: value.to(like.device), batch.cond)
        cond[sample] = batch.x_t.to(like.device, like.dtype)
        cond[timestep] = batch.t.to(like.device)
        return cond

    def replay(self, denoiser: nn.Module, batch: TraceBatch) -> Tensor:
        """Call `denoiser` as it was called, on the device and in the dtype it has; its output."""
        output = denoiser(**self.arguments(batch, next(denoiser.parameters())))
        return output if isinstance(output, Tensor) else output[0]


class MemorySet(_Calls):
    """A calibration set in memory.

    Args:
        x_t: (N, ...) float32; t: (N,).
        cond: the other arguments by name; tensors of N rows are per row, all else is shared.
        names: what the denoiser calls its arguments x_t and t.
    """

    def __init__(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Mapping[str, Any] | None = None,
        *,
        names: tuple[str, str] = ("sample", "timestep"),
        num_train_timesteps: int = 1000,
    ) -> None:
        # On the CPU, like rows read from a folder; a replay moves them to the denoiser.
        here = pytree.tree_map_only(Tensor, Tensor.cpu, (x_t, t, dict(cond or {})))
        self.x_t, self.timesteps, self.cond = here
        self.names, self.num_train_timesteps = names, num_train_timesteps

    @classmethod
    def of_calls(
        cls, denoiser: nn.Module, calls: Iterable[Mapping[str, Any]], num_train_timesteps: int
    ) -> MemorySet:
        """Return the set of some calls of a denoiser, given as keyword arguments.

        Raises:
            QuantempoError: no calls, or calls whose other arguments cannot be joined.
        """
        bound = [bind_inputs(denoiser, (), call) for call in calls]
        if not bound:
            raise QuantempoError("got no calls of the denoiser; give at least one")
        leaves, shapes = zip(*(pytree.tree_flatten(b.conditioning) for b in bound), strict=True)
        rows = [len(b.sample) for b in bound]
        if any(shape != shapes[0] for shape in shapes):
            raise QuantempoError("got calls of other arguments than the first; give equal ones")
        joined = []
        for column in zip(*leaves, strict=True):
            each = [isinstance(v, Tensor) and v.ndim > 0 and len(v) == n for v, n in
                    zip(column, rows, strict=True)]  # fmt: skip
            if not all(each) and len({hash_of(v) for v in column}) > 1:
                raise QuantempoError(
                    "an argument that is not one per row changes between the calls; expected "
                    "tensors of as many rows as x_t, or the same value in every call"
                )
            joined.append(torch.cat(column) if all(each) else column[0])
        cond = pytree.tree_unflatten(joined, shapes[0])
        x_t, t = torch.cat([b.sample for b in bound]), torch.cat([b.timestep for b in bound])
        names = bound[0].sample_name, bound[0].timestep_name
        return cls(x_t, t, cond, names=names, num_train_timesteps=num_train_timesteps)

    def __len__(self) -> int:
        return len(self.x_t)

    def batches(self, batch_size: int = 32) -> Iterator[TraceBatch]:
        """Yield all rows in order, at most `batch_size` at a time."""
        yield from map(self.rows, torch.arange(len(self)).split(batch_size))

    def rows(self, index: Tensor) -> TraceBatch:
        """Return the rows at `index` (k,) int64, in that order, repeats allowed."""

        def pick(value: Tensor) -> Tensor:
            per_row = value.ndim > 0 and len(value) == len(self)
            return value[index.to(value.device)] if per_row else value

        cond = pytree.tree_map_only(Tensor, pick, self.cond)
        return TraceBatch(pick(self.x_t), pick(self.timesteps), cond)


class TraceSet(_Calls):
    """The calibration set in a trace folder, read without loading it whole.

    Rows are ordered by chain, then pick, then half (of classifier-free guidance).

    Raises:
        QuantempoError: the trace is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = RunFolder(folder)
        index = index_of(folder)
        self.info: dict[str, Any] = RunFolder(index.parent).read_json(index.name)
        self.names = self.info["sample_name"], self.info["timestep_name"]
        self.num_train_timesteps: int = self.info["settings"]["num_train_timesteps"]
        for chunk in self.info["chunks"]:
            if not self.folder.has(chunk["file"]):
                raise QuantempoError(
                    f"the trace in {self.folder.path} lacks {chunk['file']}; rerun the trace"
                )

    def __len__(self) -> int:
        return sum(chunk["rows"] for chunk in self.info["chunks"])

    def __iter__(self) -> Iterator[TraceBatch]:
        return self.batches()

    @cached_property
    def timesteps(self) -> Tensor:
        """(N,) time-step of every row, int64 or floating point as received."""
        return self.column("t")

    def column(self, name: str) -> Tensor:
        """Return one recorded (N, ...) tensor: "t", "chain", "pick", "half", "call", "target"."""
        return torch.cat([self._read(chunk["file"])[name] for chunk in self.info["chunks"]])

    def batches(self, batch_size: int = 32) -> Iterator[TraceBatch]:
        """Yield all rows in order, at most `batch_size` at a time, one chunk in memory."""
        for chunk in self.info["chunks"]:
            tensors = self._read(chunk["file"])
            for index in torch.arange(chunk["rows"]).split(batch_size):
                yield self._batch(tensors, index)

    def rows(self, index: Tensor) -> TraceBatch:
        """Return the rows at `index` (k,) int64, in that order, repeats allowed."""
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise QuantempoError(f"got row numbers up to {int(index.max())} of {len(self)} rows")
        picked: dict[str, Tensor] = {}
        first = 0
        for chunk in self.info["chunks"]:
            here = ((index >= first) & (index < first + chunk["rows"])).nonzero()[:, 0]
            if len(here) or not picked:
                tensors = self._read(chunk["file"])
                for name, value in tensors.items():
                    if name.startswith("shared"):
                        picked[name] = value
                        continue
                    whole = picked.setdefault(name, value.new_empty(len(index), *value.shape[1:]))
                    whole[here] = value[index[here] - first]
            first += chunk["rows"]
        return self._batch(picked, torch.arange(len(index)))

    def _read(self, file: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / file)[0]

    def _batch(self, tensors: dict[str, Tensor], index: Tensor) -> TraceBatch:
        """Put the arguments together again: each leaf is a constant or a tensor of the chunk."""
        leaves: list[Any] = []
        for kind, place, value in self.info["leaves"]:
            found = value if kind == "constant" else tensors[kind + place]
            leaves.append(found[index] if kind == "cond" else found)
        cond = pytree.tree_unflatten(leaves, pytree.treespec_loads(self.info["tree"]))
        return TraceBatch(tensors["x_t"][index], tensors["t"][index], cond)
