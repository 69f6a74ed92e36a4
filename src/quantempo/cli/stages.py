"""quantempo trace, calibrate, search, round, pack: the stages one by one."""

from __future__ import annotations

from typing import Annotated, Any

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

__all__ = ["calibrate", "correct", "pack", "round_weights", "search", "trace"]

Changed = Annotated[str | None, typer.Option("--recipe", help="Another recipe from this stage on.")]


def trace(
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
    """Record what the denoiser receives while the float pipeline samples.

    Example: quantempo trace models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo.pipeline import stages as pipeline
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
    rows = len(pipeline.trace(session))
    show({"trace": str(run / "trace"), "rows": rows}, as_json)


def _stage(
    name: str, run: Any, recipe: str | None, device: str, force: bool, as_json: bool
) -> None:
    from quantempo.pipeline import stages as pipeline

    session = pipeline.reopen(run, recipe, force=force, device=device)
    getattr(pipeline, name)(session)
    seconds = session.run.read_json("manifest.json")["stages"]
    show({key: value["seconds"] for key, value in seconds.items()}, as_json)


def calibrate(
    run: Run,
    recipe: Changed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Collect the statistics of every layer input over the trace.

    Example: quantempo calibrate --run runs/cifar
    """
    _stage("calibrate", run, recipe, device, force, as_json)


def search(
    run: Run,
    recipe: Changed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose time buckets and scales by the recipe's metrics.

    Example: quantempo search --run runs/cifar
    """
    _stage("search", run, recipe, device, force, as_json)


def round_weights(
    run: Run,
    recipe: Changed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Choose the integer weights.

    Example: quantempo round --run runs/cifar
    """
    _stage("round_weights", run, recipe, device, force, as_json)


def correct(
    run: Run,
    recipe: Changed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit what the recipe corrects around the network, on the packed model's own trajectories.

    Example: quantempo correct --run runs/cifar
    """
    _stage("correct", run, recipe, device, force, as_json)


def pack(
    run: Run,
    recipe: Changed = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the packed diffusers folder and the layer table.

    Example: quantempo pack --run runs/cifar
    """
    _stage("pack", run, recipe, device, force, as_json)
