"""Build, check and time the candidates of one network at one batch size."""

from __future__ import annotations

import gc
import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantempo.bench.candidates import Candidate, Subject
from quantempo.bench.events import Timer, reason_of, take_turns, time_limit
from quantempo.bench.graph import Forward, allocated, peak_of
from quantempo.errors import QuantempoError

__all__ = ["MIN_SQNR", "Ready", "compare", "prepare", "sample_of", "sqnr_db", "summarize_gpu"]

log = logging.getLogger("quantempo")

# dB against the float32 output below which something computes another network. bfloat16 keeps
# about 40; 8 bits with scales nobody searched still leave more than 10, noise has 0 or less.
MIN_SQNR = {"bf16": 20.0, "peer": 5.0, "ours": 5.0}


@dataclass(frozen=True)
class Ready:
    """A candidate that computes the right thing.

    seconds: to build, compile and record it; sqnr_db: of its output against float32; peak_bytes:
    its weights and what one forward without a graph adds to them.
    """

    candidate: Candidate
    forward: Forward
    seconds: float
    sqnr_db: float
    peak_bytes: int


def sample_of(output: Any) -> Tensor:
    """Return the tensor in what a denoiser returns."""
    return output if isinstance(output, Tensor) else output[0]


def sqnr_db(wanted: Tensor, got: Tensor) -> float:
    """Return 10 log10(sum wanted^2 / sum (got - wanted)^2), inf for equal tensors."""
    wanted, got = wanted.double(), got.double()
    noise = float((got - wanted).square().sum())
    signal = float(wanted.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@torch.no_grad()
def prepare(
    candidate: Candidate, subject: Subject, wanted: Tensor, budget: float | None = None
) -> Ready:
    """Build a candidate and call it twice, before and after recording it.

    Args:
        candidate: one that `missing` nothing.
        subject: the network and its arguments.
        wanted: its float32 output.
        budget: seconds that this may take, None for no limit.

    Raises:
        QuantempoError: an output that is not finite or not near the wanted one.
        TimeoutError: out of budget. Whatever the candidate itself raises.
    """
    args, kwargs = subject.inputs
    device, start = wanted.device, time.perf_counter()
    gc.collect()
    before = allocated(device)
    with time_limit(budget), warnings.catch_warnings():
        # What the compiler thinks of diffusers' code is not our user's concern.
        warnings.simplefilter("ignore")
        forward = candidate.build(subject)
        # Compiles, and chooses algorithms, whose buffers are gone afterwards.
        forward(*args, **kwargs)
        gc.collect()
        held = allocated(device) - before
        peak = held + peak_of(lambda: forward(*args, **kwargs), device)
        if candidate.record is not None:
            forward = candidate.record(forward, subject)
        # Twice: networks with graphs of their own record at the second call, replay at the third.
        for _ in range(2):
            output = sample_of(forward(*args, **kwargs))
    quality = _judge(candidate, output, wanted)
    seconds = time.perf_counter() - start
    return Ready(candidate, forward, seconds, quality, peak)


def _judge(candidate: Candidate, output: Tensor, wanted: Tensor) -> float:
    if not bool(output.isfinite().all()):
        raise QuantempoError("its output holds NaN or infinity")
    quality = sqnr_db(wanted, output)
    floor = MIN_SQNR[candidate.kind]
    if quality < floor:
        raise QuantempoError(
            f"its output is {quality:.1f} dB from float32, expected {floor:g} or more: it computes "
            "something else"
        )
    return quality


def compare(
    candidates: Sequence[Candidate],
    subject: Subject,
    wanted: Tensor,
    timer: Timer,
    *,
    rounds: int = 9,
    seconds: float = 0.25,
    budget: float | None = None,
) -> tuple[list[Ready], dict[str, list[float]], dict[str, str]]:
    """Prepare every candidate, time those that are right in turns.

    Returns:
        (what ran, name -> milliseconds of every round, name -> reason of what did not).
    """
    ready: dict[str, Ready] = {}
    failed: dict[str, str] = {}
    for candidate in candidates:
        reason = candidate.missing(subject)
        if reason is None:
            try:
                ready[candidate.name] = found = prepare(candidate, subject, wanted, budget)
                log.info(
                    "bench: %s ready in %.1f s, %.1f dB",
                    candidate.name, found.seconds, found.sqnr_db,
                )  # fmt: skip
            # Compilers and drivers raise anything; the table names it beside what ran.
            except Exception as error:
                reason = reason_of(error)
                _clear(wanted.device)
        if reason is not None:
            failed[candidate.name] = reason
            log.warning("bench: %s is not timed: %s", candidate.name, reason)
    args, kwargs = subject.inputs
    calls = {
        name: (lambda forward=one.forward: forward(*args, **kwargs)) for name, one in ready.items()
    }
    with torch.no_grad():
        times = take_turns(calls, timer, rounds=rounds, seconds=seconds, failed=failed)
    return [one for name, one in ready.items() if name in times], times, failed


def _clear(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def summarize_gpu(
    ready: Sequence[Ready], times: dict[str, list[float]], failed: dict[str, str]
) -> dict[str, Any]:
    """Return medians, memory and the speed-up of the best of ours over the best bfloat16.

    Returns:
        {"ms_per_forward", "ms_min", "sqnr_db", "prepare_seconds", "peak_bytes": name -> value,
        "failed": name -> reason, "best_bf16", "best_ours": name or None,
        "speedup_vs_best_bf16": best bfloat16 ms / best of ours ms, None without one of them}.
    """
    middle = {one.candidate.name: median(times[one.candidate.name]) for one in ready}
    best: dict[str, str | None] = {
        kind: min(
            (one.candidate.name for one in ready if one.candidate.kind == kind),
            key=middle.__getitem__,
            default=None,
        )
        for kind in ("bf16", "ours")
    }
    base, mine = best["bf16"], best["ours"]
    speedup = round(middle[base] / middle[mine], 3) if base and mine else None
    return {
        "ms_per_forward": {name: round(value, 4) for name, value in middle.items()},
        "ms_min": {name: round(min(times[name]), 4) for name in middle},
        "sqnr_db": {one.candidate.name: _number(one.sqnr_db) for one in ready},
        "prepare_seconds": {one.candidate.name: round(one.seconds, 1) for one in ready},
        "peak_bytes": {one.candidate.name: one.peak_bytes for one in ready},
        "failed": dict(failed),
        "best_bf16": base,
        "best_ours": mine,
        "speedup_vs_best_bf16": speedup,
    }


def _number(value: float) -> float | None:
    # JSON has no infinity.
    return round(value, 2) if math.isfinite(value) else None
