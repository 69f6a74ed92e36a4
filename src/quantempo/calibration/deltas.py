"""Measure how fast the inputs of layers change along trajectories, and choose rates.

    u = (x(t) - x(t')) / (t' - t),  t' the time of the call before, in training time-steps

The float pipeline runs as a user would run it; hooks keep the last input of each layer and count u
by time. A rate is then searched like any scale, on the grid of changes: it is the scale of u, and
times the gap of a call that of x(t) - x(t'), made wider because changes follow each other: what a
step clips is left for the next, which adds a change of its own, mostly in the same direction. How
rates are used is in `quantizers.delta`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.errors import QuantempoError
from quantempo.models.inputs import bind_inputs
from quantempo.models.sampling import call_pipeline
from quantempo.quantized.delta import delta_spec
from quantempo.recipe import ActivationSettings
from quantempo.scales import Grid, Histogram, MinMax, search_activation

__all__ = ["WIDEN", "collect_deltas", "delta_sizes", "search_deltas"]

log = logging.getLogger("quantempo")

_HIST, _EDGES, _SIZE = ".delta_hist", ".delta_edges", ".delta_size"
# Price of leaving a layer's common rate, and candidates: as for the scales of whole inputs.
_SMOOTH = 0.01
_GRID = Grid(steps=64, floor=1 / 64)
# Times the best scale for single changes. Measured on the bundled model (8 images, 10 steps): 4
# bits x 0.7 23.6 dB, x 1 30.2, x 1.4 36.0, x 2 35.0, x 2.8 32.7; 3 bits x 1 23.6, x 1.4 27.9. Each
# layer's least mean squared error in closed loop asks for 1.2 (32.8 dB): it does not see that lag
# adds up over steps and layers where rounding averages out.
WIDEN = 1.5


def collect_deltas(
    pipe: Any,
    denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]],
    edges: Tensor,
    *,
    steps: int,
    chains: int,
    seed: int,
    per_unit: float = 1.0,
    batch_size: int = 4,
    call: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Run the float pipeline twice (ranges, then histograms) and return what changed how fast.

    For each layer `NAME.delta_hist` (S, K, N) int64 counts of u, `NAME.delta_edges` (S, 2) float32,
    `NAME.delta_size` (3,) int64: input and output elements and MACs of one image.

    Args:
        pipe: a diffusers pipeline of the float model; its scheduler is the one that is measured.
        denoiser: the network of `pipe`.
        inputs: layer name -> input channels of its segments, () for one.
        edges: (K + 1,) edges of the time bins in training time-steps.
        steps, chains, seed: num_inference_steps, images, and the first one's seed.
        per_unit: training time-steps in one unit of the time the denoiser receives.
        batch_size: images at a time; the last input of every layer is kept for each.
        call: further arguments of the pipeline.

    Raises:
        QuantempoError: NaN in an activation, or no two calls in a row go down in time.
    """
    meter = _Meter(denoiser, inputs, edges, per_unit)
    how = {"steps": steps, "chains": chains, "seed": seed, "batch_size": batch_size}
    with meter, torch.no_grad():
        for stage in ("ranges", "histograms"):
            meter.start(stage)
            _follow(pipe, meter, stage, call=call, **how)
    meter.report()
    return meter.tensors()


def delta_sizes(
    stats: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """Return (input, output) elements and MACs of one image by layer, for `plan_memory`."""
    sizes: dict[str, tuple[int, int]] = {}
    macs: dict[str, int] = {}
    for key, value in stats.items():
        if key.endswith(_SIZE):
            name = key.removesuffix(_SIZE)
            taken, given, macs[name] = value.tolist()
            sizes[name] = (taken, given)
    return sizes, macs


def search_deltas(
    stats: Mapping[str, Tensor],
    bits: Mapping[str, int],
    bucket_of: Tensor,
    edges: Tensor,
    settings: ActivationSettings,
) -> dict[str, Tensor]:
    """Return `NAME.delta_rate` (S, G) float32 for each named layer, G the number of buckets.

    The best scale of u by the metric, times WIDEN.

    Args:
        stats: from `collect_deltas`.
        bits: name -> bits of its changes.
        bucket_of: (T,) the time bucket of each training time-step, as for whole inputs.
        edges: (K + 1,) edges of the time bins in training time-steps.
        settings: the metric; buckets without data take the rate of the nearest with some.
    """
    # The first time-step of a fine bin is in the bucket of all of them.
    first = edges[:-1].double().ceil().long().clamp(0, len(bucket_of) - 1)
    of_bin, count = bucket_of[first], int(bucket_of.max()) + 1
    tensors = {}
    for name, width in tqdm(bits.items(), desc="rates", disable=None, leave=False):
        rates = []
        for hist, ends in zip(stats[name + _HIST], stats[name + _EDGES], strict=True):
            found = search_activation(
                hist,
                ends,
                delta_spec(width),
                metric=settings.metric,
                p=settings.p,
                buckets=of_bin if count > 1 else None,
                smooth=_SMOOTH,
                grid=_GRID,
            )
            rates.append(WIDEN * found.scale.expand(count))
        tensors[f"{name}.delta_rate"] = torch.stack(rates)
    return tensors


def _follow(
    pipe: Any,
    meter: _Meter,
    label: str,
    *,
    steps: int,
    chains: int,
    seed: int,
    batch_size: int,
    call: Mapping[str, Any] | None,
) -> None:
    """Run the pipeline once over all chains, a batch at a time, while `meter` listens."""
    for first in tqdm(range(0, chains, batch_size), desc=label, disable=None, leave=False):
        count = min(batch_size, chains - first)
        meter.begin(count)
        seeds = range(seed + first, seed + first + count)
        how: dict[str, Any] = {"first": first, "steps": steps, "output_type": "latent"}
        call_pipeline(pipe, seeds, **how, **(call or {}))


class _Meter:
    """Hold the last inputs, the accumulators and the hooks that feed them."""

    def __init__(
        self,
        denoiser: nn.Module,
        inputs: Mapping[str, tuple[int, ...]],
        edges: Tensor,
        per_unit: float,
    ) -> None:
        self.denoiser, self.inputs, self.per_unit = denoiser, inputs, per_unit
        self.edges, bins = edges.double(), len(edges) - 1
        self.ranges = {name: MinMax(max(1, len(s)), bins) for name, s in inputs.items()}
        self.current: Mapping[str, MinMax | Histogram] = self.ranges
        self.histograms: dict[str, Histogram] = {}
        self.sizes: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.images, self.calls, self.starts = 0, 0, 0
        self.time, self.gap = float("nan"), float("nan")
        self._handles: list[Any] = []

    def __enter__(self) -> _Meter:
        tick = self.denoiser.register_forward_pre_hook(self._tick, with_kwargs=True)
        self._handles.append(tick)
        for name, segments in self.inputs.items():
            layer = self.denoiser.get_submodule(name)
            self._handles.append(layer.register_forward_hook(self._hook(name, segments)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.last.clear()

    def begin(self, images: int) -> None:
        """Forget the last inputs; the next call starts `images` trajectories."""
        self.images, self.time = images, float("nan")
        self.last.clear()

    def start(self, stage: str) -> None:
        """Switch to filling ranges or, after them, histograms."""
        if stage == "histograms":
            self.check()
            bins = len(self.edges) - 1
            self.histograms = {n: Histogram(r.edges(), bins) for n, r in self.ranges.items()}
            self.current = self.histograms

    def check(self) -> None:
        """Refuse a sampler that left nothing to measure."""
        if self.calls == self.starts:
            raise QuantempoError(
                f"none of {self.calls} calls of the denoiser went down in time from the call "
                "before; deltas need a sampler of several steps with one call each"
            )

    def report(self) -> None:
        """Say if the sampler calls the network in a way that gives deltas little to do."""
        if 3 * self.starts > self.calls:
            log.warning(
                "delta: %d of %d calls start anew (time does not go down from the call before); "
                "those are whole 8-bit steps",
                self.starts, self.calls,
            )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """Return what `collect_deltas` does."""
        tensors: dict[str, Tensor] = {}
        for name, histogram in self.histograms.items():
            tensors[name + _HIST], tensors[name + _EDGES] = histogram.counts, histogram.edges
            tensors[name + _SIZE] = self.sizes[name]
        return tensors

    def _tick(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the time of a call."""
        t = bind_inputs(denoiser, args, kwargs).timestep.double().unique() * self.per_unit
        now = float(t[0]) if len(t) == 1 else float("nan")
        self.gap, self.time = self.time - now, now
        self.calls += 1
        self.starts += not self.gap > 0

    @property
    def bin(self) -> int:
        """The time bin of the call under way."""
        inside = torch.tensor(self.time).clamp(0, float(self.edges[-1]) - 1e-6)
        return int(torch.bucketize(inside.double(), self.edges[1:-1], right=True))

    def _hook(self, name: str, segments: tuple[int, ...]) -> Callable[..., None]:
        """Return the forward hook of a layer."""

        def see(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, before = args[0].detach(), self.last.get(name)
            if self.gap > 0 and before is not None and before.shape == x.shape:
                change = (x.float() - before) / self.gap
                parts = change.split(segments, dim=1) if segments else (change,)
                for index, part in enumerate(parts):
                    self.current[name].update(part, self.bin, index)
            if name not in self.sizes:
                weight: Any = layer.weight
                sizes = [x.numel(), output.numel(), output.numel() * weight[0].numel()]
                self.sizes[name] = torch.tensor([size // self.images for size in sizes])
            # A copy: what comes after the layer may write into its input.
            self.last[name] = x.float().clone()

        return see
