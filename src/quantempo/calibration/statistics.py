"""Collect the statistics of layer inputs over a calibration set.

Two passes of the float denoiser: ranges, then histograms over those ranges. Order of batches does
not matter (see search.histogram). Which scale is best is the business of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.calibration.dataset import TraceSet
from quantempo.scales import Histogram, MinMax

__all__ = ["TIME_BINS", "collect_statistics", "state_tensors", "time_bin_edges"]

# Fine time bins, equal in training time; buckets are unions of neighbours.
TIME_BINS = 16


def time_bin_edges(num_train_timesteps: int, bins: int = TIME_BINS) -> Tensor:
    """Return (bins + 1,) float32 equal edges over [0, T] in training time-steps."""
    return torch.linspace(0, num_train_timesteps, bins + 1)


def collect_statistics(
    denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    data: TraceSet,
    edges: Tensor,
    *,
    per_unit: float = 1.0,
) -> dict[str, tuple[MinMax, Histogram]]:
    """Return (ranges, histogram) of each named layer, by segment and fine time bin.

    Args:
        denoiser: float, left as it was.
        inputs: layer name -> input channels of its segments, () for one.
        data: the calibration set.
        edges: (K + 1,) edges of the time bins in training time-steps.
        per_unit: training time-steps in one unit of t.

    Raises:
        QuantempoError: NaN in an activation.
    """
    collector = _Collector(denoiser, inputs, len(edges) - 1)
    with collector, torch.no_grad():
        for stage in ("ranges", "histograms"):
            collector.start(stage)
            # On a GPU few large batches: every layer waits for the device once a batch.
            size = 32 if next(denoiser.parameters()).device.type == "cpu" else 256
            for batch in tqdm(data.batches(size), desc=stage, disable=None, leave=False):
                t = (batch.t.double() * per_unit).clamp(0, float(edges[-1]) - 1e-6)
                collector.time_bin = torch.bucketize(t, edges[1:-1].double(), right=True)
                data.replay(denoiser, batch)
    return {name: (collector.ranges[name], collector.histograms[name]) for name in collector.ranges}


def state_tensors(
    edges: Tensor, statistics: Mapping[str, tuple[MinMax, Histogram]]
) -> dict[str, Tensor]:
    """Return the tensors of `stats.safetensors`: the edges of the time bins, NAME.KEY of each."""
    tensors = {"time_bin_edges": edges}
    for name, (ranges, histogram) in statistics.items():
        state = {**ranges.state(), **histogram.state()}
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


class _Collector:
    """Hold the accumulators and the hooks that feed them."""

    def __init__(
        self,
        denoiser: nn.Module,
        inputs: Mapping[str, tuple[int, ...]],
        bins: int,
    ) -> None:
        self.denoiser, self.inputs = denoiser, inputs
        self.time_bin = torch.zeros(0, dtype=torch.int64)
        self.ranges = {name: MinMax(max(1, len(s)), bins) for name, s in inputs.items()}
        self.histograms: dict[str, Histogram] = {}
        self.current: Mapping[str, MinMax | Histogram] = self.ranges
        self.bins = bins
        self._handles: list[Any] = []

    def __enter__(self) -> _Collector:
        for name, segments in self.inputs.items():
            layer, see = self.denoiser.get_submodule(name), self._hook(name, segments)
            self._handles.append(layer.register_forward_pre_hook(see))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def start(self, stage: str) -> None:
        """Switch to filling ranges or, after them, histograms."""
        if stage == "histograms":
            self.histograms = {n: Histogram(r.edges(), self.bins) for n, r in self.ranges.items()}
            self.current = self.histograms

    def _hook(self, name: str, segments: tuple[int, ...]) -> Callable[..., None]:
        def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            parts = args[0].split(segments, dim=1) if segments else args[:1]
            for index, part in enumerate(parts):
                self.current[name].update(part, self._bins_of(part), index)

        return see

    def _bins_of(self, x: Tensor) -> Tensor:
        """Return one time bin a row of x, whose rows may repeat a sample (frames, heads)."""
        return self.time_bin.repeat_interleave(max(1, x.shape[0] // len(self.time_bin)))
