"""The text, plot and pictures of a ladder of recipes, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantempo.report import plots
from quantempo.run_folder import RunFolder, atomic_path
from studies.ptq4dm.plots import standalone

__all__ = ["write_quality"]

COLUMNS, ENLARGED = 12, 3
COLOURS = {"W8A8": plots.INT8, "W4A8": plots.ACCENT, "W6A6": plots.INDIGO, "W4A4": plots.OCHRE}
SHOWN = ("ptq4dm", "w8a8", "w4a8", "w4a8-adaround", "w6a6", "w4a4")


def write_quality(folder: str | Path) -> Path:
    """Write `quality.md` and, in `quality/`, `ladder.svg` and `pictures.png`; return the text.

    Args:
        folder: with `results.json`, `ladder.json` and `images/*.npy`.

    Raises:
        QuantempoError: no ladder there, or matplotlib is missing.
    """
    run = RunFolder(folder)
    results = run.read_json("results.json")
    shown = _pictures(run, results)
    with atomic_path(run / "quality.md") as temporary:
        temporary.write_text(_text(results, shown), encoding="utf-8")
    # Last: a machine may lack matplotlib.
    with atomic_path(run / "quality/ladder.svg") as temporary:
        temporary.write_text(standalone([_plot(results["ladder"])]), encoding="utf-8")
    return run / "quality.md"


def _text(results: dict[str, Any], shown: str) -> str:
    about = results["about"]
    seeds = f"seeds {about['first_seed']}, {about['first_seed'] + 1}, ..."
    lines = [
        f"# Quality of {about['source']}",
        "",
        f"{(about['scheduler'] or 'own sampler').upper()}, {about['steps']} steps, equal "
        f"{seeds} for float and "
        f"quantized models, calibration under the same sampler with other seeds. PSNR and SSIM are "
        "per image against the float image, ± the standard deviation of the means of three thirds "
        "of the seeds. `fed` is the Frechet distance on EfficientNet-Lite0 features, no FID, and "
        "comparable at equal numbers of images only. Seconds: trace to pack. Bytes: the packed "
        f"denoiser on disk. Machine: {_machine(about['machine'])}.",
        "",
        *_recipes(results),
        "",
        *([f"![{shown}](quality/pictures.png)", "", f"*{shown}.*", ""] if shown else []),
        "## One idea a rung",
        "",
        "![the ladder](quality/ladder.svg)",
        "",
        *_ladder(results["ladder"]),
        "",
        f"All rungs on the first {about['images']} seeds.",
    ]
    if results["not_run"]:
        lines += ["", f"Not run: {', '.join(results['not_run'])}."]
    lines += [f"\nFailed: {name}: {error}" for name, error in results["failed"].items()]
    return "\n".join(lines) + "\n"


def _comparable(row: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a rung on the images that all rungs have."""
    return {**row, **row.get("first", {})}


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(str(v) for k, v in machine.items() if k in ("gpu", "cpu", "torch") and v)


def _number(value: float | None, digits: int = 2, plus: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" ± {plus:.{digits}f}" if plus is not None else "")


def _recipes(results: dict[str, Any]) -> list[str]:
    head = "| recipe | PSNR mean | p05 | fed to float | fed to data | seconds | MB | in float |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    own = results["float"]
    if own:
        other = _number(own["fed_lite0_other_seeds"])
        data = _number(own["fed_lite0_vs_data"], 2, own.get("fed_lite0_vs_data_std_of_thirds"))
        lines.append(
            f"| float, {own['images']} images | | | {other} (other seeds) | {data} | | | |"
        )
    for row in results["ladder"]:
        if not row["full"]:
            continue
        kept = results["recipes"][row["name"]]["float_layers"]
        data = _number(row["fed_lite0_vs_data"], 2, row.get("fed_lite0_vs_data_std_of_thirds"))
        lines.append(
            f"| {row['name']}, {row['images']} images "
            f"| {_number(row['psnr_db_mean'], 2, row['psnr_db_std_of_thirds'])} "
            f"| {_number(row['psnr_db_p05'])} | {_number(row['fed_lite0_vs_float'])} | {data} "
            f"| {row['calibration_seconds']:.0f} | {row['bytes_packed'] / 1e6:.1f} | {len(kept)} |"
        )
    return lines


def _ladder(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| rung | idea | PSNR | p05 | SSIM | images | seconds | bits a weight | engine, machine |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in map(_comparable, rows):
        lines.append(
            f"| {row['name']} | {row['idea']} "
            f"| {_number(row['psnr_db_mean'], 2, row['psnr_db_std_of_thirds'])} "
            f"| {_number(row['psnr_db_p05'])} | {_number(row['ssim_mean'], 4)} "
            f"| {row['images']} | {row['calibration_seconds']:.0f} "
            f"| {_number(row.get('weight_bits_mean'))} "
            f"| {row['engine']}, {row['machine']} |"
        )
    return lines


def _plot(rows: list[dict[str, Any]]) -> str:
    """Draw the PSNR of every rung, families apart, the first rung on top."""
    with plots.new_figure(1, 1, 0.5 + 0.24 * max(1, len(rows))) as (figure, axes):
        axis = axes[0, 0]
        for place, row in enumerate(map(_comparable, rows)):
            colour = COLOURS.get(row["family"], plots.FLOAT)
            axis.plot([0, row["psnr_db_mean"]], [place, place], color=colour, linewidth=1)
            axis.plot(row["psnr_db_mean"], place, "o", color=colour, markersize=5)
            axis.text(row["psnr_db_mean"] + 0.5, place, f"{row['psnr_db_mean']:.1f}", va="center")
        axis.set_yticks(range(len(rows)), [f"{r['idea']}   {r['name']}" for r in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        # Room for the figures behind the dots.
        axis.set_xlim(0, 1.12 * max((_comparable(r)["psnr_db_mean"] for r in rows), default=1))
        axis.set_xlabel("PSNR to the float images, dB")
        plots.bare(axis, "x")
    return figure.svg


def _pictures(run: RunFolder, results: dict[str, Any]) -> str:
    """Draw the first images of float and shipped recipes, a row each; return what is to be seen."""
    from PIL import Image

    floats = sorted((run / "images").glob(f"float-*-{results['about']['first_seed']}.npy"))
    files = {"float": floats[0]} if floats else {}
    files |= {n: run / f"images/{n}.npy" for n in SHOWN if n in results["recipes"]}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        return ""
    rows = [np.load(file, mmap_mode="r")[:COLUMNS] for file in files.values()]
    count = min(len(row) for row in rows)
    whole = np.concatenate([np.concatenate(list(row[:count]), 1) for row in rows])
    if whole.shape[-1] == 1:
        whole = np.repeat(whole, 3, -1)
    image = Image.fromarray(np.ascontiguousarray(whole))
    size = (image.width * ENLARGED, image.height * ENLARGED)
    with atomic_path(run / "quality/pictures.png") as temporary:
        image.resize(size, Image.Resampling.NEAREST).save(temporary, "PNG", optimize=True)
    return f"The first {count} seeds, uncurated: {', '.join(files)}"
