"""Choose every scale of a model from its statistics and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

from quantempo.core import ACTIVATION, Format, weight_format
from quantempo.recipe import ActivationSettings, Recipe
from quantempo.scales import (
    ActivationScale,
    Candidates,
    bucket_of_bin,
    cost_table,
    search_activation,
    search_weight,
    segment_time,
)

__all__ = ["LayerScales", "search_scales"]

# Price of leaving a layer's common scale; keeps buckets with few samples from chasing noise.
_SMOOTH = 0.01
# About 600 (scale, zero point) pairs, 6 % apart: three times faster than the default, and its
# best scale is within that step of the finer one's.
_CANDIDATES = Candidates(steps=48, floor=1 / 16, shrink=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3))


@dataclass(frozen=True)
class LayerScales:
    """Hold the scales of one layer.

    act_scale: (S, G) float32; act_zero_point: (S,) int32; weight_scale: (O,) float32.
    """

    act_scale: Tensor
    act_zero_point: Tensor
    weight_scale: Tensor

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> dict[str, LayerScales]:
        """Return the scales of every layer in the tensors of `scales.safetensors`."""
        names = [key.removesuffix(".weight_scale") for key in tensors if "weight_scale" in key]
        return {
            name: cls(
                tensors[f"{name}.act_scale"],
                tensors[f"{name}.act_zero_point"],
                tensors[f"{name}.weight_scale"],
            )
            for name in names
        }


def search_scales(
    stats: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    known: Mapping[str, Tensor] | None = None,
    bits: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of `scales.safetensors` for the layers in `weights`.

    For each layer `NAME.act_scale` (S, G), `NAME.act_zero_point` (S,), `NAME.weight_scale` (O,);
    `bucket_of` (T,) int64, the time bucket of each training time-step. G is the number of buckets,
    or 1 for a layer none of whose segments gains `min_gain` by it.

    Args:
        stats: `NAME.hist` (S, K, N), `NAME.edges` (S, 2), `time_bin_edges` (K + 1,); a layer
            without them gets a weight scale alone.
        weights: float weight (O, ...) of each layer, searched on its device.
        recipe: metrics, bits and number of buckets.
        known: weight scales (O,) of layers that need no search.
        bits: (weight bits, activation bits) of layers where they are not the recipe's.
    """
    settings, bits = recipe.activations, bits or {}
    common = (recipe.weights.bits, settings.bits)
    common_spec = replace(ACTIVATION, symmetric=settings.symmetric)
    specs = {
        name: replace(common_spec, bits=bits.get(name, common)[1])
        for name in weights
        if f"{name}.hist" in stats
    }
    of_bin = _cut_time(stats, settings, specs)
    tensors = {"bucket_of": _bucket_table(stats["time_bin_edges"], of_bin)}
    for name, weight in tqdm(weights.items(), desc="search", disable=None, leave=False):
        scale = (known or {}).get(name)
        if scale is None:
            spec = weight_format(bits.get(name, common)[0])
            scale = search_weight(weight, spec, metric=recipe.weights.metric, p=recipe.weights.p)
        tensors[f"{name}.weight_scale"] = scale.cpu()
        if name not in specs:
            continue
        parts = [
            _search(hist, edges, settings, specs[name], of_bin)
            for hist, edges in zip(stats[f"{name}.hist"], stats[f"{name}.edges"], strict=True)
        ]
        columns = max(len(part.scale) for part in parts)
        tensors[f"{name}.act_scale"] = torch.stack([p.scale.expand(columns) for p in parts])
        tensors[f"{name}.act_zero_point"] = torch.tensor(
            [part.zero_point for part in parts], dtype=torch.int32
        )
    return tensors


def _search(
    hist: Tensor,
    edges: Tensor,
    settings: ActivationSettings,
    spec: Format,
    buckets: Tensor | None,
) -> ActivationScale:
    return search_activation(
        hist,
        edges,
        spec,
        metric=settings.metric,
        p=settings.p,
        buckets=buckets,
        min_gain=settings.min_gain,
        smooth=_SMOOTH,
        candidates=_CANDIDATES,
    )


def _cut_time(
    stats: Mapping[str, Tensor], settings: ActivationSettings, specs: Mapping[str, Format]
) -> Tensor | None:
    """Return (K,) the bucket of each fine time bin, best for all layers together, or None."""
    if settings.buckets == 1 or not specs:
        return None
    tables = []
    for name, spec in tqdm(specs.items(), desc="buckets", disable=None, leave=False):
        for hist, edges in zip(stats[f"{name}.hist"], stats[f"{name}.edges"], strict=True):
            table = cost_table(
                hist, edges, spec, metric=settings.metric, p=settings.p, candidates=_CANDIDATES
            )
            tables.append(table.at_best_zero_point())
    return bucket_of_bin(segment_time(tables, settings.buckets, _SMOOTH))


def _bucket_table(edges: Tensor, of_bin: Tensor | None) -> Tensor:
    """Return (T,) int64 bucket of each training time-step, from that of each fine bin."""
    t = torch.arange(int(edges[-1]))
    if of_bin is None:
        return torch.zeros_like(t)
    return of_bin[torch.bucketize(t.double(), edges[1:-1].double(), right=True)]
