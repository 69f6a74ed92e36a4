"""quantempo study."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli.common import Device, Force, Json, Labels, Prompts, call_arguments, show
from quantempo.errors import QuantempoError

__all__ = ["study"]

Source = Annotated[
    str | None, typer.Argument(help="Diffusers pipeline (float); the bundled one by default.")
]
Out = Annotated[Path, typer.Option("--out", help="Folder of the study.")]
Data = Annotated[str | None, typer.Option("--data", help="Folder of real images.")]
Only = Annotated[
    str | None, typer.Option("--only", help="Items, in this order: T1,T2,F3,F4,T3,T4,T5,Legacy.")
]
Images = Annotated[int | None, typer.Option("--images", min=1, help="Of a row in T3 and T5.")]
Few = Annotated[int | None, typer.Option("--images-other", min=1, help="Of any other row.")]
Seeds = Annotated[int, typer.Option("--seeds", min=1, help="Repetitions of each row.")]
Steps = Annotated[int | None, typer.Option("--steps", min=2, help="Of DDIM, main sampler; 100.")]
Samples = Annotated[int | None, typer.Option("--samples", min=2, help="Calibration inputs.")]
Small = Annotated[bool, typer.Option("--small", help="Few steps and inputs; every item.")]
Base = Annotated[str, typer.Option("--recipe", help="Recipe that every row varies.")]
Compare = Annotated[str, typer.Option("--compare", help="Recipe beside it in T3, T5; or none.")]
Reference = Annotated[int, typer.Option("--reference", min=2, help="Images of --data used.")]
Inception = Annotated[
    Path | None, typer.Option("--inception", help="Inception weights: FID instead of fed_lite0.")
]
Batch = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Images a call; 32, on a GPU 256.")
]
Compiled = Annotated[bool, typer.Option("--compile", help="Compile the networks, for a GPU.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Float products in TF32, of both models.")]
Workers = Annotated[int, typer.Option("--workers", min=1, help="Processes, by torchrun.")]
Minutes = Annotated[float | None, typer.Option("--minutes", help="Start no cell after that.")]


def study(
    source: Source = None,
    out: Out = Path("runs/study"),
    data: Data = None,
    only: Only = None,
    images: Images = None,
    few: Few = None,
    seeds: Seeds = 3,
    steps: Steps = None,
    samples: Samples = None,
    small: Small = False,
    recipe: Base = "ptq4dm",
    compare: Compare = "w8a8",
    reference: Reference = 10_000,
    inception: Inception = None,
    prompts: Prompts = None,
    class_labels: Labels = None,
    device: Device = "cpu",
    batch_size: Batch = None,
    compiled: Compiled = False,
    tf32: Tf32 = False,
    workers: Workers = 1,
    minutes: Minutes = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Rerun the paper's investigation: every table and figure, each with spreads and verdicts.

    A killed study resumes; finished cells are not run again. The page is OUT/study.html.

    Example: quantempo study models/ddpm --data images --out runs/study --only T3 --device cuda
    """
    from quantempo.cli.run_demo import DEMO_MODEL
    from quantempo.study import Settings, make_plan, run_study

    _check(device, workers, small and steps is not None)
    if workers > 1 and "RANK" not in os.environ:
        _spawn(workers)
        return
    settings = Settings(
        source=source or str(DEMO_MODEL),
        out=out,
        data=data,
        reference=min(reference, 64) if small else reference,
        extractor="inception" if inception else "lite0",
        weights=str(inception) if inception else None,
        call=call_arguments(prompts, class_labels),
        device=device,
        compiled=compiled,
        tf32=tf32,
        batch_size=batch_size or (32 if device == "cpu" else 256),
        probe=(2, 4) if small else (16, 16),
    )
    beside = None if compare == "none" else compare
    how: dict[str, Any] = {"images": images, "few": few, "seeds": seeds, "small": small}
    plan = make_plan(recipe, beside, steps=steps or 100, samples=samples, **how)
    names = tuple(name.strip() for name in only.split(",")) if only else ()
    page = run_study(settings, plan, only=names, minutes=minutes, force=force)
    if int(os.environ.get("RANK", 0)) == 0:
        show({"page": str(page)}, as_json)


def _check(device: str, workers: int, two_scales: bool) -> None:
    """Refuse devices that are not there, for every process, and two ways to give the steps."""
    from quantempo.models.load import check_device

    for name in [device, *(f"cuda:{i}" for i in range(workers) if device == "cuda")]:
        check_device(name)
    if two_scales:
        raise QuantempoError("got --small with --steps; a small study has 6 steps, give one")


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
