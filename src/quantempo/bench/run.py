"""Time the denoiser of a run folder on every engine and in float."""

from __future__ import annotations

import copy
import gc
import logging
from typing import Any

import torch

from quantempo.bench.cpu import (
    Call,
    float_candidates,
    interleave,
    no_grad,
    summarize,
)
from quantempo.bench.workloads import trace_inputs
from quantempo.calibration.dataset import TraceSet
from quantempo.core.machine import machine
from quantempo.engines.select import ENGINES, attach, choose
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.pipeline.quality import SPEED_KEYS
from quantempo.pipeline.session import Session

__all__ = ["bench_run"]

log = logging.getLogger("quantempo")


def bench_run(
    session: Session,
    *,
    batches: list[int],
    engines: list[str] | None = None,
    rounds: int = 9,
    compiled: bool = True,
) -> dict[str, Any]:
    """Measure milliseconds per forward, interleaved, and write `bench.json`.

    Args:
        session: a run folder whose `packed/` is there.
        batches: batch sizes.
        engines: names; None for all that can run here.
        rounds: interleaved samples of each candidate.
        compiled: include torch.compile baselines.

    Returns:
        {"machine", "batches": {size: {"ms_per_forward", "ms_min", "engine",
        "speedup_vs_best_fp32", "speedup_vs_best_bf16"}}}; "engine" is the default one, and so are
        the speed-ups.

    Raises:
        QuantempoError: nothing packed yet, or an engine that cannot run here.
    """
    data = TraceSet(session.run / "trace")
    names = engines or [
        name
        for name in ENGINES.names()
        if {"cpu", "any"} & set(ENGINES.get(name).devices) and ENGINES.get(name).missing() is None
    ]
    for name in names:
        reason = ENGINES.get(name).missing()
        if reason is not None:
            raise QuantempoError(f"engine '{name}' cannot run here: {reason}")
    default = choose("cpu").name if engines is None else names[0]
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "batches": {}}
    for size in batches:
        inputs: tuple[Any, dict[str, Any]] = ((), trace_inputs(data, size))
        log.info("bench: batch %d, preparing %s", size, "float, compiled" if compiled else "float")
        calls: dict[str, Call] = float_candidates(session.denoiser, inputs, compiled)
        for name in names:
            calls[f"{name}/int8"] = _engine_call(session, name, inputs)
        times = interleave(calls, rounds)
        results["batches"][str(size)] = summarize(times, f"{default}/int8")
        del calls
        torch._dynamo.reset()
        gc.collect()
    if session.run.has("bench.json"):
        # What was timed on a GPU stays.
        before = session.run.read_json("bench.json")
        results |= {key: before[key] for key in ("cuda",) if key in before}
    session.run.write_json("bench.json", results)
    if session.run.has("metrics.json"):
        first = results["batches"][str(batches[0])]
        metrics = session.run.read_json("metrics.json")
        metrics |= {key: first[key] for key in SPEED_KEYS}
        session.run.write_json("metrics.json", metrics)
    return results


def _engine_call(session: Session, name: str, inputs: tuple[Any, dict[str, Any]]) -> Call:
    denoiser = denoiser_of(load_pipeline(session.require_packed()))[1]
    attach(denoiser, name)
    return no_grad(denoiser, *copy.copy(inputs))
