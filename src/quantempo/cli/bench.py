"""quantempo bench."""

from pathlib import Path
from typing import Annotated

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
        typer.Option(
            help="flux, sd35-large, pixart-sigma, dit-xl, wan-1.3b, sdxl, sd15, ddpm35m or a "
            "diffusers folder, quantized without data."
        ),
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

    record = library.bench(
        run, model, device=device, batches=batch, engines=engine or (), candidates=candidate or (),
        compiled=compiled, ops=ops, out=out, rounds=rounds, budget=budget, steps=steps,
    )  # fmt: skip
    if as_json:
        show(record, as_json)
        return
    for line in text_table(record):
        typer.echo(line)
