"""The ladder of recipes: from the paper's to ours, one rung an idea, on one protocol (layer L5).

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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantempo import pipeline
from quantempo.backends.engine import attach
from quantempo.bench import machine
from quantempo.errors import QuantempoError
from quantempo.evaluate import load_images, psnr_db, ssim
from quantempo.evaluate.features import Features, extract, load_extractor
from quantempo.evaluate.scores import frechet_distance, spread_over_parts
from quantempo.models.family import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import run_pipeline, swap_scheduler
from quantempo.quality import summary
from quantempo.quantizers import attach_scheduler_sites, find_clock
from quantempo.quantizers.correction import attach_correction
from quantempo.recipe import Recipe
from quantempo.report.quality_page import write_quality
from quantempo.runs import RunFolder, atomic_path
from quantempo.session import ARTEFACTS, Session
from quantempo.study.networks import Frontend

__all__ = ["LadderSettings", "Rung", "ladder", "rungs"]

log = logging.getLogger("quantempo")

# First seed of float images that share no noise with those of the rungs.
OTHER_SEEDS = 500_000_000
PARTS = 3


@dataclass(frozen=True)
class Rung:
    """One recipe of the ladder: what it adds to the rung before it (`step`), in which family.

    full: also scored on the larger set of images.
    """

    name: str
    family: str
    idea: str
    recipe: Recipe
    full: bool = False


@dataclass(frozen=True)
class LadderSettings:
    """How a ladder runs.

    source: the float pipeline; out: folder; data: folder of real images, or None; steps: of DDIM
    while sampling and tracing; images: of each rung; images_full: of rungs with distribution
    scores; first_seed: of the images; tf32: let float32 products run in TF32.
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
    compiled: bool = False
    tf32: bool = False
    scheduler: str = "ddim"


def rungs() -> list[Rung]:
    """Return the ladder: the paper's recipe and plain min-max, then one idea after the other."""
    paper, found = Recipe.load("ptq4dm"), []

    def add(name: str, family: str, idea: str, recipe: Recipe, full: bool = False) -> Recipe:
        found.append(Rung(name, family, idea, replace(recipe, name=name), full))
        return recipe

    plain = paper.override("activations", metric="linf", symmetric=False)
    add("minmax", "W8A8", "round to nearest, min-max, every layer", plain.override(
        "weights", metric="linf"), full=True)  # fmt: skip
    now = add("ptq4dm", "W8A8", "the paper: symmetric, p = 2.4, released law", paper, full=True)
    now = add("affine", "W8A8", "affine activations", now.override("activations", symmetric=False))
    final = Recipe.load("w8a8")
    now = replace(now, trace=final.trace)
    now = now.override("activations", metric=final.activations.metric)
    now = add("law", "W8A8", "truncated law, squared error", now)
    roles = final.layers.float_roles
    now = now.override("layers", float_roles=roles)
    now = add("ends", "W8A8", "first, last and time layers in float", now)
    now = add("split", "W8A8", "shortcuts split in two", now.override("layers", split_skips=True))
    buckets = {"buckets": final.activations.buckets, "min_gain": final.activations.min_gain}
    now = add("buckets", "W8A8", "scales per time", now.override("activations", **buckets))
    now = _towards(now, final, "w8a8", "W8A8", add)
    for name in ("w4a8", "w6a6", "w4a4"):
        final, family = Recipe.load(name), name.upper()
        start = replace(final, rounding=now.rounding, correction=now.correction, delta=now.delta)
        start = start.override("rounding", name="nearest", bias=False)
        start = start.override("correction", affine=False).override("delta", enabled=False)
        start = start.override("layers", bits={})
        at = add(f"{name}-nearest", family, "the W8A8 recipe with fewer bits, nearest", start)
        if final.layers.bits:
            at = at.override("layers", bits=final.layers.bits)
            at = add(f"{name}-wide", family, f"8 bits in {', '.join(final.layers.bits)}", at)
        _towards(at, final, name, family, add)
    return found


def _towards(now: Recipe, final: Recipe, name: str, family: str, add: Any) -> Recipe:
    """Add the rungs that lead from a recipe with scales to a shipped one: rounding to sampler."""
    last = None
    if final.delta.enabled:
        now = replace(now, delta=final.delta)
        last = (f"{name}-delta", "changes between steps instead of inputs")
        now = add(last[0], family, last[1], now)
    if final.rounding.name in ("gptq", "adaround") and final.rounding.start != "nearest":
        now = replace(now, rounding=replace(final.rounding, name="gptq", bias=False, refine=0))
        now = add(f"{name}-gptq", family, "GPTQ", now)
    if final.rounding.name == "adaround":
        now = replace(now, rounding=replace(final.rounding, bias=False))
        now = add(f"{name}-adaround", family, "AdaRound by blocks, QDrop", now)
    if final.rounding.bias:
        now = replace(now, rounding=final.rounding)
        now = add(f"{name}-bias", family, "bias correction", now)
    idea = "affine correction of the output" if final.correction.affine else "as shipped"
    add(name, family, idea, final, full=True)
    return final


class _Bench:
    """What all rungs of one process share: float images, features, the float pipeline."""

    def __init__(self, settings: LadderSettings) -> None:
        self.settings, self.out = settings, RunFolder(settings.out)
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        torch.backends.cudnn.allow_tf32 = settings.tf32
        self.extractor = load_extractor("lite0", device=settings.device)

    @cached_property
    def identity(self) -> str:
        """Hash of what decides images besides the network."""
        s = self.settings
        kept = (s.source, s.steps, s.first_seed, s.tf32, s.scheduler)
        return hashlib.sha256(repr(kept).encode()).hexdigest()[:12]

    def sample(self, source: str | Path, first: int, count: int, compiled: bool) -> np.ndarray:
        """Return (count, H, W, C) uint8 images of a float or packed pipeline."""
        s = self.settings
        pipe = swap_scheduler(load_pipeline(source), s.scheduler).to(s.device)
        component, network = denoiser_of(pipe)
        if find_clock(network) is not None:
            attach(network, "auto" if s.device == "cpu" else "simulated")
            attach_scheduler_sites(pipe.scheduler, network)
            attach_correction(pipe.scheduler, network)
        fast = torch.compile(network) if compiled and s.compiled else None
        setattr(pipe, component, Frontend(network.eval(), fast))
        # A compiled network sees batches of one size.
        whole = -(-count // s.batch_size) * s.batch_size if fast is not None else count
        seeds = range(first, first + whole)
        return run_pipeline(pipe, seeds, steps=s.steps, batch_size=s.batch_size)[:count]

    def float_images(self, first: int, count: int) -> np.ndarray:
        """Return the float model's images, from disk if they were made before."""
        path = self.out / f"images/float-{self.identity}-{first}.npy"
        known = np.load(path) if path.is_file() else None
        if known is None or len(known) < count:
            known = self.sample(self.settings.source, first, count, compiled=count > 1024)
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
    for name in only:
        if name != "float" and name not in known:
            raise QuantempoError(f"unknown rung '{name}' (known: float, {', '.join(known)})")
    bench = _Bench(settings)
    if bench.out.foreign() and not bench.out.has("ladder.json"):
        raise QuantempoError(f"{settings.out} is not empty and no ladder; choose another --out")
    about = {**asdict(settings), "out": settings.out.name, "source": Path(settings.source).name}
    about["data"] = settings.data and Path(settings.data).name
    bench.out.write_json("ladder.json", about | {"machine": machine()})
    start, order = time.perf_counter(), only or ("float", *known)
    for name in order:
        if bench.out.has(f"rungs/{name}.json"):
            log.info("%s: done before", name)
            continue
        if minutes is not None and time.perf_counter() - start > 60 * minutes:
            log.warning("%s and what follows it is left: the time is up", name)
            break
        try:
            result = _float(bench) if name == "float" else _climb(bench, known[name])
        except Exception as error:  # one rung must not lose the others
            log.exception("%s failed: %s", name, error)
            bench.out.write_json(f"rungs/{name}.failed.json", {"error": str(error)})
            continue
        bench.out.write_json(f"rungs/{name}.json", result)
    return collect(settings.out)


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
    parts = spread_over_parts(
        lambda part: frechet_distance(part.pooled, real.pooled), features, PARTS
    )
    return {
        "fed_lite0_vs_data": frechet_distance(features.pooled, real.pooled),
        "fed_lite0_vs_data_std_of_thirds": parts.std,
    }


def _climb(bench: _Bench, rung: Rung) -> dict[str, Any]:
    """Make one rung: quantize, sample, score."""
    s = bench.settings
    recipe = rung.recipe.override("trace", steps=s.steps)
    session = pipeline.load(
        s.source, s.out / rung.name, recipe, scheduler=s.scheduler, device=s.device, force=True
    )
    _borrow(session, s.out)
    pipeline.finish(session)
    count = s.images_full if rung.full else s.images
    start = time.perf_counter()
    images = bench.sample(session.run / "packed", s.first_seed, count, compiled=rung.full)
    seconds = time.perf_counter() - start
    _save(bench.out / f"images/{rung.name}.npy", images)
    result = _pairs(bench, images) | _sizes(session)
    result |= {"name": rung.name, "family": rung.family, "idea": rung.idea, "full": rung.full}
    result["sampling_seconds"] = round(seconds, 1)
    if rung.full:
        features = bench.features(images)
        own = bench.features(bench.float_images(s.first_seed, count))
        result["fed_lite0_vs_float"] = frechet_distance(features.pooled, own.pooled)
        result |= _against_data(bench, features)
    log.info("%s: %.2f dB", rung.name, result["psnr_db_mean"])
    return result


def _borrow(session: Session, out: Path) -> None:
    """Take trace and statistics from another rung that was made with equal settings."""
    stages = session.run.read_json("manifest.json")["stages"]
    for stage in ("trace", "calibrate"):
        if stage in stages:
            continue
        for manifest in sorted(out.glob("*/manifest.json")):
            other = json.loads(manifest.read_text())["stages"].get(stage)
            source = manifest.parent / ("trace" if stage == "trace" else ARTEFACTS[stage])
            if other is None or other["key"] != session.key(stage) or not source.exists():
                continue
            target = session.run / source.name
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)
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


def _sizes(session: Session) -> dict[str, Any]:
    """Return size, share of integers, layers left in float and seconds of every stage."""
    stages = session.run.read_json("manifest.json")["stages"]
    recipe = session.recipe.to_dict()
    return summary(session) | {
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "recipe": recipe,
    }


def collect(out: Path) -> Path:
    """Write `results.json`, `quality.md` and plots from the rungs that are done."""
    folder = RunFolder(out)
    order = ["float", *(rung.name for rung in rungs())]
    done = {n: folder.read_json(f"rungs/{n}.json") for n in order if folder.has(f"rungs/{n}.json")}
    float_scores = done.pop("float", None)
    keys = ["psnr_db_mean", "psnr_db_p05", "fed_lite0_vs_float", "fed_lite0_vs_data"]
    keys += ["calibration_seconds", "bytes_packed", "float_layers"]
    folder.write_json(
        "results.json",
        {
            "about": folder.read_json("ladder.json"),
            "float": float_scores,
            "recipes": {
                name: {key: row[key] for key in keys} | {"images": row["images"]}
                for name, row in done.items()
                if row["full"]
            },
            "ladder": [{k: v for k, v in r.items() if k != "float_layers"} for r in done.values()],
            "not_run": [name for name in order[1:] if name not in done],
        },
    )
    return write_quality(out)
