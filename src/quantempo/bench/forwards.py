"""Build, check and time candidates, in turns, by CUDA events or by the wall clock."""

import gc
import inspect
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from quantempo.bench.candidates import Candidate, Forward, Subject
from quantempo.bench.results import Results, best
from quantempo.errors import QuantempoError, log
from quantempo.evaluation.fidelity import prediction, sqnr_db
from quantempo.models.presets import ddim_loop
from quantempo.quantized.attention import marked_attention

__all__ = [
    "Call", "Ready", "Timer", "clear", "compare", "images_per_second", "prepare", "reason_of",
    "take_turns", "time_limit", "timer_for", "wall_ms",
]  # fmt: skip

Call = Callable[[], Any]

# (call, count) -> milliseconds per call of `count` calls in a row.
Timer = Callable[[Call, int], float]
# dB against the float32 output below which something computes another network. bfloat16 keeps
# about 40; 8 bits with scales nobody searched still leave more than 10, noise has 0 or less.
_MIN_SQNR = {"fp32": 60.0, "bf16": 20.0, "peer": 5.0, "ours": 5.0}


@dataclass(frozen=True, eq=False)
class Ready:
    """A candidate that computes the right thing.

    engine, attentions (run in 8 bits by a forward): of ours; inputs: of its calls; ms: of a first
    call; seconds: to build, compile and record it; sqnr_db: of its output against float32;
    peak_bytes: its weights and what one forward without a graph adds.
    """

    candidate: Candidate
    engine: str
    forward: Forward
    inputs: dict[str, Any]
    ms: float
    seconds: float
    sqnr_db: float
    peak_bytes: int
    attentions: int = 0

    def __call__(self) -> Any:
        """Run the forward on its inputs."""
        return self.forward(**self.inputs)

    def row(self, samples: list[float]) -> dict[str, Any]:
        """Return what is known: medians of samples in ms, or the first call."""
        ms = samples or [self.ms]
        own = {"engine": self.engine, "attentions_8bit": self.attentions}
        return {
            "candidate": self.candidate.name, "ms_per_forward": round(median(ms), 4),
            "ms_min": round(min(ms), 4), "rounds": len(samples), "sqnr_db": round(self.sqnr_db, 2),
            "prepare_seconds": round(self.seconds, 1), "peak_bytes": self.peak_bytes,
            **(own if self.candidate.kind == "ours" else {}),
        }  # fmt: skip


@torch.no_grad()
def prepare(
    candidate: Candidate, subject: Subject, wanted: Tensor, timer: Timer,
    budget: float | None = None,
) -> Ready:  # fmt: skip
    """Build a candidate and call it, before and after recording it.

    `wanted` is the float32 output; `budget` the seconds this may take, None for no limit.
    Raises QuantempoError: an output that is not finite or not near the wanted one. TimeoutError:
    out of budget. Whatever the candidate itself raises.
    """
    device, start = wanted.device, time.perf_counter()
    gc.collect()
    before = _allocated(device)
    with time_limit(budget), warnings.catch_warnings():
        # What the compiler thinks of diffusers' code is not our user's concern.
        warnings.simplefilter("ignore")
        inputs = candidate.inputs(subject)
        forward = candidate.build(subject)
        # Ours was called once there, eagerly.
        net: Any = inspect.unwrap(forward)
        own = marked_attention(net) if candidate.kind == "ours" else {}
        attentions = sum(known.ran for known in own.values())
        # Compiles, and chooses algorithms, whose buffers are gone afterwards.
        forward(**inputs)
        gc.collect()
        held = _allocated(device) - before
        peak = held + _peak(lambda: forward(**inputs), device)
        if candidate.graph is not None:
            forward = candidate.graph(forward, inputs)
        # Networks with graphs of their own record at the second call, replay at the third.
        forward(**inputs)
        output = prediction(forward(**inputs))
        quality = _judge(candidate, output, wanted)
        ms = timer(lambda: forward(**inputs), 1)
    seconds = time.perf_counter() - start
    log.debug("bench: %s ready in %.1f s, %.1f dB", candidate.name, seconds, quality)
    engine = candidate.engine or subject.engine
    return Ready(candidate, engine, forward, inputs, ms, seconds, quality, peak, attentions)


def _judge(candidate: Candidate, output: Tensor, wanted: Tensor) -> float:
    if not bool(output.isfinite().all()):
        raise QuantempoError("its output holds NaN or infinity")
    quality, floor = sqnr_db(wanted, output), _MIN_SQNR[candidate.kind]
    if quality < floor:
        text = f"its output is {quality:.1f} dB from float32"
        raise QuantempoError(f"{text}, expected {floor:g} or more: it computes something else")
    return quality


def _allocated(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def _peak(call: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes above those held before a call its tensors reach; 0 off CUDA."""
    if device.type != "cuda":
        return 0
    before = _allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def clear(device: torch.device) -> None:
    """Free what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(
    candidates: Sequence[Candidate], subject: Subject, wanted: Tensor, timer: Timer,
    results: Results, head: dict[str, Any], *, budget: float | None = None, **turns: Any,
) -> dict[str, Ready]:  # fmt: skip
    """Prepare every candidate, time those that are right in turns; return what ran.

    A candidate has a row once it is ready ("rounds": 0, the time of one call), again after each
    round (medians so far), or when it failed. `head`, {"model", "batch"}, is what the rows share.
    Arguments as of `prepare`, `take_turns`.
    """
    ready: dict[str, Ready] = {}
    head = {"kind": "forward", **head}

    def fail(name: str, reason: str) -> None:
        log.warning("bench: %s is not timed: %s", name, reason)
        results.put({**head, "candidate": name, "failed": reason})

    for candidate in tqdm(candidates, desc="bench", disable=None, leave=False):
        if reason := candidate.missing(subject):
            fail(candidate.name, reason)
            continue
        try:
            one = ready[candidate.name] = prepare(candidate, subject, wanted, timer, budget)
            results.put(head | one.row([]))
        # Compilers and drivers raise anything; the table names it beside what ran.
        except Exception as error:
            fail(candidate.name, reason_of(error))
            clear(wanted.device)

    def after(times: dict[str, list[float]]) -> None:
        results.put(*(head | ready[name].row(ms) for name, ms in times.items()))

    failed: dict[str, str] = {}
    with torch.no_grad():
        take_turns(ready, timer, failed=failed, after=after, **turns)
    for name, reason in failed.items():
        fail(name, reason)
        del ready[name]
    return ready


@torch.no_grad()
def images_per_second(
    ready: dict[str, Ready], subject: Subject, scheduler: Any, steps: int, timer: Timer,
    results: Results, head: dict[str, Any],
) -> None:  # fmt: skip
    """Put images a second of DDIM without guidance for the best bfloat16 and the best of ours.

    "from_forwards": what the forwards allow; "measured": one run, decoder apart. See `compare`.
    """
    rows = [row for row in results.record()["rows"] if head.items() <= row.items()]
    for kind in ("bf16", "ours"):
        found = best(rows, kind, subject.engine)
        if found is None:
            continue
        one = ready[found["candidate"]]

        def speed(ms: float) -> float:
            return round(1000 * head["batch"] / ms, 2)

        def run(count: int, one: Ready = one) -> Any:
            return ddim_loop(one.forward, subject.floating, one.inputs, count, scheduler)

        row = {"kind": "images_per_second", **head, "candidate": found["candidate"],
               "steps": steps, "from_forwards": speed(steps * found["ms_per_forward"])}  # fmt: skip
        try:
            run(2)
            row["measured"] = speed(timer(lambda: run(steps), 1))
        # The forward itself was timed: a loop that fails is told, not the end of the results.
        except Exception as error:
            row["failed"] = reason_of(error)
            log.warning("bench: DDIM-%d with %s failed: %s", steps, row["candidate"], error)
        results.put(row)


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
