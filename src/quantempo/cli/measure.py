"""The verbs that measure: quantempo bench, compare and sensitivity."""

from pathlib import Path
from typing import Any

import typer

from quantempo.cli import common as use
from quantempo.cli.common import MOST, Device, Force, Json, Memory, Run, show, table

__all__ = ["bench", "compare", "sensitivity"]


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
        compiled=compiled, out=out, rounds=rounds, budget=budget, steps=steps,
        memory=memory,
    )  # fmt: skip
    if as_json:
        show(record, as_json)
        return
    for line in text_table(record):
        typer.echo(line)


@use.with_call
@use.with_loading
def compare(
    models: list[str] = typer.Argument(..., help="FOLDER or NAME=FOLDER; the first is the float."),
    out: Path = typer.Option(..., help="Folder for the images and compare.json."),
    images: int = typer.Option(64, min=8, max=MOST, help="Images of each."),
    steps: int = typer.Option(50, min=1, max=MOST, help="Sampling steps."),
    seed: int = typer.Option(0, help="Seed of the first; the next count up."),
    gate: str = typer.Option("", help="'psnr>=40, lpips<=0.05'; exit code 1 if one is not met."),
    weights: list[str] = typer.Option(
        [], help="lpips=FILE@SHA256; also dists, clip (a folder), inception; can be repeated."
    ),
    data: Path | None = typer.Option(None, help="Folder of real images: distances to them too."),
    batch_size: use.BatchSize = 16,
    engine: use.EngineName = "auto",
    scheduler: use.Scheduler = None,
    device: Device = "cpu",
    force: Force = False,
    as_json: Json = False,
    *,
    call: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Compare models, float or quantized by whomever, by images of equal seeds and prompts.

    The first is the reference. Intervals are of 95 %, by bootstrap over pairs; a tie is a
    difference whose interval holds zero. The gate is kept in the folder before images are made.

    Example: quantempo compare models/ddpm-cifar10 runs/cifar runs/other --out compared
    """
    from quantempo.pipeline import compare as library

    found = library.compare(
        models, out, images=images, steps=steps, seed=seed, batch_size=batch_size, gate=gate,
        weights=weights, data=data, call=call, engine=engine, scheduler=scheduler, device=device,
        force=force, **loading,
    )  # fmt: skip
    if as_json:
        show(found, as_json)
    else:
        _show_compared(found)
    if not found["passed"]:
        raise typer.Exit(1)


def _show_compared(found: dict[str, Any]) -> None:
    """Print the table of scores, the verdicts, and how each model meets the gate."""

    def ends(row: dict[str, Any]) -> str:
        return f" [{row['low']:.4g}, {row['high']:.4g}]" if "low" in row else ""

    rows = [[f"against {found['reference']}", *found["models"]]]
    for score, cells in found["scores"].items():
        texts = {name: f"{cell['value']:.4g}{ends(cell)}" for name, cell in cells.items()}
        rows.append([score, *(texts.get(name, "") for name in found["models"])])
    table(rows)
    for row in found["verdicts"]:
        by = f"{row['verdict']}, {row['difference']:+.3g}{ends(row)}"
        typer.echo(f"{row['score']}: {row['of']} against {row['against']}: {by}")
    for name, rules in found["gate"]["models"].items():
        for rule in rules:
            text = f"{'passed' if rule['passed'] else 'FAILED'} ({rule['value']:.4g})"
            more = "; more images may decide otherwise" if rule["open"] else ""
            typer.echo(f"gate: {name}: {rule['rule']}: {text}{more}")
    for name, why in found["missing"].items():
        typer.echo(f"no {name}: {why}")


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
