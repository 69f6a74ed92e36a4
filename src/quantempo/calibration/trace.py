"""Record the inputs a denoiser receives while its pipeline samples.

The pipeline is called as a user would call it and a hook on the denoiser keeps what arrives: x_t,
the time-step as received, the conditioning. No sampler is re-implemented, so x_t and t cannot be
paired wrongly. `timesteps` says which steps to keep, `sources` may replace x_t before a chunk is
written, `dataset` reads the result.

A chain is one image being denoised. Before anything runs, `picks` step indices of the timestep
distribution are dealt to every chain. Index i stands for number i of the K distinct times that the
denoiser receives in a run, the last of them first (for i < steps = K; in general for number
floor((i + 1/2) K / steps)): that is the target. A first run, in which the network hardly runs,
finds them. Each target keeps the call whose time is nearest; among calls at the same time (the two
stages of Heun) one is chosen with equal chances. Memory holds the kept rows only.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Generator, Tensor, nn

from quantempo.calibration.dataset import TraceSet, index_of
from quantempo.calibration.recorder import NeverCalledError, Recorder, answered, probe
from quantempo.calibration.rows import Law, UnmeasuredError
from quantempo.calibration.sources import SOURCES, check_source, image_digest, replace_rows
from quantempo.calibration.timesteps import TIME_SAMPLERS, TimeSampler, make_time_sampler
from quantempo.core import ranks
from quantempo.core.progress import Progress
from quantempo.errors import QuantempoError, log
from quantempo.models.call import call_pipeline
from quantempo.models.layers import denoisers_of, hooked
from quantempo.models.load import model_digest
from quantempo.models.sampling import latents_of, schedule_of, scheduler_settings
from quantempo.quantized import Times
from quantempo.recipe import TraceSettings
from quantempo.run_folder import RunFolder, canonical, read_tensors, reading, tensors_sha256

__all__ = ["TraceSet", "affordable", "check_settings", "deal_targets", "picture_size", "trace"]

_FORMAT = 2
_METADATA = "quantempo_trace"


def trace(
    pipe: Any, denoiser: nn.Module, folder: str | Path, *, steps: int, chains: int, picks: int,
    time_sampler: TimeSampler, seed: int, batch_size: int = 16,
    call: Mapping[str, Any] | None = None, source: str = "trajectory",
    images: np.ndarray | None = None, model_hash: str | None = None, force: bool = False,
    needed: bool = True,
) -> TraceSet:  # fmt: skip
    """Record a calibration set into `folder`, a chunk for each call; its index lies beside it.

    A rerun with the same settings keeps the files that are whole and gives the same bits.

    Args:
        chains, picks, source: see `recipe.TraceSettings`; a pick is one row, or one a half of
            guidance.
        seed: of the draw of the steps, and of the first chain; chain c starts from seed + c.
        call: further arguments of the pipeline, as for `models.sampling.run_pipeline`.
        images: (n, H, W, C) uint8 for the sources that need them; force: replace another trace.
        model_hash: of the denoiser, hashed here if None; needed: refuse one that is never called.
    Raises QuantempoError: a trace of other settings or model is there, the denoiser is called in a
    way that cannot be recorded, or the source does not fit the pipeline or the images.
    """
    call = dict(call or {})
    check_source(source, pipe, images)
    settings = _settings(pipe, denoiser, call, time_sampler, model_hash)
    settings |= {"images": image_digest(source, images), "source": source, "seed": seed}
    settings |= {"batch_size": batch_size, "steps": steps, "chains": chains, "picks": picks}
    targets = deal_targets(time_sampler, chains, picks, steps, seed)
    run = _Run(pipe, denoiser, settings, call, images)
    files = _fill(run, RunFolder(folder), targets, force, needed)
    if not ranks.rank():
        _finish(RunFolder(folder), files, settings, targets, time_sampler.density(steps))
    ranks.told(None)
    return TraceSet(folder)


def check_settings(settings: TraceSettings, data: str | None) -> None:
    """Raise QuantempoError for settings that name nothing known, or images that are not given."""
    make_time_sampler(settings.time_sampler, settings.time_sampler_args)
    if SOURCES.get(settings.source).needs_images and data is None:
        raise QuantempoError(f"source '{settings.source}' needs images; pass a folder (--data)")


class _Run(NamedTuple):
    """What every chunk is made with."""

    pipe: Any
    denoiser: nn.Module
    settings: dict[str, Any]
    call: dict[str, Any]
    images: np.ndarray | None


def _fill(run: _Run, store: RunFolder, targets: Tensor, force: bool, needed: bool) -> list[str]:
    """Write the chunks that are not there yet; return the names of all."""
    settings = run.settings
    size, steps = settings["batch_size"], settings["steps"]
    starts = range(0, len(targets), size)
    files = {f"chunk-{i // size:05d}.safetensors": i for i in starts}
    missing = [name for name in files if not _is_whole(store, name, settings, force)]
    if missing:
        # From here on the index would promise more than the folder holds.
        index_of(store.path).unlink(missing_ok=True)
    # Nobody writes before all have looked.
    if missing := ranks.told(missing):
        try:
            try:
                law, calls = _probe(run, [0])
            except UnmeasuredError:
                # A pipeline may call the network otherwise for one image: Latte cuts its text.
                law, calls = _probe(run, [0, 0])
        except NeverCalledError:
            if needed:
                raise
            store.path.mkdir(parents=True, exist_ok=True)
            return []
        times = Times.of(calls, settings["num_train_timesteps"])
        found = torch.stack([times.noisiest(t)[0] for t in calls]).unique()
        targets = found[(2 * targets + 1) * len(found) // (2 * steps)]
    mine = ranks.mine(missing)
    calls_left = steps * len(mine)
    with Progress(total=calls_left, desc="trace", unit="call") as bar:
        for name in mine:
            first = files[name]
            batch = targets[first : first + size]
            try:
                tensors, details = _record(run, law, times, batch, first, bar)
            except UnmeasuredError:
                # What the first image alone has not, a mask of captions of other lengths, say.
                own = law | _probe(run, range(first, first + len(batch)))[0]
                tensors, details = _record(run, own, times, batch, first, bar)
            store.write_safetensors(name, tensors, details, everyone=True)
    return ranks.told(list(files))


def _probe(run: _Run, places: Sequence[int]) -> tuple[Law, list[Tensor]]:
    how = {key: run.settings[key] for key in ("steps", "seed")}
    return probe(run.pipe, run.denoiser, places, call=run.call, **how)


def _record(
    run: _Run, law: Law, times: Times, targets: Tensor, first: int, bar: Any
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run one batch of chains; return the chunk's tensors and metadata."""
    pipe, settings = run.pipe, run.settings
    steps, seed = settings["steps"], settings["seed"] + first
    source = settings["source"]
    # What it answers would go into x_t alone.
    quick = answered(run.denoiser) if SOURCES.get(source).make is not None else nullcontext()
    recorder = Recorder(law, times, targets, first, seed, bar)
    with hooked({"": run.denoiser}, recorder.see, before=True), quick:
        seeds = range(seed, seed + len(targets))
        call_pipeline(pipe, seeds, first=first, steps=steps, output_type="latent", **run.call)
    tensors, details = recorder.result()
    t, schedule = tensors["t"], None
    if SOURCES.get(source).needs_schedule:
        t, schedule = schedule_of(pipe.scheduler, t)
    encode = partial(latents_of, pipe) if getattr(pipe, "vae", None) is not None else None
    given = (schedule, run.images, settings["seed"], encode)
    tensors["x_t"] = replace_rows(source, {**tensors, "t": t}, *given)
    details |= {"rows": len(tensors["t"]), "sha256": tensors_sha256(tensors), "settings": settings}
    # One entry: safetensors writes several in random order, and equal traces should be equal files.
    return tensors, {_METADATA: _json(details)}


def picture_size(pipe: Any, denoiser: nn.Module, steps: int, call: Any) -> Any:
    """Return (height, width) of what a pipeline makes; its network runs once."""
    with answered(denoiser):
        return call_pipeline(pipe, [0], steps=steps, **call).shape[-3:-1]


def affordable(pipe: Any, settings: TraceSettings, call: Any, minutes: float) -> dict[str, int]:
    """Return the chains and steps for a budget of time, at most those of the settings.

    A call of its networks for one image is measured. Each step of a chain takes one, each row that
    is kept about eight more, for statistics and rounding; half of the budget is for these.
    """
    times, networks = list[float](), denoisers_of(pipe)

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    # Twice: the first call of all loads and compiles.
    for _ in range(2):
        times.clear()
        with ExitStack() as stack, hooked(networks, note, before=True), hooked(networks, note):
            for network in networks.values():
                stack.enter_context(answered(network))
            call_pipeline(pipe, [0], steps=settings.steps, **call)
    each = max((b - a for a, b in zip(times[::2], times[1::2], strict=True)), default=0.0)

    few, least, picks = min(2, settings.chains), min(4, settings.steps), settings.picks
    halves = ((settings.chains >> i, settings.steps >> j) for i in range(20) for j in range(20))
    some = [(c * (s + 8 * min(picks, s)), c, s) for c, s in halves if c >= few and s >= least]
    fit = (one for one in some if one[0] * each <= 30 * minutes)
    _, chains, steps = max(fit, default=min(some))
    log.info("%.2g s a call, %g minutes: %d chains of %d steps", each, minutes, chains, steps)
    # Of one clock.
    return ranks.told({"chains": chains, "steps": steps})


def deal_targets(sampler: TimeSampler, chains: int, picks: int, steps: int, seed: int) -> Tensor:
    """Draw step indices, dealt like cards; return (chains, picks) int64, ascending along picks.

    Each chain gets times from all over, one twice only where over `chains` draws fell on it.
    """
    # Not the generator of chain 0, whose numbers become its noise.
    generator = Generator().manual_seed(seed ^ 0x5EED_7157)
    drawn = sampler.sample(chains * picks, steps, generator)
    return drawn.sort().values.view(picks, chains).T.contiguous()


def _settings(
    pipe: Any, denoiser: nn.Module, call: Any, sampler: Any, known: str | None
) -> dict[str, Any]:
    """Describe what is traced, in JSON types."""
    names = {TIME_SAMPLERS.get(name): name for name in TIME_SAMPLERS.names()}
    kind = names.get(type(sampler), type(sampler).__name__)
    return {
        "format": _FORMAT,
        "model": known or model_digest(denoiser),
        "dtype": str(next(denoiser.parameters()).dtype),
        "pipeline": type(pipe).__name__,
        "scheduler": scheduler_settings(pipe.scheduler),
        "arguments": canonical(call),
        "num_train_timesteps": getattr(pipe.scheduler.config, "num_train_timesteps", None),
        "time_sampler": {"name": kind, **asdict(sampler)},
    }


def _is_whole(store: RunFolder, name: str, settings: dict[str, Any], force: bool) -> bool:
    """Return whether a chunk is there and undamaged; refuse one with other settings."""
    if not store.has(name):
        return False
    try:
        tensors, metadata = read_tensors(store / name)
        with reading(store / name):
            details = json.loads(metadata[_METADATA])
            old, known = dict(details["settings"]), details["sha256"]
    except QuantempoError:
        # Torn, or not ours: made again; the progress bar shows it.
        return False
    both = {key: (_json(old.get(key)), _json(value)) for key, value in settings.items()}
    differing = {key: texts for key, texts in both.items() if texts[0] != texts[1]}
    if differing and not force:
        short = (f"{k} {was[:40]}, now {now[:40]}" for k, (was, now) in differing.items())
        text = f"{store.path} holds a trace with other settings ({'; '.join(short)})"
        raise QuantempoError(f"{text}; choose another folder, delete this one, or force")
    return not differing and known == tensors_sha256(tensors)


def _finish(
    store: RunFolder, names: list[str], settings: dict[str, Any], targets: Tensor, density: Tensor
) -> None:
    """Write the index, whose presence means that the trace is complete."""
    chunks, found = [], []
    law: dict[str, Any] = {}
    for name in names:
        with reading(store / name), safe_open(store / name, framework="pt") as stream:
            details = json.loads(stream.metadata()[_METADATA])
        chunks.append({"file": name, **{k: details[k] for k in ("rows", "sha256", "groups")}})
        found.append({key: details[key] for key in ("sample_name", "timestep_name", "times")})
        if found[-1] != found[0] or law | details["law"] != details["law"] | law:
            raise QuantempoError(f"{store / name} is not of this trace; delete it and rerun")
        law |= details["law"]
    never = {"sample_name": "", "timestep_name": "", "times": asdict(Times(1))}
    info = {
        "settings": settings,
        "law": law,
        "seeds": [settings["seed"] + chain for chain in range(settings["chains"])],
        "target_steps": targets.tolist(),
        "density": density.tolist(),
        **(found or [never])[0],
        "chunks": chunks,
    }
    index = index_of(store.path)
    RunFolder(index.parent).write_json(index.name, info)
    # A forced rerun with larger batches leaves chunks of the old trace behind.
    for file in store.path.glob("chunk-*.safetensors"):
        if file.name not in names:
            file.unlink()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
