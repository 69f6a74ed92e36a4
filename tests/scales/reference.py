"""The metrics and the activation grid once more, in plain numpy float64, for the search tests."""

import itertools
import math
from collections.abc import Callable

import numpy as np


def kl_by_loops(x: np.ndarray, x_hat: np.ndarray, weight: np.ndarray, e: float = 1e-6) -> float:
    """The definition in the docstring of `kl`, one bin after the other."""
    bins: dict[float, list[float]] = {}
    for value, level, count in sorted(zip(x, x_hat, weight, strict=True)):
        bins.setdefault(float(value), [float(level), 0.0])[1] += float(count)
    every = list(bins.items())
    gaps = [abs(b[1][0] - a[1][0]) for a, b in itertools.pairwise(every)]
    gaps = [gap for gap in gaps if gap > 0]
    rounding = 1e-6 * max(abs(value) for value in bins)
    half = rounding + (min(gaps) * (0.5 + 1e-6) if gaps else 0.0)
    total = sum(count for _, (_, count) in every)
    if total == 0:
        return 0.0
    runs: list[list[float]] = []  # shares of the non-empty inside bins of each level
    outside: list[float] = []
    last: tuple[float, bool] | None = None
    for value, (level, count) in every:
        clipped = abs(value - level) > half
        if clipped and count > 0:
            outside.append(count / total)
        if not clipped:
            if last != (level, False):
                runs.append([])
            if count > 0:
                runs[-1].append(count / total)
        last = (level, clipped)
    granted = e if outside else 0.0
    inside = sum(map(sum, runs))
    value = 0.0
    for run in runs:
        for share in run:
            q = (1 - granted) * (sum(run) / len(run)) / inside
            value += share * math.log(share / q)
    return value + sum(share * math.log(share * len(outside) / granted) for share in outside)


def _cosine(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    norm = math.sqrt((w * x * x).sum() * (w * y * y).sum())
    return 1 - (w * x * y).sum() / norm if norm > 0 else float(bool((w * (x - y) ** 2).sum()))


METRIC_OF: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "mse": lambda x, y, w: float((w * (x - y) ** 2).sum() / w.sum()),
    "linf": lambda x, y, w: float(np.abs(x - y)[w > 0].max()),
    "l1": lambda x, y, w: float((w * np.abs(x - y)).sum() / w.sum()),
    "lp": lambda x, y, w: float((w * np.abs(x - y) ** 2.4).sum() / w.sum()),
    "cosine": _cosine,
    "kl": kl_by_loops,
}


def levels(x: np.ndarray, scale: float, zero_point: int, qmin: int, qmax: int) -> np.ndarray:
    """Return x_hat = s * (clamp(round(x / s) + z) - z) in float64."""
    return scale * (np.clip(np.round(x / scale) + zero_point, qmin, qmax) - zero_point)


def candidates(
    lo: float, hi: float, bits: int, symmetric: bool, steps: int, floor: float, shrink: tuple
) -> list[tuple[float, int]]:
    """Return the (scale, zero point) pairs that `Candidates` describes, for unsigned codes."""
    lo, hi, top = min(lo, 0.0), max(hi, 0.0), 2**bits - 1
    if symmetric:
        found = {2 ** (bits - 1)}
        grid = [(max(-lo, hi) / (top - 2 ** (bits - 1)), 2 ** (bits - 1))]
    else:
        pairs = [(a, 1.0) for a in shrink] + [(1.0, b) for b in shrink]
        found = {round(-lo * a / ((hi * b - lo * a) / top)) for a, b in pairs}
        grid = [((hi - lo) / top, round(-lo / ((hi - lo) / top)))]
    for z in sorted(found):
        need = [hi / (top - z)] if z < top else []
        need += [-lo / z] if z > 0 else []
        for j in range(steps):
            grid.append((max(need) * floor ** (j / (steps - 1)), z))
    return [(float(np.float32(scale)), z) for scale, z in grid]
