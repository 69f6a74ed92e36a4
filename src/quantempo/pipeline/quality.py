"""Sample from the float and the packed model, and judge one by the other."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from quantempo.calibration.dataset import TraceSet
from quantempo.core.machine import machine
from quantempo.core.progress import tell
from quantempo.errors import log
from quantempo.evaluation import eps_sqnr, evaluate_outputs
from quantempo.pipeline.arguments import merged
from quantempo.pipeline.layer_table import int8_share, mean_weight_bits
from quantempo.pipeline.samples import engine_of, open_model, sample
from quantempo.pipeline.session import Session
from quantempo.report.card import write_card
from quantempo.run_folder import RunFolder, reading

__all__ = ["SPEED_KEYS", "evaluate", "open_model", "sample"]

# What a benchmark adds to metrics.json; kept when the pairs are scored again.
SPEED_KEYS = ("ms_per_forward", "speedup_vs_best_fp32", "speedup_vs_best_bf16")
_BATCH = 16


def evaluate(
    session: Session, *, images: int = 64, steps: int = 50, seed: int = 0, batch_size: int = 16,
    engine: str = "auto", packed: str = "keep", device: str = "cpu", data: str | Path | None = None,
    inception: str | Path | None = None, call: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Sample pairs from both models, score them and write `metrics.json`.

    The pairs have seeds `seed`, `seed + 1`, ...; `call` goes over the arguments the run was traced
    with; `data`: a folder of real images to score against; `inception`: weights for FID and its
    like.
    Raises QuantempoError: nothing packed yet, or see `sample` and `evaluate_outputs`.
    """
    start = time.perf_counter()
    run, seeds = session.run, list(range(seed, seed + images))
    loading: dict[str, Any] = {k: v for k, v in session.loading.items() if k == "dtype"}
    loading |= {"engine": engine, "scheduler": session.scheduler, "device": device}
    quantized = open_model(session.require_packed(), packed=packed, **loading)
    pipe = session.pipe.to(device)
    how: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "seeds": seeds}
    how |= {"call": merged(session.call, call), "force": session.force}
    keep = os.access(run.path, os.W_OK)
    with tempfile.TemporaryDirectory() as scratch:
        out = run if keep else RunFolder(scratch)
        pairs = (
            sample(pipe, out / "samples/float", identity=session.model["sha256"], **how),
            sample(quantized, out / "samples/int8", identity=session.key("pack"), **how),
        )
    # Of the images: calls of other shapes may run on another one.
    used = engine_of(quantized)
    metrics = evaluate_outputs(*pairs, reference=data)
    if inception is not None:
        more = evaluate_outputs(*pairs, reference=data, extractor="inception", weights=inception)
        metrics = more | metrics | {"scores": metrics.get("scores", []) + more.get("scores", [])}
    metrics |= _by_time(session, pipe, quantized)
    about: dict[str, Any] = {"engine": used, "steps": steps, "seeds": seeds}
    about |= {"batch_size": batch_size, "sampler": type(pipe.scheduler).__name__}
    metrics |= summary(session) | about | {"machine": machine(), "packed_key": session.key("pack")}
    before = run.read_json("metrics.json") if run.has("metrics.json") else {}
    metrics = {key: before[key] for key in SPEED_KEYS if key in before} | metrics
    if keep:
        run.write_json("metrics.json", metrics)
        write_card(run, run / "packed")
    log.info("scores %s %s", "written to" if keep else "not kept in read-only", run.path)
    tell("metrics", **metrics)
    log.info("evaluate   %8.1f s     %d pairs of images", time.perf_counter() - start, images)
    return metrics


def _by_time(session: Session, pipe: Any, packed: Any) -> dict[str, Any]:
    """Return the SQNR of every denoiser's output by time."""
    result = {}
    for part in session.parts:
        if not len(TraceSet(part.run / "trace")):
            continue
        networks = getattr(pipe, part.component), getattr(packed, part.component)
        edges = part.run.read_safetensors("stats.safetensors")["time_bin_edges"].tolist()
        key = "eps_sqnr_db" + ("" if part is session else f"_{part.component}")
        result[key] = eps_sqnr(*networks, _calls(part), bins=edges)
    return result


def _calls(session: Session) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Yield (args, kwargs, place in time) of recorded calls, about 128 spread over the set."""
    trace = TraceSet(session.run / "trace")
    count = min(128, len(trace)) // _BATCH * _BATCH or len(trace)
    index = torch.linspace(0, len(trace) - 1, count).long()
    for rows in trace.calls(index, _BATCH):
        batch = trace.rows(rows)
        arguments = trace.arguments(batch, next(session.denoiser.parameters()))
        yield (), arguments, trace.times.noisiest(batch.t)


def summary(session: Session) -> dict[str, Any]:
    """Return what the run folder says of size, share of integers and time spent."""
    run = session.run
    rows, parts = run.read_json("layers.json"), session.parts
    seconds = sum(second for part in parts for second in part.seconds().values())
    names = [*(part.component for part in parts), *session.also]
    files = [f for name in names for f in (run / "packed" / name).glob("*.safetensors")]
    more = (p.numel() for name in session.also for p in getattr(session.pipe, name).parameters())
    with reading(run / "layers.json"):
        return {
            **int8_share(rows),
            "weight_bits_mean": mean_weight_bits(rows),
            "bytes_float32": 4 * (sum(part.model["parameters"] for part in parts) + sum(more)),
            "bytes_packed": sum(file.stat().st_size for file in files),
            "calibration_seconds": round(seconds, 2),
            "float_layers": [
                {k: row[k] for k in ("name", "reason")} for row in rows if row["buckets"] is None
            ],
        }
