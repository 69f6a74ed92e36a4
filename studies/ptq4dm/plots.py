"""Figures of a study: scores as dots, errors over time, laws as bars, activations as boxes.

Here: what the figures of one item show, `write_plots` and what it reads. Not here: the page
(`study_page`), the style of figures (`plots`). Reads nothing but the study's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantempo.errors import QuantempoError
from quantempo.report import plots
from quantempo.report.plots import ACCENT, FLOAT, INDIGO, INK, INT8, MUTED, OCHRE, RULE
from quantempo.run_folder import RunFolder, atomic_path

__all__ = [
    "Plot",
    "grouped",
    "is_float",
    "item_plots",
    "mean_of",
    "read_items",
    "score_names",
    "spread_of",
    "standalone",
    "write_plots",
]

CURVES_SHOWN = 8
LAWS_A_ROW = 4
LINES = [(colour, dash) for dash in ("-", "--") for colour in (INT8, ACCENT, INDIGO, OCHRE)]
# From here on one far value would press all others together on a linear axis.
LOG_FROM = 12.0
CARD, MARGIN = "#ffffff", 12


@dataclass(frozen=True)
class Plot:
    """Hold a figure as one <svg> element in the variables of the page, and what it shows."""

    svg: str
    caption: str


def read_items(run: RunFolder) -> dict[str, dict[str, Any] | None]:
    """Return item name -> its JSON in the order of the study, None where the file is missing.

    Raises QuantempoError: no folder, no `study.json` in it, or a damaged file.
    """
    if not run.has("study.json"):
        raise QuantempoError(
            f"no study.json in {run.path}; make it with python -m studies.ptq4dm --out"
        )
    found = sorted(path.stem for path in run.path.glob("items/*.json"))
    names = list(dict.fromkeys([*run.read_json("study.json").get("items", []), *found]))
    return {n: run.read_json(f"items/{n}.json") if n in found else None for n in names}


def score_names(extractor: str | None) -> dict[str, str]:
    """Return score key -> heading with unit; only Inception features give what is called FID."""
    frechet = "FID" if extractor == "inception" else "FED"
    names = {
        "psnr_db": "PSNR dB_↑",
        "ssim": "SSIM_↑",
        "sqnr_db": "SQNR dB_↑",
        "fed_float": f"{frechet} to_float_↓",
        "fed_data": f"{frechet} to_data_↓",
        "sfed_data": f"s{frechet} to_data_↓",
        "kid_data": "KID_×_10³ to_data_↓",
        "is": "IS_↑",
    }
    # Narrow headings break, but not before an arrow.
    return {key: name.replace("_", "\N{NO-BREAK SPACE}") for key, name in names.items()}


def mean_of(row: Mapping[str, Any], key: str) -> float | None:
    """Return the mean of a score over seeds, None unless it is there and finite."""
    return _finite((row.get(key) or {}).get("mean"))


def spread_of(row: Mapping[str, Any], key: str) -> float | None:
    """Return the standard deviation of a score over seeds, None for a single seed."""
    return _finite((row.get(key) or {}).get("std"))


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def is_float(row: Mapping[str, Any]) -> bool:
    """Return whether the row is the model in float, the line the others are held against."""
    return str(row.get("label", "")).strip().lower() == "float"


def grouped(item: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by group, in the order of their first rows; T5 by its samplers."""
    key = "sampler" if item.get("name") == "T5" else "group"
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in item.get("rows") or []:
        groups.setdefault(str(row.get(key) or ""), []).append(row)
    return groups


def item_plots(item: Mapping[str, Any], extractor: str | None = None) -> list[Plot]:
    """Draw what an item has: scores of its rows, curves over time, laws, activations.

    item: the JSON of the item; extractor: of the features behind the scores, "lite0" or
    "inception".

    Raises QuantempoError: matplotlib is missing.
    """
    groups, extra = grouped(item), item.get("extra") or {}
    parts = (
        _scores(groups, score_names(extractor)),
        _curves(groups),
        _laws(extra["laws"], int(extra["steps"])) if extra.get("laws") else None,
        _layers(extra["layers"]) if extra.get("layers") else None,
    )
    return [plot for plot in parts if plot is not None]


def write_plots(folder: str | Path) -> list[Path]:
    """Write `items/NAME.svg` for each item with something to draw, one below the other.

    The files stand alone: fixed colours on a white card, so that they can be read on any page.

    folder: of the study.

    Returns The files, in the order of the study.

    Raises QuantempoError: no study there, a damaged file in it, matplotlib is missing.
    """
    run, paths = RunFolder(folder), []
    items = read_items(run)
    extractor = (run.read_json("study.json").get("settings") or {}).get("extractor")
    for name, item in items.items():
        figures = item_plots(item, extractor) if item is not None else []
        if figures:
            paths.append(run / f"items/{name}.svg")
            with atomic_path(paths[-1]) as temporary:
                temporary.write_text(standalone([f.svg for f in figures]), encoding="utf-8")
    return paths


def standalone(figures: Sequence[str]) -> str:
    """Return themed figures below each other as one SVG file: fixed colours, a white card."""
    sizes = []
    for svg in figures:
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        assert box is not None, "matplotlib names the size of a figure in its viewBox"
        sizes.append((float(box[1]), float(box[2])))
    width = max(w for w, _ in sizes) + 2 * MARGIN
    height = sum(h for _, h in sizes) + (len(sizes) + 1) * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">',
        "<style>text { font-family: system-ui, 'Segoe UI', Arial, sans-serif !important }</style>",
        f'<rect width="{width:g}" height="{height:g}" rx="8" fill="{CARD}"/>',
    ]
    top = float(MARGIN)
    for svg, (w, h) in zip(figures, sizes, strict=True):
        place = f'<svg x="{MARGIN}" y="{top:g}" width="{w:g}" height="{h:g}"'
        parts.append(svg.strip().replace("<svg", place, 1))
        top += h + MARGIN
    text = "\n".join([*parts, "</svg>\n"])
    for colour, variable in plots.VARIABLES.items():
        text = text.replace(f"var(--{variable})", colour)
    return text


def _slots(groups: Mapping[str, list[dict[str, Any]]]) -> tuple[list[Any], list[tuple[int, int]]]:
    """Return the lines of a dot plot from the top, a group's name or a row, and each extent."""
    slots: list[Any] = []
    extents = []
    for name, rows in groups.items():
        if len(groups) > 1:
            slots.append(name)
        first = len(slots)
        slots += [row for row in rows if not is_float(row)]
        extents.append((first, len(slots)))
    return slots, extents


def _scores(groups: Mapping[str, list[dict[str, Any]]], names: Mapping[str, str]) -> Plot | None:
    """Draw PSNR and, beside it, the distance to the data, or else to the float model's images."""
    groups = {n: rows for n, rows in groups.items() if not all(map(is_float, rows))}
    rows = [row for part in groups.values() for row in part if not is_float(row)]
    measured = [key for key in names if any(mean_of(row, key) is not None for row in rows)]
    distance = [key for key in ("fed_data", "fed_float") if key in measured][:1]
    keys = [key for key in ("psnr_db",) if key in measured] + distance
    if not keys:
        return None
    slots, extents = _slots(groups)
    ruled = False
    with plots.new_figure(1, len(keys), 0.5 + 0.21 * len(slots), sharey=True) as (figure, axes):
        _name_slots(axes[0, 0], slots)
        for axis, key in zip(axes[0], keys, strict=True):
            for y, slot in enumerate(slots):
                if not isinstance(slot, str):
                    _dot(axis, y, slot, key)
            seen = False
            for part, (first, last) in zip(groups.values(), extents, strict=True):
                line = next((row for row in part if is_float(row)), None)
                if line is not None and mean_of(line, key) is not None:
                    _rule(axis, line, key, first - 0.5, last - 0.5, None if seen else "float")
                    seen = ruled = True
            _score_axis(axis, slots, [mean_of(row, key) for row in rows])
            axis.set_title(names[key])
            if seen:
                plots.legend_above(axis, 1)
    spread = any(spread_of(row, key) is not None for row in rows for key in keys)
    caption = "Mean over seeds" + (", bar ± one standard deviation, small dots the seeds" * spread)
    caption += "; orange the model in float" * ruled
    return Plot(figure.svg, f"{caption}.")


def _dot(axis: Any, y: int, row: Mapping[str, Any], key: str) -> None:
    mean, spread = mean_of(row, key), spread_of(row, key)
    if mean is None:
        # Identical images have no finite PSNR.
        words = "identical" if key == "psnr_db" and row.get("identical") else "–"
        axis.annotate(words, (0.01, y), xycoords=("axes fraction", "data"), color=MUTED,
                      va="center")  # fmt: skip
        return
    values = [v for v in row[key].get("values") or [] if _finite(v) is not None]
    if len(values) > 1:
        axis.plot(values, [y] * len(values), ".", color=FLOAT, markersize=4)
    axis.errorbar(mean, y, xerr=spread, fmt="o", color=INT8, markersize=4.5, elinewidth=1.2)


def _rule(
    axis: Any, row: Mapping[str, Any], key: str, top: float, bottom: float, label: str | None
) -> None:
    mean, spread = mean_of(row, key), spread_of(row, key)
    axis.plot([mean, mean], [top, bottom], color=ACCENT, linewidth=1.2, label=label)
    if mean is not None and spread is not None:
        ends = (mean - spread, mean + spread)
        axis.fill_betweenx([top, bottom], *ends, color=ACCENT, alpha=0.15, linewidth=0)


def _score_axis(axis: Any, slots: Sequence[Any], values: Sequence[float | None]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    known = [value for value in values if value is not None]
    if known and min(known) > 0 and max(known) > LOG_FROM * min(known):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
    plots.bare(axis, "x")
    for y, slot in enumerate(slots):
        if isinstance(slot, str) and y:
            axis.axhline(y - 0.5, color=RULE, linewidth=0.8)


def _name_slots(axis: Any, slots: Sequence[Any]) -> None:
    names = [slot if isinstance(slot, str) else str(slot.get("label", "")) for slot in slots]
    axis.set_yticks(range(len(slots)), names)
    axis.set_ylim(len(slots) - 0.4, -0.6)
    for label, slot in zip(axis.get_yticklabels(), slots, strict=True):
        label.set(color=INK, weight="bold" if isinstance(slot, str) else "normal")


def _curves(groups: Mapping[str, list[dict[str, Any]]]) -> Plot | None:
    """Draw the SQNR of the noise prediction over time, a panel per group, a line per label."""
    shown = {n: [row for row in rows if row.get("curve")] for n, rows in groups.items()}
    shown = {n: rows for n, rows in shown.items() if rows}
    if not shown:
        return None
    labels = list(dict.fromkeys(str(row["label"]) for rows in shown.values() for row in rows))
    styles = dict(zip(labels[:CURVES_SHOWN], LINES, strict=False))
    shown = {n: [r for r in rows if r["label"] in styles] for n, rows in shown.items()}
    shown = {n: rows for n, rows in shown.items() if rows}
    last = max(max(row["curve"]["t"]) for rows in shown.values() for row in rows)
    columns = min(2, len(shown))
    lines = -(-len(shown) // columns)
    height = max(2.3 * lines, 2.9 if lines == 1 else 0)
    with plots.new_figure(lines, columns, height, sharey=True) as (figure, axes):
        seen: dict[str, Any] = {}
        for axis, (name, rows) in zip(axes.flat, shown.items(), strict=False):
            for row in rows:
                seen[row["label"]] = _curve(axis, row, *styles[row["label"]])
            plots.time_axis(axis, last)
            axis.set_title(name if len(shown) > 1 else "SQNR of the predicted noise, dB")
            plots.bare(axis, "y")
        plots.trim(axes, len(shown))
        figure.legend([*seen.values()], [*seen], loc="outside right upper", handlelength=2.2)
    spread = any(row["curve"].get("std") for rows in shown.values() for row in rows)
    caption = "SQNR of the predicted noise in dB, on the float model's inputs, by t"
    caption += "; band one standard deviation" * spread
    over = f" The first {len(styles)} of {len(labels)} labels." if len(labels) > len(styles) else ""
    return Plot(figure.svg, f"{caption}.{over}")


def _curve(axis: Any, row: Mapping[str, Any], colour: str, dash: str) -> Any:
    curve = row["curve"]
    order = np.argsort(curve["t"])
    t, values = np.asarray(curve["t"], float)[order], np.asarray(curve["sqnr_db"], float)[order]
    if curve.get("std"):
        spread = np.asarray(curve["std"], float)[order]
        axis.fill_between(t, values - spread, values + spread, color=colour, alpha=0.13,
                          linewidth=0)  # fmt: skip
    return axis.plot(t, values, color=colour, linestyle=dash, linewidth=1.4)[0]


def _laws(laws: Mapping[str, Mapping[str, Any]], steps: int) -> Plot:
    """Draw each law: what was drawn as bars, its density as a line."""
    rows = -(-len(laws) // LAWS_A_ROW)
    columns = min(len(laws), LAWS_A_ROW)
    with plots.new_figure(rows, columns, 0.45 + 1.55 * rows) as (figure, axes):
        for axis, (name, law) in zip(axes.flat, laws.items(), strict=False):
            drawn = np.asarray(law["drawn"], float)
            axis.bar(np.arange(steps), drawn / max(1.0, drawn.sum()), width=1.0, color=INT8,
                     alpha=0.75, linewidth=0, label="drawn")  # fmt: skip
            edges = np.arange(steps + 1) - 0.5
            density = np.append(law["density"], law["density"][-1])
            axis.step(edges, density, where="post", color=ACCENT, linewidth=1.2, label="law")
            axis.set_xlim(steps - 0.5, -0.5)
            axis.set_title(name)
            axis.locator_params(axis="y", nbins=4)
            axis.locator_params(axis="x", nbins=4, integer=True)
            plots.bare(axis, "y")
        plots.trim(axes, len(laws))
        figure.supxlabel("step of the sampler   (noise → image)", fontsize=8.5, color=MUTED)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper right", ncols=2)
    caption = "Share of the calibration set at each step: bars what was drawn, line the law."
    return Plot(figure.svg, caption)


def _layers(layers: Sequence[Mapping[str, Any]]) -> Plot:
    """Draw each layer's input over time: boxplots on the left, densities on the right."""
    with plots.new_figure(len(layers), 2, 2.2 * len(layers)) as (figure, axes):
        for (left, right), layer in zip(axes, layers, strict=True):
            _boxes(left, layer)
            left.set_title(f"{layer['name']}  ({layer['role']})")
            _densities(right, layer)
            # The title of the left panel may reach across; the legend takes the other end.
            plots.legend_above(right, 4)
    return Plot(
        figure.svg,
        "Inputs of layers over time. Box 25 to 75 %, whiskers 1 to 99 %, dots the extremes; "
        "right the same inputs as densities at single t (log axis).",
    )


def _boxes(axis: Any, layer: Mapping[str, Any]) -> None:
    ends = ("whislo", "q1", "med", "q3", "whishi")
    boxes, places = [], []
    extremes: Sequence[Any] = layer.get("extremes") or [None] * len(layer["t"])
    for t, quantiles, fliers in zip(layer["t"], layer["quantiles"], extremes, strict=True):
        if quantiles is not None:
            boxes.append(dict(zip(ends, quantiles, strict=True)) | {"fliers": fliers or []})
            places.append(float(t))
    gap = float(np.diff(np.sort(places)).min()) if len(places) > 1 else 20.0
    axis.bxp(boxes, positions=places, widths=0.6 * gap, manage_ticks=False, **plots.BOXES)
    plots.time_axis(axis, max(places, default=1.0) + gap / 2)
    plots.bare(axis, "y")


def _densities(axis: Any, layer: Mapping[str, Any]) -> None:
    edges = np.asarray(layer["grid"], float)
    number: Callable[[str], float] = float
    times = sorted(layer["densities"], key=number)
    for t, (colour, dash) in zip(times, LINES, strict=False):
        density = np.asarray(layer["densities"][t], float)
        density = np.where(density > 0, density, np.nan)
        axis.step(edges[:-1], density, where="post", color=colour, linestyle=dash, linewidth=1.2,
                  label=f"t = {float(t):g}")  # fmt: skip
    axis.set_yscale("log")
    axis.minorticks_off()
    plots.bare(axis, "y")
