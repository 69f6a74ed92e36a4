"""The main line: load -> trace -> calibrate -> search -> round -> pack -> run (layer L5).

One verb is one function here, one command and one artefact in the run folder. Each stage reads the
artefacts before it, so any can be run again from the file before it, and a killed run resumes: a
stage whose artefact was made from the same model and settings is not repeated. Evaluate and report
have files of their own (`quantempo.quality`, `quantempo.report`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.calibrate.collect import collect_statistics, state_tensors, time_bin_edges
from quantempo.calibrate.dataset import TraceSet
from quantempo.calibrate.scales import LayerScales, schedule_scales, search_scales, site_scales
from quantempo.calibrate.sources import needs_images
from quantempo.calibrate.timesteps import make_time_sampler
from quantempo.calibrate.trace import trace as trace_pipeline
from quantempo.core import WEIGHT
from quantempo.evaluate import load_images
from quantempo.export.pack import pack_denoiser
from quantempo.layer_table import layer_rows, layer_sqnr
from quantempo.models.family import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.macs import count_macs
from quantempo.quantizers import LayerPlan, bits_of, measured_sites
from quantempo.quantizers.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding import ROUNDINGS
from quantempo.runs import atomic_path
from quantempo.session import Session, load, reopen

log = logging.getLogger("quantempo")

__all__ = [
    "Session",
    "calibrate",
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
                legacy_pairing=settings.legacy_pairing,
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
        plans = plan_layers(session.sites, session.recipe)
        inputs = {p.name: p.segments for p in plans if p.kind == "int8"}
        edges = time_bin_edges(session.num_train_timesteps)
        statistics = collect_statistics(
            session.denoiser,
            inputs,
            data,
            edges,
            sites=measured_sites(session.recipe.layers.sites, session.denoiser),
            per_unit=per_unit(data, session.num_train_timesteps),
        )
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
        weights = {
            name: session.denoiser.get_submodule(name).weight.detach().cpu() for name in bits
        }
        chosen = session.recipe.layers.sites
        measured = measured_sites(chosen, session.denoiser)
        recipe = session.recipe.override("layers", sites=measured)
        tensors = search_scales(stats, weights, recipe, bits=bits)
        given = set(chosen) - set(measured)
        tensors |= schedule_scales(given, session.pipe.scheduler, session.recipe.trace.steps)
        session.run.write_safetensors("scales.safetensors", tensors)


def round_weights(session: Session) -> None:
    """Choose the integer weights; writes `rounding.safetensors`."""
    with session.stage("round") as needed:
        if not needed:
            return
        rounding = ROUNDINGS.get(session.recipe.rounding.name)
        scales = LayerScales.read(session.run.read_safetensors("scales.safetensors"))
        bits = bits_of(plan_layers(session.sites, session.recipe))
        codes = {
            name: rounding(
                session.denoiser.get_submodule(name).weight.detach().cpu(),
                layer.weight_scale,
                replace(WEIGHT, bits=bits[name][0]),
            )
            for name, layer in scales.items()
        }
        session.run.write_safetensors("rounding.safetensors", codes)


def pack(session: Session) -> Path:
    """Replace the layers, write the diffusers folder `packed/` and the table `layers.json`."""
    run = session.run
    with session.stage("pack") as needed:
        if needed:
            data = TraceSet(run / "trace")
            tensors = run.read_safetensors("scales.safetensors")
            scales = LayerScales.read(tensors)
            plans = [
                replace(p, buckets=scales[p.name].act_scale.shape[1]) if p.kind == "int8" else p
                for p in plan_layers(session.sites, session.recipe)
            ]
            pipe = load_pipeline(session.source)
            denoiser = denoiser_of(pipe)[1]
            pack_denoiser(
                denoiser,
                plans,
                scales,
                run.read_safetensors("rounding.safetensors"),
                bucket_of=tensors["bucket_of"],
                per_unit=per_unit(data, session.num_train_timesteps),
                sites=site_scales(tensors),
                recipe=session.recipe,
                source_sha256=session.model["sha256"],
            )
            run.write_json("layers.json", _layer_table(session, plans, denoiser, data))
            if type(session.pipe) is type(pipe):
                pipe.scheduler = session.pipe.scheduler
            elif session.scheduler:
                log.warning("packed/ keeps its own scheduler; pass --scheduler to sample as traced")
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
    stages: tuple[Callable[[Session], Any], ...] = (trace, calibrate, search, round_weights)
    for stage in stages:
        stage(session)
    return pack(session)
