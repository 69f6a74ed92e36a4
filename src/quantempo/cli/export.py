"""quantempo export: a packed model in a format of other programs."""

import importlib
from pathlib import Path
from typing import Any

import typer

from quantempo.cli import common as use

__all__ = ["FORMATS", "export"]

# The module of `quantempo.export` whose `write` makes it.
FORMATS = {"onnx": "graphs", "openvino": "graphs"}


@use.with_call
def export(
    run: Path = typer.Argument(..., help="Run folder, or its packed/."),
    format: str = typer.Option(..., help=f"{', '.join(FORMATS)}."),
    out: Path = typer.Option(..., help="Folder for the files."),
    batch_size: use.BatchSize = 1,
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
) -> None:
    """Write a packed model as graphs with the same integers and scales, for other runtimes.

    A graph has the shapes of the call it is made from: images a call, arguments as traced.

    Example: quantempo export runs/cifar --format onnx --out cifar-onnx
    """
    from quantempo.registry import check_known

    check_known([format], FORMATS, "no format")
    writer = importlib.import_module(f"quantempo.export.{FORMATS[format]}")
    packed = run / "packed" if (run / "packed").is_dir() else run
    how = {"batch_size": batch_size, "force": force, "call": call}
    use.show(writer.write(packed, out, format=format, **how), as_json)
