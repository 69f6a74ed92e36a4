"""quantempo quantize."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantempo.cli import common as use

__all__ = ["quantize"]


@use.with_call
@use.with_loading
def quantize(
    source: use.Source,
    run: use.Run,
    recipe: use.RecipeName = "w8a8",
    steps: use.Steps = None,
    scheduler: use.Scheduler = None,
    data: use.Data = None,
    device: use.Device = "cpu",
    budget_bytes: Annotated[
        int | None,
        typer.Option(min=1, help="Choose bits a layer: bytes of integer weights at most."),
    ] = None,
    budget_bops: Annotated[
        int | None,
        typer.Option(
            min=1, help="Choose bits a layer: MACs x weight bits x activation bits at most."
        ),
    ] = None,
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Quantize a diffusers pipeline: load, trace, calibrate, search, round, pack.

    A killed run resumes. The result is the diffusers folder RUN/packed. With a budget the bits
    of every integer layer are chosen by what they cost in the image (see quantempo sensitivity).
    Bytes count codes and one scale a channel; bit operations are of one image and step.

    Example: quantempo quantize models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo import mixed_precision as sensitivity
    from quantempo.pipeline import quality
    from quantempo.pipeline import stages as pipeline
    from quantempo.recipe import Recipe

    resolved = Recipe.load(recipe).override("trace", steps=steps)
    budgets: dict[str, Any] = {"budget_bytes": budget_bytes, "budget_bops": budget_bops}
    if limited := any(budgets.values()):
        resolved = sensitivity.recall(run, resolved, **budgets)
    session = pipeline.load(
        source, run, resolved, call=call, scheduler=scheduler, force=force, device=device,
        data=data, **loading,
    )  # fmt: skip
    if limited:
        sensitivity.choose_bits(session, **budgets)
    packed = pipeline.finish(session)
    summary = quality.summary(session)
    if not as_json:
        following = use.next_command(run, source, session.seconds(), {})
        use.show_summary(summary, packed, following)
        return
    summary["float_layers"] = len(summary["float_layers"])
    use.show({"packed": str(packed), **summary}, as_json)
