"""quantempo trace, calibrate, search, round, pack: the stages one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from quantempo.cli import common as use

__all__ = ["STAGES", "trace"]

Changed = Annotated[str | None, typer.Option("--recipe", help="Another recipe from this stage on.")]

_HELP = {
    "calibrate": "Collect the statistics of every layer input over the trace.",
    "search": "Choose time buckets and scales by the recipe's metrics.",
    "round": "Choose the integer weights.",
    "pack": "Write the packed diffusers folder and the layer table.",
}


@use.with_call
@use.with_loading
def trace(
    source: use.Source,
    run: use.Run,
    recipe: use.RecipeName = "w8a8",
    steps: use.Steps = None,
    scheduler: use.Scheduler = None,
    data: use.Data = None,
    device: use.Device = "cpu",
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Record what the denoiser receives while the float pipeline samples.

    Example: quantempo trace models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo.pipeline import stages as pipeline
    from quantempo.recipe import Recipe

    resolved = Recipe.load(recipe).override("trace", steps=steps)
    session = pipeline.load(
        source, run, resolved, call=call, scheduler=scheduler, force=force, device=device,
        data=data, **loading,
    )  # fmt: skip
    rows = len(pipeline.trace(session))
    use.show({"trace": str(run / "trace"), "rows": rows}, as_json)


def _command(verb: str, text: str) -> Callable[..., None]:
    """Return the command of a stage that reads the run folder."""

    def command(
        run: use.Run,
        recipe: Changed = None,
        device: use.Device = "cpu",
        force: use.Force = False,
        as_json: use.Json = False,
    ) -> None:
        from quantempo.pipeline import stages as pipeline

        session = pipeline.reopen(run, recipe, force=force, device=device)
        getattr(pipeline, "round_weights" if verb == "round" else verb)(session)
        use.show({name: entry["seconds"] for name, entry in session.done().items()}, as_json)

    command.__name__ = verb
    command.__doc__ = f"{text}\n\n    Example: quantempo {verb} --run runs/cifar\n    "
    return command


STAGES: tuple[Any, ...] = (trace, *(_command(verb, text) for verb, text in _HELP.items()))
