"""The verbs that look: quantempo status, report, inspect, engines (what runs here); and push."""

from pathlib import Path
from typing import Any

import typer

from quantempo.cli.common import Json, Run, next_command, show, table

__all__ = ["engines", "inspect", "push", "report", "status"]


def status(run: Path = typer.Argument(..., help="Run folder."), as_json: Json = False) -> None:
    """Print what a run folder holds: stages with their time, quality, and the next command.

    Example: quantempo status runs/cifar
    """
    from quantempo.pipeline.cache import ARTEFACTS
    from quantempo.run_folder import RunFolder

    folder = RunFolder(run)
    manifest, model = folder.read_json("manifest.json"), folder.read_json("model.json")
    done = {
        name: manifest["stages"].get(name, {}).get("seconds") if folder.has(artefact) else None
        for name, artefact in ARTEFACTS.items()
    }
    metrics = folder.read_json("metrics.json") if folder.has("metrics.json") else {}
    following = next_command(folder.path, model["path"], done, metrics)
    about = {"model": model["path"], "recipe": manifest["recipe"]["name"]}
    if as_json:
        quality = metrics.get("psnr_db_mean")
        values: dict[str, Any] = {**about, "stages": done, "psnr_db_mean": quality}
        show(values | {"next": following}, as_json)
        return
    for name, seconds in done.items():
        about[name] = "not done" if seconds is None else f"{seconds:.1f} s"
    if "psnr_db_mean" in metrics:
        about["quality"] = f"{metrics['psnr_db_mean']:.1f} dB PSNR to the float images"
    table([*about.items(), ("next", following)])


def engines(as_json: Json = False) -> None:
    """Print the engines, on which devices they run, and why one cannot run here or is slow here.

    Example: quantempo engines
    """
    from quantempo.engines import ENGINES

    rows: list[dict[str, Any]] = []
    for name in ENGINES.names():
        engine = ENGINES.get(name)
        missing = engine.missing()
        rows.append({
            "engine": name, "devices": list(engine.devices), "works": missing is None,
            "reason": missing or engine.handicap(),
        })  # fmt: skip
    if as_json:
        show({"engines": rows}, as_json)
        return
    lines = []
    for row in rows:
        says = "works" if row["works"] else "does not work here"
        reason = f": {row['reason']}" if row["reason"] else ""
        lines.append((row["engine"], ", ".join(row["devices"]), says + reason))
    table(lines)


def report(run: Run, as_json: Json = False) -> None:
    """Write RUN/report.html, one self-contained page, from the files of the run folder.

    Example: quantempo report --run runs/cifar
    """
    from quantempo.report import render

    show({"report": str(render(run))}, as_json)


def push(
    run: Path = typer.Argument(..., help="Run folder."),
    name: str = typer.Argument(..., help="Repository on the hub, OWNER/NAME."),
    private: bool = typer.Option(False, "--private", help="Where it is new: for you alone."),
    as_json: Json = False,
) -> None:
    """Upload RUN/packed to the Hugging Face hub, with its model card, by the hub's own client.

    Example: quantempo push runs/cifar me/ddpm-cifar10-int8
    """
    from quantempo.report.card import push as upload

    show({"pushed": upload(run, name, private=private)}, as_json)


def inspect(
    model: Path = typer.Argument(..., help="Packed diffusers folder, or a run folder."),
    device: str | None = typer.Option(None, help="Torch device; the GPU if there is one."),
    as_json: Json = False,
) -> None:
    """Print the layers of a packed model: bits, scales over time, what runs them here, reasons.

    Example: quantempo inspect runs/cifar/packed
    """
    from quantempo.pipeline.layer_table import describe
    from quantempo.report.bits import bits_cell, bits_facts

    folder = model / "packed" if (model / "packed").is_dir() else model
    rows, unfused, notes = describe(folder, device)
    if as_json:
        show({"layers": rows, "unfused": unfused, "notes": notes}, as_json)
        return
    lines = [("layer", "role", "weight", "bits", "scale over time (buckets)", "backend")]
    for row in rows:
        shape = "x".join(map(str, row["weight_shape"]))
        scales = "a token" if row["buckets"] == 0 else "-"
        if row["scale_min"] is not None:
            scales = f"{row['scale_min']:.3g} .. {row['scale_max']:.3g} ({row['buckets']})"
        backend = f"{row['backend']}: {row['reason']}" if row["reason"] else row["backend"]
        bits = bits_cell(row).replace(" / ", "/")
        lines.append((row["name"], row["role"], shape, bits, scales, backend))
    table(lines)
    for name, text in (*bits_facts(rows, None), *notes.items()):
        typer.echo(f"{name}: {text}")
    for name, reason in unfused.items():
        typer.echo(f"not fused: {name}: {reason}")
