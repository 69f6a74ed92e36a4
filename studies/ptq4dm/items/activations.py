"""Figure 3: how activations move over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from quantempo.report.plots import quantiles
from studies.ptq4dm.base import Plan, Study, study
from studies.ptq4dm.cells import Row

__all__ = ["Activations"]

LAYERS = 6
SHARES = (0.01, 0.25, 0.5, 0.75, 0.99)
# Densities are compared and drawn on this many cells.
CELLS = 128


@study("F3")
class Activations(Study):
    """Boxplots and densities of layer inputs at several t, normalised, for each of several layers.

    Layers are spread evenly over the network; the paper shows the decoder only.
    """

    title = "Figure 3: activations over time"
    question = "Does the distribution of a layer's input change with the time-step?"

    def rows(self, plan: Plan) -> list[Row]:
        """Return nothing: no image is made."""
        return []

    def extra(self, plan: Plan, tools: Any) -> dict[str, Any]:
        """Return quantiles and densities by time bin, and the claim judged against two seeds."""
        recipe = plan.law("linspace").override("layers", split_skips=False)
        row = Row("linspace", plan.sampler, 2, recipe)
        tables = [tools.calibrate(cell)[1] for cell in row.cells(2)]
        names = [key.removesuffix(".hist") for key in tables[0] if key.endswith(".hist")]
        chosen = [names[round(i)] for i in np.linspace(0, len(names) - 1, min(LAYERS, len(names)))]
        roles = {site.name: site.role for site in tools.networks.sites}
        layers = [_layer(name, roles[name], tables[0]) for name in chosen]
        moved = [_moved(name, tables) for name in names]
        return {"layers": layers, "claims": [_claim(moved)]}


def _layer(name: str, role: str, stats: dict[str, Any]) -> dict[str, Any]:
    hist, edges = stats[f"{name}.hist"][0].numpy(), stats[f"{name}.edges"][0].tolist()
    time = stats["time_bin_edges"].numpy()
    centres = (time[:-1] + time[1:]) / 2
    filled = np.flatnonzero(hist.sum(axis=1))
    cells = hist.reshape(len(hist), CELLS, -1).sum(axis=2)
    grid = np.linspace(edges[0], edges[1], CELLS + 1)
    shown = filled[np.linspace(0, len(filled) - 1, min(4, len(filled))).round().astype(int)]
    return {
        "name": name,
        "role": role,
        "t": centres[filled].tolist(),
        "quantiles": [quantiles(hist[k], edges[0], edges[1], SHARES).tolist() for k in filled],
        "extremes": stats[f"{name}.range"][0][filled].tolist(),
        "grid": grid.tolist(),
        "densities": {
            f"{centres[k]:g}": (cells[k] / (cells[k].sum() * np.diff(grid))).tolist() for k in shown
        },
    }


def _moved(name: str, tables: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the total variation between early and late times, and between two seeds at one."""
    parts = []
    low = max(float(stats[f"{name}.edges"][0, 0]) for stats in tables)
    high = min(float(stats[f"{name}.edges"][0, 1]) for stats in tables)
    grid = np.linspace(low, high, CELLS + 1)
    for stats in tables:
        hist = stats[f"{name}.hist"][0].numpy()
        left, right = stats[f"{name}.edges"][0].tolist()
        bins = np.linspace(left, right, hist.shape[1] + 1)
        filled = np.flatnonzero(hist.sum(axis=1))
        ends = []
        for k in (filled[0], filled[-1]):
            share = np.interp(grid, bins, np.append(0, hist[k].cumsum()) / hist[k].sum())
            ends.append(np.diff(share))
        parts.append(ends)
    apart = np.mean([np.abs(ends[0] - ends[1]).sum() / 2 for ends in parts])
    seeds = np.mean([np.abs(parts[0][i] - parts[1][i]).sum() / 2 for i in (0, 1)])
    return float(apart), float(seeds)


def _claim(moved: list[tuple[float, float]]) -> dict[str, Any]:
    changed = sum(apart > 2 * seeds for apart, seeds in moved)
    middle = [float(np.median([pair[i] for pair in moved])) for i in (0, 1)]
    verdict = "confirmed" if changed > len(moved) / 2 else "refuted"
    return {
        "text": "distributions of activations change with the time-step",
        "paper": "shown for decoder layers, without numbers",
        "verdict": verdict,
        "detail": f"total variation between the first and the last sixteenth of time: median "
        f"{middle[0]:.3f} over {len(moved)} layers, between two seeds at one time {middle[1]:.3f}; "
        f"more than twice as much in {changed} layers",
    }
