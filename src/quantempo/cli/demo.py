"""quantempo demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import MOST, Force, Json, show, show_summary

__all__ = ["demo"]


def demo(
    run: Annotated[Path, typer.Option("--run", help="Run folder.")] = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=2, max=MOST, help="Pairs of images.")] = 64,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Do the whole main line on the bundled CIFAR-10 model; no network, a few minutes.

    Example: quantempo demo
    """
    from quantempo.cli.run_demo import run_demo

    metrics = run_demo(run, images=images, force=force)
    if as_json:
        show(metrics, as_json)
    else:
        show_summary(metrics, run / "report.html", f"quantempo inspect {run}")
