"""Collect the statistics of layer inputs over a calibration set.

Two passes of the float denoiser: ranges, then histograms over those ranges. The order of batches
does not matter (see scales.histogram). Which scale is best is the business of the search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.calibration.dataset import CalibrationData
from quantempo.models.layers import hooked, input_of
from quantempo.quantized import Times, token_rows
from quantempo.scales import Histogram, MinMax

__all__ = ["TIME_BINS", "collect_ranges", "collect_statistics", "time_bin_edges"]

# Fine time bins, of equally many places; buckets are unions of neighbours.
TIME_BINS = 16


def time_bin_edges(times: Times, bins: int = TIME_BINS) -> Tensor:
    """Return (bins + 1,) float32 equal edges over all places; a bin for clean tokens alone."""
    if times.clean and bins > 1:
        return torch.cat([torch.zeros(1), torch.linspace(1, times.count, bins)])
    return torch.linspace(0, times.count, bins + 1)


def collect_statistics(
    denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    data: CalibrationData,
    *,
    bins: int = TIME_BINS,
) -> dict[str, Tensor]:
    """Return the tensors of `stats.safetensors`.

    `time_bin_edges` (K + 1,), K = bins; for each named layer, by segment and fine time bin,
    `NAME.range` (S, K, 2), `NAME.hist` (S, K, N) int64 and `NAME.edges` (S, 2) of the histograms.

    Args:
        denoiser: float, left as it was.
        inputs: layer name -> input channels of its segments, () for one.

    Raises:
        QuantempoError: NaN in an activation, or a layer that no row reaches.
    """
    ranges = collect_ranges(denoiser, inputs, data, bins=bins)
    histograms = {name: Histogram(seen.edges(), bins) for name, seen in ranges.items()}
    _feed(histograms, denoiser, inputs, data, bins, "histograms")
    tensors = {"time_bin_edges": time_bin_edges(data.times, bins)}
    for name in inputs:
        state = {**ranges[name].state(), **histograms[name].state()}
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def collect_ranges(
    denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    data: CalibrationData,
    *,
    bins: int = 1,
) -> dict[str, MinMax]:
    """Return the smallest and largest input of each named layer; arguments as above."""
    ranges = {name: MinMax(max(1, len(parts)), bins) for name, parts in inputs.items()}
    _feed(ranges, denoiser, inputs, data, bins, "ranges")
    return ranges


@torch.no_grad()
def _feed(
    sinks: Mapping[str, MinMax | Histogram],
    denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    data: CalibrationData,
    bins: int,
    stage: str,
) -> None:
    """Run the denoiser on all rows and give each sink the inputs of its layer."""
    edges = time_bin_edges(data.times, bins)
    time_bin = torch.zeros(0, dtype=torch.int64)

    def see(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        x, segments = input_of(args, kwargs), inputs[name]
        x, bin_of = token_rows(time_bin, x)
        # Rows of a layer's input may repeat a sample (frames, heads).
        bin_of = bin_of.repeat_interleave(max(1, x.shape[0] // len(bin_of)))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        for index, part in enumerate(x.split(segments, axis) if segments else (x,)):
            sinks[name].update(part, bin_of, index)

    # On a GPU few large batches: every layer waits for the device once a batch.
    size = 32 if next(denoiser.parameters()).device.type == "cpu" else 256
    with hooked({name: denoiser.get_submodule(name) for name in inputs}, see, before=True):
        total = math.ceil(len(data) / size)
        for batch in tqdm(data.batches(size), stage, total, disable=None, leave=False):
            time_bin = _bins(data.times.place(batch.t), edges)
            data.replay(denoiser, batch)


def _bins(t: Tensor, edges: Tensor) -> Tensor:
    """Return the fine bin of each place in time; an edge belongs to the bin above it."""
    t = t.clamp(0, float(edges[-1]) - 1e-6)
    return torch.bucketize(t, edges[1:-1].double(), right=True)
