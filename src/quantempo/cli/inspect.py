"""quantempo inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import Json, show

__all__ = ["inspect"]


def inspect(
    model: Annotated[Path, typer.Argument(help="Packed diffusers folder, or a run folder.")],
    device: Annotated[
        str | None, typer.Option("--device", help="Torch device; the GPU if there is one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the layers of a packed model: bits, scales over time, what runs them here, reasons.

    Example: quantempo inspect runs/cifar/packed
    """
    from quantempo.pipeline.layer_table import describe
    from quantempo.report.bits import bits_cell

    rows, unfused = describe(model / "packed" if (model / "packed").is_dir() else model, device)
    if as_json:
        show({"layers": rows, "unfused": unfused}, as_json)
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
    for name, reason in unfused.items():
        typer.echo(f"not fused: {name}: {reason}")
