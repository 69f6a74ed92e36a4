"""Run the cells of a study as independent jobs, alone or shared among processes (layer L5).

A finished cell is a file and is not run again; a failed one leaves its error and the others go on.
Cells with one calibration stay together; which process gets which depends on their costs only, and
no result depends on it.
"""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from quantempo.errors import QuantempoError
from quantempo.runs import RunFolder
from quantempo.study.cells import Cell, Row
from quantempo.study.run_cell import run_cell
from quantempo.study.tools import Tools

__all__ = ["World", "run_cells", "share"]

log = logging.getLogger("quantempo")


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


def share(jobs: Sequence[tuple[Any, int]], size: int) -> list[list[Any]]:
    """Divide (job, cost) among processes, dearest first to the least loaded; cheapest run first."""
    loads, shares = [0] * size, [[] for _ in range(size)]  # type: list[int], list[list[Any]]
    for job, cost in sorted(jobs, key=lambda item: -item[1]):
        least = loads.index(min(loads))
        loads[least] += cost
        shares[least].append((job, cost))
    return [[job for job, _ in sorted(part, key=lambda item: item[1])] for part in shares]


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
        log.info(
            "[%d/%d%s] %s: %s; about %s left",
            self.done,
            self.total,
            of,
            what,
            said,
            f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s",
        )


def run_cells(
    tools: Tools, rows: Iterable[tuple[str, Row]], seeds: int, world: World, minutes: float | None
) -> None:
    """Run what is not done of the cells of (item, row) pairs; write `cells/KEY.json`.

    Args:
        tools: of this process.
        rows: of all items.
        seeds: repetitions of each row.
        world: the processes.
        minutes: start nothing after that long; what is left is listed as not run.

    Raises:
        QuantempoError: no cell could be run at all.
    """
    folder = RunFolder(tools.settings.out / "cells")
    names: dict[str, tuple[Cell, str]] = {}
    for item, row in rows:
        for cell in row.cells(seeds):
            label = f"{item} {row.group + ' ' if row.group else ''}{row.label}"
            name = f"{label} seed {cell.repetition}"
            names.setdefault(cell.key(tools.identity), (cell, name))
    todo = {key: pair for key, pair in names.items() if not folder.has(f"{key}.json")}
    log.info("%d cells, %d done before", len(names), len(names) - len(todo))
    deadline = None if minutes is None else time.perf_counter() + 60 * minutes
    _references(tools, [cell for cell, _ in todo.values()], seeds, world)
    world.wait()
    groups: dict[str, list[str]] = {}
    for key, (cell, _) in todo.items():
        groups.setdefault(repr(cell.calibration() or key), []).append(key)
    costs = [(keys, sum(todo[key][0].cost for key in keys)) for keys in groups.values()]
    mine = [key for keys in share(costs, world.size)[world.rank] for key in keys]
    progress = _Progress(len(mine), sum(todo[key][0].cost for key in mine), world)
    for key in mine:
        if deadline is not None and time.perf_counter() > deadline:
            log.warning("%d cells are left: the time is up", len(mine) - progress.done)
            break
        cell, name = todo[key]
        said = _attempt(folder, key, cell, name, partial(run_cell, tools, cell, seeds))
        progress.tell(name, cell.cost, said)
    world.wait()


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


def _references(tools: Tools, cells: Sequence[Cell], seeds: int, world: World) -> None:
    """Make the float images and probe inputs that the cells need, once among all processes."""
    images: dict[tuple[Any, int], int] = {}
    for cell in cells:
        near = {cell.repetition}
        if cell.recipe is None:
            near.add((cell.repetition + 1) % seeds)
        for repetition in near:
            key = (cell.sampler, repetition)
            images[key] = max(images.get(key, 0), cell.images)
    jobs: list[tuple[Any, int]] = [
        ((sampler, repetition, count), sampler.steps * count)
        for (sampler, repetition), count in images.items()
    ]
    samplers = dict.fromkeys(cell.sampler for cell in cells if cell.recipe is not None)
    jobs += [((s, None, 0), s.steps * tools.settings.probe[0]) for s in samplers]
    for sampler, repetition, count in share(jobs, world.size)[world.rank]:
        start = time.perf_counter()
        try:
            if repetition is None:
                tools.probe(sampler)
            else:
                tools.float_images(sampler, repetition, count)
        except QuantempoError as error:
            # Its cells will meet the same error and report it.
            log.error("float images of %s: %s", sampler, error)
            continue
        seconds = time.perf_counter() - start
        if seconds > 1:
            log.info("float, %s, %d images: %.1f s", sampler, count, seconds)
