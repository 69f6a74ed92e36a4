"""What the verbs share: options, printing, reading prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.errors import QuantempoError

__all__ = [
    "BatchSize",
    "Data",
    "Device",
    "EngineName",
    "Force",
    "Json",
    "Labels",
    "Prompts",
    "RecipeName",
    "Run",
    "Scheduler",
    "Source",
    "Steps",
    "call_arguments",
    "open_session",
    "show",
]

Source = Annotated[str, typer.Argument(help="Diffusers pipeline folder (float) or hub name.")]
Run = Annotated[Path, typer.Option("--run", help="Run folder, one artefact a stage.")]
RecipeName = Annotated[str, typer.Option("--recipe", help="Shipped recipe or TOML file.")]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", help="Sampler instead of the pipeline's own.")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="Text file, one prompt a line, for text models.")
]
Labels = Annotated[
    str | None, typer.Option("--class-labels", help="Comma-separated labels, for class models.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="auto, openvino, onednn, triton (GPU) or simulated.")
]
Device = Annotated[str, typer.Option("--device", help="Torch device, cpu or cuda.")]
Data = Annotated[
    str | None, typer.Option("--data", help="Image folder, for recipes with source raw or mimic.")
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Steps to trace; the recipe's by default.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images a call.")]
Force = Annotated[bool, typer.Option("--force", help="Redo what other settings made.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def call_arguments(prompts: Path | None, labels: str | None) -> dict[str, Any]:
    """Return the extra arguments of the pipeline's call.

    Raises:
        QuantempoError: no such file, an empty one, or labels that are no integers.
    """
    call: dict[str, Any] = {}
    if prompts is not None:
        if not prompts.is_file():
            raise QuantempoError(f"no file '{prompts}'; expected a text file, one prompt a line")
        try:
            text = prompts.read_text()
        except (UnicodeDecodeError, OSError) as error:
            raise QuantempoError(f"cannot read '{prompts}': {error}; expected text") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise QuantempoError(f"'{prompts}' is empty; expected one prompt a line")
        call["prompt"] = lines
    if labels is not None:
        try:
            call["class_labels"] = [int(label) for label in labels.split(",")]
        except ValueError as error:
            raise QuantempoError(
                f"got --class-labels {labels}; expected integers: 1,2,3"
            ) from error
    return call


def open_session(
    source: str,
    run: Path,
    recipe: Any,
    prompts: Path | None,
    labels: str | None,
    scheduler: str | None,
    force: bool,
    device: str,
    data: str | None,
) -> Any:
    """Open the float pipeline and its run folder from the options of a command."""
    from quantempo.pipeline.session import load

    options: dict[str, Any] = {"scheduler": scheduler, "force": force, "device": device}
    return load(source, run, recipe, call=call_arguments(prompts, labels), data=data, **options)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Print results on stdout: JSON for machines, one `name  value` line each for people."""
    if as_json:
        typer.echo(json.dumps(values))
        return
    width = max(len(key) for key in values)
    for key, value in values.items():
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        typer.echo(f"{key:<{width}}  {value}")
