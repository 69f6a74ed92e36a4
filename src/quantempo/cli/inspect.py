"""quantempo inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import Json, show

__all__ = ["inspect"]


def inspect(
    model: Annotated[Path, typer.Argument(help="Packed diffusers folder, or a run folder.")],
    as_json: Json = False,
) -> None:
    """Print the layer table of a packed model: bits, scales over time, backend, reasons.

    Example: quantempo inspect runs/cifar/packed
    """
    from quantempo.pipeline.layer_table import describe
    from quantempo.report.bits import bits_cell

    rows = describe(model / "packed" if (model / "packed").is_dir() else model)
    if as_json:
        show({"layers": rows}, as_json)
        return
    width = max(len(row["name"]) for row in rows)
    typer.echo(
        f"{'layer':<{width}}  {'role':<9} {'weight':<18} bits    scale over time (buckets)"
        "             backend"
    )
    for row in rows:
        shape = "x".join(str(n) for n in row["weight_shape"])
        scales = "-"
        if row["scale_min"] is not None:
            scales = f"{row['scale_min']:.3g} .. {row['scale_max']:.3g} ({row['buckets']})"
        backend = f"{row['backend']}: {row['reason']}" if row["reason"] else row["backend"]
        bits = bits_cell(row).replace(" / ", "/")
        typer.echo(
            f"{row['name']:<{width}}  {row['role']:<9} {shape:<18} {bits:<7} {scales:<37} {backend}"
        )
