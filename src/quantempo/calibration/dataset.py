"""The recorded network inputs, read back from a trace folder.

What a trace holds, in a fixed order, without loading it whole. `trace` writes the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.run_folder import RunFolder, read_tensors

__all__ = ["TraceBatch", "TraceSet", "flatten", "index_of", "unflatten"]


def index_of(folder: str | Path) -> Path:
    """Return the table of contents of a trace folder: `trace.json` beside `trace/`."""
    return Path(folder).with_name(f"{Path(folder).name}.json")


class TraceBatch(NamedTuple):
    """Rows of a trace.

    x_t: (b, ...) float32, what the network received; t: (b,) int64 or float32, the time-step it
    received with it; cond: its other arguments by name, tensors (b, ...), as received.
    """

    x_t: Tensor
    t: Tensor
    cond: dict[str, Any]


class TraceSet:
    """The calibration set: N recorded calls of one row each.

    Rows are ordered by chain, then pick, then half (of classifier-free guidance).

    Args:
        folder: a finished trace folder.

    Raises:
        QuantempoError: the trace is missing, unfinished or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = RunFolder(folder)
        index = index_of(folder)
        self.info: dict[str, Any] = RunFolder(index.parent).read_json(index.name)
        for chunk in self.info["chunks"]:
            if not self.folder.has(chunk["file"]):
                raise QuantempoError(
                    f"the trace in {self.folder.path} lacks {chunk['file']}; rerun the trace"
                )

    def __len__(self) -> int:
        return sum(chunk["rows"] for chunk in self.info["chunks"])

    def __iter__(self) -> Iterator[TraceBatch]:
        return self.batches()

    @property
    def num_train_timesteps(self) -> int:
        """Number of training time-steps T of the model."""
        return self.info["settings"]["num_train_timesteps"]

    @property
    def names(self) -> tuple[str, str]:
        """What the denoiser calls its arguments x_t and t."""
        return self.info["sample_name"], self.info["timestep_name"]

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
            for first in range(0, chunk["rows"], batch_size):
                last = min(first + batch_size, chunk["rows"])
                yield self._batch(tensors, torch.arange(first, last))

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
                    if name.startswith("shared."):
                        picked[name] = value
                        continue
                    whole = picked.setdefault(name, value.new_empty(len(index), *value.shape[1:]))
                    whole[here] = value[index[here] - first]
            first += chunk["rows"]
        return self._batch(picked, torch.arange(len(index)))

    def arguments(self, batch: TraceBatch, like: Tensor) -> dict[str, Any]:
        """Return the keyword arguments of the recorded call, on the device of `like`.

        Only x_t takes its dtype; the rest stays as it was received.
        """
        sample, timestep = self.names
        cond = unflatten(
            {
                name: value.to(like.device) if isinstance(value, Tensor) else value
                for name, value in flatten(batch.cond).items()
            }
        )
        cond[sample] = batch.x_t.to(like.device, like.dtype)
        cond[timestep] = batch.t.to(like.device)
        return cond

    def replay(self, denoiser: nn.Module, batch: TraceBatch) -> Tensor:
        """Call `denoiser` as it was called, on the device and in the dtype it has; its output."""
        output = denoiser(**self.arguments(batch, next(denoiser.parameters())))
        return output if isinstance(output, Tensor) else output[0]

    def _read(self, file: str) -> dict[str, Tensor]:
        return read_tensors(self.folder / file)[0]

    def _batch(self, tensors: dict[str, Tensor], index: Tensor) -> TraceBatch:
        cond: dict[str, Any] = dict(self.info["constants"])
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "cond":
                cond[rest] = value[index]
            elif kind == "shared":
                cond[rest] = value
        return TraceBatch(tensors["x_t"][index], tensors["t"][index], unflatten(cond))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Turn nested dicts, lists and tuples into one dict with dotted keys ("a.b", "a.0").

    Empty containers stay as leaves.
    """
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple) and value:
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for key, item in items:
        if "." in key:
            raise QuantempoError(f"cannot record an argument called '{key}': it has a dot")
        result.update(flatten(item, f"{prefix}.{key}" if prefix else key))
    return result


def unflatten(values: dict[str, Any]) -> dict[str, Any]:
    """Undo `flatten`; containers with the keys 0, 1, ... come back as tuples."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return {name: _tuples(value) for name, value in tree.items()}


def _tuples(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        return value
    if all(key.isdigit() for key in value):
        return tuple(_tuples(value[str(index)]) for index in range(len(value)))
    return {key: _tuples(item) for key, item in value.items()}
