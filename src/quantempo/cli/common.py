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
    "show_summary",
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
            wanted = "expected integers: 1,2,3"
            raise QuantempoError(f"got --class-labels {labels}; {wanted}") from error
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


def show_summary(values: dict[str, Any], where: Path) -> None:
    """Print what a quantized model is worth: quality, size, share of integers, speed, its place."""
    small, large = values["bytes_packed"] / 1e6, values["bytes_float32"] / 1e6
    lines = {
        "size": f"{small:.1f} MB, {large / small:.1f} times smaller than float32 ({large:.1f} MB)",
        "integers": f"{values['int8_mac_share']:.1%} of the work of layers "
        f"({values['int8_mac_share_with_attention']:.1%} with the products of attention)",
    }
    if "psnr_db_mean" in values:
        lines["quality"] = (
            f"{values['psnr_db_mean']:.1f} dB PSNR to the float images, "
            f"{values['psnr_db_p05']:.1f} dB for the worst 5 % ({len(values['seeds'])} pairs)"
        )
    if "engine" in values:
        lines["engine"] = values["engine"]
    if "speedup_vs_best_fp32" in values:
        lines["speed"] = (
            f"{values['speedup_vs_best_fp32']:.2f} times the best float32, "
            f"{values['speedup_vs_best_bf16']:.2f} times bfloat16"
        )
    if "total_seconds" in values:
        lines["time"] = f"{values['total_seconds']:.0f} s"
    lines["result"] = str(where)
    typer.echo("")
    for name, text in lines.items():
        typer.echo(f"{name:<10} {text}")
