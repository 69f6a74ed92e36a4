"""The run folder as a cache: which file each stage leaves, and the key that says what made it."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantempo import __version__
from quantempo.core import ranks
from quantempo.core.machine import machine
from quantempo.core.progress import tell
from quantempo.errors import QuantempoError, log
from quantempo.recipe import Recipe
from quantempo.run_folder import Kept, RunFolder, file_sha256, hash_of, reading

__all__ = ["ARTEFACTS", "BESIDE", "Cache"]

# Stage -> the artefact that is there when it is done, what else it leaves, and the sections of the
# recipe that it reads besides those of the stages before it.
_STAGES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "trace": ("trace.json", ("trace",), ("trace",)),
    "calibrate": ("stats.safetensors", (), ("layers",)),
    "search": ("scales.safetensors", (), ("activations", "weights")),
    "round": ("rounding.safetensors", (), ("rounding",)),
    "pack": ("packed", ("layers.json",), ()),
}
_KEPT = "unfinished"
ARTEFACTS = {stage: artefact for stage, (artefact, _, _) in _STAGES.items()}
BESIDE = {stage: beside for stage, (_, beside, _) in _STAGES.items()}


@dataclass
class Cache:
    """The artefacts of one run folder under one recipe; `force` redoes stages of other settings."""

    run: RunFolder
    recipe: Recipe
    force: bool

    @property
    def surroundings(self) -> dict[str, Any]:
        """What the manifest says of who made the artefacts."""
        versions = {package: version(package) for package in ("torch", "diffusers")}
        return {"versions": {"quantempo": __version__, **versions}, "machine": machine()}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides all artefacts besides the recipe: the model, its call, its surroundings."""
        raise NotImplementedError

    def key(self, stage: str) -> str:
        """Return a hash of everything that decides the artefact of a stage."""
        settings = dict(self.identity)
        for name, (_, _, sections) in _STAGES.items():
            settings |= {section: asdict(getattr(self.recipe, section)) for section in sections}
            if name == stage:
                break
        if (limit := self.recipe.attention.max_error) and stage != "trace":
            settings["attention"] = True if stage == "calibrate" else limit
        if stage == "calibrate":
            # Statistics are of the float model: the same for any bits, and what stays in float.
            del settings["layers"]["bits"], settings["layers"]["float_macs"]
            if (how := self.recipe.activations).granularity != "time":
                settings["tokens"] = [how.metric, how.p]
        return hash_of(settings)

    def wait(self) -> None:
        """Wait until all ranks have looked at the run folder as it was."""
        ranks.told(None)

    def stale(self, stage: str) -> bool:
        """Return whether the run folder holds this stage's artefact of other settings."""
        entry = self.run.stages().get(stage)
        return entry is not None and entry.get("key") != self.key(stage)

    def refuse_stale(self, *stages: str) -> None:
        """Raise QuantempoError if the run folder holds an artefact (of any stage) not as set."""
        for stage in stages or ARTEFACTS:
            if self.run.has(ARTEFACTS[stage]) and self.stale(stage):
                text = f"{self.run / ARTEFACTS[stage]} was made with other settings"
                raise QuantempoError(f"{text}; use another --run folder, or --force to redo it")

    def seconds(self) -> dict[str, float]:
        """Return stage -> seconds of those that made what is packed."""
        with reading(self.run / "manifest.json"):
            return {
                name: float(entry["seconds"])
                for name, entry in self.run.stages().items()
                if name in ARTEFACTS and not self.stale(name)
            }

    def require_packed(self) -> Path:
        """Return the packed folder, else (none, or of other settings) QuantempoError."""
        packed = self.run / "packed"
        if not packed.is_dir() or "pack" not in self.run.stages():
            raise QuantempoError(f"nothing is packed in {self.run.path} yet; run quantempo pack")
        self.refuse_stale("pack")
        return packed

    def kept(self, stage: str) -> Kept:
        """Return what a killed run of a stage has left."""
        return Kept(RunFolder(self.run / _KEPT), self.key(stage))

    @contextmanager
    def stage(self, name: str) -> Iterator[bool]:
        """Yield whether the stage has to run; note its key and seconds when it ends.

        Raises QuantempoError: other settings, of it (without `force`) or of a stage before.
        """
        artefact = ARTEFACTS[name]
        label = f"{list(ARTEFACTS).index(name) + 1}/{len(ARTEFACTS)} {name:<10}"
        files = [self.run / file for file in (artefact, *BESIDE[name])]
        with self.run.lock():
            if name in self.run.stages() and all(file.exists() for file in files):
                if not self.stale(name):
                    log.info("%s     done before  %s", label, self.run / artefact)
                    yield False
                    return
                if not self.force:
                    self.refuse_stale(name)
            self.check_before(name)
            # Not after it: killed on the way, the new artefact would pass for the old one.
            if name in (stages := self.run.stages()):
                del stages[name]
                manifest = self.run.read_json("manifest.json")
                self.run.write_json("manifest.json", manifest | {"stages": stages})
            # No rank begins before all have looked.
            ranks.told(None, name)
            start = time.perf_counter()
            # One packs, what it writes is one folder.
            yield name != "pack" or not ranks.rank()
            if not ranks.rank():
                seconds = round(time.perf_counter() - start, 3)
                hashes = {file.name: file_sha256(file) for file in files if file.is_file()}
                entry = {"key": self.key(name), "seconds": seconds, "sha256": hashes}
                self.run.update_manifest(stages={name: entry}, **self.surroundings)
                shutil.rmtree(self.run / _KEPT, ignore_errors=True)
                log.info("%s %8.1f s     %s", label, seconds, self.run / artefact)
                tell("stage", name=name, seconds=seconds)
            ranks.told(None)

    def check_before(self, name: str) -> None:
        """Refuse to build a stage on one that is not done, or was done with other settings."""
        done = self.run.stages()
        for stage, artefact in ARTEFACTS.items():
            if stage == name:
                return
            if stage not in done or not self.run.has(artefact):
                text = f"{stage} is not done in {self.run.path}"
                raise QuantempoError(f"{text}; run quantempo {stage} before {name}")
            if self.stale(stage):
                text = f"{self.run / artefact} was made with other settings"
                raise QuantempoError(f"{text}; run quantempo {stage} --force before {name}")
