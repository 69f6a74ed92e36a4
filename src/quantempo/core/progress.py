"""One bar for all loops of a run, with the time that is left of it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

__all__ = ["Progress", "listening", "tell", "whole"]

_RUNS: list["_Run"] = []
_LISTENERS: list[Callable[[dict[str, Any]], object]] = []


@contextmanager
def listening(listener: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Call a function with each event, a dict for JSON, while the block runs: for trackers.

    {"event": "progress", "loop", "done", "total"} of every step of a loop, {"event": "stage",
    "name", "seconds"} of one that ends, {"event": "metrics", ...} of `evaluate` and `compare`.
    """
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)


def tell(event: str, **values: Any) -> None:
    """Tell listeners of an event."""
    for listener in _LISTENERS:
        listener({"event": event, **values})


class _Run:
    """The loops of a run in their order, what each should cost and how long those done took."""

    def __init__(self, costs: Mapping[str, float], repeats: int) -> None:
        self.costs, self.repeats, self.start = dict(costs), repeats, time.monotonic()
        self.count, self.spent = Counter[str](), Counter[str]()

    def left(self, name: str, part: float, seconds: float) -> float:
        """Return the seconds left, from what a unit of the costs took so far."""
        names, part = [*self.costs], (self.count[name] + part) / self.repeats
        took = {n: value for n, value in self.spent.items() if n != name}
        done = sum(self.costs[n] for n in took) + part * self.costs[name]
        todo = sum(self.costs[n] for n in names[names.index(name) :]) - part * self.costs[name]
        return todo * (sum(took.values()) + self.spent[name] + seconds) / max(done, 1e-9)


class Progress(tqdm):  # type: ignore[type-arg]
    """A bar of one loop, on a terminal alone; in a `whole` run that of the run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loop = kwargs["desc"]
        self.run = next((run for run in _RUNS if self.loop in run.costs), None)
        form = {"bar_format": "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"}
        kwargs |= form if self.run else {}
        self.done = kwargs.get("initial", 0)
        super().__init__(*args, **{"disable": None, "leave": False, **kwargs})

    def __iter__(self) -> Iterator[Any]:
        # tqdm's own does not count where no bar is shown.
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: float | None = 1) -> bool | None:
        """Count steps, show them on a terminal and tell listeners."""
        self.done += n or 0
        tell("progress", loop=self.loop, done=self.done, total=self.total)
        return super().update(n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what is shown: seconds of the run, of which one passes a second."""
        found = super().format_dict
        if self.run is None or not found["total"]:
            return found
        past = time.monotonic() - self.run.start
        left = self.run.left(self.loop, found["n"] / found["total"], found["elapsed"])
        return {**found, "n": past, "total": past + left, "elapsed": past, "rate": 1.0}

    def close(self) -> None:
        """End the loop."""
        if self.run is not None and not self.disable:
            self.run.count[self.loop] += 1
            self.run.spent[self.loop] += super().format_dict["elapsed"]
        super().close()


@contextmanager
def whole(costs: Mapping[str, float], repeats: int = 1) -> Iterator[None]:
    """Show one bar for loops: name -> what it costs, in any unit; each comes `repeats` times."""
    _RUNS.append(_Run(costs, repeats))
    try:
        yield
    finally:
        _RUNS.pop()
