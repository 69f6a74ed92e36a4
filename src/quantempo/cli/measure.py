"""The verbs that measure: quantempo bench and quantempo sensitivity."""

from pathlib import Path

import typer

from quantempo.cli.common import MOST, Device, Force, Json, Memory, Run, show, table

__all__ = ["bench", "sensitivity"]


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
    memory: Memory = None,
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
        memory=memory,
    )  # fmt: skip
    if as_json:
        show(record, as_json)
        return
    for line in text_table(record):
        typer.echo(line)


def sensitivity(
    run: Run,
    options: str = typer.Option("w4a4,w4a8,w8a4,w8a8", help="Bits to try, comma-separated."),
    chains: int = typer.Option(8, min=1, max=MOST, help="Trajectories, in one batch."),
    steps: int = typer.Option(10, min=1, max=MOST, help="Steps of each."),
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure what each layer costs in the image at each number of bits, one layer at a time.

    The loss is the mean squared error of the last latent against the float model, same seeds.
    Writes RUN/sensitivity.json and RUN/sensitivity.svg; a killed run resumes.

    Example: quantempo sensitivity --run runs/cifar
    """
    from quantempo import mixed_precision as library
    from quantempo.pipeline import stages as pipeline

    session = pipeline.reopen(run, force=force, device=device)
    chosen = list(dict.fromkeys(part.strip() for part in options.split(",") if part.strip()))
    found = library.measure(session, chosen, chains=chains, steps=steps)
    rows = library.table_rows(found, chosen)
    if as_json:
        show({"settings": found["settings"], "signal": found["signal"], "layers": rows}, as_json)
        return
    sizes = list(rows[0]["bytes"])
    lines = [["layer", "role", "MACs", *(f"bytes {size}" for size in sizes), *chosen]]
    for row in rows:
        counts = (f"{count:,}" for count in (row["macs"], *map(row["bytes"].get, sizes)))
        losses = (f"{row['losses'][option]:.2e}" for option in chosen)
        lines.append([row["name"], row["role"], *counts, *losses])
    table(lines, right=range(2, len(lines[0])))
