"""Check and time each kernel beside its rivals and the limits of the machine, measured too.

    floor = max(operations / peak, bytes / bandwidth)        fraction = floor / measured time

The bandwidth is that of a copy within the device, the 8-bit peak twice the best bfloat16 matrix
product, which is what the datasheets of tensor cores state.

A kernel is timed only if its integer sums equal float64's, its epilogue is within one rounding of
the result's type and three runs are equal bit for bit. Timing: every contender calls in turn on
copies of its arguments that together exceed the L2 cache twice, so that inputs come from memory as
they do in a network; the calls of one turn are one CUDA graph, without gaps between launches.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.bench.op_cases import (
    CONVOLUTIONS,
    NORMS,
    PRODUCTS,
    ConvCase,
    GemmCase,
    NormCase,
    image,
)
from quantempo.bench.results import Results
from quantempo.bench.turns import Call, Timer, reason_of, take_turns, timer_for
from quantempo.engines.cuda.graphs import capture
from quantempo.errors import QuantempoError

__all__ = ["Limits", "bench_ops", "check", "measure_limits", "rivals", "rotated", "tera", "time_op"]

log = logging.getLogger("quantempo")

Case = ConvCase | GemmCase | NormCase

_BF16 = torch.bfloat16
# Bytes of one copy of the largest inputs are well below the memory of any card this runs on.
_MOST_COPIES = 16


def tera(amount: float, ms: float) -> float:
    """Return 10^12 operations or bytes a second."""
    return amount / (ms * 1e9)


@dataclass(frozen=True)
class Limits:
    """bf16_tflops: of the best bfloat16 product measured; copy_tbytes: read and written, TB/s."""

    bf16_tflops: float
    copy_tbytes: float

    @property
    def int8_tflops(self) -> float:
        """Twice the bfloat16 figure."""
        return 2 * self.bf16_tflops

    def fraction(self, operations: float, moved: float, ms: float) -> float:
        """Return floor / measured, 1 for a kernel at the limit."""
        return max(tera(operations, ms) / self.int8_tflops, tera(moved, ms) / self.copy_tbytes)


def check(case: Case, given: dict[str, Tensor]) -> None:
    """Refuse a kernel that computes something else.

    Raises:
        QuantempoError: sums that differ, an epilogue that is not within one rounding, or runs that
            differ from each other.
    """
    if isinstance(case, NormCase):
        case = replace(case, joined=True)
    first = case.run(given)
    for _ in range(2):
        if not torch.equal(first, case.run(given)):
            raise QuantempoError("repeated runs differ from each other")
    count = len(first)
    # Both ends: the last rows fill no whole tile.
    size = 1 if first.ndim == 4 else 64
    ends = [*range(min(size, count)), *range(max(size, count - size), count)]
    rows = torch.tensor(ends, device=first.device)
    wanted = case.reference(given, rows)
    if isinstance(case, NormCase):
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


def _as_fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def rivals(case: Case) -> dict[str, Callable[[torch.device], Call]]:
    """Return name -> maker of a call on fresh random arguments, by the libraries of torch.

    Convolutions and products alone: cuDNN's bfloat16 convolution has no epilogue here, cuBLAS
    and the 8-bit products neither.
    """
    if isinstance(case, ConvCase):
        n, s, c, o = case.batch, case.size, case.inputs, case.outputs

        def convolve(device: torch.device) -> Call:
            x = image(torch.randn(n, c, s, s, device=device, dtype=_BF16))
            weight = image(torch.randn(o, c, 3, 3, device=device, dtype=_BF16))
            return lambda: F.conv2d(x, weight, padding=1)

        return {"bf16": convolve}
    if isinstance(case, GemmCase):
        m, n, k = case.rows, case.columns, case.inner

        def bf16(device: torch.device) -> Call:
            x = torch.randn(m, k, device=device, dtype=_BF16)
            weight = torch.randn(n, k, device=device, dtype=_BF16)
            return lambda: F.linear(x, weight)

        def int8(device: torch.device) -> Call:
            x = torch.randint(-128, 128, (m, k), dtype=torch.int8, device=device)
            weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
            return lambda: torch._int_mm(x, weight.t())

        def fp8(device: torch.device) -> Call:
            x, weight = (_as_fp8(torch.randn(rows, k, device=device)) for rows in (m, n))
            left, right = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
            return lambda: torch._scaled_mm(x, weight.t(), left, right, out_dtype=_BF16)

        return {"bf16": bf16, "_int_mm": int8, "fp8 rowwise": fp8}
    return {}


def rotated(
    makers: dict[str, Callable[[torch.device], Call]], device: torch.device, moved: float
) -> tuple[dict[str, Call], int]:
    """Return calls that each run through several copies of their arguments, and how many.

    On CUDA the copies together exceed L2 twice and one call replays one graph of them all.

    Args:
        makers: by name; called once for every copy.
        device: where.
        moved: bytes of one call.
    """
    if device.type != "cuda":
        return {name: maker(device) for name, maker in makers.items()}, 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    copies = max(2, min(_MOST_COPIES, math.ceil(2 * cache / moved)))
    calls: dict[str, Call] = {}
    for name, maker in makers.items():
        several = [maker(device) for _ in range(copies)]
        calls[name] = _graph(several)
    return calls, copies


def _graph(several: Sequence[Call]) -> Call:
    """Return the calls as one CUDA graph; their results are dropped."""

    def every() -> None:
        for call in several:
            call()

    graph, _ = capture(every)

    # The graph reads the arguments that the calls hold.
    def replay(_kept: Sequence[Call] = several) -> None:
        graph.replay()

    return replay


def time_op(
    case: Case,
    device: torch.device,
    timer: Timer,
    limits: Limits,
    *,
    rounds: int = 5,
    seconds: float = 0.25,
) -> dict[str, Any]:
    """Return the row of one case.

    Returns:
        {"kind", "op", "shape", "copies", "ms": name -> median, "failed": name -> reason} and,
        where ours ran, "tflops", "tbytes", "roofline_fraction", "checked": True, and
        "speedup_vs_NAME" over each rival. Ours is "ours"; one that fails its check is not timed.
    """
    row: dict[str, Any] = {"kind": "op", "op": case.op, "shape": case.name, "failed": {}}
    makers = rivals(case)
    given = case.make(device)
    try:
        check(case, given)
        makers = {"ours": lambda where: _call(case, where), **makers}
    # A kernel that does not compile here is a row of the table, not the end of it.
    except Exception as error:
        row["failed"]["ours"] = reason_of(error)
        log.warning("bench: %s %s is not timed: %s", case.op, case.name, row["failed"]["ours"])
    del given
    working: dict[str, Call] = {}
    copies = 1
    for name, maker in makers.items():
        try:
            calls, copies = rotated({name: maker}, device, case.moved)
            working |= calls
        except Exception as error:
            row["failed"][name] = reason_of(error)
    times = take_turns(working, timer, rounds=rounds, seconds=seconds, failed=row["failed"])
    ms = {name: median(values) / copies for name, values in times.items()}
    row |= {"copies": copies, "ms": {name: round(value, 5) for name, value in ms.items()}}
    if "ours" in ms:
        mine = ms["ours"]
        row["checked"] = True
        row["tflops"] = round(tera(case.operations, mine), 1)
        row["tbytes"] = round(tera(case.moved, mine), 3)
        row["roofline_fraction"] = round(limits.fraction(case.operations, case.moved, mine), 3)
        row |= {f"speedup_vs_{n}": round(v / mine, 3) for n, v in ms.items() if n != "ours"}
    del working, times
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def _call(case: Case, device: torch.device) -> Call:
    given = case.make(device)
    return lambda: case.run(given)


def measure_limits(
    device: torch.device, timer: Timer, *, rounds: int = 5, size: int = 8192, copy: int = 1 << 30
) -> Limits:
    """Measure the best bfloat16 product and a copy within the device.

    Args:
        device: where.
        timer: what measures.
        rounds: samples of each; the median counts.
        size: of a square product beside those of `PRODUCTS`.
        copy: bytes copied; twice as many are moved.
    """
    products = [GemmCase(size, size, size)]
    products += PRODUCTS if device.type == "cuda" else ()
    best = 0.0
    for case in products:
        calls, copies = rotated({"bf16": rivals(case)["bf16"]}, device, 2 * case.moved)
        ms = median(take_turns(calls, timer, rounds=rounds, seconds=0.1)["bf16"]) / copies
        best = max(best, tera(case.operations, ms))
    source = torch.empty(copy, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    calls = {"copy": lambda: target.copy_(source)}
    ms = median(take_turns(calls, timer, rounds=rounds, seconds=0.1)["copy"])
    return Limits(best, tera(2.0 * copy, ms))


def bench_ops(
    results: Results,
    cases: Sequence[Case] = (*CONVOLUTIONS, *PRODUCTS, *NORMS),
    *,
    device: str = "cuda",
    rounds: int = 5,
    seconds: float = 0.25,
    timer: Timer | None = None,
    size: int = 8192,
    copy: int = 1 << 30,
) -> None:
    """Check and time each kernel on the shapes of real layers; `results` gets a row after each.

    Args:
        results: gets {"kind": "limits", ...} and for each case {"kind": "op", ...}, see `time_op`.
        cases: see `op_cases`.
        device: where.
        rounds, seconds: samples of each, and of one: so long that the GPU's power control settles.
            In shorter turns each kernel has the clock that the one before it left.
        timer: what measures; by default that of the device.
        size, copy: see `measure_limits`.
    """
    where = torch.device(device)
    timer = timer or timer_for(where)
    with torch.no_grad():
        limits = measure_limits(where, timer, rounds=rounds, size=size, copy=copy)
        results.put({
            "kind": "limits",
            "bf16_tflops": round(limits.bf16_tflops, 1),
            "int8_tflops": round(limits.int8_tflops, 1),
            "copy_tbytes": round(limits.copy_tbytes, 3),
            "meaning": "bf16: best measured product; int8: twice that; copy: read and written",
            "timing": "median of turns; one CUDA graph a turn over copies of the arguments that "
            "exceed L2 twice together",
        })  # fmt: skip
        for case in cases:
            results.put(time_op(case, where, timer, limits, rounds=rounds, seconds=seconds))
