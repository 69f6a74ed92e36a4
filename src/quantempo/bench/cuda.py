"""Time a network, and the kernels under it, on a GPU against the best bfloat16.

Library functions without a command line: `bench_model`, `bench_ops`; `bench_cuda` is both for a
run folder or a model name, and `results_of` turns what they return into one flat record.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantempo.bench.candidates import Candidate, Subject, select
from quantempo.bench.events import Timer, reason_of, timer_for
from quantempo.bench.graph import fastest_library
from quantempo.bench.measure import Ready, compare, sample_of, summarize_gpu
from quantempo.bench.op_table import Case, all_cases, measure_limits, time_op
from quantempo.bench.records import results_of, text_table, write_results
from quantempo.bench.workloads import Workload, model_workload, trace_inputs
from quantempo.calibration.dataset import TraceSet
from quantempo.core.machine import machine
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import check_device, load_pipeline
from quantempo.models.presets import check_preset, ddim_loop
from quantempo.pipeline.session import Session

__all__ = [
    "bench_cuda",
    "bench_model",
    "bench_ops",
    "check_request",
    "gpu_machine",
    "results_of",
    "run_workload",
    "text_table",
    "write_results",
]

log = logging.getLogger("quantempo")

_PACKAGES = ("quantempo", "torch", "triton", "diffusers", "torchao")


def gpu_machine() -> dict[str, Any]:
    """Describe the machine and the versions that a GPU figure was measured with."""
    found = machine()
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.setdefault("versions", {})[package] = version(package)
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {"sm": f"{card.major}.{card.minor}", "gpu_bytes": card.total_memory}
        found["versions"]["cuda"] = torch.version.cuda
    return found


def run_workload(session: Session, dtype: torch.dtype = torch.bfloat16) -> Workload:
    """Return the float and the packed network of a run folder, on the session's device.

    Raises:
        QuantempoError: nothing packed yet, or no trace.
    """
    data = TraceSet(session.run / "trace")
    packed = nn.Module.to(
        denoiser_of(load_pipeline(session.require_packed(), dtype))[1], session.device
    )
    floating = session.denoiser
    like = next(floating.parameters())

    def inputs(batch: int) -> dict[str, Any]:
        return trace_inputs(data, batch, like)

    name = Path(session.source).name
    scheduler = session.pipe.scheduler
    return Workload(name, floating, packed.eval(), inputs, scheduler, "run folder", dtype)


@contextmanager
def _many_compiled() -> Iterator[None]:
    """Let one process hold the compiled forms of one class that are timed against each other.

    Beyond torch's usual limit the next one would silently run uncompiled.
    """
    import torch._dynamo.config as dynamo

    with dynamo.patch(recompile_limit=64, accumulated_recompile_limit=1024):
        yield


def bench_model(
    workload: Workload,
    batches: Sequence[int],
    *,
    candidates: Iterable[str] = (),
    rounds: int = 9,
    seconds: float = 0.25,
    budget: float | None = None,
    steps: int | None = None,
    engine: str = "triton",
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Time every candidate at every batch size; nothing is written.

    Args:
        workload: see `run_workload`, `model_workload`, `quick_workload`.
        batches: batch sizes.
        candidates: shell patterns of their names, see `timing.candidates`; none for all.
        rounds: interleaved samples of each.
        seconds: of one sample.
        budget: seconds in which one candidate has to be built, compiled and recorded.
        steps: of DDIM, to measure images a second as well.
        engine: that runs the quantized network.
        timer: what measures; by default that of the device.

    Returns:
        {"model", "scales", "batches": {size: see `summarize_gpu`, with "images_per_second"}}.

    Raises:
        QuantempoError: a pattern that matches no candidate.
    """
    chosen = select(candidates)
    timer = timer or timer_for(workload.device)
    results: dict[str, Any] = {
        "model": workload.name,
        "scales": workload.scales,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "rounds": rounds,
        "batches": {},
    }
    for size in batches:
        log.info("bench: %s, batch %d, %d candidates", workload.name, size, len(chosen))
        with _many_compiled(), fastest_library():
            results["batches"][str(size)] = _one_batch(
                workload, size, chosen, timer, engine,
                {"rounds": rounds, "seconds": seconds, "budget": budget}, steps,
            )  # fmt: skip
        _forget(workload.device)
    return results


def _one_batch(
    workload: Workload,
    size: int,
    chosen: Sequence[Candidate],
    timer: Timer,
    engine: str,
    settings: dict[str, Any],
    steps: int | None,
) -> dict[str, Any]:
    subject = workload.subject(size, engine)
    wanted = _float32(workload, size)
    ready, times, failed = compare(chosen, subject, wanted, timer, **settings)
    found = summarize_gpu(ready, times, failed)
    if steps is not None:
        by_name = {one.candidate.name: one for one in ready}
        found["images_per_second"] = {
            kind: _images_per_second(workload, subject, by_name[name], found, size, steps, timer)
            for kind in ("bf16", "ours")
            if (name := found[f"best_{kind}"]) is not None
        }
    return found


@torch.no_grad()
def _float32(workload: Workload, size: int) -> torch.Tensor:
    """Return the output of the float32 network, without TensorFloat32 in its convolutions."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return sample_of(workload.floating(**workload.inputs(size))).float()


def _images_per_second(
    workload: Workload,
    subject: Subject,
    one: Ready,
    found: dict[str, Any],
    size: int,
    steps: int,
    timer: Timer,
) -> dict[str, Any]:
    """Return what the forwards allow, and what a whole run of DDIM reaches (once, after a call).

    Guidance is off: one row is one image. A decoder of latents is not included.
    """
    name = one.candidate.name
    forward_only = 1000 * size / (steps * found["ms_per_forward"][name])
    result = {"candidate": name, "steps": steps, "from_forwards": round(forward_only, 2)}
    kwargs = subject.inputs[1]

    def run(count: int) -> Any:
        return ddim_loop(one.forward, workload.floating, kwargs, count, workload.scheduler)

    try:
        run(2)
        ms = timer.sample(lambda: run(steps), 1)
        result["measured"] = round(1000 * size / ms, 2)
    # The forward itself was timed: a loop that fails is told, not the end of the results.
    except Exception as error:
        result["failed"] = reason_of(error)
        log.warning("bench: DDIM-%d with %s failed: %s", steps, name, result["failed"])
    return result


def _forget(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bench_ops(
    cases: Sequence[Case] | None = None,
    *,
    device: str = "cuda",
    rounds: int = 5,
    seconds: float = 0.25,
    timer: Timer | None = None,
    size: int = 8192,
    copy: int = 1 << 30,
) -> dict[str, Any]:
    """Check and time each kernel on the shapes of real layers.

    Args:
        cases: see `timing.op_cases`; all by default.
        device: where.
        rounds, seconds: samples of each, and of one: so long that the GPU's power control settles.
            In shorter turns each kernel has the clock that the one before it left.
        timer: what measures; by default that of the device.
        size, copy: see `measure_limits`.

    Returns:
        {"limits": {"bf16_tflops", "int8_tflops", "copy_tbytes", "meaning"}, "rows": see `time_op`}.

    Raises:
        QuantempoError: the device cannot be used.
    """
    check_device(device)
    where = torch.device(device)
    timer = timer or timer_for(where)
    chosen = all_cases() if cases is None else cases
    with torch.no_grad(), fastest_library():
        limits = measure_limits(where, timer, rounds=rounds, size=size, copy=copy)
        log.info("bench: %.0f TFLOP/s bf16, copy %.2f TB/s", limits.bf16_tflops, limits.copy_tbytes)
        rows = [time_op(c, where, timer, limits, rounds=rounds, seconds=seconds) for c in chosen]
    return {
        "limits": {
            "bf16_tflops": round(limits.bf16_tflops, 1),
            "int8_tflops": round(limits.int8_tflops, 1),
            "copy_tbytes": round(limits.copy_tbytes, 3),
            "meaning": "bf16: best measured product; int8: twice that; copy: read and written",
            "timing": "median of turns; one CUDA graph a turn over copies of the arguments that "
            "exceed L2 twice together",
        },
        "rows": rows,
    }


def check_request(run: bool, model: str | None, ops: bool, candidates: Iterable[str] = ()) -> None:
    """Raise QuantempoError for a request that names nothing, too much, or what does not exist."""
    if run and model is not None:
        raise QuantempoError("got both a run folder and a model; give one of --run and --model")
    if not run and model is None and not ops:
        raise QuantempoError("nothing to time: give --run RUN, --model NAME, or --ops")
    if model is not None and not Path(model).exists():
        check_preset(model)
    select(candidates)


def bench_cuda(
    session: Session | None = None,
    model: str | None = None,
    *,
    batches: Sequence[int] | None = None,
    ops: bool = False,
    out: str | Path | None = None,
    device: str = "cuda",
    **settings: Any,
) -> dict[str, Any]:
    """Time a run folder's network, or a model quantized without data, or kernels, or several.

    Writes what it finds to `out`, and for a run folder under "cuda" in its `bench.json`.

    Args:
        session: a run folder on the device, or None.
        model: a preset or a diffusers folder, or None.
        batches: by default 16 and 256, for text-to-image networks 2 and 8.
        ops: time the kernels too.
        out: JSON file for the flat record.
        device: where.
        settings: of `bench_model`.

    Raises:
        QuantempoError: nothing to time, both a run and a model, an unusable device, and what
            `bench_model` refuses.
    """
    check_request(session is not None, model, ops, settings.get("candidates", ()))
    if out is not None and Path(out).is_dir():
        # It would be replaced by the file.
        raise QuantempoError(f"{out} is a folder; expected a file to write to")
    check_device(device)
    results: dict[str, Any] = {"machine": gpu_machine()}
    if session is not None or model is not None:
        workload = run_workload(session) if session else model_workload(str(model), device)
        text = "encoder_hidden_states" in workload.inputs(1)
        sizes = list(batches or ([2, 8] if text else [16, 256]))
        results["models"] = [bench_model(workload, sizes, **settings)]
        del workload
        _forget(torch.device(device))
    if ops:
        results["ops"] = bench_ops(device=device)
    if session is not None:
        before = session.run.read_json("bench.json") if session.run.has("bench.json") else {}
        session.run.write_json("bench.json", {**before, "cuda": results})
    if out is not None:
        write_results(out, results)
    return results
