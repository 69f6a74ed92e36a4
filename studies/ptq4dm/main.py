"""A whole study: plan, run, summarize, write tables, page and text."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantempo import __version__
from quantempo.core.machine import machine
from quantempo.errors import QuantempoError
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder, atomic_path
from studies.command import process_state
from studies.ptq4dm import items as _items  # noqa: F401  (registers the studies)
from studies.ptq4dm.base import STUDIES, Plan
from studies.ptq4dm.cells import Cell, Row, Sampler, digest
from studies.ptq4dm.page import render_study
from studies.ptq4dm.plots import write_plots
from studies.ptq4dm.results import Found, rows_csv, summarize
from studies.ptq4dm.run_cell import pooled
from studies.ptq4dm.runner import World, is_done, run_cells, write_cells
from studies.ptq4dm.text import study_text
from studies.ptq4dm.tools import Settings, Tools

__all__ = ["make_plan", "read_cells", "run_study"]

log = logging.getLogger("quantempo")

SMALL = (("ddim", 4), ("ddim", 6), ("ddim", 10), ("ddpm", 20), ("dpm++", 4), ("euler", 5))


def _samplers(steps: int) -> tuple[tuple[str, int], ...]:
    """Return the samplers of T5; the second is the main one."""
    ddim = [("ddim", round(steps * factor)) for factor in (0.5, 1, 2.5)]
    return (*ddim, ("ddpm", min(1000, 10 * steps)), ("dpm++", 20), ("euler", 30))


def make_plan(
    recipe: str | Recipe = "ptq4dm",
    compare: str | Recipe | None = "w8a8",
    *,
    images: int | None = None,
    few: int | None = None,
    seeds: int = 3,
    steps: int = 100,
    samples: int | None = None,
    small: bool = False,
) -> Plan:
    """Return the scale of a study.

    Args:
        recipe: what every row varies by one thing.
        compare: the recipe beside it in item Ours; None for none.
        images: of each row of T3, and of T5 under the main sampler; default 10,000,
            for a small study 4 a seed.
        few: of every other row; default a sixth of `images`.
        seeds: repetitions of each row.
        steps: of DDIM, the main sampler; T5 has half and 2.5 times as many too, DDPM ten times.
        samples: calibration inputs; default 256 (small: 8).
        small: 6 steps and few inputs, for a look on a CPU.

    Raises QuantempoError: fewer than 2 images a seed, which no distance can be computed of.
    """
    base = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    ours = Recipe.load(compare) if isinstance(compare, str) else compare
    images = images or (4 * seeds if small else 10_000)
    few = min(images, few or max(images // 6, min(images, 2 * seeds)))
    if seeds < 1 or few < 2 * seeds:
        raise QuantempoError(
            f"got {images} images ({few} for the smaller tables) for {seeds} seeds; expected at "
            f"least {2 * seeds}: distances of image sets need two images a seed"
        )
    samplers = tuple(Sampler(name, k) for name, k in (SMALL if small else _samplers(steps)))
    samples = samples or (8 if small else 256)
    sizes = (samples // 2, samples) if small else (samples, 4 * samples)
    return Plan(base, ours, samplers[1], samplers, images, few, samples, sizes, seeds)


def run_study(
    settings: Settings,
    plan: Plan,
    *,
    only: tuple[str, ...] = (),
    minutes: float | None = None,
    force: bool = False,
    known: Path | None = None,
    tables: bool = True,
) -> Path:
    """Run the studies and return the page `study.html`, or `cells.jsonl`, in the output folder.

    A killed run resumes: cells that are finished are not run again. Under torchrun the cells are
    shared among its processes, with the same results as in one.

    Args:
        settings: model, data, folder, device.
        plan: the scale.
        only: names of studies, run in that order; () for all, cheapest cells first.
        minutes: start no cell after that long.
        force: take over a folder that holds a study of another model or data.
        known: `cells.jsonl` of an earlier run: its cells are not run again.
        tables: write tables, plots, page and text, besides `cells.jsonl`.

    Raises QuantempoError: unknown study, a folder with something else in it, or what `Tools`
    raises.
    """
    names = [name for name in STUDIES.names() if plan.ours or name != "Ours"]
    chosen = [STUDIES.get(name) for name in only or names]
    out, world = RunFolder(settings.out), World()
    _check_folder(out)
    settings = replace(settings, device=world.device(settings.device))
    tools = Tools(settings)
    with process_state(settings.tf32), closing(tools):
        start = time.perf_counter()
        _check_owner(out, tools, force)
        world.wait()
        if world.rank == 0:
            read_cells(out, known)
            before = out.read_json("study.json") if out.has("study.json") else {}
            out.write_json("study.json", _about(tools, plan, [s.name for s in chosen], before))
        world.wait()
        rows = [
            (index if only else 0, item.name, row)
            for index, item in enumerate(chosen)
            for row in item.rows(plan)
        ]
        run_cells(tools, rows, plan, world, minutes)
        if world.rank == 0:
            if tables:
                _summarize(tools, plan, chosen, out, time.perf_counter() - start)
            write_cells(out)
        world.wait()
    world.close()
    return out / ("study.html" if tables else "cells.jsonl")


def read_cells(out: RunFolder, known: Path | None) -> None:
    """Take the finished cells of a `cells.jsonl` that the folder does not have yet.

    Raises QuantempoError: no such file, or one that holds something else.
    """
    if known is None:
        return
    try:
        rows = [json.loads(line) for line in known.read_text().splitlines()]
        cells = {row.pop("key"): row for row in rows}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, AttributeError) as error:
        raise QuantempoError(
            f"cannot read {known} ({error}); expected cells.jsonl of a study"
        ) from error
    for key, row in cells.items():
        # What is void there gives way to a result, not the other way round.
        if not is_done(out, f"cells/{key}.json"):
            out.write_json(f"cells/{key}.json", row)


def _check_folder(out: RunFolder) -> None:
    if out.path.is_file() or (out.foreign() and not out.has("study.json")):
        raise QuantempoError(f"{out.path} is not empty and no study; choose another --out folder")


def _check_owner(out: RunFolder, tools: Tools, force: bool) -> None:
    if not out.has("study.json") or force:
        return
    before = out.read_json("study.json")
    if before["identity"] != tools.identity:
        raise QuantempoError(
            f"{out.path} holds a study of another model, data or precision "
            f"({before['model']['path']}); choose another --out folder, or --force to use it"
        )


def _about(tools: Tools, plan: Plan, chosen: list[str], before: dict[str, Any]) -> dict[str, Any]:
    """Describe the study; what `before` says of items that are not chosen stays."""
    settings = asdict(tools.settings)
    folder = settings.pop("data")
    own = "the float model's own, of other seeds (DDIM 10)"
    data = {"source": Path(folder).name if folder else own, "images": len(tools.data)}
    source, out = settings.pop("source"), settings.pop("out")
    settings |= {
        "recipe": plan.recipe.name,
        "compared_with": plan.ours.name if plan.ours else None,
        "sampler": str(plan.sampler),
        "images": plan.images,
        "images_other": plan.few,
        "seeds": plan.seeds,
        "calibration_inputs": plan.samples,
    }
    return {
        "name": Path(out).name,
        "identity": tools.identity,
        "model": {
            "path": Path(source).name,
            "class": type(tools.denoiser).__name__,
            "parameters": sum(p.numel() for p in tools.denoiser.parameters()),
            "sha256": tools.digest,
        },
        "data": data,
        "settings": json.loads(json.dumps(settings, default=str)),
        "machine": machine(),
        "versions": {"quantempo": __version__, "torch": version("torch")},
        "items": [n for n in STUDIES.names() if n in {*chosen, *before.get("items", ())}],
        "not_run": [e for e in before.get("not_run", ()) if e["item"] not in chosen],
        "failed": [e for e in before.get("failed", ()) if e["item"] not in chosen],
        "seconds": 0.0,
    }


def _summarize(tools: Tools, plan: Plan, chosen: list[Any], out: RunFolder, spent: float) -> None:
    """Write what follows from the cells that are there: tables, plots, page, text."""
    about = out.read_json("study.json") | {"seconds": round(spent, 1)}
    for item in chosen:
        rows = item.rows(plan)
        cells = {(row.group, row.label): _results(tools, out, row, plan.seeds) for row in rows}
        _note_missing(about, tools, out, item.name, rows, cells, plan.seeds)
        table = []
        for row in rows:
            line = summarize(row, cells[row.group, row.label])
            line["failed"] = _failed(tools, out, row, plan.seeds)
            if line["seeds"]:
                line["pooled"] = _pooled(tools, row.cells(plan.seeds), out)
            table.append(line)
        try:
            extra = _extra(tools, plan, item, out)
        except Exception as error:  # one figure must not lose the page
            about["failed"].append({"item": item.name, "row": "figure", "error": str(error)})
            extra = {}
        claims = [*item.claims(Found(rows, cells)), *extra.pop("claims", [])]
        found = {"name": item.name, "title": item.title, "question": item.question}
        found |= {"reading": _reading(claims), "rows": table, "claims": claims, "extra": extra}
        found |= {"paper": item.paper.to_dict() if item.paper else None}
        out.write_json(f"items/{item.name}.json", found)
        if table:
            with atomic_path(out / f"items/{item.name}.csv") as temporary:
                temporary.write_text(rows_csv(table))
    out.write_json("study.json", about)
    write_plots(out.path)
    with atomic_path(out / "study.md") as temporary:
        temporary.write_text(study_text(out.path))
    render_study(out.path)


def _kept(out: RunFolder, name: str, make: Callable[[], Any]) -> Any:
    """Return what stands in `cells/NAME.json`; make and write it first if nothing does."""
    name = f"cells/{name}.json"
    if not out.has(name) and (made := make()):
        out.write_json(name, made)
    return out.read_json(name) if out.has(name) else None


def _extra(tools: Tools, plan: Plan, item: Any, out: RunFolder) -> dict[str, Any]:
    """Return what a figure needs besides rows, from disk if it was made for this plan before."""
    settings = Row("figure", plan.sampler, 1, plan.base()).cells(1)[0]
    key = digest([tools.identity, item.name, settings.describe()])
    return _kept(out, f"figure-{key}", lambda: item.extra(plan, tools)) or {}


def _pooled(tools: Tools, cells: list[Cell], out: RunFolder) -> dict[str, Any] | None:
    key = digest([tools.identity, [cell.key(tools.identity) for cell in cells]])
    return _kept(out, f"pooled-{key}", lambda: pooled(tools, cells))


def _results(tools: Tools, out: RunFolder, row: Row, seeds: int) -> list[dict[str, Any] | None]:
    names = [f"cells/{cell.key(tools.identity)}.json" for cell in row.cells(seeds)]
    return [out.read_json(name) if out.has(name) else None for name in names]


def _failed(tools: Tools, out: RunFolder, row: Row, seeds: int) -> int:
    names = [f"cells/{cell.key(tools.identity)}" for cell in row.cells(seeds)]
    return sum(out.has(f"{n}.failed.json") and not out.has(f"{n}.json") for n in names)


def _note_missing(
    about: dict[str, Any],
    tools: Tools,
    out: RunFolder,
    item: str,
    rows: list[Row],
    cells: dict[tuple[str, str], list[dict[str, Any] | None]],
    seeds: int,
) -> None:
    for row in rows:
        label = f"{row.group}: {row.label}" if row.group else row.label
        for cell, result in zip(row.cells(seeds), cells[row.group, row.label], strict=True):
            if result is not None:
                continue
            name = f"cells/{cell.key(tools.identity)}.failed.json"
            entry = {"item": item, "row": f"{label}, seed {cell.repetition}"}
            if out.has(name):
                about["failed"].append(entry | {"error": out.read_json(name)["error"]})
            else:
                about["not_run"].append(entry | {"reason": "not started"})


def _reading(claims: list[dict[str, Any]]) -> str:
    count: dict[str, int] = {}
    for claim in claims:
        count[claim["verdict"]] = count.get(claim["verdict"], 0) + 1
    return ", ".join(f"{number} {verdict}" for verdict, number in count.items())
