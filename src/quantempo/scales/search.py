"""Choose every scale of a model from its statistics and weights.

Activations: per segment and time bucket; the boundaries are chosen for all layers together, by a
dynamic programme over the fine time bins. Weights: per output channel, symmetric.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from quantempo.core import ACTIVATION, WEIGHT, Format, GroupFormat, ranks, weight_format
from quantempo.core.paged import loaded
from quantempo.core.progress import Progress
from quantempo.recipe import ActivationSettings, Recipe, WeightSettings
from quantempo.run_folder import Kept
from quantempo.scales import activation
from quantempo.scales.groups import search_groups
from quantempo.scales.histogram import ACT_BITS, bin_centers
from quantempo.scales.metrics import DENSITY_METRICS, Metric, check_weight, make_metric

__all__ = [
    "LayerScales", "bucket_of_bin", "search_scales", "search_weight", "search_weights",
    "segment_costs", "segment_time",
]  # fmt: skip

BINS = 2048
# Of the scales of an input, in elements of a weight.
_INPUT_COST = 2**20
# Price of leaving a layer's common scale; keeps buckets with few samples from chasing noise.
_SMOOTH = 0.01
# About 600 (scale, zero point) pairs, 6 % apart: three times faster than the default, and its
# best scale is within that step of the finer one's.
_CANDIDATES = activation.Candidates(
    steps=48, floor=1 / 16, shrink=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
)


@dataclass(frozen=True)
class LayerScales:
    """Hold a layer's act_scale (S, G), act_zero_point int32 (S,), weight_scale (O,), groups."""

    act_scale: Tensor
    act_zero_point: Tensor
    weight_scale: Tensor
    weight_group: Tensor | None = None

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> dict[str, "LayerScales"]:
        """Return the scales of every layer in the tensors of `scales.safetensors`."""
        names = [key.removesuffix(".weight_scale") for key in tensors if "weight_scale" in key]
        keys = [field.name for field in fields(cls)]
        return {name: cls(*(tensors.get(f"{name}.{key}") for key in keys)) for name in names}  # type: ignore[arg-type]


def search_scales(
    stats: Mapping[str, Tensor], weights: Mapping[str, Tensor], recipe: Recipe,
    known: Mapping[str, Tensor] | None = None, bits: Mapping[str, tuple[int, int]] | None = None,
    kept: Kept | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the tensors of `scales.safetensors` for the layers in `weights`.

    For each layer `NAME.act_scale` (S, G), `NAME.act_zero_point` (S,), and of `search_weights`;
    `bucket_of` (T,) int64, the time bucket of each training time-step. G is the number of buckets,
    1 for a layer none of whose segments gains `min_gain` by it, or 0 for one whose tokens have a
    scale each; `NAME.errors` (2,) float64 where that was measured: by time, by token.

    Args:
        stats: of `collect_statistics`; a layer without them gets a weight scale alone.
        weights: float weight (O, ...) of each layer, searched on its device.
        known: what an earlier search found of weights, not searched again; kept: a killed one.
        bits: (weight bits, activation bits) of layers where they are not the recipe's.
    """
    settings, bits, kept = recipe.activations, bits or {}, kept or Kept()
    common = (recipe.weights.bits, settings.bits)
    specs = {
        name: replace(ACTIVATION, symmetric=settings.symmetric, bits=bits.get(name, common)[1])
        for name in weights
        if f"{name}.hist" in stats
    }
    before = ranks.told(kept.every("scales"))
    if (of_bin := before.pop("of_bin", None)) is None:
        of_bin = _cut_time(stats, settings, specs)
    cut = {} if of_bin is None else {"of_bin": of_bin}
    how: dict[str, Any] = {"min_gain": settings.min_gain, "smooth": _SMOOTH, **_metric(settings)}
    tensors = {"bucket_of": _bucket_table(stats["time_bin_edges"], of_bin), **before}
    todo = [name for name in weights if f"{name}.weight_scale" not in before]
    mine = ranks.mine(todo, [_INPUT_COST + weights[name].numel() for name in todo])
    for name in Progress(mine, desc="search"):
        kept.write(f"scales-{ranks.rank()}", None, tensors | cut, last=False)
        keys = (f"{name}.weight_scale", f"{name}.weight_group")
        found = {key: known[key] for key in keys if key in known} if known else {}
        here = bits.get(name, common)[0]
        found = found or search_weights(name, loaded(weights[name]), recipe.weights, here)
        tensors |= {key: value.cpu() for key, value in found.items()}
        if name not in specs:
            continue
        parts = [
            activation.search_activation(hist, edges, specs[name], buckets=of_bin, **how)
            for hist, edges in zip(stats[f"{name}.hist"], stats[f"{name}.edges"], strict=True)
        ]
        columns = max(len(part.scale) for part in parts)
        tensors[f"{name}.act_scale"] = torch.stack([p.scale.expand(columns) for p in parts])
        tensors[f"{name}.act_zero_point"] = torch.tensor([part.zero_point for part in parts]).int()
        if settings.granularity == "time" or f"{name}.token_error" not in stats:
            continue
        mass = stats[f"{name}.hist"].sum((1, 2)).double()
        token = stats[f"{name}.token_error"][:, ACT_BITS.index(specs[name].bits)]
        both = torch.stack([token.new_tensor([part.cost for part in parts]), token])
        tensors[f"{name}.errors"] = errors = both @ (mass / mass.sum())
        if settings.granularity == "token" or errors[1] < (1 - settings.min_gain) * errors[0]:
            tensors[f"{name}.act_scale"] = torch.empty(len(parts), 0)
            tensors[f"{name}.act_zero_point"].fill_(specs[name].symmetric_zero_point)
    kept.write(f"scales-{ranks.rank()}", None, tensors | cut)
    return ranks.merged(tensors)


def _metric(settings: ActivationSettings) -> dict[str, Any]:
    return {"metric": settings.metric, "p": settings.p, "candidates": _CANDIDATES}


def _cut_time(
    stats: Mapping[str, Tensor], settings: ActivationSettings, specs: Mapping[str, Format]
) -> Tensor | None:
    """Return (K,) the bucket of each fine time bin, best for all layers together, or None."""
    if settings.buckets == 1 or not specs:
        return None
    found: dict[str, list[activation.CostTable]] = {}
    how = _metric(settings)
    for name in Progress(ranks.mine(specs), desc="buckets"):
        both = zip(stats[f"{name}.hist"], stats[f"{name}.edges"], strict=True)
        costs = (activation.cost_table(*h, specs[name], **how) for h in both)
        found[name] = [table.at_best_zero_point() for table in costs]
    found = ranks.merged(found)
    tables = [table for name in specs for table in found[name]]
    return bucket_of_bin(segment_time(tables, settings.buckets, _SMOOTH))


def _bucket_table(edges: Tensor, of_bin: Tensor | None) -> Tensor:
    """Return (T,) int64 bucket of each training time-step, from that of each fine bin."""
    t = torch.arange(int(edges[-1]))
    if of_bin is None:
        return torch.zeros_like(t)
    return of_bin[torch.bucketize(t.double(), edges[1:-1].double(), right=True)]


def bucket_of_bin(boundaries: Tensor) -> Tensor:
    """Return (K,) int64, the bucket of each fine bin, from boundaries (B + 1,) = [0, ..., K]."""
    return torch.arange(len(boundaries) - 1).repeat_interleave(boundaries.diff())


def segment_costs(table: activation.CostTable, smooth: float = 0.0) -> Tensor:
    """Return (K, K + 1): what bins i..j-1 add to a layer's error with one scale of their own.

    cost[i, j] = min over candidates of sum_{i <= k < j} mass_k cost_kp, relative to the error of
    the best scale for all bins (so 0 to 1); infinite for j <= i; 0 for a layer without error.
    table: `cost_table(...).at_best_zero_point()`, rows the K fine bins in order of time.
    """
    contribution = table.weighted(smooth)
    sums = torch.nn.functional.pad(contribution.cumsum(0), (0, 0, 1, 0))
    cost = torch.full((len(contribution), len(sums)), torch.inf, dtype=torch.float64)
    for i in range(len(contribution)):
        cost[i, i + 1 :] = (sums[i + 1 :] - sums[i]).amin(1).clamp_min(0)
    whole = float(cost[0, -1])
    return cost / whole if whole > 0 else torch.where(cost.isinf(), cost, 0)


def segment_time(tables: Sequence[activation.CostTable], buckets: int, smooth: float = 0) -> Tensor:
    """Cut K fine bins into contiguous buckets that suit all layers best; return boundaries int64.

    Minimises sum over layers and buckets of `segment_costs`: every layer takes its own best scale
    in every bucket, and counts relative to its error with one scale. Exact, in O(layers K^2 P + B
    K^2). tables: of each layer, rows the K bins, one zero point each. Boundaries (B + 1,) as in
    `bucket_of_bin`, fewer if fewer bins hold data.
    Source: optimal partition of a sequence, Bellman 1961; scales by time bucket, Q-Diffusion's
    successors (TDQ, So et al. 2023; APQ-DM, Wang et al. 2024).
    """
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


def search_weights(name: str, weight: Tensor, how: WeightSettings, bits: int) -> dict[str, Tensor]:
    """Return `NAME.weight_scale` (O,), and `NAME.weight_group` of a weight in groups."""
    spec = weight_format(bits, how.group)
    if isinstance(spec, GroupFormat):
        found = search_groups(weight, spec)
        return {f"{name}.weight_scale": found.scale, f"{name}.weight_group": found.groups}
    scale = search_weight(weight, spec, metric=how.metric, p=how.p)
    return {f"{name}.weight_scale": scale}


def search_weight(
    weight: Tensor, spec: Format = WEIGHT, *, metric: str = "lp", p: float = 2.4, steps: int = 80
) -> Tensor:
    """Choose the scale of every output channel: argmin over clip ratios r of metric(w, Q(w; s_r)).

    s_r = r max|w| / qmax for `steps` ratios from 1 to 0.2 in equal distances; 1 is min-max, is
    first, and wins ties. The metric sees w / max|w|, so tiny weights do not underflow. A metric of
    densities (kl) sees a histogram of 2048 bins over [-max|w|, max|w|] of the channel.

    weight: (O, ...) floating; spec: a signed symmetric grid; metric, p: see `make_metric`.
    Returns (O,) float32, > 0, on the device of the weight; 2^-30 for a channel of zeros.
    Raises QuantempoError: fewer than two axes, NaN or infinity.
    Error: float32; of candidates whose metrics agree to about 1e-6 either may win.
    """
    check_weight(weight)
    rows = weight.detach().flatten(1).float()
    peak = rows.abs().amax(1)
    safe = torch.where(peak > 0, peak, 1)
    ratios = torch.linspace(1.0, 0.2, steps, dtype=torch.float64, device=rows.device)
    scale = (peak.double()[:, None] * ratios / spec.qmax).float().clamp_min(activation.TINY)
    function = make_metric(metric, p)
    if metric in DENSITY_METRICS:
        cost = _density_costs(rows / safe[:, None], ratios, function, spec)
    else:
        cost = _exact_costs(rows, safe, scale, function, spec)
    best = scale.gather(1, cost.argmin(1, keepdim=True))[:, 0]
    return torch.where(peak > 0, best, activation.EMPTY_SCALE)


def _exact_costs(rows: Tensor, peak: Tensor, scale: Tensor, metric: Metric, spec: Format) -> Tensor:
    """Return the (O, steps) metric of every scale on the rows (O, L) themselves."""
    cost, steps, length = torch.empty_like(scale), scale.shape[1], rows.shape[1]
    # Blocks of (channels, ratios) of about so many elements.
    most = activation.CHUNK if rows.device.type == "cpu" else activation.CHUNK_GPU
    few = min(steps, max(1, most // length))
    some = max(1, most // (few * length))
    for i, j in itertools.product(range(0, len(rows), some), range(0, steps, few)):
        here, tried = slice(i, i + some), slice(j, j + few)
        x, s, top = rows[here, None], scale[here, tried, None], peak[here, None, None]
        codes = (x / s).round_().clamp_(spec.qmin, spec.qmax)
        cost[here, tried] = metric(x / top, codes.mul_(s / top))
    return cost


def _density_costs(unit: Tensor, ratios: Tensor, metric: Metric, spec: Format) -> Tensor:
    """Return the (O, steps) metric on the histograms of rows (O, L) scaled to a peak of 1."""
    x = bin_centers(torch.tensor([-1.0, 1.0]), BINS).to(unit.device)
    step = (ratios / spec.qmax)[:, None]
    x_hat = (x / step).round_().clamp_(spec.qmin, spec.qmax).mul_(step)
    place = ((unit + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    cost = []
    for part in place.split(64):
        counts = part.new_zeros(len(part), BINS).scatter_add_(1, part, torch.ones_like(part))
        cost.append(metric(x, x_hat, counts[:, None]))
    return torch.cat(cost)
