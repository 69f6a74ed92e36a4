"""A run folder with the float pipeline it belongs to: `load` starts one, `reopen` continues it.

Which artefact is whose is decided here: every stage notes a hash of the model and the settings that
made it, so a finished stage is not repeated and another model's artefact is never used. Layer L5.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from quantempo.bench import machine
from quantempo.calibrate.timesteps import make_time_sampler
from quantempo.errors import QuantempoError
from quantempo.models.family import Site, denoiser_of, sites
from quantempo.models.load import check_finite, load_pipeline, model_digest
from quantempo.models.sampling import swap_scheduler
from quantempo.quantizers import find_clock
from quantempo.recipe import Recipe
from quantempo.runs import RunFolder
from quantempo.version import __version__

__all__ = ["Session", "load", "reopen"]

log = logging.getLogger("quantempo")


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
        settings: dict[str, Any] = {name: asdict(getattr(self.recipe, name)) for name in sections}
        settings["model"] = self.run.read_json("model.json")["sha256"]
        settings["call"] = self.call
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
    name, denoiser = denoiser_of(session.pipe)
    if find_clock(denoiser) is not None:
        raise QuantempoError(f"'{source}' is quantized already; start from the float model")
    check_finite(denoiser)
    model = {
        "path": str(source),
        "pipeline": type(session.pipe).__name__,
        "component": name,
        "class": type(denoiser).__name__,
        "scheduler": type(session.pipe.scheduler).__name__,
        "parameters": sum(p.numel() for p in denoiser.parameters()),
        "sha256": model_digest(denoiser),
    }
    _check_owner(folder, model["sha256"], force)
    folder.write_json("model.json", model)
    stages = folder.read_json("manifest.json")["stages"] if folder.has("manifest.json") else {}
    versions = {package: version(package) for package in ("torch", "diffusers")}
    manifest = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "recipe_sha256": recipe.sha256,
        "call": session.call,
        "scheduler": scheduler,
        "versions": {"quantempo": __version__, **versions},
        "machine": machine(),
        "seeds": {"trace": recipe.trace.seed},
        "stages": stages,
    }
    folder.write_json("manifest.json", manifest)
    return session


def _check_owner(folder: RunFolder, sha256: str, force: bool) -> None:
    """Refuse a folder that holds the run of another model, or something else than a run."""
    if folder.has("model.json"):
        before = folder.read_json("model.json")
        if before["sha256"] != sha256 and not force:
            raise QuantempoError(
                f"run folder {folder.path} belongs to another model ({before['path']}); choose "
                "another --run folder, or --force to start it over"
            )
    elif folder.path.is_file() or (folder.path.is_dir() and any(folder.path.iterdir())):
        raise QuantempoError(f"{folder.path} is not empty and no run folder; choose another --run")


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
