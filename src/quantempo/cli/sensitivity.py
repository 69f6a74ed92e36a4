"""quantempo sensitivity."""

from typing import Annotated, Any

import typer

from quantempo.cli.common import MOST, Device, Force, Json, Run, show

__all__ = ["sensitivity"]


def sensitivity(
    run: Run,
    options: Annotated[
        str, typer.Option("--options", help="Bits to try, comma-separated.")
    ] = "w4a4,w4a8,w8a4,w8a8",
    chains: Annotated[int, typer.Option(min=1, max=MOST, help="Trajectories, in one batch.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Steps of each.")] = 10,
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
    table = library.measure(session, chosen, chains=chains, steps=steps)
    rows = library.table_rows(table, chosen)
    if as_json:
        show({"settings": table["settings"], "signal": table["signal"], "layers": rows}, as_json)
    else:
        _print(rows, chosen)


def _print(rows: list[dict[str, Any]], options: list[str]) -> None:
    """Print one line a layer, the largest loss first."""
    name, role = (max(len(row[key]) for row in rows) for key in ("name", "role"))
    sizes = list(rows[0]["bytes"])
    typer.echo(
        f"{'layer':<{name}}  {'role':<{role}}  {'MACs':>13}"
        + "".join(f"  {f'bytes {size}':>10}" for size in sizes)
        + "".join(f"  {option:>9}" for option in options)
    )
    for row in rows:
        typer.echo(
            f"{row['name']:<{name}}  {row['role']:<{role}}  {row['macs']:>13,}"
            + "".join(f"  {row['bytes'][size]:>10,}" for size in sizes)
            + "".join(f"  {row['losses'][option]:>9.2e}" for option in options)
        )
