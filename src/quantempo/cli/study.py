"""quantempo study (layer L6)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import Device, Force, Json, Labels, Prompts, call_arguments, show
from quantempo.errors import QuantempoError

__all__ = ["study"]


def study(
    source: Annotated[
        str | None, typer.Argument(help="Diffusers pipeline (float); the bundled one by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the study.")] = Path("runs/study"),
    data: Annotated[
        str | None, typer.Option("--data", help="Folder of real images, searched recursively.")
    ] = None,
    only: Annotated[
        str | None,
        typer.Option("--only", help="Items: T1,T2,F3,F4,T3,T4,T5,Legacy."),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Images of a row in T3 and T5.")
    ] = None,
    few: Annotated[
        int | None, typer.Option("--images-other", min=1, help="Images of any other row.")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Repetitions of each row.")] = 3,
    small: Annotated[
        bool, typer.Option("--small", help="Few steps and inputs, for a CPU; every item.")
    ] = False,
    recipe: Annotated[str, typer.Option("--recipe", help="Recipe that rows vary.")] = "ptq4dm",
    compare: Annotated[
        str, typer.Option("--compare", help="Recipe beside it in T3 and T5, or none.")
    ] = "w8a8",
    reference: Annotated[
        int, typer.Option("--reference", min=2, help="Images of --data that are used.")
    ] = 10_000,
    inception: Annotated[
        Path | None, typer.Option("--inception", help="Inception weights: FID instead of fed.")
    ] = None,
    prompts: Prompts = None,
    class_labels: Labels = None,
    device: Device = "cpu",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images a call (256 on a GPU, or 32).")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the networks (a GPU gains fourfold).")
    ] = False,
    tf32: Annotated[
        bool, typer.Option("--tf32", help="Float products in TF32, also those of the float model.")
    ] = False,
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes, one a GPU, started by torchrun.")
    ] = 1,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Start no cell after that long.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rerun the paper's investigation: every table and figure, each with spreads and verdicts.

    A killed study resumes; finished cells are not run again. The page is OUT/study.html.

    Example: quantempo study models/ddpm --data images --out runs/study --only T3 --device cuda
    """
    if workers > 1 and "RANK" not in os.environ:
        _spawn(workers)
        return
    from quantempo.demo import DEMO_MODEL
    from quantempo.models.load import check_device
    from quantempo.study import Settings, make_plan
    from quantempo.study import study as run

    check_device(device)
    settings = Settings(
        source=source or str(DEMO_MODEL),
        out=out,
        data=data,
        reference=min(reference, 256) if small else reference,
        extractor="inception" if inception else "lite0",
        weights=str(inception) if inception else None,
        call=call_arguments(prompts, class_labels),
        device=device,
        compiled=compiled,
        tf32=tf32,
        batch_size=batch_size or (32 if device == "cpu" else 256),
        **({"probe": (3, 5)} if small else {}),
    )
    plan = make_plan(
        recipe,
        None if compare == "none" else compare,
        images=images,
        few=few,
        seeds=seeds,
        small=small,
    )
    names = tuple(name.strip() for name in only.split(",")) if only else ()
    page = run(settings, plan, only=names, minutes=minutes, force=force)
    if int(os.environ.get("RANK", 0)) == 0:
        show({"page": str(page)}, as_json)


def _spawn(workers: int) -> None:
    """Run the same command in `workers` processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={workers}", "-m", "quantempo", *sys.argv[1:]]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise QuantempoError(
            f"a process of the study ended with code {done.returncode}, see above; run the same "
            "command again: finished cells are kept"
        )
