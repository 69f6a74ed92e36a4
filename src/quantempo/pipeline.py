"""The main line: load -> trace -> calibrate -> search -> round -> pack -> run (layer L5).

One verb is one function here, one command and one artefact in the run folder. Each stage reads the
artefacts before it, so any can be run again from the file before it, and a killed run resumes: a
stage whose artefact was made from the same model and settings is not repeated. Evaluate and report
have files of their own (`quantempo.quality`, `quantempo.report`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantempo
from quantempo.bench import machine
from quantempo.calibrate.collect import collect_statistics, time_bin_edges
from quantempo.calibrate.dataset import TraceSet
from quantempo.calibrate.scales import LayerScales, search_scales, site_scales
from quantempo.calibrate.timesteps import make_time_sampler
from quantempo.calibrate.trace import trace as trace_pipeline
from quantempo.core import WEIGHT
from quantempo.errors import QuantempoError
from quantempo.layer_table import layer_rows, layer_sqnr
from quantempo.models.family import Site, denoiser_of, sites
from quantempo.models.load import check_finite, load_pipeline, model_digest
from quantempo.models.macs import count_macs
from quantempo.models.sampling import swap_scheduler
from quantempo.export.pack import pack_denoiser
from quantempo.quantizers import LayerPlan, find_clock
from quantempo.quantizers.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding import ROUNDINGS
from quantempo.runs import RunFolder, atomic_path

__all__ = [
    "STAGES",
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

log = logging.getLogger("quantempo")

STAGES = ("trace", "calibrate", "search", "round", "pack")


@dataclass
class Session:
    """One run folder with the float pipeline it belongs to.

    Args:
        run: the folder.
        source: where the float pipeline was loaded from.
        recipe: the resolved recipe.
        call: extra arguments of the pipeline's call (prompts, class labels, guidance).
        scheduler: name of the scheduler to trace and sample with, None for the pipeline's own.
        force: redo stages whose settings changed instead of refusing.
        device: torch device that traces and calibrates.
    """

    run: RunFolder
    source: str
    recipe: Recipe
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    force: bool = False
    device: str = "cpu"

    @cached_property
    def pipe(self) -> Any:
        """The float pipeline, float32."""
        pipe = load_pipeline(self.source).to(self.device)
        return swap_scheduler(pipe, self.scheduler) if self.scheduler else pipe

    @cached_property
    def denoiser(self) -> nn.Module:
        """The float denoiser."""
        return denoiser_of(self.pipe)[1].eval()

    @cached_property
    def sites(self) -> list[Site]:
        """Every layer that could be quantized."""
        return sites(self.denoiser)

    @property
    def num_train_timesteps(self) -> int:
        """T of the scheduler the model was trained with."""
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def key(self, stage: str) -> str:
        """Return a hash of everything that decides the artefact of a stage."""
        sections = {
            "trace": ("trace",),
            "calibrate": ("trace", "layers"),
            "search": ("trace", "layers", "activations", "weights"),
        }.get(stage, ("trace", "layers", "activations", "weights", "rounding"))
        settings = {name: asdict(getattr(self.recipe, name)) for name in sections}
        settings |= {"model": self.run.read_json("model.json")["sha256"], "call": self.call}
        settings["scheduler"] = type(self.pipe.scheduler).__name__
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def stale(self, stage: str) -> bool:
        """Return whether the run folder holds this stage's artefact of other settings."""
        done = self.run.read_json("manifest.json")["stages"].get(stage)
        return done is not None and done["key"] != self.key(stage)

    @contextmanager
    def stage(self, name: str, artefact: str) -> Iterator[bool]:
        """Yield whether the stage has to run; note its key and seconds when it ends.

        Raises:
            QuantempoError: the artefact is there but was made with other settings, and `force`
                is off.
        """
        done = self.run.read_json("manifest.json")["stages"].get(name)
        if done and self.run.has(artefact):
            if not self.stale(name):
                log.info("%s: done before (%s)", name, artefact)
                yield False
                return
            if not self.force:
                raise QuantempoError(
                    f"{self.run / artefact} was made with other settings; use another --run "
                    "folder, or --force to redo it"
                )
        start = time.perf_counter()
        yield True
        seconds = round(time.perf_counter() - start, 3)
        self.run.update_manifest(stages={name: {"key": self.key(name), "seconds": seconds}})
        log.info("%s: %.1f s -> %s", name, seconds, artefact)


def load(
    source: str | Path,
    run: str | Path,
    recipe: str | Recipe = "w8a8",
    *,
    call: dict[str, Any] | None = None,
    scheduler: str | None = None,
    force: bool = False,
    device: str = "cpu",
) -> Session:
    """Open a float pipeline and start (or continue) a run folder with it; writes `model.json`.

    Args:
        source: diffusers pipeline folder or hub name.
        run: run folder.
        recipe: a `Recipe`, the name of a shipped one or a TOML file.
        call: extra arguments of the pipeline's call.
        scheduler: sampler to use instead of the pipeline's own.
        force: let a run folder be taken over by another model or other settings.
        device: torch device that traces and calibrates.

    Raises:
        QuantempoError: the source is no float diffusers pipeline or holds NaN; the run folder
            belongs to another model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    make_time_sampler(recipe.trace.time_sampler, recipe.trace.time_sampler_args)
    folder = RunFolder(run)
    session = Session(folder, str(source), recipe, dict(call or {}), scheduler, force, device)
    denoiser = session.denoiser
    if find_clock(denoiser) is not None:
        raise QuantempoError(f"'{source}' is quantized already; start from the float model")
    check_finite(denoiser)
    digest = model_digest(denoiser)
    if folder.has("model.json") and not force:
        before = folder.read_json("model.json")
        if before["sha256"] != digest:
            raise QuantempoError(
                f"run folder {folder.path} belongs to another model ({before['path']}); choose "
                "another --run folder, or --force to start it over"
            )
    elif folder.path.exists() and not folder.has("model.json") and any(folder.path.iterdir()):
        raise QuantempoError(f"{folder.path} is not empty and no run folder; choose another --run")
    name, _ = denoiser_of(session.pipe)
    entry = {
        "path": str(source),
        "pipeline": type(session.pipe).__name__,
        "component": name,
        "class": type(denoiser).__name__,
        "scheduler": type(session.pipe.scheduler).__name__,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "sha256": digest,
    }
    folder.write_json("model.json", entry)
    before = folder.read_json("manifest.json") if folder.has("manifest.json") else {}
    folder.write_json(
        "manifest.json",
        {
            "recipe": recipe.to_dict(),
            "recipe_sha256": recipe.sha256,
            "call": session.call,
            "scheduler": scheduler,
            "versions": {
                "quantempo": quantempo.__version__,
                **{package: version(package) for package in ("torch", "diffusers")},
            },
            "machine": machine(),
            "seeds": {"trace": recipe.trace.seed},
            "stages": before.get("stages", {}),
        },
    )
    return session


def reopen(
    run: str | Path,
    recipe: str | Recipe | None = None,
    *,
    force: bool = False,
    device: str = "cpu",
) -> Session:
    """Continue a run folder from its manifest, with another recipe if one is given.

    Raises:
        QuantempoError: not a run folder, or the model at its path is another one now.
    """
    folder = RunFolder(run)
    manifest, model = folder.read_json("manifest.json"), folder.read_json("model.json")
    return load(
        model["path"],
        run,
        recipe or Recipe.from_dict(manifest["recipe"]),
        call=manifest["call"],
        scheduler=manifest["scheduler"],
        force=force,
        device=device,
    )


def trace(session: Session) -> TraceSet:
    """Run the float pipeline and keep the inputs its denoiser received; writes `trace/`."""
    settings = session.recipe.trace
    folder = session.run / "trace"
    with session.stage("trace", "trace/trace.json") as needed:
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
                force=session.force,
                model_hash=session.run.read_json("model.json")["sha256"],
            )
    return TraceSet(session.run / "trace")


def calibrate(session: Session) -> None:
    """Collect the statistics of every layer input over the trace; writes `stats.safetensors`."""
    data = TraceSet(session.run / "trace")
    with session.stage("calibrate", "stats.safetensors") as needed:
        if not needed:
            return
        plans = plan_layers(session.sites, session.recipe.layers)
        inputs = {p.name: p.segments for p in plans if p.kind == "int8"}
        edges = time_bin_edges(session.num_train_timesteps)
        statistics = collect_statistics(
            session.denoiser,
            inputs,
            data,
            edges,
            sites=session.recipe.layers.sites,
            per_unit=per_unit(data, session.num_train_timesteps),
        )
        tensors = {"time_bin_edges": edges}
        for name, (ranges, histogram) in statistics.items():
            state = {**ranges.state(), **histogram.state()}
            tensors |= {f"{name}.{key}": value for key, value in state.items()}
        session.run.write_safetensors("stats.safetensors", tensors)


def per_unit(data: TraceSet, num_train_timesteps: int) -> float:
    """Return the training time-steps in one unit of the recorded time: 1, or T for t in [0, 1]."""
    t = data.timesteps
    return float(num_train_timesteps) if t.is_floating_point() and float(t.max()) <= 1 else 1.0


def search(session: Session) -> None:
    """Choose every scale by the recipe's metrics; writes `scales.safetensors`."""
    with session.stage("search", "scales.safetensors") as needed:
        if not needed:
            return
        stats = session.run.read_safetensors("stats.safetensors")
        weights = {
            plan.name: session.denoiser.get_submodule(plan.name).weight.detach().cpu()
            for plan in plan_layers(session.sites, session.recipe.layers)
            if plan.kind == "int8"
        }
        tensors = search_scales(stats, weights, session.recipe)
        session.run.write_safetensors("scales.safetensors", tensors)


def round_weights(session: Session) -> None:
    """Choose the integer weights; writes `rounding.safetensors`."""
    with session.stage("round", "rounding.safetensors") as needed:
        if not needed:
            return
        rounding = ROUNDINGS.get(session.recipe.rounding.name)
        scales = LayerScales.read(session.run.read_safetensors("scales.safetensors"))
        spec = replace(WEIGHT, bits=session.recipe.weights.bits)
        codes = {
            name: rounding(
                session.denoiser.get_submodule(name).weight.detach().cpu(),
                layer.weight_scale,
                spec,
            )
            for name, layer in scales.items()
        }
        session.run.write_safetensors("rounding.safetensors", codes)


def pack(session: Session) -> Path:
    """Replace the layers, write the diffusers folder `packed/` and the table `layers.json`."""
    run = session.run
    with session.stage("pack", "packed") as needed:
        if needed:
            data = TraceSet(run / "trace")
            tensors = run.read_safetensors("scales.safetensors")
            scales = LayerScales.read(tensors)
            plans = [
                replace(p, buckets=scales[p.name].act_scale.shape[1]) if p.kind == "int8" else p
                for p in plan_layers(session.sites, session.recipe.layers)
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
                source_sha256=run.read_json("model.json")["sha256"],
            )
            with atomic_path(run / "packed") as temporary:
                pipe.save_pretrained(temporary)
            run.write_json("layers.json", _layer_table(session, plans, denoiser, data))
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
    bits = (session.recipe.weights.bits, session.recipe.activations.bits)
    return layer_rows(session.sites, plans, packed, macs, sqnr, bits)


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
