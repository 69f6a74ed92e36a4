"""quantempo bench."""

from pathlib import Path

import typer

from quantempo.cli.common import MOST, Device, Json, show

__all__ = ["bench"]


def bench(
    run: Path | None = typer.Option(None, help="Run folder that is packed."),
    batch: list[int] | None = typer.Option(None, min=1, max=MOST, help="Batch size; repeatable."),
    engine: list[str] | None = typer.Option(None, help="Engine; repeatable; all on a CPU."),
    rounds: int = typer.Option(9, min=1, max=MOST, help="Interleaved samples of each."),
    compiled: bool = typer.Option(True, help="Include torch.compile baselines."),
    device: Device = "cpu",
    model: str | None = typer.Option(
        None,
        help="flux, sd35-large, pixart-sigma, dit-xl, wan-1.3b, sdxl, sd15, ddpm35m or a "
        "diffusers folder, quantized without data.",
    ),
    candidate: list[str] | None = typer.Option(None, help="Pattern like 'ours/*'; repeatable."),
    ops: bool = typer.Option(False, "--ops", help="GPU: time the kernels one by one."),
    steps: int | None = typer.Option(
        None, "--sample-steps", min=1, help="Images a second too, DDIM of so many steps."
    ),
    budget: float | None = typer.Option(None, min=1, help="Seconds a candidate may compile."),
    out: Path | None = typer.Option(None, help="Write the results to this file."),
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
