"""Milliseconds of calls that take turns, by CUDA events or by the wall clock."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from quantempo.errors import log

__all__ = ["Call", "Timer", "reason_of", "take_turns", "time_limit", "timer_for", "wall_ms"]

Call = Callable[[], Any]

# (call, count) -> milliseconds per call of `count` calls in a row.
Timer = Callable[[Call, int], float]


def _cuda_ms(call: Call, count: int) -> float:
    """Return milliseconds per call between two CUDA events, gaps between kernels included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / count


def wall_ms(call: Call, count: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return milliseconds per call, for devices whose calls return when they are done."""
    start = clock()
    for _ in range(count):
        call()
    return 1000 * (clock() - start) / count


def timer_for(device: torch.device | str) -> Timer:
    """Return the timer of a device type."""
    return _cuda_ms if torch.device(device).type == "cuda" else wall_ms


def take_turns(
    calls: Mapping[str, Call], timer: Timer, *, rounds: int = 9, seconds: float = 0.25,
    failed: dict[str, str] | None = None,
    after: Callable[[dict[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:  # fmt: skip
    """Return `rounds` samples in milliseconds per call of each call, interleaved.

    One sample repeats the call for about `seconds`; two short samples before choose the count.
    The order is forwards, then backwards, so that clocks and drifts are shared. A call that raises
    has its reason put into `failed`, or raises here without that; `after` is called with all
    samples so far after each round.
    """
    counts: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}

    def sample(name: str, count: int) -> float | None:
        try:
            return timer(calls[name], count)
        # Whatever it was belongs in the table, beside the candidates that ran.
        except Exception as error:
            if failed is None:
                raise
            failed[name] = f"while timing: {reason_of(error)}"
            times.pop(name)
            return None

    for name in calls:
        if sample(name, 2) is not None and (once := sample(name, 2)) is not None:
            counts[name] = max(1, min(10_000, round(1000 * seconds / max(once, 1e-4))))
    for i in range(rounds):
        order = list(times)
        for name in order if i % 2 == 0 else reversed(order):
            found = sample(name, counts[name])
            if found is not None:
                times[name].append(found)
        after(times)
    return times


def reason_of(error: BaseException) -> str:
    """Return one line that says what went wrong, at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise TimeoutError when the body takes longer; only the main thread can be interrupted."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        if seconds is not None:
            log.warning("no time limit of %g s here: not in the main thread", seconds)
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"gave up after {seconds:g} s, the limit of a candidate (--budget)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
