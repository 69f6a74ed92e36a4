"""quantempo sensitivity."""

import typer

from quantempo.cli.common import MOST, Device, Force, Json, Run, show, table

__all__ = ["sensitivity"]


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
