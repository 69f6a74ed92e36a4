"""quantempo status, engines: what a run folder holds, what can run models here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli.common import Json, next_command

__all__ = ["engines", "status"]


def status(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    as_json: Json = False,
) -> None:
    """Print what a run folder holds: stages with their time, quality, and the next command.

    Example: quantempo status runs/cifar
    """
    import json

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
        typer.echo(json.dumps(values | {"next": following}))
        return
    for name, text in about.items():
        typer.echo(f"{name:<10} {text}")
    for name, seconds in done.items():
        typer.echo(f"{name:<10} {'not done' if seconds is None else f'{seconds:.1f} s'}")
    if "psnr_db_mean" in metrics:
        typer.echo(f"{'quality':<10} {metrics['psnr_db_mean']:.1f} dB PSNR to the float images")
    typer.echo(f"{'next':<10} {following}")


def engines(as_json: Json = False) -> None:
    """Print the engines, on which devices they run, and why one cannot run here or is slow here.

    Example: quantempo engines
    """
    import json

    from quantempo.engines import ENGINES

    rows: list[dict[str, Any]] = []
    for name in ENGINES.names():
        engine = ENGINES.get(name)
        missing = engine.missing()
        slower = None if missing else engine.handicap()
        rows.append({
            "engine": name, "devices": list(engine.devices), "works": missing is None,
            "reason": missing or slower,
        })  # fmt: skip
    if as_json:
        typer.echo(json.dumps({"engines": rows}))
        return
    for row in rows:
        says = "works" if row["works"] else "does not work here"
        reason = f": {row['reason']}" if row["reason"] else ""
        typer.echo(f"{row['engine']:<10} {', '.join(row['devices']):<10} {says}{reason}")
