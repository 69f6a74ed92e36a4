"""A run folder with the float pipeline it belongs to: `load` starts one, `reopen` continues it.

Which artefact is whose is decided here: every stage notes a hash of the model and the settings that
made it, so a finished stage is not repeated and another model's artefact is never used.
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

from quantempo import __version__
from quantempo.calibration.sources import needs_images
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.core.machine import machine
from quantempo.errors import QuantempoError
from quantempo.models.layers import Site, check_roles, denoiser_of, sites
from quantempo.models.load import check_device, check_finite, load_pipeline, model_digest
from quantempo.models.sampling import swap_scheduler
from quantempo.quantized import find_clock
from quantempo.quantized.plan import check_bits
from quantempo.recipe import Recipe
from quantempo.rounding import ROUNDINGS, check_start
from quantempo.run_folder import RunFolder
from quantempo.scales import make_metric

__all__ = ["ARTEFACTS", "BESIDE", "Session", "load", "reopen"]

log = logging.getLogger("quantempo")

# Stage -> the artefact that is there when it is done.
ARTEFACTS = {
    "trace": "trace.json",
    "calibrate": "stats.safetensors",
    "search": "scales.safetensors",
    "round": "rounding.safetensors",
    "correct": "correction.safetensors",
    "pack": "packed",
}
# What a stage leaves besides its artefact.
BESIDE = {"trace": ("trace",), "correct": ("correction.json",)}
_SECTIONS = {
    "calibrate": ("layers",),
    "search": ("activations", "weights"),
    "round": ("rounding",),
    "correct": ("correction",),
    "pack": (),
}
_OTHER = "{path} was made with other settings; use another --run folder, or --force to redo it"


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
        data: folder of images for the sources of x_t that need them.
    """

    run: RunFolder
    source: str
    recipe: Recipe
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    force: bool = False
    device: str = "cpu"
    data: str | None = None

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

    @cached_property
    def model(self) -> dict[str, Any]:
        """What `model.json` holds of the float pipeline; the hash is of the denoiser's weights."""
        folder = Path(self.source)
        return {
            "path": str(folder.resolve()) if folder.is_dir() else self.source,
            "pipeline": type(self.pipe).__name__,
            "component": denoiser_of(self.pipe)[0],
            "class": type(self.denoiser).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "sha256": model_digest(self.denoiser),
        }

    @cached_property
    def _surroundings(self) -> dict[str, str]:
        """Hashes of what else decides the recorded inputs: the scheduler, the other networks."""
        # Private entries are of diffusers; a list of names among them is in the order of a set.
        known = {k: v for k, v in self.pipe.scheduler.config.items() if not k.startswith("_")}
        settings = json.dumps(known, sort_keys=True, default=str)
        found = {type(self.pipe.scheduler).__name__: hashlib.sha256(settings.encode()).hexdigest()}
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and part is not self.denoiser:
                found[name] = model_digest(part)
        return found

    def key(self, stage: str) -> str:
        """Return a hash of everything that decides the artefact of a stage."""
        # Each stage depends on the sections of those before it and on its own.
        sections: tuple[str, ...] = ("trace",)
        for name, own in _SECTIONS.items():
            if stage == "trace":
                break
            sections += own
            if name == stage:
                break
        settings: dict[str, Any] = {name: asdict(getattr(self.recipe, name)) for name in sections}
        if stage == "calibrate":
            # Statistics are of the float model: the same for any bits.
            del settings["layers"]["bits"]
        settings |= {"model": self.model["sha256"], "call": self.call, **self._surroundings}
        if needs_images(self.recipe.trace.source):
            settings["data"] = self.data and str(Path(self.data).resolve())
        text = json.dumps(settings, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def stale(self, stage: str) -> bool:
        """Return whether the run folder holds this stage's artefact of other settings."""
        done = self.run.read_json("manifest.json")["stages"].get(stage)
        return done is not None and done["key"] != self.key(stage)

    def refuse_stale(self) -> None:
        """Raise QuantempoError if the run folder holds an artefact of other settings."""
        for stage, artefact in ARTEFACTS.items():
            if self.run.has(artefact) and self.stale(stage):
                raise QuantempoError(_OTHER.format(path=self.run / artefact))

    def _check_before(self, name: str) -> None:
        """Refuse to build a stage on one that is not done, or was done with other settings."""
        done = self.run.read_json("manifest.json")["stages"]
        for stage, artefact in ARTEFACTS.items():
            if stage == name:
                return
            if stage == "correct" and not self.recipe.correction.affine:
                continue
            if stage not in done or not self.run.has(artefact):
                raise QuantempoError(
                    f"{stage} is not done in {self.run.path}; run quantempo {stage} before {name}"
                )
            if self.stale(stage):
                raise QuantempoError(
                    f"{self.run / artefact} was made with other settings; run quantempo {stage} "
                    f"--force before {name}"
                )

    def seconds(self) -> dict[str, float]:
        """Return stage -> seconds of those that made what the run folder holds.

        A stage of another recipe that this one does not have (a correction) is left out.
        """
        done = self.run.read_json("manifest.json")["stages"]
        return {
            name: entry["seconds"]
            for name, entry in done.items()
            if name not in ARTEFACTS or not self.stale(name)
        }

    def forget(self, stage: str) -> None:
        """Remove what a stage left that this recipe does not have."""
        self._undo(stage)
        for name in (ARTEFACTS[stage], *BESIDE.get(stage, ())):
            (self.run / name).unlink(missing_ok=True)

    def _undo(self, stage: str) -> None:
        manifest = self.run.read_json("manifest.json")
        if manifest["stages"].pop(stage, None) is not None:
            self.run.write_json("manifest.json", manifest)

    def require_packed(self) -> Path:
        """Return the packed folder.

        Raises:
            QuantempoError: nothing is packed yet, or it was made with other settings.
        """
        packed = self.run / "packed"
        if not packed.is_dir() or "pack" not in self.run.read_json("manifest.json")["stages"]:
            raise QuantempoError(f"nothing is packed in {self.run.path} yet; run quantempo pack")
        if self.stale("pack"):
            raise QuantempoError(_OTHER.format(path=packed))
        return packed

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Yield whether the stage has to run; note its key and seconds when it ends.

        Raises:
            QuantempoError: the artefact is there but was made with other settings, and `force`
                is off.
        """
        artefact = ARTEFACTS[name]
        done = self.run.read_json("manifest.json")["stages"].get(name)
        if done and self.run.has(artefact):
            if not self.stale(name):
                log.info("%s: done before (%s)", name, artefact)
                yield False
                return
            if not self.force:
                raise QuantempoError(_OTHER.format(path=self.run / artefact))
        self._check_before(name)
        if done:
            # Not after it: killed on the way, the new artefact would pass for the old one.
            self._undo(name)
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
    data: str | Path | None = None,
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
        data: folder of images, needed by the sources "raw" and "mimic" of `recipe.trace`.

    Raises:
        QuantempoError: the source is no float diffusers pipeline or holds NaN; a name in the recipe
            that nothing has; the run folder belongs to another model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    _check_names(recipe, data)
    check_device(device)
    folder = RunFolder(run)
    session = Session(folder, str(source), recipe, dict(call or {}), scheduler, force, device)
    session.data = None if data is None else str(data)
    if find_clock(session.denoiser) is not None:
        raise QuantempoError(f"'{source}' is quantized already; start from the float model")
    check_finite(session.denoiser)
    check_bits(session.sites, recipe)
    _check_owner(session)
    stages = folder.read_json("manifest.json")["stages"] if folder.has("manifest.json") else {}
    versions = {package: version(package) for package in ("torch", "diffusers")}
    manifest = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "recipe_sha256": recipe.sha256,
        "call": session.call,
        "scheduler": scheduler,
        "data": session.data,
        "versions": {"quantempo": __version__, **versions},
        "machine": machine(),
        "seeds": {"trace": recipe.trace.seed},
        "stages": stages,
    }
    folder.write_json("manifest.json", manifest)
    folder.write_json("model.json", session.model)
    return session


def _check_names(recipe: Recipe, data: str | Path | None) -> None:
    """Refuse a recipe with a name that no registry knows, before anything is computed."""
    source = recipe.trace.source
    if needs_images(source) and data is None:
        raise QuantempoError(f"source '{source}' needs images; pass a folder of them (--data)")
    make_time_sampler(recipe.trace.time_sampler, recipe.trace.time_sampler_args)
    make_metric(recipe.activations.metric, recipe.activations.p)
    make_metric(recipe.weights.metric, recipe.weights.p)
    if ROUNDINGS.get(recipe.rounding.name).needs == "block":
        check_start(recipe.rounding)
    check_roles(recipe.layers.float_roles)


def _check_owner(session: Session) -> None:
    """Refuse a folder that holds another run, or something else than a run; writes nothing.

    Raises:
        QuantempoError: another model or other settings without `force`, or not a run folder.
    """
    folder = session.run
    if folder.has("model.json"):
        before = folder.read_json("model.json")
        if session.force:
            return
        if before["sha256"] != session.model["sha256"]:
            raise QuantempoError(
                f"run folder {folder.path} belongs to another model ({before['path']}); choose "
                "another --run folder, or --force to start it over"
            )
        session.refuse_stale()
    elif folder.path.is_file() or folder.foreign():
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
        data=manifest.get("data"),
        force=force,
        device=device,
    )
