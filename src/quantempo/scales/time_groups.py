"""Cut time into buckets: a dynamic programme over the fine time bins.

The clock has one bucket table for the whole network, so the boundaries are chosen for all layers
together; a layer that gains too little from them keeps a single scale all the same
(`search_activation`, min_gain).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.scales.activation import CostTable

__all__ = ["bucket_of_bin", "segment_costs", "segment_time"]


def bucket_of_bin(boundaries: Tensor) -> Tensor:
    """Return (K,) int64, the bucket of each fine bin, from boundaries (B + 1,) = [0, ..., K]."""
    return torch.arange(len(boundaries) - 1).repeat_interleave(boundaries.diff())


def segment_costs(table: CostTable, smooth: float = 0.0) -> Tensor:
    """Return (K, K + 1): what bins i..j-1 add to a layer's error with one scale of their own.

    cost[i, j] = min over candidates of sum_{i <= k < j} mass_k cost_kp, relative to the error of
    the best scale for all bins (so 0 to 1); infinite for j <= i; 0 for a layer without error.

    Args:
        table: rows are the K fine bins in order of time, all candidates of one zero point:
            `cost_table(...).at_best_zero_point()`.
        smooth: see `CostTable.weighted`.

    Raises:
        QuantempoError: candidates of several zero points; the layer can use only one.
    """
    if len(table.zero_point.unique()) > 1:
        raise QuantempoError(
            "got a table over several zero points, but all buckets of a layer share one; "
            "use its at_best_zero_point()"
        )
    contribution = table.weighted(smooth)
    sums = torch.nn.functional.pad(contribution.cumsum(0), (0, 0, 1, 0))
    cost = torch.full((len(contribution), len(sums)), torch.inf, dtype=torch.float64)
    for i in range(len(contribution)):
        cost[i, i + 1 :] = (sums[i + 1 :] - sums[i]).amin(1).clamp_min(0)
    whole = float(cost[0, -1])
    return cost / whole if whole > 0 else torch.where(cost.isinf(), cost, 0)


def segment_time(tables: Sequence[CostTable], buckets: int, smooth: float = 0.0) -> Tensor:
    """Cut K fine bins into contiguous buckets that suit all layers best.

    Minimises sum over layers and buckets of `segment_costs`: every layer takes its own best
    scale in every bucket, and counts relative to its error with one scale, so that no layer
    decides by the size of its activations. (The minimum over scales is inside the sum over
    layers: adding the layers' tables first would give all of them the same candidate.) Exact, in
    O(layers K^2 P + B K^2).

    Args:
        tables: one for each layer, rows the K fine bins, one zero point each.
        buckets: B; fewer are returned if fewer bins hold data.
        smooth: see `CostTable.weighted`.

    Returns:
        (B + 1,) int64 boundaries [0, ..., K]; bucket b holds fine bins boundaries[b] up to, not
        including, boundaries[b + 1]. Every bucket holds data.

    Raises:
        QuantempoError: no tables, tables over different bins, buckets < 1.

    Source: optimal partition of a sequence, Bellman 1961; scales by time bucket, Q-Diffusion's
    successors (TDQ, So et al. 2023; APQ-DM, Wang et al. 2024).
    """
    if not tables or len({len(table.mass) for table in tables}) != 1 or buckets < 1:
        raise QuantempoError(
            f"got tables over {[len(table.mass) for table in tables]} bins and {buckets} buckets; "
            "expected the same number of bins for every layer and at least one bucket"
        )
    # Bins without data join the bin before them, so that no bucket is empty.
    filled = torch.stack([table.mass for table in tables]).sum(0).nonzero()[:, 0]
    starts = [0, *filled[1:].tolist(), len(tables[0].mass)]
    cost = torch.stack([segment_costs(table, smooth) for table in tables]).sum(0)
    cut = _cut(cost[starts[:-1]][:, starts], min(buckets, len(filled)))
    return torch.tensor([starts[i] for i in cut])


def _cut(cost: Tensor, buckets: int) -> list[int]:
    """Return the boundaries of the best partition; cost (n, n + 1) of items i..j-1 together."""
    best, back = cost[0], []
    for _ in range(buckets - 1):
        # best[i]: items before i in the buckets so far; the next bucket starts at i.
        best, previous = (best[:-1, None] + cost).min(0)
        back.append(previous)
    cut = [cost.shape[1] - 1]
    for previous in reversed(back):
        cut.append(int(previous[cut[-1]]))
    return [0, *reversed(cut)]
