"""Sample from the float and the packed model, and judge one by the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quantempo.calibration.dataset import TraceSet
from quantempo.core.machine import machine
from quantempo.engines.select import attach, attached
from quantempo.errors import QuantempoError
from quantempo.evaluation import eps_sqnr, evaluate_pairs
from quantempo.models.layers import denoiser_of
from quantempo.models.load import check_device, load_pipeline
from quantempo.models.sampling import entries, run_pipeline, swap_scheduler
from quantempo.pipeline.layer_table import int8_share, mean_weight_bits
from quantempo.pipeline.session import Session
from quantempo.quantized import find_clock
from quantempo.run_folder import RunFolder, atomic_path, hash_of

__all__ = ["SPEED_KEYS", "evaluate", "open_model", "sample"]

# What a benchmark adds to metrics.json; kept when the pairs are scored again.
SPEED_KEYS = ("ms_per_forward", "speedup_vs_best_fp32", "speedup_vs_best_bf16")

log = logging.getLogger("quantempo")


def open_model(
    path: str | Path, *, engine: str = "auto", scheduler: str | None = None, device: str = "cpu"
) -> Any:
    """Load a float or packed pipeline, ready to sample; a packed one with an engine attached.

    Raises:
        QuantempoError: see `load_pipeline` and `attach`; an engine asked of a float model.
    """
    check_device(device)
    pipe = load_pipeline(path)
    pipe = swap_scheduler(pipe, scheduler) if scheduler else pipe
    pipe.to(device)
    denoiser = denoiser_of(pipe)[1]
    if find_clock(denoiser) is None:
        if engine != "auto":
            raise QuantempoError(f"'{path}' is a float model; engine '{engine}' runs packed ones")
        return pipe
    attach(denoiser, engine)
    return pipe


def sample(
    pipe: Any,
    folder: str | Path,
    seeds: Sequence[int],
    *,
    steps: int,
    batch_size: int = 16,
    call: dict[str, Any] | None = None,
    identity: str = "",
    force: bool = False,
) -> np.ndarray:
    """Write one PNG per seed (its name) and return the images, (n, H, W, 3) uint8.

    Images that are there already, made by the same model and settings, are kept: a killed run
    resumes. The settings stand in `settings.json` beside them.

    Args:
        batch_size: images a call; an engine compiles for it.
        identity: what else decides the images (hash of the model).
        force: throw away pictures of other settings.

    Raises:
        QuantempoError: the folder holds something else.
    """
    out, call = RunFolder(folder), call or {}
    settings = _settings(pipe, identity, steps, call)
    ours = _is_ours(out, settings, force)
    todo = [seed for seed in seeds if not (ours and out.has(f"{seed}.png"))]

    def write(first: int, images: np.ndarray) -> None:
        if first == 0 and not ours:
            # Not earlier: a call that fails leaves the folder as it was.
            for old in out.path.glob("*.png"):
                old.unlink()
            out.write_json("settings.json", settings)
        for seed, image in zip(todo[first : first + len(images)], images, strict=True):
            grey = image.squeeze(-1) if image.shape[-1] == 1 else image
            with atomic_path(out / f"{seed}.png") as temporary:
                Image.fromarray(grey).save(temporary, format="PNG")

    if todo:
        # Prompts and labels go by position in the whole list, whatever is left to do.
        places = [list(seeds).index(seed) for seed in todo]
        arguments = entries(call, places)
        run_pipeline(pipe, todo, steps=steps, batch_size=batch_size, on_batch=write, **arguments)
    return np.stack([_read(out / f"{seed}.png") for seed in seeds])


def _settings(pipe: Any, identity: str, steps: int, call: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the images of a folder, apart from their seeds."""
    return {
        "model": identity,
        "engine": attached(denoiser_of(pipe)[1]) or "float",
        "scheduler": type(pipe.scheduler).__name__,
        "steps": steps,
        "call": hash_of(call),
    }


def _is_ours(out: RunFolder, settings: dict[str, Any], force: bool) -> bool:
    """Return whether the folder holds images of these settings; refuse one with something else."""
    if out.has("settings.json"):
        if out.read_json("settings.json") == settings:
            return True
        if not force:
            raise QuantempoError(
                f"{out.path} holds images of another model or other settings; choose another "
                "folder, or --force to replace them"
            )
    elif out.path.is_file() or out.foreign():
        raise QuantempoError(f"{out.path} is not empty; choose another folder for the images")
    return False


def _read(path: Path) -> np.ndarray:
    image = np.asarray(Image.open(path))
    return image[..., None] if image.ndim == 2 else image


def evaluate(
    session: Session,
    *,
    images: int = 64,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 16,
    engine: str = "auto",
    device: str = "cpu",
    data: str | Path | None = None,
    inception: str | Path | None = None,
) -> dict[str, Any]:
    """Sample pairs from both models, score them and write `metrics.json`.

    Args:
        session: a run folder whose `packed/` is there.
        images: number of pairs, seeds `seed`, `seed + 1`, ...
        data: folder of real images for scores against a reference set.
        inception: weights of the Inception network for FID, IS, sFID and KID.

    Raises:
        QuantempoError: nothing packed yet, or see `sample` and `evaluate_pairs`.
    """
    start = time.perf_counter()
    run, seeds = session.run, list(range(seed, seed + images))
    packed = open_model(
        session.require_packed(), engine=engine, scheduler=session.scheduler, device=device
    )
    pipe = open_model(session.source, scheduler=session.scheduler, device=device)
    how: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "force": session.force}
    how |= {"call": session.call, "seeds": seeds}
    pairs = (
        sample(pipe, run / "samples/float", identity=session.model["sha256"], **how),
        sample(packed, run / "samples/int8", identity=session.key("pack"), **how),
    )
    metrics = evaluate_pairs(*pairs, reference=data)
    if inception is not None:
        more = evaluate_pairs(*pairs, reference=data, extractor="inception", weights=inception)
        metrics = more | metrics | {"scores": metrics["scores"] + more["scores"]}
    networks = denoiser_of(pipe)[1], denoiser_of(packed)[1]
    edges = run.read_safetensors("stats.safetensors")["time_bin_edges"].tolist()
    metrics["eps_sqnr_db"] = eps_sqnr(*networks, _calls(session), bins=edges)
    metrics |= summary(session) | {
        "engine": attached(networks[1]),
        "sampler": type(pipe.scheduler).__name__,
        "steps": steps,
        "seeds": seeds,
        "batch_size": batch_size,
        "machine": machine(),
    }
    before = run.read_json("metrics.json") if run.has("metrics.json") else {}
    metrics = {key: before[key] for key in SPEED_KEYS if key in before} | metrics
    run.write_json("metrics.json", metrics)
    log.info("evaluate   %8.1f s     %d pairs of images", time.perf_counter() - start, images)
    return metrics


def _calls(
    session: Session, batch_size: int = 16
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """Yield (args, kwargs, training time-step) of recorded calls, about 128 spread over the set."""
    trace = TraceSet(session.run / "trace")
    count = min(128, len(trace)) // batch_size * batch_size or len(trace)
    index = torch.linspace(0, len(trace) - 1, count).long()
    for rows in trace.calls(index, batch_size):
        batch = trace.rows(rows)
        arguments = trace.arguments(batch, next(session.denoiser.parameters()))
        yield (), arguments, batch.t.double() * trace.per_unit


def summary(session: Session) -> dict[str, Any]:
    """Return what the run folder says of size, share of integers and time spent."""
    run = session.run
    rows, model = run.read_json("layers.json"), run.read_json("model.json")
    files = (run / "packed" / model["component"]).glob("*.safetensors")
    return {
        **int8_share(rows),
        "weight_bits_mean": mean_weight_bits(rows),
        "bytes_float32": 4 * model["parameters"],
        "bytes_packed": sum(file.stat().st_size for file in files),
        "calibration_seconds": round(sum(session.seconds().values()), 2),
        "float_layers": [
            {"name": row["name"], "reason": row["reason"]} for row in rows if row["reason"]
        ],
    }
