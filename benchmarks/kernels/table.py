"""Check and time each kernel beside its rivals and the limits of the machine, measured too.

    floor = max(operations / peak, bytes / bandwidth)        fraction = floor / measured time

The bandwidth is that of a copy within the device, the 8-bit peak twice the best bfloat16 product.

A kernel is timed only if its integer sums equal float64's, its epilogue is within one rounding of
the result's type and three runs are equal bit for bit. Timing: every contender calls in turn on
copies of its arguments that together exceed the L2 cache twice, so that inputs come from memory as
they do in a network; the calls of one turn are one CUDA graph, without gaps between launches.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.cases import CASES, PRODUCTS, Case, gemm
from quantempo.bench.forwards import Call, Timer, clear, reason_of, take_turns, timer_for
from quantempo.bench.results import Results, Row
from quantempo.engines.cuda.graphs import capture
from quantempo.errors import QuantempoError, log

__all__ = ["Limits", "bench_ops", "check", "measure_limits", "tera", "time_op"]

# Copies of the largest inputs: well below the memory of any card this runs on.
_MOST_COPIES = 16


def tera(amount: float, ms: float) -> float:
    """Return 10^12 operations or bytes a second."""
    return amount / (ms * 1e9)


@dataclass(frozen=True)
class Limits:
    """bf16_tflops: of the best bfloat16 product measured; copy_tbytes: read and written, TB/s."""

    bf16_tflops: float
    copy_tbytes: float

    def fraction(self, operations: float, moved: float, ms: float) -> float:
        """Return floor / measured, 1 for a kernel at the limit."""
        compute, memory = 2 * self.bf16_tflops, self.copy_tbytes
        return max(tera(operations, ms) / compute, tera(moved, ms) / memory)


def check(case: Case, given: dict[str, Tensor]) -> None:
    """Raise QuantempoError: sums or runs that differ, an epilogue not within one rounding."""
    first = case.whole(given)
    if not all(torch.equal(first, case.whole(given)) for _ in range(2)):
        raise QuantempoError("repeated runs differ from each other")
    count = len(first)
    # Both ends: the last rows fill no whole tile.
    size = 1 if first.ndim == 4 else 64
    ends = [*range(min(size, count)), *range(max(size, count - size), count)]
    rows = torch.tensor(ends, device=first.device)
    wanted = case.reference(given, rows)
    if case.sums is None or case.epilogue is None:
        # Float32 statistics move a value that lies on the border between two codes.
        away = (first[rows].double() - wanted.clamp(-128, 127)).abs().max()
        if float(away) > 0.5 + 1e-2:
            raise QuantempoError(f"a code is {float(away):.3f} steps from its value, expected 0.5")
        return
    sums = case.sums(given)[rows]
    if sums.dtype != torch.int32 or not torch.equal(sums.double(), wanted):
        wrong = int((sums.double() != wanted).sum())
        raise QuantempoError(f"{wrong} of {sums.numel()} integer sums differ from float64")
    exact = case.epilogue(given, rows, wanted)
    # Half a unit in the last place of bfloat16, and float32's roundings of the terms before.
    bound = exact.abs() * 2**-8 + 2**-20 * float(exact.abs().max())
    if bool(((first[rows].double() - exact).abs() > bound).any()):
        raise QuantempoError("the epilogue is more than one rounding away from float64")


def _rotated(
    maker: Callable[[torch.device], Call], device: torch.device, moved: float
) -> tuple[Call, int]:
    """Return a call (on CUDA a graph) on copies that exceed L2 twice together, and how many."""
    if device.type != "cuda":
        return maker(device), 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = max(2, min(_MOST_COPIES, math.ceil(2 * cache / moved)))
    several = [maker(device) for _ in range(copies)]

    def every() -> None:
        # Results are dropped: one that is kept would need memory of its own.
        for call in several:
            call()

    graph, _ = capture(every)

    # The graph reads the arguments that the calls hold.
    return lambda _kept=several: graph.replay(), copies


def time_op(case: Case, device: torch.device, timer: Timer, limits: Limits, **turns: Any) -> Row:
    """Return the row of one case: ours is "ours"; one that fails its check is not timed.
    {"kind", "op", "shape", "copies", "ms": name -> median, "failed": name -> reason} and, where
    ours ran, "tflops", "tbytes", "roofline_fraction", "checked": True, and
    "speedup_vs_NAME" over each rival. `turns` are of `take_turns`.
    """
    row: Row = {"kind": "op", "op": case.op, "shape": case.name, "failed": {}}

    def ours(device: torch.device) -> Call:
        given = case.make(device)
        return lambda: case.run(given)

    calls: dict[str, Call] = {}
    copies = 1
    for name, maker in {"ours": ours, **case.rivals}.items():
        try:
            if name == "ours":
                check(case, case.make(device))
            calls[name], copies = _rotated(maker, device, case.moved)
        # A kernel that does not compile here is a row of the table, not the end of it.
        except Exception as error:
            row["failed"][name] = reason_of(error)
            log.warning("bench: %s %s: %s is not timed: %s", case.op, case.name, name, error)
    times = take_turns(calls, timer, failed=row["failed"], **turns)
    ms = {name: median(values) / copies for name, values in times.items()}
    row |= {"copies": copies, "ms": {name: round(value, 5) for name, value in ms.items()}}
    if mine := ms.get("ours"):
        fraction = limits.fraction(case.operations, case.moved, mine)
        row |= {
            "checked": True, "tflops": round(tera(case.operations, mine), 1),
            "tbytes": round(tera(case.moved, mine), 3), "roofline_fraction": round(fraction, 3),
        }  # fmt: skip
        row |= {f"speedup_vs_{n}": round(v / mine, 3) for n, v in ms.items() if n != "ours"}
    del calls, times
    clear(device)
    return row


def measure_limits(
    device: torch.device, timer: Timer, *, rounds: int = 5, size: int = 8192, copy: int = 1 << 30
) -> Limits:
    """Measure the best bfloat16 product (`PRODUCTS`, a square) and a copy of some bytes."""
    best = 0.0
    for case in (gemm(size, size, size), *(PRODUCTS if device.type == "cuda" else ())):
        call, copies = _rotated(case.rivals["bf16"], device, 2 * case.moved)
        times = take_turns({"bf16": call}, timer, rounds=rounds, seconds=0.1)["bf16"]
        best = max(best, tera(case.operations, median(times) / copies))
    source = torch.empty(copy, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    times = take_turns(calls, timer, rounds=rounds, seconds=0.1)["copy"]
    return Limits(best, tera(2.0 * copy, median(times)))


def bench_ops(
    results: Results, cases: Sequence[Case] = CASES, *, device: str = "cuda", rounds: int = 5,
    seconds: float = 0.25, timer: Timer | None = None, **sizes: int,
) -> None:  # fmt: skip
    """Check and time each kernel on the shapes of real layers; `results` gets a row after each.

    In turns shorter than the default each kernel has the clock that the one before it left, since
    the GPU's power control does not settle; `sizes` are of `measure_limits`.
    """
    where = torch.device(device)
    timer = timer or timer_for(where)
    with torch.no_grad():
        limits = measure_limits(where, timer, rounds=rounds, **sizes)
        results.put({
            "kind": "limits",
            "bf16_tflops": round(limits.bf16_tflops, 1),
            "int8_tflops": round(2 * limits.bf16_tflops, 1),
            "copy_tbytes": round(limits.copy_tbytes, 3),
            "meaning": "bf16: best measured product; int8: twice that; copy: read and written",
            "timing": "median of turns; one CUDA graph a turn over copies of the arguments that "
            "exceed L2 twice together",
        })  # fmt: skip
        for case in cases:
            results.put(time_op(case, where, timer, limits, rounds=rounds, seconds=seconds))
