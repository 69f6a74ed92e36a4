"""quantempo export and import: packed models in formats of other programs."""

import importlib
from pathlib import Path
from typing import Any

import typer

from quantempo.cli import common as use

__all__ = ["FORMATS", "export", "import_"]

# The module of `quantempo.export` whose `write` makes it.
FORMATS = {"comfy": "comfy", "onnx": "graphs", "openvino": "graphs"}


@use.with_call
def export(
    run: Path = typer.Argument(..., help="Run folder, or its packed/."),
    format: str = typer.Option(..., help=f"{', '.join(FORMATS)}."),
    out: Path = typer.Option(..., help="Folder for the files; of comfy the file."),
    batch_size: use.BatchSize = 1,
    rotate: bool = typer.Option(False, "--rotate", help="comfy: round anew, rotated (ConvRot)."),
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
) -> None:
    """Write a packed model with the same integers and scales, for other programs.

    A graph has the shapes of the call it is made from: images a call, arguments as traced.

    Example: quantempo export runs/flux --format comfy --out flux-int8.safetensors
    """
    from quantempo.errors import QuantempoError
    from quantempo.registry import check_known

    check_known([format], FORMATS, "no format")
    if rotate and format != "comfy":
        raise QuantempoError(f"--rotate is of format comfy, not of {format}; leave it out")
    writer = importlib.import_module(f"quantempo.export.{FORMATS[format]}")
    packed = run / "packed" if (run / "packed").is_dir() else run
    how = {"batch_size": batch_size, "force": force, "call": call, "rotate": rotate}
    use.show(writer.write(packed, out, format=format, **how), as_json)


@use.with_loading
def import_(
    file: Path = typer.Argument(..., help="Quantized checkpoint of ComfyUI, safetensors."),
    model: str = typer.Option(..., help="The float diffusers folder it was made of, or hub name."),
    out: Path = typer.Option(..., help="Folder for the packed pipeline."),
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Make a packed diffusers folder of ComfyUI's quantized checkpoint.

    Example: quantempo import flux-int8.safetensors --model path/to/flux --out flux-packed
    """
    from quantempo.export import comfy

    use.show(comfy.read(file, model, out, force=force, **loading), as_json)
