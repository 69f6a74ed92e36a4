"""The ladder of recipes: from the paper's to ours, one rung an idea, on one protocol.

Every rung is a run folder made by the main line; its images start from the seeds of the float
model's. What is written: `rungs/NAME.json` for each rung and, from all of them, `results.json`,
`quality.md` and plots. A killed ladder resumes, and several processes may do different rungs of
one folder (`only`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import nn

from quantempo.core.machine import machine
from quantempo.engines.select import attached
from quantempo.errors import QuantempoError
from quantempo.evaluation import load_images, psnr_db, ssim
from quantempo.evaluation.features import Extractor, Features, extract, load_extractor
from quantempo.evaluation.scores import frechet_distance
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline, model_digest
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.cache import ARTEFACTS, BESIDE
from quantempo.pipeline.quality import open_model, summary
from quantempo.pipeline.session import Session
from quantempo.recipe import Recipe
from quantempo.registry import check_known
from quantempo.run_folder import RunFolder, atomic_path
from studies.ablation.page import write_quality
from studies.ablation.rungs import Rung, rungs
from studies.ablation.variants import quantized
from studies.command import process_state

__all__ = ["LadderSettings", "Rung", "ladder", "rungs"]

log = logging.getLogger("quantempo")

# First seed of float images that share no noise with those of the rungs.
OTHER_SEEDS = 500_000_000
PARTS = 3
# What all rungs of one folder have in common; the rest of the settings is about the work.
PROTOCOL = (
    *("source", "model_sha256", "data", "steps", "first_seed", "tf32", "scheduler", "call"),
    "override",
)
_ABSENT: dict[str, Any] = {"call": {}, "override": {}}


@dataclass(frozen=True)
class LadderSettings:
    """How a ladder runs.

    source: the float pipeline; out: folder; data: folder of real images, or None; steps: of DDIM
    while sampling and tracing; images: of each rung; images_full: of rungs with distribution
    scores; first_seed: of the images; tf32: let float32 products of sampling run in TF32;
    scheduler: None for the pipeline's own; call: further arguments of the pipeline; engine: of the
    packed models; override: section -> settings that all recipes have instead of their own.
    """

    source: str
    out: Path
    data: str | None = None
    steps: int = 100
    images: int = 256
    images_full: int = 5120
    first_seed: int = 0
    device: str = "cpu"
    batch_size: int = 64
    tf32: bool = False
    scheduler: str | None = "ddim"
    engine: str = "auto"
    call: dict[str, Any] = field(default_factory=dict)
    override: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A spread is over three parts; a distance takes two images in each.
        for name, value, least in (
            ("images", self.images, PARTS),
            ("images_full", self.images_full, max(2 * PARTS, self.images)),
        ):
            if value < least:
                raise QuantempoError(f"got {name} = {value}; expected at least {least}")


class _Bench:
    """What all rungs of one process share: float images, features, the float pipeline."""

    engine = "float"

    def __init__(self, settings: LadderSettings) -> None:
        self.settings, self.out = settings, RunFolder(settings.out)

    @cached_property
    def extractor(self) -> Extractor:
        """The network of the distances."""
        return load_extractor("lite0", device=self.settings.device)

    @cached_property
    def identity(self) -> str:
        """Hash of what decides images besides the network."""
        s = self.settings
        kept = (s.source, s.steps, s.first_seed, s.tf32, s.scheduler, s.call)
        return hashlib.sha256(repr(kept).encode()).hexdigest()[:12]

    def sample(
        self, source: str | Path, first: int, count: int, network: nn.Module | None = None
    ) -> np.ndarray:
        """Return (count, H, W, C) uint8 images of a pipeline, float or packed or of a network."""
        s = self.settings
        engine = "auto" if Path(source) == Path(s.source) else s.engine
        pipe = open_model(source, engine=engine, scheduler=s.scheduler, device=s.device)
        name, own = denoiser_of(pipe)
        self.engine = "simulated" if network is not None else attached(own) or "float"
        seeds = range(first, first + count)
        with process_state(s.tf32), patch.object(pipe, name, network or own):
            return run_pipeline(pipe, seeds, steps=s.steps, batch_size=s.batch_size, **s.call)

    def float_images(self, first: int, count: int) -> np.ndarray:
        """Return the float model's images, from disk if they were made before."""
        path = self.out / f"images/float-{self.identity}-{first}.npy"
        # Of several processes one makes them.
        with RunFolder(path.parent).lock():
            known = np.load(path) if path.is_file() else None
            if known is None or len(known) < count:
                known = self.sample(self.settings.source, first, count)
                _save(path, known)
        return known[:count]

    def features(self, images: np.ndarray) -> Features:
        """Return the features of images."""
        return extract(self.extractor, images, device=self.settings.device)

    @cached_property
    def real(self) -> Features | None:
        """Features of at most 10,000 real images, or None without a folder of them."""
        s = self.settings
        if s.data is None:
            return None
        size = self.float_images(s.first_seed, s.images).shape[1:3]
        return self.features(load_images(s.data, size, limit=10_000).images)


def _save(path: Path, images: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, images)


def ladder(
    settings: LadderSettings, only: tuple[str, ...] = (), minutes: float | None = None
) -> Path:
    """Run the rungs that are not done, write what follows from all that are; return the text.

    Args:
        settings: model, folder, protocol.
        only: names of rungs, in that order; () for all. "float" makes the float model's figures.
        minutes: start no rung after that long.

    Raises:
        QuantempoError: an unknown rung, or a folder that holds something else.
    """
    known = {rung.name: rung for rung in rungs()}
    check_known(only, ["float", *known], "unknown rung")
    about = _start(settings)
    _run(_Bench(settings), only, minutes, about)
    return collect(settings.out)


def _run(
    bench: _Bench, only: tuple[str, ...], minutes: float | None, about: dict[str, Any]
) -> None:
    known = {rung.name: rung for rung in rungs()}
    start, order = time.perf_counter(), only or ("float", *known)
    for name in order:
        if _done(bench.out, name, known.get(name), about) is not None:
            log.info("%s: done before", name)
            continue
        if minutes is not None and time.perf_counter() - start > 60 * minutes:
            log.warning("%s and what follows it is left: the time is up", name)
            break
        failed = bench.out / f"rungs/{name}.failed.json"
        try:
            result = _float(bench) if name == "float" else _climb(bench, known[name])
        except Exception as error:  # one rung must not lose the others
            log.exception("%s failed: %s", name, error)
            bench.out.write_json(f"rungs/{name}.failed.json", {"error": str(error)})
            continue
        bench.out.write_json(f"rungs/{name}.json", result)
        failed.unlink(missing_ok=True)


def _start(settings: LadderSettings) -> dict[str, Any]:
    """Check what every rung needs before the first one; return and write `ladder.json`."""
    out = RunFolder(settings.out)
    if out.foreign() and not out.has("ladder.json"):
        raise QuantempoError(f"{settings.out} is not empty and no ladder; choose another --out")
    about = {**asdict(settings), "out": settings.out.name, "source": Path(settings.source).name}
    about["data"] = settings.data and Path(settings.data).name
    # Names of folders tell little: rungs of another model's weights must not be taken for these.
    about["model_sha256"] = model_digest(denoiser_of(load_pipeline(settings.source))[1])
    before = out.read_json("ladder.json") if out.has("ladder.json") else about
    for key in PROTOCOL:
        # A ladder of an earlier version may lack a key.
        if (known := before.get(key, _ABSENT.get(key, about[key]))) != about[key]:
            raise QuantempoError(
                f"the ladder in {settings.out} has {key} = {known}, got {about[key]}; choose "
                "another --out"
            )
    if settings.data is not None:
        load_images(settings.data, limit=1)
    out.write_json("ladder.json", about | {"machine": machine()})
    return about


def _done(
    folder: RunFolder, name: str, rung: Rung | None, about: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what a rung gave, None if it was not run as it is now (`rung` None: "float")."""
    if not folder.has(f"rungs/{name}.json"):
        return None
    row = folder.read_json(f"rungs/{name}.json")
    count = about["images_full" if rung is None or rung.full else "images"]
    wanted = rung and (_recipe(rung, about).to_dict(), rung.variant)
    if row["images"] == count and (not wanted or (row["recipe"], row.get("variant", "")) == wanted):
        return dict(row)
    log.warning("%s was made with another recipe or number of images; it counts as not run", name)
    return None


def _recipe(rung: Rung, about: dict[str, Any]) -> Recipe:
    """Return the recipe of a rung under the protocol of a ladder."""
    recipe = rung.recipe.override("trace", steps=about["steps"])
    for section, values in about.get("override", {}).items():
        recipe = recipe.override(section, **values)
    return recipe


def _float(bench: _Bench) -> dict[str, Any]:
    """Return the float model's own scores: against data, and between two sets of seeds."""
    s = bench.settings
    first = bench.features(bench.float_images(s.first_seed, s.images_full))
    other = bench.features(bench.float_images(OTHER_SEEDS, s.images_full))
    result = {
        "images": s.images_full,
        "fed_lite0_other_seeds": frechet_distance(other.pooled, first.pooled),
    }
    return result | _against_data(bench, first)


def _against_data(bench: _Bench, features: Features) -> dict[str, Any]:
    real = bench.real
    if real is None:
        return {"fed_lite0_vs_data": None}
    parts = (features[slice(part, None, PARTS)] for part in range(PARTS))
    std = np.std([frechet_distance(part.pooled, real.pooled) for part in parts], ddof=1)
    return {
        "fed_lite0_vs_data": frechet_distance(features.pooled, real.pooled),
        "fed_lite0_vs_data_std_of_thirds": float(std),
    }


def _climb(bench: _Bench, rung: Rung) -> dict[str, Any]:
    """Make one rung: quantize, sample, score."""
    s = bench.settings
    recipe = _recipe(rung, asdict(s))
    how: dict[str, Any] = {"scheduler": s.scheduler, "call": s.call, "device": s.device}
    session = pipeline.load(s.source, s.out / rung.name, recipe, force=True, **how)
    # Of several processes one traces.
    with bench.out.lock():
        _borrow(session, s.out, last="trace")
        data = pipeline.trace(session)
    network, count = None, s.images_full if rung.full else s.images
    if rung.variant:
        network, made = quantized(session.denoiser, recipe, data, rung.variant)
        sizes = _sizes(session, made)
    else:
        _borrow(session, s.out)
        pipeline.finish(session)
        sizes = _sizes(session, summary(session))
    start = time.perf_counter()
    source = s.source if rung.variant else session.run / "packed"
    images = bench.sample(source, s.first_seed, count, network)
    seconds, engine = time.perf_counter() - start, bench.engine
    _save(bench.out / f"images/{rung.name}.npy", images)
    result = _pairs(bench, images) | sizes | {"variant": rung.variant}
    if count > s.images:
        # On the images of the other rungs, to be compared with them.
        result["first"] = _pairs(bench, images[: s.images])
    result |= {"name": rung.name, "family": rung.family, "idea": rung.idea, "full": rung.full}
    here = machine()
    result |= {"engine": engine, "machine": here.get("gpu", here["cpu"])}
    result["sampling_seconds"] = round(seconds, 1)
    if rung.full:
        features = bench.features(images)
        own = bench.features(bench.float_images(s.first_seed, count))
        result["fed_lite0_vs_float"] = frechet_distance(features.pooled, own.pooled)
        result |= _against_data(bench, features)
    keys = ("psnr_db_mean", "psnr_db_p05", "weight_bits_mean", "calibration_seconds")
    log.info("%s: %s", rung.name, json.dumps({key: round(result[key], 3) for key in keys}))
    return result


def _borrow(session: Session, out: Path, last: str = "round") -> None:
    """Take what another rung made with equal settings, up to a stage."""
    stages, until = session.run.read_json("manifest.json")["stages"], [*ARTEFACTS].index(last)
    for number, (stage, artefact) in enumerate(ARTEFACTS.items()):
        if number > until or (stage in stages and not session.stale(stage)):
            continue
        for manifest in sorted(out.glob("*/manifest.json")):
            other = json.loads(manifest.read_text())["stages"].get(stage)
            sources = [manifest.parent / name for name in (*BESIDE.get(stage, ()), artefact)]
            if other is None or other["key"] != session.key(stage):
                continue
            if not all(source.exists() for source in sources):
                continue
            for source in sources:
                with atomic_path(session.run / source.name) as temporary:
                    copy = shutil.copytree if source.is_dir() else shutil.copy
                    copy(source, temporary)
            session.run.update_manifest(stages={stage: other})
            break


def _pairs(bench: _Bench, images: np.ndarray) -> dict[str, Any]:
    s = bench.settings
    float_images = bench.float_images(s.first_seed, len(images))
    psnr = psnr_db(float_images, images)
    thirds = [float(part.mean()) for part in np.array_split(psnr, PARTS)]
    return {
        "images": len(images),
        "psnr_db_mean": float(psnr.mean()),
        "psnr_db_p05": float(np.percentile(psnr, 5)),
        "psnr_db_std_of_thirds": float(np.std(thirds, ddof=1)),
        "ssim_mean": float(ssim(float_images, images, device=s.device).mean()),
    }


def _sizes(session: Session, made: dict[str, Any]) -> dict[str, Any]:
    """Return size, layers left in float and seconds of every stage; made: `summary`, or a row."""
    stages = session.seconds() | made.pop("seconds", {})
    made["calibration_seconds"] = round(sum(stages.values()), 2)
    return made | {"stage_seconds": stages, "recipe": session.recipe.to_dict()}


def collect(out: Path) -> Path:
    """Write `results.json`, `quality.md` and plots from the rungs that are done."""
    folder, known = RunFolder(out), {rung.name: rung for rung in rungs()}
    about = folder.read_json("ladder.json")
    found = {name: _done(folder, name, rung, about) for name, rung in known.items()}
    done = {name: row for name, row in found.items() if row is not None}
    failed = {n: f"rungs/{n}.failed.json" for n in ("float", *known) if n not in done}
    keys = ["psnr_db_mean", "psnr_db_p05", "fed_lite0_vs_float", "fed_lite0_vs_data"]
    keys += ["calibration_seconds", "bytes_packed", "float_layers"]
    folder.write_json(
        "results.json",
        {
            "about": about,
            "float": _done(folder, "float", None, about),
            "recipes": {
                name: {key: row[key] for key in keys} | {"images": row["images"]}
                for name, row in done.items()
                if row["full"]
            },
            "ladder": [{k: v for k, v in r.items() if k != "float_layers"} for r in done.values()],
            "not_run": [name for name in known if name not in done],
            "failed": {n: folder.read_json(f)["error"] for n, f in failed.items() if folder.has(f)},
        },
    )
    return write_quality(out)
