"""The main line: load -> trace -> calibrate -> search -> round -> pack -> run.

One verb is one function here, one command and one artefact in the run folder. Each stage reads the
artefacts before it, so any can be run again from the file before it, and a killed run resumes: a
stage whose artefact was made from the same model and settings is not repeated. Evaluate and report
have files of their own (`quantempo.pipeline.quality`, `quantempo.report`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.calibration.correction import fit_correction
from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.sources import needs_images
from quantempo.calibration.statistics import collect_statistics, state_tensors, time_bin_edges
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace as trace_pipeline
from quantempo.checkpoint.pack import pack_denoiser
from quantempo.core import WEIGHT
from quantempo.engines.select import attach
from quantempo.evaluation import load_images
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.macs import count_macs
from quantempo.pipeline.layer_table import layer_rows, layer_sqnr
from quantempo.pipeline.session import Session, load, reopen
from quantempo.quantized import LayerPlan, bits_of
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding import ROUNDINGS, round_by_weights, round_denoiser
from quantempo.run_folder import atomic_path
from quantempo.scales.search import LayerScales, search_scales

log = logging.getLogger("quantempo")

__all__ = [
    "Session",
    "calibrate",
    "correct",
    "finish",
    "load",
    "pack",
    "quantize",
    "reopen",
    "round_weights",
    "search",
    "trace",
]


def trace(session: Session) -> TraceSet:
    """Run the float pipeline and keep the inputs its denoiser received; writes `trace/`."""
    settings = session.recipe.trace
    folder = session.run / "trace"
    with session.stage("trace") as needed:
        if needed:
            trace_pipeline(
                session.pipe,
                session.denoiser,
                folder,
                steps=settings.steps,
                chains=settings.chains,
                picks=settings.picks,
                time_sampler=make_time_sampler(settings.time_sampler, settings.time_sampler_args),
                seed=settings.seed,
                num_train_timesteps=session.num_train_timesteps,
                call=session.call,
                source=settings.source,
                images=_source_images(session),
                force=session.force,
                model_hash=session.model["sha256"],
            )
    return TraceSet(session.run / "trace")


def _source_images(session: Session) -> np.ndarray | None:
    """Return (n, H, W, 3) uint8 images of the size of x_t, or None if the source reads none."""
    if not needs_images(session.recipe.trace.source) or session.data is None:
        return None
    size = getattr(session.denoiser.config, "sample_size", None)
    size = (size, size) if isinstance(size, int) else size
    return load_images(session.data, size, limit=10_000).images


def calibrate(session: Session) -> None:
    """Collect the statistics of every layer input over the trace; writes `stats.safetensors`."""
    data = TraceSet(session.run / "trace")
    with session.stage("calibrate") as needed:
        if not needed:
            return
        recipe = session.recipe
        plans = plan_layers(session.sites, recipe)
        inputs = {p.name: p.segments for p in plans if p.kind == "int8"}
        edges = time_bin_edges(session.num_train_timesteps)
        unit = per_unit(data, session.num_train_timesteps)
        statistics = collect_statistics(session.denoiser, inputs, data, edges, per_unit=unit)
        session.run.write_safetensors("stats.safetensors", state_tensors(edges, statistics))


def per_unit(data: TraceSet, num_train_timesteps: int) -> float:
    """Return the training time-steps in one unit of the recorded time: 1, or T for t in [0, 1]."""
    t = data.timesteps
    return float(num_train_timesteps) if t.is_floating_point() and float(t.max()) <= 1 else 1.0


def search(session: Session) -> None:
    """Choose every scale by the recipe's metrics; writes `scales.safetensors`."""
    with session.stage("search") as needed:
        if not needed:
            return
        stats = session.run.read_safetensors("stats.safetensors")
        bits = bits_of(plan_layers(session.sites, session.recipe))
        weights = {name: session.denoiser.get_submodule(name).weight.detach() for name in bits}
        tensors = search_scales(stats, weights, session.recipe, bits=bits)
        session.run.write_safetensors("scales.safetensors", tensors)


def round_weights(session: Session) -> None:
    """Choose the integer weights; writes `rounding.safetensors`."""
    with session.stage("round") as needed:
        if not needed:
            return
        run, settings = session.run, session.recipe.rounding
        scales = LayerScales.read(run.read_safetensors("scales.safetensors"))
        bits = bits_of(plan_layers(session.sites, session.recipe))
        specs = {name: replace(WEIGHT, bits=bits[name][0]) for name in scales}
        weights = {n: session.denoiser.get_submodule(n).weight.detach().cpu() for n in scales}
        by_weights = settings.name if ROUNDINGS.get(settings.name).needs == "weights" else "nearest"
        codes = round_by_weights(
            by_weights, weights, {n: s.weight_scale for n, s in scales.items()}, specs
        )
        if by_weights != settings.name or settings.bias or settings.refine:
            twin = _assemble(session, codes)[1].to(session.device)
            codes = round_denoiser(
                session.denoiser,
                twin,
                scales,
                specs,
                TraceSet(run / "trace"),
                settings,
                folder=run / "blocks",
                key=session.key("round"),
            )
        run.write_safetensors("rounding.safetensors", codes)


def _assemble(
    session: Session, rounding: Mapping[str, Tensor], *, last: bool = False
) -> tuple[Any, nn.Module, list[LayerPlan]]:
    """Return a fresh pipeline, its denoiser packed from the artefacts, and the plans.

    Args:
        rounding: codes of each layer, and what a rounding changed besides (bias, scales).
        last: with correction.
    """
    run, recipe = session.run, session.recipe
    data, tensors = TraceSet(run / "trace"), run.read_safetensors("scales.safetensors")
    scales = {
        name: replace(found, act_scale=rounding.get(f"{name}.act_scale", found.act_scale))
        for name, found in LayerScales.read(tensors).items()
    }
    plans = [
        replace(p, buckets=scales[p.name].act_scale.shape[1]) if p.kind == "int8" else p
        for p in plan_layers(session.sites, recipe)
    ]
    pipe = load_pipeline(session.source)
    denoiser = denoiser_of(pipe)[1]
    for name in scales:
        if f"{name}.bias" in rounding:
            denoiser.get_submodule(name).bias.data.copy_(rounding[f"{name}.bias"])
    corrected = last and recipe.correction.affine
    pack_denoiser(
        denoiser,
        plans,
        scales,
        {name: rounding[name] for name in scales},
        bucket_of=tensors["bucket_of"],
        per_unit=per_unit(data, session.num_train_timesteps),
        recipe=recipe,
        source_sha256=session.model["sha256"],
        correction=run.read_safetensors("correction.safetensors") if corrected else None,
    )
    return pipe, denoiser, plans


def correct(session: Session) -> None:
    """Fit what is corrected around the network; writes `correction.safetensors` and `.json`."""
    if not session.recipe.correction.affine:
        # Left in place it would be of other settings for whoever opens the folder next.
        session.forget("correct")
        return
    with session.stage("correct") as needed:
        if needed:
            rounding = session.run.read_safetensors("rounding.safetensors")
            packed = _assemble(session, rounding)[1].to(session.device)
            attach(packed, "auto" if session.device == "cpu" else "simulated")
            fitted = fit_correction(
                session.pipe,
                packed,
                session.recipe.correction,
                steps=session.recipe.trace.steps,
                call=session.call,
            )
            session.run.write_json("correction.json", fitted.report)
            session.run.write_safetensors("correction.safetensors", fitted.tensors)


def pack(session: Session) -> Path:
    """Replace the layers, write the diffusers folder `packed/` and the table `layers.json`."""
    run = session.run
    with session.stage("pack") as needed:
        if needed:
            rounding = run.read_safetensors("rounding.safetensors")
            pipe, denoiser, plans = _assemble(session, rounding, last=True)
            data = TraceSet(run / "trace")
            run.write_json("layers.json", _layer_table(session, plans, denoiser, data))
            if type(session.pipe) is type(pipe):
                pipe.scheduler = session.pipe.scheduler
            elif session.scheduler:
                log.warning("packed/ keeps its own scheduler; pass --scheduler to sample as traced")
            denoiser.cpu()
            with atomic_path(run / "packed") as temporary:
                pipe.save_pretrained(temporary)
    return run / "packed"


def _layer_table(
    session: Session, plans: list[LayerPlan], packed: nn.Module, data: TraceSet
) -> list[dict[str, Any]]:
    # Rows spread evenly over the set, so that every part of time is in the figures.
    batch = data.rows(torch.linspace(0, len(data) - 1, min(16, len(data))).long())

    def forward() -> Tensor:
        return data.replay(session.denoiser, batch)

    macs = count_macs(session.denoiser, forward, len(batch.x_t))
    sqnr = layer_sqnr(session.denoiser, packed, batch.t, forward)
    return layer_rows(session.sites, plans, packed, macs, sqnr)


def quantize(
    source: str | Path,
    run: str | Path,
    recipe: str | Recipe = "w8a8",
    **options: Any,
) -> Path:
    """Run load to pack and return the packed diffusers folder; options as for `load`.

    Raises:
        QuantempoError: see the stages.
    """
    return finish(load(source, run, recipe, **options))


def finish(session: Session) -> Path:
    """Run every stage that is not done yet, trace to pack, and return the packed folder."""
    stages: tuple[Callable[[Session], Any], ...] = (
        trace,
        calibrate,
        search,
        round_weights,
        correct,
    )
    for stage in stages:
        stage(session)
    return pack(session)
