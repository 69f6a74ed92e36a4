"""The main line with a run folder: trace -> calibrate -> search -> round -> pack.

One verb is one function here, one command and one artefact, made of those before it by one step of
`quantize`, once for the same model and settings: a killed run resumes.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import SOURCES, TraceSet, picture_size
from quantempo.calibration.trace import trace as trace_pipeline
from quantempo.checkpoint.diffusers_plugin import QuantempoConfig, mark_quantized, seal
from quantempo.checkpoint.write import Shards
from quantempo.evaluation import load_images
from quantempo.models.call import images_a_call, own_guidance
from quantempo.pipeline import quantize as core
from quantempo.pipeline.layer_table import measured_rows, weight_rows
from quantempo.pipeline.session import Session, load, reopen
from quantempo.recipe import Recipe
from quantempo.report.card import write_card
from quantempo.run_folder import Kept, RunFolder, atomic_path, private_folder

__all__ = [
    "Session", "calibrate", "finish", "load", "pack", "quantize", "reopen", "round_weights",
    "search", "trace",
]  # fmt: skip

log = logging.getLogger("quantempo")
Stage = Callable[[Session], None]
Make = Callable[[Session, Path], dict[str, Tensor]]


def _stage(name: str, file: str) -> Callable[[Make], Stage]:
    """Make a stage, for every denoiser, of what writes its artefact, given a scratch folder."""

    def decorate(make: Make) -> Stage:
        @wraps(make)
        def run(session: Session) -> None:
            for part in session.parts:
                with part.stage(name) as needed:
                    if needed:
                        with private_folder(part.run / name) as scratch:
                            part.run.write_safetensors(file, make(part, scratch))

        return run

    return decorate


def trace(session: Session) -> TraceSet:
    """Keep what denoisers receive in `trace/`; of several, one that is never called stays float."""
    found: list[TraceSet] = []
    for part in session.parts:
        found.append(_traced(part, part is session.parts[-1] and not any(map(len, found))))
        if not len(found[-1]):
            log.warning("%s stays in float: the pipeline never calls it", part.component)
    session.release()
    return found[0]


def _traced(session: Session, needed: bool) -> TraceSet:
    folder, settings = session.run / "trace", session.recipe.trace
    with session.stage("trace") as missing:
        if missing:
            for name, value in own_guidance(session.pipe, session.call).items():
                log.info("%s %s, the pipeline's own: give what you will sample with", name, value)
            trace_pipeline(
                session.pipe, session.denoiser, folder, steps=settings.steps,
                chains=settings.chains, picks=settings.picks, seed=settings.seed,
                time_sampler=make_time_sampler(settings.time_sampler, settings.time_sampler_args),
                call=session.call, source=settings.source, images=_source_images(session),
                batch_size=images_a_call(session.pipe, session.call, 16),
                force=session.force, model_hash=session.model["sha256"], needed=needed,
            )  # fmt: skip
    return TraceSet(folder)


def _source_images(session: Session) -> np.ndarray | None:
    """Return (n, H, W, 3) uint8 images of the pipeline's size, or None if the source reads none."""
    settings, data = session.recipe.trace, session.data
    if not SOURCES.get(settings.source).needs_images or data is None:
        return None
    size = picture_size(session.pipe, session.denoiser, settings.steps, session.call)
    latent = getattr(session.pipe, "vae", None) is not None
    limit = settings.chains * settings.picks if latent else 10_000
    return load_images(data, size, limit).images


@_stage("calibrate", "stats.safetensors")
def calibrate(session: Session, _: Path) -> dict[str, Tensor]:
    """Collect the statistics of every layer input over the trace; writes `stats.safetensors`."""
    given = session.denoiser, _trace_of(session), session.plans, session.recipe
    return core.calibrate(*given, kept=session.kept("calibrate"))


@_stage("search", "scales.safetensors")
def search(session: Session, _: Path) -> dict[str, Tensor]:
    """Choose every scale by the recipe's metrics; writes `scales.safetensors`."""
    stats = session.run.read_safetensors("stats.safetensors")
    how = session.plans, session.recipe
    scales = core.search(session.denoiser, stats, *how, kept=session.kept("search"))
    given = session.denoiser, _trace_of(session), session.plans, scales, session.recipe
    return core.keep_costly(*given)


@_stage("round", "rounding.safetensors")
def round_weights(session: Session, scratch: Path) -> dict[str, Tensor]:
    """Choose the integer weights; writes `rounding.safetensors`."""
    scales = session.run.read_safetensors("scales.safetensors")
    given = session.denoiser, _trace_of(session), session.recipe, session.plans, scales
    kept = Kept(RunFolder(session.run / "blocks"), session.key("round"))
    return core.round_weights(*given, kept=kept, scratch=scratch)


def pack(session: Session) -> Path:
    """Write the quantized pipeline, the diffusers folder `packed/`, and the table `layers.json`."""
    run = session.run
    for part in session.parts[1:]:
        part.check_before("pack")
    with session.stage("pack") as needed:
        if needed:
            with atomic_path(run / "packed") as temporary:
                _write_packed(session, temporary)
    return run / "packed"


def _write_packed(session: Session, to: Path) -> None:
    rows, networks = [], {}
    for part in session.parts:
        network, found = _packed(part, session.kept("pack"))
        if len(_trace_of(part)):
            networks[part.component] = network
        start = "" if part is session else f"{part.component}."
        rows += [row | {"name": start + row["name"]} for row in found]
    for name in session.also:
        rows += weight_rows(name, getattr(session.pipe, name))
    session.run.write_json("layers.json", rows)
    session.save(networks, to)
    seal(to, next(iter(networks)))
    # Not sealed: the figures follow.
    write_card(session.run, to)


def _packed(session: Session, kept: Kept) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Return the quantized denoiser, marked for saving, and its rows of the layer table."""
    run, data = session.run, _trace_of(session)
    scales = run.read_safetensors("scales.safetensors")
    codes = run.read_safetensors("rounding.safetensors", paged=True)
    found = core.Quantized.of(session.recipe, session.plans, scales, codes, data.times)
    folder: Any = kept.folder
    name, state = session.component, found.saved(session.denoiser)
    shards = Shards(folder / name, state, kept, f"layers-{name}")
    packed = found.install(session.denoiser, copy=True, store=shards.store)
    name = f"rows-{name}"
    rows = kept.read(name)[0] or measured_rows(session.denoiser, packed, found.plans, data)
    kept.write(name, rows, {})
    about = {"times": data.times, "source_sha256": session.model["sha256"]}
    config = QuantempoConfig.of(found.recipe, found.plans, **about)
    config.attention_errors = found.attention  # type: ignore[attr-defined]
    mark_quantized(packed, config)
    packed.hf_quantizer.shards = shards
    return packed, rows


def _trace_of(session: Session) -> TraceSet:
    return TraceSet(session.run / "trace")


def quantize(source: Any, run: str | Path, recipe: str | Recipe = "w8a8", **options: Any) -> Path:
    """Run load to pack and return the packed diffusers folder; source and options as for `load`."""
    return finish(load(source, run, recipe, **options))


def finish(session: Session) -> Path:
    """Run every stage that is not done yet, trace to pack, and return the packed folder."""
    with core.bar_of(session.denoiser, session.recipe, len(session.parts)):
        for stage in (trace, calibrate, search, round_weights):
            stage(session)
    return pack(session)
