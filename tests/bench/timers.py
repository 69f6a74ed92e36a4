"""Timers that need no clock."""

from typing import Any


class Steady:
    """Call once and say 2 ms, or what each new call costs in turn."""

    def __init__(self, *costs: float) -> None:
        self.costs, self.seen = costs or (2.0,), []

    def __call__(self, call: Any, count: int) -> float:
        call()
        if call not in self.seen:
            self.seen.append(call)
        return self.costs[self.seen.index(call) % len(self.costs)]
