"""quantempo ladder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import Device, EngineName, Json, Labels, Prompts, call_arguments, show

__all__ = ["ladder"]

Only = Annotated[str | None, typer.Option("--only", help="Names of rungs, in this order.")]


def ladder(
    source: Annotated[
        str | None, typer.Argument(help="Diffusers pipeline (float); the bundled one by default.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the ladder.")] = Path("runs/ladder"),
    data: Annotated[str | None, typer.Option("--data", help="Folder of real images.")] = None,
    only: Only = None,
    images: Annotated[int, typer.Option("--images", min=3, help="Of each rung.")] = 256,
    images_full: Annotated[
        int, typer.Option("--images-full", min=6, help="Of shipped recipes, with distances.")
    ] = 5120,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Of DDIM.")] = 100,
    prompts: Prompts = None,
    class_labels: Labels = None,
    device: Device = "cpu",
    engine: EngineName = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images a call.")] = 64,
    tf32: Annotated[bool, typer.Option("--tf32", help="Float products in TF32.")] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Start no rung after that.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Climb from the paper's recipe to ours, one idea a rung, on one protocol.

    A killed ladder resumes. The text is OUT/quality.md, the figures OUT/results.json.

    Example: quantempo ladder models/ddpm --data images --out runs/ladder --device cuda
    """
    from quantempo.cli.run_demo import DEMO_MODEL
    from quantempo.ladder import LadderSettings
    from quantempo.ladder import ladder as climb
    from quantempo.models.load import check_device

    check_device(device)
    settings = LadderSettings(
        source=source or str(DEMO_MODEL),
        out=out,
        data=data,
        steps=steps,
        images=images,
        images_full=max(images, images_full),
        device=device,
        batch_size=batch_size,
        tf32=tf32,
        engine=engine,
        call=call_arguments(prompts, class_labels),
    )
    names = tuple(name.strip() for name in only.split(",")) if only else ()
    text = climb(settings, names, minutes)
    failed = json.loads((out / "results.json").read_text())["failed"]
    show({"text": str(text), "failed": sorted(failed)}, as_json)
    if failed:
        raise typer.Exit(1)
