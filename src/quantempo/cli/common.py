"""What the verbs share: options, printing, the arguments of a pipeline's call."""

import functools
import inspect
import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.errors import QuantempoError

__all__ = [
    *("MOST", "BatchSize", "Device", "EngineName", "Force", "Json", "Memory", "Packed", "Run"),
    *("Scheduler", "call_arguments", "next_command", "show", "show_summary", "table"),
    *("with_call", "with_loading", "with_model"),
]

# Of images, steps and the like; beyond it a list of them alone fills the memory.
MOST = 1_000_000

Run = Annotated[Path, typer.Option("--run", help="Run folder, one artefact a stage.")]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", help="Sampler instead of the pipeline's own.")
]
EngineName = Annotated[
    str, typer.Option("--engine", help="auto, openvino, onednn, triton (GPU) or simulated.")
]
Packed = Annotated[str, typer.Option("--packed", help="4-bit weights: keep, unpack or auto.")]
Device = Annotated[str, typer.Option("--device", help="Torch device, cpu or cuda.")]
Memory = Annotated[
    str | None, typer.Option("--memory", help="12GB of the GPU: blocks beyond it are copied in.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, max=MOST, help="Images a call.")]
Force = Annotated[bool, typer.Option("--force", help="Redo what other settings made.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def _options(panel: str, table: dict[str, tuple[Any, ...]]) -> dict[str, inspect.Parameter]:
    """Return optional parameters of a panel: name -> (type, help, further names)."""

    def option(name: str, kind: Any, text: str, *names: str) -> inspect.Parameter:
        hint = Annotated[kind | None, typer.Option(*names, help=text, rich_help_panel=panel)]
        place = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, place, default=None, annotation=hint)

    return {name: option(name, *row) for name, row in table.items()}


_CALL = _options("Arguments of the pipeline's call", {
    "prompts": (Path, "Text file, one prompt a line, for text models."),
    "class_labels": (str, "Comma-separated labels, for class models."),
    "negative_prompt": (str, "What not to show, for text models."),
    "height": (int, "Pixels."),
    "width": (int, "Pixels."),
    "num_frames": (int, "Frames of a film."),
    "guidance_scale": (float, "Guidance, where it differs from the pipeline's own."),
    "strength": (float, "How far an input image is changed, 0 to 1."),
    "max_sequence_length": (int, "Tokens of a prompt."),
    "call_file": (Path, "TOML file of any arguments; files of images by name.", "--call"),
    "settings": (list[str], "Any argument, KEY=VALUE; can be repeated.", "--set"),
})  # fmt: skip
_LOADING = _options("Loading of the model", {
    "dtype": (str, "float32 (default), bfloat16 or float16."),
    "variant": (str, "Weights of another name: fp16, ema."),
    "revision": (str, "Branch or commit of a hub name."),
})  # fmt: skip


def _with(
    parameter: str, options: Mapping[str, inspect.Parameter], collect: Callable[..., dict[str, Any]]
) -> Callable[[Any], Any]:
    """Return a decorator that gives a verb options; it receives what was given as one argument."""

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(verb, eval_str=True)

        @functools.wraps(verb)
        def command(**given: Any) -> Any:
            collected = collect(**{name: given.pop(name) for name in options})
            return verb(**{parameter: collected}, **given)

        every = [*options.values(), *(p for name, p in own.parameters.items() if name != parameter)]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in every]
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def call_arguments(
    prompts: Path | None = None, class_labels: str | None = None, call_file: Path | None = None,
    settings: list[str] | None = None, **values: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the extra arguments of the pipeline's call: of the file, then --set, then options."""
    from quantempo.pipeline.arguments import read_arguments, read_text

    call = read_arguments(call_file, settings or ())
    call |= {name: value for name, value in values.items() if value is not None}
    if prompts is not None:
        text = read_text(prompts, "a text file, one prompt a line")
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if not lines:
            raise QuantempoError(f"'{prompts}' is empty; expected one prompt a line")
        call["prompt"] = lines
    if class_labels is not None:
        try:
            call["class_labels"] = [int(label) for label in class_labels.split(",")]
        except ValueError as error:
            wanted = "expected integers: 1,2,3"
            raise QuantempoError(f"got --class-labels {class_labels}; {wanted}") from error
    return call


with_call = _with("call", _CALL, call_arguments)
with_loading = _with("loading", _LOADING, lambda **given: {k: v for k, v in given.items() if v})


@with_call
@with_loading
def _model_arguments(
    *,
    source: str = typer.Argument(..., help="Diffusers pipeline folder (float) or hub name."),
    run: Run,
    recipe: str = typer.Option("w8a8", help="Shipped recipe or TOML file."),
    steps: int | None = typer.Option(None, min=1, help="Steps to trace; the recipe's by default."),
    only: str | None = typer.Option(None, help="One network, of a pipeline with several."),
    data: str | None = typer.Option(None, help="Image folder, for the sources raw and mimic."),
    memory: str | None = typer.Option(
        None, help="12GB: a network larger than this stays in its files; a third of it all."
    ),
    also: str = typer.Option("", help="text_encoder,vae: their weights in int8 too."),
    minutes: float | None = typer.Option(
        None, min=0, help="Budget: as many chains and steps to trace as it allows, printed."
    ),
    lora: list[str] | None = typer.Option(None, help="FILE:0.8, merged first; can be repeated."),
    scheduler: Scheduler = None,
    device: Device = "cpu",
    force: Force = False,
    call: dict[str, Any],
    loading: dict[str, Any],
) -> dict[str, Any]:
    """Return the arguments of `pipeline.stages.load`."""
    from quantempo.recipe import Recipe

    resolved = Recipe.load(recipe).override("trace", steps=steps)
    return {
        "source": source, "run": run, "recipe": resolved, "data": data, "only": only,
        "scheduler": scheduler, "device": device, "force": force, "call": call, **loading,
        "memory": memory, "minutes": minutes, "lora": lora, "also": also,
    }  # fmt: skip


with_model = _with("model", inspect.signature(_model_arguments).parameters, _model_arguments)


def show(values: dict[str, Any], as_json: bool) -> None:
    """Print results on stdout: JSON for machines, one `name  value` line each for people."""
    if as_json:
        typer.echo(json.dumps(values))
        return

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    table([(key, text(value)) for key, value in values.items()])


def table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print rows in aligned columns, those numbered `right` flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if i in right else "<" for i in range(len(widths))]
    for row in rows:
        cells = (f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def next_command(run: Path, source: str, done: dict[str, Any], metrics: dict[str, Any]) -> str:
    """Return the command line that goes on with a run folder."""
    if any(seconds is None for seconds in done.values()):
        return f"quantempo quantize {shlex.quote(source)} --run {shlex.quote(str(run))}"
    verb = "report" if "psnr_db_mean" in metrics else "evaluate"
    return f"quantempo {verb} --run {shlex.quote(str(run))}"


def show_summary(values: dict[str, Any], where: Path, following: str) -> None:
    """Print what a quantized model is worth in words, its place, and the next command."""
    from quantempo.report.answers import seen

    small, large = values["bytes_packed"] / 1e6, values["bytes_float32"] / 1e6
    words = [f"{small:.1f} MB, {large / small:.1f}x smaller"]
    lines = {"integers": f"{values['int8_mac_share']:.1%} of the work of layers"}
    if "speedup_vs_best_fp32" in values:
        words.append(f"{values['speedup_vs_best_fp32']:.1f}x faster here")
        lines["speed"] = (
            f"{values['speedup_vs_best_fp32']:.2f} times the best float32, "
            f"{values['speedup_vs_best_bf16']:.2f} times bfloat16 ({values['engine']})"
        )
    if "psnr_db_mean" in values:
        mean = values["psnr_db_mean"]
        words.append(f"{seen(mean)}: {mean:.1f} dB")
        lines["quality"] = (
            f"{mean:.1f} dB PSNR to the float images, {values['psnr_db_p05']:.1f} dB "
            f"for the worst 5 % ({len(values['seeds'])} pairs)"
        )
    if "total_seconds" in values:
        lines["time"] = f"{values['total_seconds']:.0f} s"
    typer.echo("\n" + "; ".join(words) + "\n")
    table([*lines.items(), ("result", str(where)), ("next", following)])
