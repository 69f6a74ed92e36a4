"""`python -m studies.ptq4dm`: every table and figure of the paper, with spreads and verdicts."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from quantempo.errors import QuantempoError
from quantempo.models.load import check_device
from studies.command import at_least, call_of, command, names_of, parser, show
from studies.ptq4dm import Settings, make_plan, run_study

__all__ = ["main"]


def main() -> None:
    """Rerun the paper's investigation. A killed study resumes; the page is OUT/study.html."""
    made = parser(
        "ptq4dm",
        "Rerun the paper's investigation: every table and figure, each with spreads and verdicts. "
        "A killed study resumes; finished cells are not run again. The page is OUT/study.html.",
        "models/ddpm --data images --out runs/study --only T3 --device cuda",
        "runs/study",
        "items T1,T2,F3,F4,T3,T4,T5,Legacy,Ours",
    )
    add = made.add_argument
    add("--images", type=at_least(1), help="of a row in T3 and T5; 10,000")
    add("--images-other", type=at_least(1), help="of any other row; a sixth")
    add("--seeds", type=at_least(1), default=3, help="repetitions of each row")
    add("--steps", type=at_least(2), help="of DDIM, the main sampler; 100")
    add("--samples", type=at_least(2), help="calibration inputs")
    add("--small", action="store_true", help="few steps and inputs; every item")
    add("--recipe", default="ptq4dm", help="recipe that every row varies")
    add("--compare", default="w8a8", help="recipe beside it in item Ours; or none")
    add("--reference", type=at_least(2), default=10_000, help="images of --data used")
    add("--inception", type=Path, help="Inception weights: FID instead of fed_lite0")
    add("--compile", action="store_true", help="compile the networks, for a GPU")
    add("--workers", type=at_least(1), default=1, help="processes, by torchrun")
    add("--known", type=Path, help="cells.jsonl of an earlier run, whose cells are not run again")
    add("--cells-only", action="store_true", help="write cells.jsonl, no tables and no page")
    add("--force", action="store_true", help="take over a study of another model or data")
    command(made, _run)


def _run(given: argparse.Namespace) -> int:
    gpus = (f"cuda:{i}" for i in range(given.workers) if given.device == "cuda")
    for name in (given.device, *gpus):
        check_device(name)
    if given.small and given.steps is not None:
        raise QuantempoError("got --small with --steps; a small study has 6 steps, give one")
    if given.workers > 1 and "RANK" not in os.environ:
        return _spawn(given.workers)
    same = {name: getattr(given, name) for name in ("source", "out", "data", "device", "tf32")}
    settings = Settings(
        **same,
        reference=min(given.reference, 64) if given.small else given.reference,
        extractor="inception" if given.inception else "lite0",
        weights=str(given.inception) if given.inception else None,
        call=call_of(given),
        compiled=given.compile,
        batch_size=given.batch_size or (32 if given.device == "cpu" else 256),
        probe=(2, 4) if given.small else (16, 16),
    )
    how: dict[str, Any] = {"images": given.images, "few": given.images_other}
    how |= {"seeds": given.seeds, "small": given.small, "samples": given.samples}
    compare = None if given.compare == "none" else given.compare
    plan = make_plan(given.recipe, compare, steps=given.steps or 100, **how)
    how = {name: getattr(given, name) for name in ("minutes", "force", "known")}
    how |= {"only": names_of(given.only), "tables": not given.cells_only}
    found = run_study(settings, plan, **how)
    if int(os.environ.get("RANK", 0)) == 0:
        show({"page" if found.suffix == ".html" else "cells": str(found)}, given.json)
    return 0


def _spawn(workers: int) -> int:
    """Run the same command in `workers` processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={workers}", "-m", "studies.ptq4dm", *sys.argv[1:]]
    # They end with this process, however it ends: torchrun passes the signal on to its own.
    done = subprocess.run(command, check=False, preexec_fn=_end_with_parent)
    if done.returncode:
        raise QuantempoError(
            f"a process of the study ended with code {done.returncode}, see above; run the same "
            "command again: finished cells are kept"
        )
    return 0


def _end_with_parent() -> None:
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


if __name__ == "__main__":
    main()
