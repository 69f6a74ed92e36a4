"""A run folder with the float pipeline it belongs to: `load` starts one, `reopen` continues it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from quantempo.calibration.trace import SOURCES, TraceSet, affordable, check_settings
from quantempo.checkpoint.write import save_pipeline
from quantempo.errors import QuantempoError, log
from quantempo.models import load as models
from quantempo.models.large import room
from quantempo.models.layers import denoisers_of
from quantempo.models.sampling import check_arguments, scheduler_settings, swap_scheduler
from quantempo.pipeline.arguments import kept_arguments, read_call, write_call, write_settings
from quantempo.pipeline.cache import Cache
from quantempo.pipeline.quantize import LayerPlan, check_recipe, plan
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder, atomic_path, hash_of, reading

__all__ = ["Session", "load", "reopen"]


@dataclass
class Session(Cache):
    """One run folder with the float pipeline it belongs to; `source` and others as of `load`."""

    source: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    device: str = "cpu"
    data: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    only: str | None = None
    memory: int | str | None = None
    # A budget, the chains and steps that it was found to be enough for, and those asked for.
    minutes: tuple[Any, ...] | None = None
    also: list[str] = field(default_factory=list)

    @cached_property
    def original(self) -> Any:
        """The float pipeline as it was loaded; its networks are those of `pipe`."""
        memory = room(self.device) if self.memory is None else self.memory
        return models.load_pipeline(self.source, memory=memory, **self.loading).to(self.device)

    @cached_property
    def pipe(self) -> Any:
        """The float pipeline that is traced."""
        return swap_scheduler(self.original, self.scheduler) if self.scheduler else self.original

    @cached_property
    def denoiser(self) -> nn.Module:
        """The float denoiser; of several the first."""
        return denoisers_of(self.pipe)[self.component].eval()

    @property
    def component(self) -> str:
        """The name of the denoiser in the pipeline."""
        return self.only or next(iter(denoisers_of(self.pipe)))

    @cached_property
    def parts(self) -> list["Session"]:
        """This session, and one for each further denoiser with a run folder inside its own."""
        found = [self]
        for name in [] if self.only else list(denoisers_of(self.pipe))[1:]:
            part = replace(self, run=RunFolder(self.run / name), only=name)
            part.original, part.pipe = self.original, self.pipe
            found.append(part)
        return found

    @cached_property
    def plans(self) -> list[LayerPlan]:
        """What each layer becomes; to be asked when the trace is there."""
        return plan(self.denoiser, self.recipe, TraceSet(self.run / "trace"))

    def key(self, stage: str) -> str:
        """Return a hash of everything that decides the artefact of a stage."""
        found = super().key(stage)
        return hash_of([found, sorted(self.also)]) if self.also and stage == "pack" else found

    def save(self, networks: Mapping[str, nn.Module], folder: Path) -> None:
        """Write the pipeline with other networks, and with the scheduler it was traced with."""
        pipe = self.pipe
        if type(pipe) is not type(self.original):
            # The pipeline that runs this scheduler is none that diffusers can load.
            pipe = self.original
            log.warning("packed/ keeps its own scheduler; pass --scheduler to sample as traced")
        variant, revision, lora = (self.loading.get(k) for k in ("variant", "revision", "lora"))
        here = models.fetched(self.source, variant, revision)
        copies = models.component_copies(here, variant, self.original if lora else None)
        save_pipeline(pipe, networks, copies, folder, self.also)
        write_settings(folder, self.call)

    def release(self) -> None:
        """Leave the networks that only the trace runs to the files they were loaded from."""
        variant, revision, lora = (self.loading.get(k) for k in ("variant", "revision", "lora"))
        if not lora and self.source != str(self.run / "source"):
            here = models.fetched(self.source, variant, revision)
            models.release_others(self.original, here, variant)

    @cached_property
    def model(self) -> dict[str, Any]:
        """What `model.json` holds of the float pipeline; the hash is of the denoiser's weights."""
        folder = Path(self.source)
        return {
            "path": str(folder.resolve()) if folder.exists() else self.source,
            "pipeline": type(self.pipe).__name__,
            "component": self.component,
            "class": type(self.denoiser).__name__,
            "scheduler": type(self.pipe.scheduler).__name__,
            "parameters": sum(p.numel() for p in self.denoiser.parameters()),
            "sha256": models.model_digest(self.denoiser),
        }

    @cached_property
    def identity(self) -> dict[str, Any]:  # type: ignore[override]
        """What decides all artefacts besides the recipe: the networks, the sampler, the call."""
        others = {
            name: models.model_digest(part)
            for name, part in self.pipe.components.items()
            if isinstance(part, nn.Module) and part is not self.denoiser
        }
        images = self.data if SOURCES.get(self.recipe.trace.source).needs_images else None
        return {
            "model": self.model["sha256"],
            "others": others,
            "configs": models.configs_of(self.pipe),
            "scheduler": scheduler_settings(self.pipe.scheduler),
            "call": self.call,
            "data": images and str(Path(images).resolve()),
            **({"only": self.only} if self.only else {}),
        }


def load(
    source: Any, run: str | Path, recipe: str | Recipe = "w8a8", *,
    call: dict[str, Any] | None = None, scheduler: str | None = None, force: bool = False,
    device: str = "cpu", data: str | Path | None = None, only: str | None = None,
    memory: int | str | None = None, minutes: float | None = None,
    also: str | Sequence[str] = (), **loading: Any,
) -> Session:  # fmt: skip
    """Open a float pipeline and start (or continue) a run folder with it; writes `model.json`.

    Args:
        source: a diffusers folder or hub name, or a pipeline in memory, which is saved in the run
            folder (`source/`) and stays as it is but for its device.
        recipe: a `Recipe`, the name of a shipped one or a TOML file.
        call: arguments of the pipeline's call: numbers, text, tensors, arrays, pictures, lists.
        scheduler: to trace and sample with, None for the pipeline's own.
        force: let a run folder be taken over by another model or other settings.
        data: folder of images, needed by the sources "raw" and "mimic" of `recipe.trace`.
        only: the one network to quantize of a pipeline with several denoisers, None for all.
        memory: bytes ("12GB") beyond which networks stay in their files; None: a third of them all.
        minutes: budget for which chains and steps are chosen, once for a run; see `affordable`.
        also: components whose weights are to be int8 too: "text_encoder,vae".
        loading: dtype, variant and revision of `load_pipeline`; lora: files to merge ["FILE:0.8"].
    Raises QuantempoError: the source is no float diffusers pipeline or holds NaN; a name in the
    recipe that nothing has; the run folder belongs to another model.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    call = kept_arguments(call or {})
    folder = None if data is None else str(data)
    check_settings(recipe.trace, folder)
    models.check_device(device)
    store, given = RunFolder(run), not isinstance(source, str | Path)
    path = str(store / "source" if given else source)
    loras = [models.named_lora(entry) for entry in loading.pop("lora", None) or ()]
    loading = {k: str(v).removeprefix("torch.") for k, v in loading.items() if v is not None}
    loading |= {"lora": loras} if loras else {}
    if given and loading:
        raise QuantempoError(f"{', '.join(loading)} is for folders; change the pipeline itself")
    how = (store, recipe, force, path, call, scheduler, device, folder, loading, only, memory)
    session = Session(*how)
    if given:
        session.original = models.check_pipeline(source).to(device)
    if only and only not in (known := denoisers_of(session.pipe)):
        raise QuantempoError(f"got only '{only}'; this pipeline denoises with: {', '.join(known)}")
    session.also = models.other_networks(session.pipe, also)
    if minutes is not None:
        session.recipe = recipe = _afforded(session, minutes)
    for part in session.parts:
        check_recipe(recipe, part.denoiser, *denoisers_of(session.pipe).values())
        models.check_finite(part.denoiser)
    check_arguments(session.pipe, call)
    for part in session.parts:
        _check_owner(part)
    if given and not (store.has("source") and store.stages() and not force):
        with atomic_path(store / "source") as temporary:
            source.save_pretrained(temporary)
    for part in session.parts:
        _write_manifest(part)
    return session


def _afforded(session: Session, minutes: float) -> Recipe:
    """Return the recipe with chains and steps for a budget; the same ones for the same budget."""
    run, recipe = session.run, session.recipe
    if not 0 <= minutes < float("inf"):
        raise QuantempoError(f"got {minutes} minutes; expected a number, 0 or more")
    asked = {name: getattr(recipe.trace, name) for name in ("chains", "steps")}
    before = run.read_json("manifest.json") if run.has("manifest.json") else {}
    known: Any = before.get("minutes")
    ours = known and run.read_json("model.json")["sha256"] == session.model["sha256"]
    # Whoever goes on with a run asks for what was found.
    if not ours or known[0] != minutes or asked not in known[1:]:
        known = minutes, affordable(session.pipe, recipe.trace, session.call, minutes), asked
    session.minutes = known
    return recipe.override("trace", **known[1])


def _write_manifest(session: Session) -> None:
    """Write `model.json` and `manifest.json` if they say something new: a run may be read-only."""
    session.wait()
    run, recipe = session.run, session.recipe
    manifest = {
        "recipe": recipe.to_dict(),
        "recipe_toml": recipe.to_toml(),
        "recipe_sha256": recipe.sha256,
        "call_sha256": hash_of(session.call),
        "scheduler": session.scheduler,
        "data": session.data,
        "only": session.only,
        "memory": session.memory,
        "also": session.also,
        "minutes": session.minutes and list(session.minutes),
        "loading": session.loading,
        "seeds": {"trace": recipe.trace.seed},
    }
    # What runs of before know nothing of.
    known = dict.fromkeys(("only", "memory", "minutes")) | {"also": []}
    known |= run.read_json("manifest.json") if run.has("manifest.json") else {}
    model = run.read_json("model.json") if run.has("model.json") else None
    if known == {**known, **manifest} and model == session.model:
        return
    with run.lock():
        # First, so that whoever is killed here leaves a run folder.
        run.write_json("model.json", session.model)
        manifest |= {"call": write_call(run, session.call), "stages": run.stages()}
        run.write_json("manifest.json", manifest | session.surroundings)


def _check_owner(session: Session) -> None:
    """Raise QuantempoError for a folder of another run (without `force`), or of other files."""
    folder = session.run
    # First: another process may begin the run just now.
    other = folder.foreign()
    if folder.is_run:
        if session.force:
            return
        before = folder.read_json("model.json") if folder.has("model.json") else session.model
        with reading(folder / "model.json"):
            digest, path = before["sha256"], before["path"]
        if digest != session.model["sha256"]:
            text = f"run folder {folder.path} belongs to another model ({path}); choose another"
            raise QuantempoError(f"{text} --run folder, or --force to start it over")
        session.refuse_stale()
    elif other:
        raise QuantempoError(f"{folder.path} is not empty and no run folder; choose another --run")


def reopen(
    run: str | Path, recipe: str | Recipe | None = None, *, force: bool = False, device: str = "cpu"
) -> Session:
    """Continue a run folder from its manifest, with another recipe if one is given; see `load`."""
    folder = RunFolder(run)
    manifest, model = folder.read_json("manifest.json"), folder.read_json("model.json")
    with reading(folder / "manifest.json"):
        source = str(folder / "source" if folder.has("source") else model["path"])
        options = {k: manifest.get(k) for k in ("scheduler", "data", "only", "memory")}
        options["also"] = manifest.get("also", [])
        options |= {"call": read_call(folder, manifest["call"]), "force": force, "device": device}
        options["minutes"] = (minutes := manifest.get("minutes")) and float(minutes[0])
        options |= manifest.get("loading", {})
        recipe = recipe or Recipe.from_dict(manifest["recipe"])
    return load(source, run, recipe, **options)
