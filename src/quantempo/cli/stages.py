"""The verbs that make a run folder: quantempo quantize and demo, or its stages one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli import common as use

__all__ = ["STAGES", "demo", "quantize", "trace"]

Changed = Annotated[str | None, typer.Option("--recipe", help="Another recipe from this stage on.")]

_HELP = {
    "calibrate": "Collect the statistics of every layer input over the trace.",
    "search": "Choose time buckets and scales by the recipe's metrics.",
    "round": "Choose the integer weights.",
    "pack": "Write the packed diffusers folder and the layer table.",
}


@use.with_model
def quantize(
    budget_bytes: int | None = typer.Option(
        None, min=1, help="Choose bits a layer: bytes of integer weights at most."
    ),
    budget_bops: int | None = typer.Option(
        None, min=1, help="Choose bits a layer: MACs x weight bits x activation bits at most."
    ),
    max_loss_db: float | None = typer.Option(
        None, min=0, help="Weights in 4 bits where images lose so much PSNR at most against 8."
    ),
    as_json: use.Json = False,
    *,
    model: dict[str, Any],
) -> None:
    """Quantize a diffusers pipeline: load, trace, calibrate, search, round, pack.

    A killed run resumes. The result is the diffusers folder RUN/packed. With a budget the bits
    of every integer layer are chosen by what they cost in the image (see quantempo sensitivity).
    Bytes count codes, scales and the groups that 4-bit weights have; bit operations are of one
    image and step.

    Example: quantempo quantize models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo import mixed_precision as sensitivity
    from quantempo.pipeline import quality
    from quantempo.pipeline import stages as pipeline

    given = {"budget_bytes": budget_bytes, "budget_bops": budget_bops, "max_loss_db": max_loss_db}
    budgets: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if budgets:
        model["recipe"] = sensitivity.recall(model["run"], model["recipe"], **budgets)
    session = pipeline.load(**model)
    if max_loss_db is not None:
        sensitivity.limit_loss(session, max_loss_db)
    elif budgets:
        sensitivity.choose_bits(session, **budgets)
    packed = pipeline.finish(session)
    summary = quality.summary(session)
    if not as_json:
        following = use.next_command(model["run"], model["source"], session.seconds(), {})
        use.show_summary(summary, packed, following)
        return
    summary["float_layers"] = len(summary["float_layers"])
    use.show({"packed": str(packed), **summary}, as_json)


def demo(
    run: Path = typer.Option(Path("runs/demo"), help="Run folder."),
    images: int = typer.Option(64, min=2, max=use.MOST, help="Pairs of images."),
    force: use.Force = False,
    as_json: use.Json = False,
) -> None:
    """Do the whole main line on the bundled CIFAR-10 model; no network, a few minutes.

    Example: quantempo demo
    """
    from quantempo.cli.run_demo import run_demo

    metrics = run_demo(run, images=images, force=force)
    if as_json:
        use.show(metrics, as_json)
    else:
        use.show_summary(metrics, run / "report.html", f"quantempo inspect {run}")


@use.with_model
def trace(as_json: use.Json = False, *, model: dict[str, Any]) -> None:
    """Record what the denoiser receives while the float pipeline samples.

    Example: quantempo trace models/ddpm-cifar10 --run runs/cifar
    """
    from quantempo.pipeline import stages as pipeline

    rows = len(pipeline.trace(pipeline.load(**model)))
    use.show({"trace": str(model["run"] / "trace"), "rows": rows}, as_json)


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
        use.show({name: entry["seconds"] for name, entry in session.run.stages().items()}, as_json)

    command.__name__ = verb
    command.__doc__ = f"{text}\n\n    Example: quantempo {verb} --run runs/cifar\n    "
    return command


STAGES: tuple[Any, ...] = (trace, *(_command(verb, text) for verb, text in _HELP.items()))
