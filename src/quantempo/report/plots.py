"""Figures of the report: plain arrays in, one inline SVG out, one style for all."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantempo.errors import QuantempoError

__all__ = [
    "ACCENT", "FLOAT", "INDIGO", "INK", "INT8", "MUTED", "OCHRE", "RULE", "VARIABLES", "Activation",
    "activation_boxes", "bare", "layer_axis",
    "legend_above", "new_figure", "quantiles", "scale_curves", "step_curve", "time_axis",
    "timestep_distribution", "trim",
]  # fmt: skip

# Colours stand for variables of the page, so that figures follow its light and dark themes.
VARIABLES = {
    "#11181f": "ink", "#5b6671": "muted", "#d4dade": "rule", "#0b7a75": "int8",
    "#97a3ae": "float", "#c4622d": "accent", "#5561a9": "indigo", "#a08019": "ochre",
}  # fmt: skip
INK, MUTED, RULE, INT8, FLOAT, ACCENT, INDIGO, OCHRE = VARIABLES
ROLE_COLOURS = {"conv": INT8, "shortcut": ACCENT, "attention": INDIGO, "linear": OCHRE}
STYLE = Path(__file__).with_name("report.mplstyle")
# What the style cannot say of boxplots, as options of matplotlib's `bxp`.
_BOX = {"facecolor": INT8, "edgecolor": "none", "alpha": 0.55}
BOXES: dict[str, Any] = {"patch_artist": True, "boxprops": _BOX}
WIDTH = 10.0
SHOWN = (0.01, 0.25, 0.5, 0.75, 0.99)


@contextmanager
def new_figure(rows: int, columns: int, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its (rows, columns) axes; their SVG is in `figure.svg` afterwards."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        hint = "pip install 'quantempo[report]'"
        raise QuantempoError(f"the report needs matplotlib; {hint}") from error
    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        # Two panels: keep the last tick label of the left one off the first of the right one.
        figure.get_layout_engine().set(wspace=0.05, hspace=0.06)
        axes = figure.subplots(rows, columns, squeeze=False, **options)
        yield figure, axes
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    figure.svg = _inline(stream.getvalue())


def _inline(svg: str) -> str:
    """Return the <svg> element alone, themed, without metadata (its only foreign addresses)."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Nothing refers to the names of groups, and they repeat from figure to figure.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def time_axis(axis: Any, last: float) -> None:
    """Let time run as sampling does: noise on the left, the image on the right."""
    axis.set_xlim(last, 0)
    axis.set_xlabel("place in time   (noise → image)")


def legend_above(axis: Any, columns: int) -> None:
    """Put the legend between title and axes, at the left, where narrow screens begin."""
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, borderaxespad=0.1,
                columnspacing=1.4, handlelength=1.4)  # fmt: skip
    axis.set_title(axis.get_title(loc="left"), pad=20)


def layer_axis(axis: Any, count: int, title: str) -> None:
    """Let layers run in the order of the network, without ticks."""
    axis.set_xlim(-0.8, count - 0.2)
    axis.set_xticks([])
    axis.set_xlabel("layers in the order of the network")
    axis.set_title(title)
    if axis.get_legend_handles_labels()[0]:
        legend_above(axis, 6)
    bare(axis, "y")


def bare(axis: Any, grid: str) -> None:
    """Leave the axes with labels and the grid lines of one direction, "x" or "y"."""
    axis.grid(visible=False, axis="x" if grid == "y" else "y")
    axis.tick_params(length=0, pad=5)


def timestep_distribution(drawn: np.ndarray, density: np.ndarray | None, steps: int) -> str:
    """Draw how often steps (n,) were drawn, and their density (steps,)."""
    with new_figure(1, 1, 2.6) as (figure, axes):
        axis = axes[0, 0]
        counts = np.bincount(drawn, minlength=steps) / max(1, len(drawn))
        axis.bar(np.arange(steps), counts, width=0.86, color=INT8, label="drawn")
        if density is not None:
            axis.step(np.arange(steps + 1) - 0.5, np.append(density, density[-1]), where="post",
                      color=ACCENT, linewidth=1.4, label="density")  # fmt: skip
        axis.set_xlim(steps - 0.5, -0.5)
        axis.set_xlabel("step of the sampler   (noise → image)")
        axis.set_title("share of the calibration set at each step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        legend_above(axis, 2)
        bare(axis, "y")
    return figure.svg


class Activation(NamedTuple):
    """Hold the statistics of one layer input.

    label: name and role; hist: (K, N) counts by time bin; edges: (lo, hi) of the N bins; extremes:
    (K, 2) min and max; time_edges: (K + 1,) of the time bins; window: (T, 2) smallest and largest
    value its scale can represent at each place in time, or None.
    """

    label: str
    hist: np.ndarray
    edges: tuple[float, float]
    extremes: np.ndarray
    time_edges: np.ndarray
    window: np.ndarray | None = None


def quantiles(counts: np.ndarray, lo: float, hi: float, shares: Sequence[float]) -> np.ndarray:
    """Return the quantiles of a histogram of equal bins over [lo, hi], linear inside a bin."""
    above = np.cumsum(counts, dtype=np.float64)
    # A target of zero would land in a bin without counts.
    target = np.maximum(np.asarray(shares) * above[-1], np.finfo(np.float64).tiny)
    bins = np.searchsorted(above, target)
    inside = 1 - (above[bins] - target) / np.asarray(counts)[bins]
    return lo + (bins + inside) * (hi - lo) / len(counts)


def activation_boxes(layers: Sequence[Activation]) -> str:
    """Draw boxplots over time: box 25-75 %, whiskers 1-99 %, dots the extremes, band the window."""
    with new_figure(-(-len(layers) // 2), 2, 2.35 * -(-len(layers) // 2)) as (figure, axes):
        for axis, layer in zip(axes.flat, layers, strict=False):
            filled = np.flatnonzero(layer.hist.sum(axis=1) > 0)
            centres = (layer.time_edges[:-1] + layer.time_edges[1:]) / 2
            boxes = []
            for k in filled:
                q = quantiles(layer.hist[k], *layer.edges, SHOWN)
                box = dict(zip(("whislo", "q1", "med", "q3", "whishi"), q, strict=True))
                boxes.append({**box, "fliers": layer.extremes[k]})
            widths = 0.6 * float(np.diff(layer.time_edges).min())
            axis.bxp(boxes, positions=centres[filled], widths=widths, manage_ticks=False, **BOXES)
            if layer.window is not None:
                t = np.arange(len(layer.window))
                for end in layer.window.T:
                    axis.step(t, end, where="post", color=ACCENT, linewidth=1.1)
            time_axis(axis, float(layer.time_edges[-1]))
            axis.set_title(layer.label)
            bare(axis, "y")
        trim(axes, len(layers))
    return figure.svg


def trim(axes: Any, used: int) -> None:
    """Remove the axes beyond the first `used`."""
    for axis in list(axes.flat)[used:]:
        axis.remove()


def scale_curves(scales: Sequence[tuple[str, np.ndarray]], bucket_of: np.ndarray) -> str:
    """Draw how activation scales move over time, each relative to its own geometric mean.

    scales: (role, (G,) of the G > 1 time buckets) of each input; bucket_of: (T,) bucket of each t.
    """
    t = np.arange(len(bucket_of))
    centres = np.array([t[bucket_of == bucket].mean() for bucket in range(bucket_of.max() + 1)])
    with new_figure(1, 1, 2.6) as (figure, axes):
        axis, seen = axes[0, 0], set[str]()
        for edge in np.flatnonzero(np.diff(bucket_of)) + 1:
            axis.axvline(edge, color=RULE, linewidth=1)
        for role, values in scales:
            relative = values / np.exp(np.log(values).mean())
            axis.plot(centres, relative, color=ROLE_COLOURS.get(role, FLOAT), alpha=0.6,
                      linewidth=0.9, marker=".", markersize=4,
                      label=None if role in seen else role)  # fmt: skip
            seen.add(role)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        time_axis(axis, len(bucket_of))
        axis.set_title("activation scale in each time bucket, relative to the layer's own mean")
        legend_above(axis, 6)
        bare(axis, "y")
    return figure.svg


def step_curve(t: Sequence[float], sqnr_db: Sequence[float], last: float) -> str:
    """Draw the SQNR of the noise prediction over time."""
    with new_figure(1, 1, 2.5) as (figure, axes):
        axis = axes[0, 0]
        axis.plot(t, sqnr_db, color=INT8, linewidth=1.6, marker="o", markersize=2.6)
        low = int(np.argmin(sqnr_db))
        axis.annotate(f"{sqnr_db[low]:.1f} dB at t = {t[low]:g}", (t[low], sqnr_db[low]),
                      textcoords="offset points", xytext=(0, -12), fontsize=8, color=INK,
                      ha="left" if t[low] > last / 2 else "right")  # fmt: skip
        axis.margins(y=0.22)
        axis.set_title("SQNR of the predicted noise on the same inputs, dB")
        time_axis(axis, last)
        bare(axis, "y")
    return figure.svg
