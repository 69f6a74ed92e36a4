"""quantempo bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli.common import MOST, Device, Json, show

__all__ = ["bench"]


def bench(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder that is packed.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=MOST, help="Batch size; repeat for more.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="Engine; repeat for more on a CPU, all installed by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=MOST, help="Interleaved samples of each.")] = 9,
    compiled: Annotated[bool, typer.Option(help="Include torch.compile baselines.")] = True,
    device: Device = "cpu",
    model: Annotated[
        str | None,
        typer.Option(help="sdxl, sd15, ddpm35m or a diffusers folder, quantized without data."),
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="Pattern like 'ours/*'; repeat for more.")
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="GPU: time the kernels one by one.")] = False,
    steps: Annotated[
        int | None,
        typer.Option("--sample-steps", min=1, help="Images a second too, DDIM of so many steps."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="Seconds a candidate may take to compile.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time the denoiser: on a CPU every engine, on a GPU our kernels, against the best float forms.

    Example: quantempo bench --run runs/cifar --batch 8 --batch 16
    """
    from quantempo.bench import run as library
    from quantempo.bench.results import text_table

    what: dict[str, Any] = {"device": device, "ops": ops, "engines": engine or ()}
    what["candidates"] = candidate or ()
    # Before a run folder is opened.
    library.check_request(run is not None, model, out=out, **what)
    session = None
    if run is not None:
        from quantempo.pipeline.session import reopen

        session = reopen(run, device=device)
    record = library.bench(
        session, model, batches=batch, compiled=compiled, out=out, rounds=rounds, budget=budget,
        steps=steps, **what,
    )  # fmt: skip
    if as_json:
        show(record, as_json)
        return
    for line in text_table(record):
        typer.echo(line)
