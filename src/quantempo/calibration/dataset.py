"""Calibration data: recorded denoiser inputs, from a trace folder or in memory."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.calibration.rows import LISTED, Law, Place, alike, join, load, measure, take
from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs
from quantempo.quantized import Times
from quantempo.quantized.layers import StoredLinear
from quantempo.run_folder import RunFolder, read_tensors, reading, tensors_sha256

__all__ = ["CalibrationData", "MemorySet", "TraceBatch", "TraceSet", "index_of"]


def index_of(folder: str | Path) -> Path:
    """Return the table of contents of a trace folder: `trace.json` beside `trace/`."""
    return Path(folder).with_name(f"{Path(folder).name}.json")


class TraceBatch(NamedTuple):
    """Rows of a calibration set: x_t (b, ...), t (b,) or (b, tokens), other arguments by name."""

    x_t: Tensor
    t: Tensor
    cond: dict[str, Any]


_ROWS: Law = {"[0]": Place(0, 1), "[1]": Place(0, 1)}


class CalibrationData:
    """What calibration reads: N rows in pieces, each the arguments of one call.

    timesteps: (N,) or (N, tokens), int64 or floating point, as received; times: their places.
    """

    timesteps: Any
    times: Times
    # What the denoiser calls its arguments x_t and t.
    names: tuple[str, str]
    # Key and number of rows of each piece; those of one key can be joined.
    pieces: list[tuple[str, int]]
    law: Law

    def piece(self, number: int) -> TraceBatch:
        """Return all rows of a piece."""
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(count for _, count in self.pieces)

    def batches(self, batch_size: int = 32) -> Iterator[TraceBatch]:
        """Yield all rows in order, at most `batch_size` at a time, one piece in memory."""
        for number, (_, count) in enumerate(self.pieces):
            piece = self.piece(number)
            for index in torch.arange(count).split(batch_size):
                yield take(self.law, piece, index)

    def rows(self, index: Tensor) -> TraceBatch:
        """Return the rows at `index` (k,) int64, in that order, repeats allowed; see `calls`."""
        if not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise QuantempoError(f"got row numbers up to {int(index.max())} of {len(self)} rows")
        parts, places, keys, first = [], [], set(), 0
        for number, (key, count) in enumerate(self.pieces):
            here = ((index >= first) & (index < first + count)).nonzero()[:, 0]
            if len(here):
                parts.append(take(self.law, self.piece(number), index[here] - first))
                places.append(here)
                keys.add(key)
            first += count
        if len(keys) > 1:
            raise QuantempoError("got rows whose arguments differ; ask for those of one of `calls`")
        return take(self.law, join(self.law, parts), torch.cat(places).argsort())

    def calls(self, index: Tensor, size: int) -> list[Tensor]:
        """Split row numbers into calls: up to `size` rows of equal shared arguments and lengths."""
        keys = list(dict.fromkeys(key for key, _ in self.pieces))
        numbers = torch.tensor([keys.index(key) for key, _ in self.pieces])
        mine = numbers.repeat_interleave(torch.tensor([n for _, n in self.pieces]))[index]
        return [part for n in mine.unique() for part in index[mine == n].split(size)]

    def spread(self, most: int) -> Tensor:
        """Return the numbers of rows from all over the set, up to `most`, for one call."""
        index = torch.linspace(0, len(self) - 1, min(most, len(self))).long()
        return max(self.calls(index, most), key=len)

    def arguments(self, batch: TraceBatch, like: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the recorded call where `like` is, x_t in its dtype."""
        sample, timestep = self.names
        cond = pytree.tree_map_only(Tensor, lambda value: value.to(like.device), batch.cond)
        x_t = batch.x_t.to(like.device, like.dtype)
        cond[sample] = list(x_t) if LISTED in self.law else x_t
        cond[timestep] = batch.t.to(like.device)
        return cond

    def replay(self, denoiser: nn.Module, batch: TraceBatch) -> Tensor:
        """Call `denoiser` as it was called, on the device and in the dtype it has; its output."""
        # A layer that stores its weight is float32 in any network.
        own = (m for m in denoiser.modules() if not isinstance(m, StoredLinear))
        mine = (x for m in own for x in m.parameters(recurse=False))
        floats = (x for x in denoiser.buffers() if x.is_floating_point())
        like = next(chain(mine, denoiser.parameters(), floats))
        output = denoiser(**self.arguments(batch, like))
        whole = isinstance(output, Tensor) or (LISTED in self.law and isinstance(output, list))
        made = output if whole else output[0]
        return torch.stack(made) if isinstance(made, list) else made


class MemorySet(CalibrationData):
    """A calibration set in memory, of a denoiser called with sample and timestep; see `of_calls`.

    x_t: (N, ...); t: (N,), of `num_train_timesteps`, or None: of those of the rows.
    """

    def __init__(self, x_t: Tensor, t: Tensor, *, num_train_timesteps: int | None = None) -> None:
        batches = [TraceBatch(x_t, t, {})]
        self._fill(batches, _ROWS, ("sample", "timestep"), num_train_timesteps)

    def _fill(
        self, batches: list[TraceBatch], law: Law, names: tuple[str, str], steps: int | None
    ) -> None:
        self.law, self.names = law, names
        groups: dict[str, list[TraceBatch]] = {}
        for batch in batches:
            # On the CPU, like rows read from a folder; a replay moves them to the denoiser.
            here = pytree.tree_map_only(Tensor, Tensor.cpu, batch)
            for key, rows in alike(law, here, len(here.t)):
                groups.setdefault(key, []).append(take(law, here, rows))
        self._batches = [join(law, group) for group in groups.values()]
        self.pieces = [(k, len(b.t)) for k, b in zip(groups, self._batches, strict=True)]
        self.timesteps = torch.cat([batch.t for batch in self._batches])
        rising = self.timesteps.flatten().unique()
        self.times = Times(steps) if steps else Times.of(list(rising.flip(0)))

    def piece(self, number: int) -> TraceBatch:
        """Return all rows of a piece."""
        return self._batches[number]

    @classmethod
    def of_calls(
        cls, denoiser: nn.Module, calls: Iterable[Any], num_train_timesteps: int | None = None
    ) -> "MemorySet":
        """Return the set of some calls of a denoiser, given as keyword arguments.

        Their numbers of rows must differ, which tells what has an entry a row from what is shared;
        without further tensors they need not. Several entries of one row lie side by side.
        Raises QuantempoError: no calls, of as many rows each, or arguments that change in other
        ways.
        """
        bound = [bind_inputs(denoiser, (), call) for call in calls]
        if not bound:
            raise QuantempoError("got no calls of the denoiser; give at least one")
        batches = [TraceBatch(*inputs[:3]) for inputs in bound]
        least, most = (f(batches, key=lambda batch: len(batch.t)) for f in (min, max))
        law = dict(_ROWS)
        if len(least.t) < len(most.t):
            # Their rows are others, so that values say nothing.
            two = [pytree.tree_map_only(Tensor, lambda v: v.to("meta"), b) for b in (least, most)]
            law = measure(two[0], two[1], torch.arange(len(least.t)), len(most.t))
        elif any(isinstance(v, Tensor) for v in pytree.tree_leaves(most.cond)):
            raise QuantempoError(
                f"got calls of {len(most.t)} rows each; give one of another number of rows, which "
                "tells arguments with an entry a row from shared ones"
            )
        law |= {LISTED: None} if bound[0].listed else {}
        made, names = cls.__new__(cls), (bound[0].sample_name, bound[0].timestep_name)
        made._fill(batches, law, names, num_train_timesteps)
        return made


class TraceSet(CalibrationData):
    """The calibration set in a trace folder, whole and undamaged, read without loading it whole.

    Rows are ordered by chunk, arguments that can be joined, chain, pick, half (of guidance).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = RunFolder(folder)
        index = index_of(folder)
        self.info: dict[str, Any] = RunFolder(index.parent).read_json(index.name)
        with reading(index):
            self.names = self.info["sample_name"], self.info["timestep_name"]
            self.times = Times(**self.info["times"])
            self.law = {path: value and Place(*value) for path, value in self.info["law"].items()}
            self._unseen: dict[str, Any] = {c["file"]: c["sha256"] for c in self.info["chunks"]}
            self._groups: list[tuple[str, int, Any]] = []
            for chunk in self.info["chunks"]:
                first = 0
                for group in chunk["groups"]:
                    self._groups.append((chunk["file"], first, group))
                    first += group["rows"]
            self.pieces = [(group["key"], group["rows"]) for _, _, group in self._groups]
        for file in self._unseen:
            if not self.folder.has(file):
                text = f"the trace in {self.folder.path} lacks {file}"
                raise QuantempoError(f"{text}; delete {index} and rerun it")

    @cached_property
    def timesteps(self) -> Tensor:
        """The time-step of every row."""
        return self.column("t")

    def column(self, name: str) -> Tensor:
        """Return one recorded (N, ...) tensor: "t", "chain", "pick", "half", "call", "target"."""
        return torch.cat([self._read(chunk["file"])[name] for chunk in self.info["chunks"]])

    def _read(self, file: str) -> dict[str, Tensor]:
        tensors = read_tensors(self.folder / file)[0]
        if self._unseen.get(file) not in (None, tensors_sha256(tensors)):
            text = f"{self.folder / file} is not what was traced"
            raise QuantempoError(f"{text}; delete {index_of(self.folder.path)} and rerun the trace")
        self._unseen[file] = None
        return tensors

    def piece(self, number: int) -> TraceBatch:
        """Return all rows of a group of a chunk."""
        file, first, group = self._groups[number]
        tensors = self._read(file)
        mine = slice(first, first + group["rows"])
        given = load(group["arguments"], tensors)
        return TraceBatch(tensors["x_t"][mine], tensors["t"][mine], given)
