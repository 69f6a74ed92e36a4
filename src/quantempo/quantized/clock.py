"""Which time bucket the denoiser is in, read by every quantized layer.

Scales are keyed by the time the network receives, never by a call counter, so one calibration
serves every scheduler and step count of that model, and a batch may mix times.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from quantempo.core.instance import FixedTypes, PerThread, keep
from quantempo.errors import QuantempoError

__all__ = ["CLOCK_NAME", "StepClock", "Times", "token_rows"]

# The clock is a child of the denoiser under this name, so its table is saved with the weights.
CLOCK_NAME = "quantempo_clock"


@dataclass(frozen=True)
class Times:
    """The times of a run of the float model in order, nearest to the image first.

    Place of t: (t - first) per_unit in an even run, else the number of the nearest of `values`.

    count: number of places; values: the rising or falling times of an uneven run; first, per_unit:
    time of place 0 of an even one; places in a unit, negative if time falls; clean: whether place 0
    is that of given tokens (a first frame) and no time of the run.
    """

    count: int
    first: float = 0.0
    per_unit: float = 1.0
    values: Sequence[float] = ()
    clean: bool = False

    @classmethod
    def of(cls, calls: list[Tensor], steps: int | None = None) -> "Times":
        """Return the places of the times received, a tensor a call, in the order of the calls.

        An even run over T training time-steps has a place for each. The times that stay from call
        to call while others change are those of clean tokens.
        """
        ends = torch.stack([torch.stack(torch.aminmax(t.detach().cpu().double())) for t in calls])
        run = max(ends.T, key=lambda end: len(end.unique()))
        values, clean = run.unique(), ends.unique()
        clean = clean[~torch.isin(clean, values)]
        if run[0] < run[-1]:
            values = values.flip(0)
        count, first, last = len(values), float(values[0]), float(values[-1])
        step = (last - first) / max(1, count - 1)
        error = float((values - first - step * torch.arange(count)).abs().max())
        if len(clean):
            values = torch.cat([clean, values])
            return cls(len(values), values=tuple(values.tolist()), clean=True)
        # t of 0 .. T - 1 are rounded to whole numbers.
        whole = error <= max(step / 8, 1.01) and 0 <= first <= 1.5 * step
        if steps is not None and whole and last <= steps <= 2 * count * step:
            return cls(steps)
        if count > 1 and error <= 1e-3 * abs(step):
            return cls(count, first, 1 / step)
        return cls(count, values=tuple(values.tolist()))

    @cached_property
    def _edges(self) -> dict[torch.device, Tensor]:
        return {}

    def place(self, t: Tensor) -> Tensor:
        """Return the place of each time, float64 of the same shape."""
        t = t.double()
        if not self.values:
            return (t - self.first) * self.per_unit
        sign = 1 if self.values[-1] > self.values[0] else -1
        if t.device not in self._edges:
            values = sign * torch.tensor(self.values, dtype=torch.float64)
            self._edges[t.device] = ((values[1:] + values[:-1]) / 2).to(t.device)
        return torch.bucketize(sign * t.contiguous(), self._edges[t.device]).double()

    def index(self, t: Tensor) -> Tensor:
        """Return the place of each time as an index below `count`, int64 of the same shape."""
        return self.place(t).round().long().clamp(0, self.count - 1)

    def noisiest(self, t: Tensor) -> Tensor:
        """Return the place of each row of (B, ...) times, that of its noisiest token: (B,)."""
        return self.place(t).flatten(1).amax(1) if t.ndim > 1 else self.place(t)


def token_rows(of: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer input with its tokens as rows, and the bucket (or bin) of each row.

    of: (B, N), or (B,), as it is; x: (B', N', C), multiples of these, (rows, C), or whole, at its
    noisiest.
    """
    if of.ndim < 2:
        return x, of
    repeats = [divmod(a, b) for a, b in zip(x.shape, of.shape, strict=False)]
    if x.ndim == 3 and not any(rest for _, rest in repeats):
        for dim, (repeat, _) in enumerate(repeats):
            of = of.repeat_interleave(repeat, dim)
        return x.flatten(0, 1), of.flatten()
    return x, of.amax(1) if x.ndim > 2 or len(x) % of.numel() else of.flatten()


class StepClock(FixedTypes):
    """Map the time-step the denoiser receives to a bucket: bucket_of[times.index(t)].

    bucket_of: (T,) int64, from 0, not falling; times: the T places, None: those of t = 0 .. T - 1.
    """

    bucket_of: Tensor
    call: PerThread

    def __init__(self, bucket_of: Tensor, times: Times | None = None) -> None:
        super().__init__()
        self.times = times or Times(len(bucket_of))
        self.register_buffer("bucket_of", bucket_of.to(torch.int64))
        # Of the call that a thread is in: the bucket, and what `engines` found of its rows.
        keep(self, "call", PerThread(bucket=torch.zeros((), dtype=torch.int64), rows=None))
        # Called when the network was moved to another device.
        self.moved: Callable[[], None] | None = None
        # The bucket of a compiled call, in which a compiler loses what is set for a thread.
        self.traced: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.bucket_of.device
        found = super()._apply(fn, recurse)
        if self.moved is not None and self.bucket_of.device != before:
            self.moved()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine set."""
        return {**self.__dict__, "moved": None}

    @property
    def bucket(self) -> Tensor:
        """Time bucket of the call that this thread is in, () or (B,); none where tokens differ."""
        if self.by_token:
            raise QuantempoError("got a time-step for every token; attach 'simulated' for these")
        return self.now

    @property
    def now(self) -> Tensor:
        """Return the same, or the bucket of every token, (B, N)."""
        found: Tensor = self.call.bucket if self.traced is None else self.traced
        return found

    def _put(self, bucket: Tensor, rows: Any) -> None:
        compiling = torch.compiler.is_compiling()
        if compiling or self.traced is not None:
            self.traced = bucket if compiling else None
        if not compiling:
            self.call.bucket, self.call.rows = bucket, rows

    @property
    def by_token(self) -> bool:
        """Whether the call has a time for every token."""
        return self.now.ndim == 2

    @contextmanager
    def at(self, bucket: Tensor) -> Iterator[None]:
        """Set the bucket for a while."""
        before = self.now, self.call.rows
        self._put(bucket, None)
        try:
            yield
        finally:
            self._put(*before)

    def forward(self, timestep: Any, device: torch.device | None = None) -> None:
        """Set the bucket from a time-step: a number or a tensor of shape (), (1,), (B,) or (B, N).

        It becomes (), or (B,) for B > 1, or that of every token, (B, N); no host synchronisation.
        On a device, that of the table if None. Called as a module, whose table hooks may bring.
        """
        table = self.bucket_of if device is None else self.bucket_of.to(device)
        t = torch.as_tensor(timestep, device=table.device)
        t = t.flatten(1) if t.ndim > 1 and t.numel() > len(t) else t.flatten()
        index = self.times.index(t)
        # Not by subscript: a compiled network would have to wait for the index.
        bucket = table.index_select(0, index.reshape(-1)) if t.numel() else table[:1]
        self._put(bucket.reshape(() if t.numel() <= 1 else t.shape), None)

    set = forward

    def rows(self, table: Tensor, like: Tensor) -> Tensor:
        """Return the row of a (G,) table for the current bucket, shaped to broadcast over `like`.

        G = 1 (constant in time) or the number of buckets; like: (B', ...), B' a multiple of the
        clock's batch. Return (), (B', 1, ...) when the batch mixes times, or (B', N, 1) of tokens.
        """
        if len(table) == 1:
            return table[0]
        if self.by_token:
            flat, bucket = token_rows(self.now, like)
            with self.at(bucket):
                value = self.rows(table, flat)
            return value if flat is like else value.unflatten(0, like.shape[:2])
        bucket = self.bucket
        value = table.index_select(0, bucket.reshape(-1))
        if bucket.ndim == 0:
            return value.reshape(())
        value = value.repeat_interleave(self.repeats(like.shape[0]))
        return value.reshape(-1, *[1] * (like.ndim - 1))

    def repeats(self, rows: int) -> int:
        """Return how many of these rows of a layer's input there are for each time-step."""
        repeat, rest = divmod(rows, self.bucket.shape[0])
        if rest:
            text = f"got {len(self.bucket)} time-steps for a layer input of {rows} rows"
            raise QuantempoError(f"{text}; expected a multiple")
        return repeat
