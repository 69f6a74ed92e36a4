"""Run the cells of a study as independent jobs, alone or shared among processes.

A finished cell is a file and is not run again; a failed one leaves its error and the others go on.
Cells with one calibration stay together; which process gets which depends on their costs only, and
no result depends on it.
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from quantempo.run_folder import RunFolder, atomic_path
from studies.ptq4dm.base import Plan
from studies.ptq4dm.cells import Cell, Row
from studies.ptq4dm.run_cell import run_cell
from studies.ptq4dm.tools import Tools

__all__ = ["Job", "World", "is_done", "jobs_of", "run_cells", "share", "write_cells"]

log = logging.getLogger("quantempo")


@dataclass
class Job:
    """Something one process does: work, its cost, its rank (lower first), compiled structures."""

    work: Any
    cost: int
    rank: int = 0
    structures: set[str] = field(default_factory=set)


class World:
    """This process among those that torchrun started; one process without it."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        if self.size > 1 and not dist.is_initialized():
            # Gloo: nothing but barriers is exchanged, and those wait for the slowest process.
            dist.init_process_group("gloo", timeout=timedelta(days=7))

    def device(self, name: str) -> str:
        """Return the device of this process: "cuda" becomes the GPU of its local rank."""
        return f"cuda:{self.local}" if name == "cuda" and self.size > 1 else name

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.size > 1:
            dist.destroy_process_group()


# Images that take as long as the few chains of the probe, which are not compiled.
PROBE_COST = 300
# What compiling a network takes, in network calls of one image.
COMPILING = 600_000


def share(jobs: Sequence[Job], size: int) -> list[list[Any]]:
    """Divide jobs among processes: rank by rank, dearest first, where it ends earliest.

    A process that has not met a job's structure yet pays for compiling it, so that rare networks
    stay on few processes. Each process runs its share rank by rank, cheapest first.
    """
    loads = [0] * size
    known: list[set[str]] = [set() for _ in range(size)]
    shares: list[list[Job]] = [[] for _ in range(size)]
    for job in sorted(jobs, key=lambda job: (job.rank, -job.cost)):
        compiling = [COMPILING * len(job.structures - met) for met in known]
        # Counted twice for the choice: time that every process spends compiling is lost to all.
        ends = [load + 2 * extra for load, extra in zip(loads, compiling, strict=True)]
        least = ends.index(min(ends))
        loads[least] += job.cost + compiling[least]
        known[least] |= job.structures
        shares[least].append(job)
    return [
        [job.work for job in sorted(part, key=lambda job: (job.rank, job.cost))] for part in shares
    ]


class _Progress:
    """One line a finished job, with the time that is left at the speed so far."""

    def __init__(self, total: int, cost: int, world: World) -> None:
        self.total, self.cost, self.world = total, cost, world
        self.done, self.paid, self.start = 0, 0, time.perf_counter()

    def tell(self, what: str, cost: int, said: str) -> None:
        self.done, self.paid = self.done + 1, self.paid + cost
        spent = time.perf_counter() - self.start
        left = spent / max(1, self.paid) * (self.cost - self.paid)
        of = f" of process {self.world.rank}" if self.world.size > 1 else ""
        time_left = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
        where = f"[{self.done}/{self.total}{of}]"
        log.info("%s %s: %s; about %s left", where, what, said, time_left)


def run_cells(
    tools: Tools,
    rows: Iterable[tuple[int, str, Row]],
    plan: Plan,
    world: World,
    minutes: float | None,
) -> None:
    """Run what is not done of the cells of (rank, item, row) triples; write `cells/KEY.json`.

    Args:
        tools: of this process.
        rows: of all items; those of a lower rank are run first.
        plan: main sampler and seeds.
        world: the processes.
        minutes: start nothing after that long; what is left is listed as not run.
    """
    folder = RunFolder(tools.settings.out / "cells")
    names: dict[str, tuple[Cell, str, int]] = {}
    for rank, item, row in rows:
        for cell in row.cells(plan.seeds):
            label = f"{item} {row.group + ' ' if row.group else ''}{row.label}"
            name = f"{label} seed {cell.repetition}"
            names.setdefault(cell.key(tools.identity), (cell, name, rank))
    todo = {key: entry for key, entry in names.items() if not is_done(folder, f"{key}.json")}
    if world.rank == 0:
        log.info("%d cells, %d done before", len(names), len(names) - len(todo))
    deadline = None if minutes is None else time.perf_counter() + 60 * minutes
    _references(tools, [cell for cell, _, _ in todo.values()], plan, world, deadline)
    world.wait()
    mine = [
        key
        for keys in share(jobs_of(todo, plan, tools.settings.compiled), world.size)[world.rank]
        for key in keys
    ]
    progress = _Progress(len(mine), sum(todo[key][0].cost for key in mine), world)
    for key in mine:
        if deadline is not None and time.perf_counter() > deadline:
            log.warning("%d cells are left: the time is up", len(mine) - progress.done)
            break
        cell, name, _ = todo[key]
        run = partial(run_cell, tools, cell)
        progress.tell(name, cell.cost, _attempt(folder, key, cell, name, run))
        if world.rank == 0:
            # Whoever ends this process loses no more than what runs.
            write_cells(RunFolder(tools.settings.out))
    world.wait()


def write_cells(out: RunFolder) -> None:
    """Write `cells.jsonl`, one line a result, from `cells/`."""
    found = sorted((out / "cells").glob("*.json"))
    names = [path.stem for path in found if not path.stem.endswith(".failed")]
    lines = [json.dumps(out.read_json(f"cells/{name}.json") | {"key": name}) for name in names]
    with atomic_path(out / "cells.jsonl") as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))


def is_done(folder: RunFolder, name: str) -> bool:
    """Return whether a folder holds a result that need not be made again."""
    # A note says what of a result is void: it stays until the cell has been run again.
    return folder.has(name) and "note" not in folder.read_json(name)


def jobs_of(todo: dict[str, tuple[Cell, str, int]], plan: Plan, compiled: bool) -> list[Job]:
    """Join cells that share float images or calibration inputs."""
    jobs: dict[tuple[int, str], Job] = {}
    for key, (cell, _, rank) in sorted(todo.items(), key=lambda item: item[1][0].cost):
        job = jobs.setdefault((rank, cell.group(plan.sampler)), Job([], 0, rank))
        job.work.append(key)
        job.cost += cell.cost
        if compiled and cell.structure:
            job.structures.add(cell.structure)
    for job in jobs.values():
        # The last calibration is kept: those who share one come together, the cheapest first.
        kinds = [cell.recipe and cell.inputs for cell in (todo[key][0] for key in job.work)]
        order = sorted(range(len(kinds)), key=lambda i: kinds.index(kinds[i]))
        job.work = [job.work[i] for i in order]
    return list(jobs.values())


def _attempt(
    folder: RunFolder, key: str, cell: Cell, name: str, run: Callable[[], dict[str, Any]]
) -> str:
    """Run one cell, write its result or its error, and return what to say of it."""
    failed = f"{key}.failed.json"
    try:
        result = run()
    except Exception as error:  # a failed cell must not lose the others
        folder.write_json(
            failed, {"name": name, "error": str(error), "traceback": traceback.format_exc()}
        )
        log.error("%s failed: %s", name, error)
        return "failed"
    folder.write_json(f"{key}.json", {"name": name, "cell": cell.describe(), **result})
    (folder / failed).unlink(missing_ok=True)
    psnr = result.get("psnr_db")
    quality = f"{psnr:.2f} dB" if psnr is not None else f"fed_data {result['fed_data']:.2f}"
    return f"{quality}, {result['seconds']:.1f} s"


def _references(
    tools: Tools, cells: Sequence[Cell], plan: Plan, world: World, deadline: float | None
) -> None:
    """Make what several processes read: the main sampler's float images, inputs of the probe.

    Float images of other samplers are needed by one process each, which makes them.
    """
    images: dict[int, int] = {}
    for cell in cells:
        if cell.sampler == plan.sampler:
            beside = cell.repetition if cell.beside is None else cell.beside
            for repetition in {cell.repetition, beside}:
                images[repetition] = max(images.get(repetition, 0), cell.images)
    steps = plan.sampler.steps
    jobs = [Job((plan.sampler, r, count), steps * count) for r, count in images.items()]
    samplers = dict.fromkeys(cell.sampler for cell in cells if cell.recipe is not None)
    jobs += [Job((s, None, 0), s.steps * PROBE_COST) for s in samplers]
    for sampler, repetition, count in share(jobs, world.size)[world.rank]:
        start = time.perf_counter()
        if deadline is not None and start > deadline:
            break
        try:
            if repetition is None:
                tools.probe(sampler)
            else:
                tools.float_images(sampler, repetition, count)
        except Exception as error:  # its cells will meet the same error and report it
            log.error("float images of %s: %s", sampler, error)
            continue
        seconds = time.perf_counter() - start
        if seconds > 1:
            what = f"{count} images" if count else "inputs of the probe"
            log.info("float, %s, %s: %.1f s", sampler, what, seconds)
