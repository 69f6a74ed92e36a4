"""quantempo quantize (layer L6)."""

from __future__ import annotations

from typing import Annotated

import typer

from quantempo.cli.common import (
    Data,
    Device,
    Force,
    Json,
    Labels,
    Prompts,
    RecipeName,
    Run,
    Scheduler,
    Steps,
    call_arguments,
    show,
)

__all__ = ["quantize"]


def quantize(
    source: Annotated[str, typer.Argument(help="Diffusers pipeline folder (float) or hub name.")],
    run: Run,
    recipe: RecipeName = "w8a8",
    steps: Steps = None,
    scheduler: Scheduler = None,
    prompts: Prompts = None,
    class_labels: Labels = None,
    data: Data = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Quantize a diffusers pipeline: load, trace, calibrate, search, round, pack.

    A killed run resumes. The result is the diffusers folder RUN/packed.

    Example: quantempo quantize models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo import pipeline, quality
    from quantempo.recipe import Recipe

    resolved = Recipe.load(recipe).override("trace", steps=steps)
    session = pipeline.load(
        source,
        run,
        resolved,
        call=call_arguments(prompts, class_labels),
        scheduler=scheduler,
        force=force,
        device=device,
        data=data,
    )
    packed = pipeline.finish(session)
    summary = quality.summary(session)
    summary["float_layers"] = len(summary["float_layers"])
    show({"packed": str(packed), **summary}, as_json)
