"""Choose the scales of activations from their histograms.

A search tries every candidate of a grid and keeps the one of the smallest metric, so that brute
force can check it. Every tensor operation here stays below the size from which torch uses threads:
a caller who wants all cores runs several layers, which are independent, at a time.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantempo.core import ACTIVATION, Format
from quantempo.errors import QuantempoError
from quantempo.scales.histogram import bin_centers
from quantempo.scales.metrics import make_metric

__all__ = [
    "ActivationScale", "Candidates", "CostTable", "bucket_gain", "cost_table", "search_activation",
]  # fmt: skip

TINY = torch.finfo(torch.float32).tiny
# The scale of what was zero throughout: any would do, but a product of two stays a normal number.
EMPTY_SCALE = 2.0**-30
# Fine where most layers have their best range, and down to a range that one outlier filled.
SHRINK = (*(round(1 - 0.05 * i, 2) for i in range(15)), 0.2, 0.14, 0.1, 0.07, 0.05, 0.03, 0.015)
# Elements of one chunk of candidates: its temporaries stay in cache, and torch spreads operations
# over threads from 2^15 elements on. A GPU wants few launches: SDXL's weights would take millions.
CHUNK, CHUNK_GPU = (1 << 15) - 1, 1 << 26


class Candidates(NamedTuple):
    """Say which (scale, zero point) an activation search tries.

    Each zero point gets `steps` scales in equal ratios, from the one whose range just covers the
    data down to `floor` times that. The zero points are those of the ranges [lo f, hi] and
    [lo, hi f] for f in `shrink` (the zero point of [lo a, hi b] depends on a/b only).
    """

    steps: int = 80
    floor: float = 1 / 64
    shrink: tuple[float, ...] = SHRINK


@dataclass(frozen=True)
class CostTable:
    """Hold the metric of every candidate on every histogram row.

    scale: (P,) float64, values exact in float32; zero_point: (P,) int64; cost: (R, P) float64, 0
    for a row without data; mass: (R,) float64, the share of the data in each row, sums to one. The
    error of the whole is sum_r mass_r cost_rp: exactly the metric of all data for mse, l1 and lp;
    for cosine and kl, no sums over data, this mean over rows is what the total means.
    """

    scale: Tensor
    zero_point: Tensor
    cost: Tensor
    mass: Tensor

    def weighted(self, smooth: float = 0.0) -> Tensor:
        """Return (R, P) contributions mass * cost, plus what leaving the common scale costs.

        The penalty is smooth * E * mass_r * |log(scale_p / scale_c)|, c the best candidate in
        common and E its error: at smooth = 0.01 a scale twice as small has to save 0.7 % of E.
        It stays a sum over rows, so a segmentation of time by the same table is still exact.
        """
        contribution = self.cost * self.mass[:, None]
        if smooth == 0:
            return contribution
        total = contribution.sum(0)
        common = int(total.argmin())
        away = (self.scale / self.scale[common]).log().abs()
        return contribution + smooth * total[common] * self.mass[:, None] * away

    def at_best_zero_point(self) -> "CostTable":
        """Return the candidates of the zero point that suits rows with scales of their own best."""
        index = _choose(self.weighted(), self.zero_point)
        own = self.zero_point == self.zero_point[index[0]]
        return CostTable(self.scale[own], self.zero_point[own], self.cost[:, own], self.mass)


class ActivationScale(NamedTuple):
    """Hold G scales, float32, and the zero point of an activation; cost: mean metric by mass."""

    scale: Tensor
    zero_point: int
    cost: float


def _candidates(lo: float, hi: float, spec: Format, tried: Candidates) -> list[tuple[float, int]]:
    """Return (scale, zero point) pairs, min-max first; zero is exact in each of them."""
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    qmin, qmax = spec.qmin, spec.qmax
    if lo == hi:
        return [(EMPTY_SCALE, spec.symmetric_zero_point if spec.symmetric else qmin)]

    def zero_point(low: float, high: float) -> int:
        return min(max(round(qmin - low * (qmax - qmin) / (high - low)), qmin), qmax)

    if spec.symmetric:
        zeros = [spec.symmetric_zero_point]
        min_max = max(-lo, hi) / (qmax - zeros[0])
    else:
        shrunk = [(f, 1.0) for f in tried.shrink] + [(1.0, f) for f in tried.shrink]
        ranges = [(lo, hi), *((lo * a, hi * b) for a, b in shrunk)]
        zeros = list(dict.fromkeys(zero_point(low, high) for low, high in ranges))
        min_max = (hi - lo) / (qmax - qmin)
    pairs = [(min_max, zeros[0])]
    for z in zeros:
        # A side without codes cannot be covered; the other one always has some.
        top = max(hi / (qmax - z) if qmax > z else 0.0, -lo / (z - qmin) if z > qmin else 0.0)
        ratio = tried.floor ** (1 / max(tried.steps - 1, 1))
        pairs += [(top * ratio**j, z) for j in range(tried.steps)]
    return pairs


def cost_table(
    hist: Tensor, edges: Tensor, spec: Format = ACTIVATION, *, metric: str = "mse", p: float = 2.4,
    candidates: Candidates | None = None,
) -> CostTable:  # fmt: skip
    """Evaluate a metric for all candidates of a grid, min-max first, on every row of a histogram.

    hist: (R, N) counts in equal bins over edges (2,) = [lo, hi]; metric, p: see `make_metric`.
    Raises QuantempoError: no data, or negative counts.
    Error: a value stands for its bin, see `Histogram`. Temporaries: below 10 MB.
    """
    counts = hist.to(torch.float64)
    mass = counts.sum(1)
    if not bool((counts >= 0).all()) or not 0 < float(mass.sum()) < math.inf:
        raise QuantempoError("got a histogram without data or with negative counts; recalibrate")
    lo, hi = edges.tolist()
    pairs = _candidates(lo, hi, spec, candidates or Candidates())
    scale = torch.tensor([pair[0] for pair in pairs], dtype=torch.float64)
    # Judged with the digits it will be stored with.
    scale = scale.to(torch.float32).clamp_min(TINY).to(torch.float64)
    zeros = torch.tensor([pair[1] for pair in pairs])
    function, x = make_metric(metric, p), bin_centers(edges, hist.shape[1])
    chunk, cost = max(1, CHUNK // hist.shape[1]), []
    for s, z in zip(scale[:, None].split(chunk), zeros[:, None].split(chunk), strict=True):
        codes = (x / s).round_().clamp_(spec.qmin - z, spec.qmax - z)
        cost.append(function(x, codes.mul_(s), counts[:, None]))
    return CostTable(scale, zeros, torch.cat(cost, 1), mass / mass.sum())


def _choose(contribution: Tensor, zero_point: Tensor) -> Tensor:
    """Return (R,) candidates, each row's own scale under the one zero point best for their sum."""
    best, chosen = math.inf, torch.zeros(len(contribution), dtype=torch.int64)
    for z in dict.fromkeys(zero_point.tolist()):
        members = (zero_point == z).nonzero()[:, 0]
        value, index = contribution[:, members].min(1)
        if float(value.sum()) < best:
            best, chosen = float(value.sum()), members[index]
    return chosen


def bucket_gain(table: CostTable, smooth: float = 0.0) -> float:
    """Return 1 - (best error with a scale for each row) / (best error with one), in [0, 1]."""
    contribution = table.weighted(smooth)
    one = float(table.weighted().sum(0).min())
    index = _choose(contribution, table.zero_point)
    own = float(contribution.gather(1, index[:, None]).sum())
    return max(0.0, 1 - own / one) if one > 0 else 0.0


def _merge_rows(hist: Tensor, buckets: Tensor | None) -> Tensor:
    """Add the (K, N) fine rows of each bucket: (G, N)."""
    if buckets is None:
        return hist.sum(0, keepdim=True)
    # Before any arithmetic in float, so that one bucket is the static search bit for bit.
    return torch.stack([hist[buckets == g].sum(0) for g in range(int(buckets.max()) + 1)])


def search_activation(
    hist: Tensor, edges: Tensor, spec: Format = ACTIVATION, *, buckets: Tensor | None = None,
    min_gain: float = 0.0, smooth: float = 0.0, **how: Any,
) -> ActivationScale:  # fmt: skip
    """Choose a scale for each time bucket and one zero point for all of them.

    argmin over z of sum_g mass_g min over s of metric(x, Q(x; s, z)) on the histogram of bucket g.
    The first candidate is min-max and ties keep the first, so the result is never worse by the
    metric. A bucket without data takes the scale of the nearest one with data, the earlier of two.

    Args:
        hist, edges: (K, N) counts of K fine time bins; see `cost_table`; zero may lie outside.
        buckets: (K,) integers, the bucket of each fine bin; None for one bucket.
        min_gain: a layer whose `bucket_gain` is smaller keeps one scale (G = 1).
        how: metric, p and candidates of `cost_table`.
    Raises QuantempoError: see `cost_table`.
    Error: on the data the L_p norm of the error is within (hi - lo)/N of the grid's best one.
    Source: Shang et al., CVPR 2023, eq. 11-13, over the whole set instead of means of batches.
    """
    merged = _merge_rows(hist, buckets)
    table = cost_table(merged, edges, spec, **how)
    if len(merged) > 1 and bucket_gain(table, smooth) < min_gain:
        return search_activation(hist, edges, spec, **how)
    index = _choose(table.weighted(smooth if len(merged) > 1 else 0.0), table.zero_point)
    filled = table.mass.nonzero()[:, 0]
    away = (torch.arange(len(merged))[:, None] - filled).abs()
    source = filled[away.argmin(1)]
    return ActivationScale(
        scale=table.scale[index[source]].to(torch.float32),
        zero_point=int(table.zero_point[index[0]]),
        cost=float(table.weighted().gather(1, index[:, None]).sum()),
    )
