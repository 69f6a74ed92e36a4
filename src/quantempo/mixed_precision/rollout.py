"""A short trajectory of a pipeline in which one layer is quantized."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from quantempo.core import WEIGHT
from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError
from quantempo.models.layers import timestep_of
from quantempo.models.sampling import call_pipeline
from quantempo.quantized import LayerPlan, StepClock, fill, swap_layers
from quantempo.recipe import Recipe
from quantempo.rounding import nearest
from quantempo.scales import search_weight
from quantempo.scales.search import LayerScales, search_scales

__all__ = ["Grids", "last_latent", "one_quantized"]


def last_latent(pipe: Any, seeds: Sequence[int], steps: int, call: dict[str, Any]) -> Tensor:
    """Return the last sample that the scheduler of a pipeline made, float64 on the CPU.

    Before any decoder and any clipping; (B, C, H, W), or twice the batch where the pipeline keeps
    the halves of guidance together to the end.

    Raises:
        QuantempoError: see `call_pipeline`; the pipeline did not step its scheduler.
    """
    scheduler, last = pipe.scheduler, list[Any]()
    step, before = scheduler.step, scheduler.__dict__.get("step")

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def keep(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = keep
    try:
        call_pipeline(pipe, seeds, steps=steps, output_type="latent", **call)
    finally:
        # A site of the sampler may have wrapped the step of this instance already.
        if before is None:
            del scheduler.step
        else:
            scheduler.step = before
    if not last:
        raise QuantempoError(f"{type(pipe).__name__} did not call the step of its scheduler")
    return last[0].detach().double().cpu()


class Grids:
    """Search the scales of one layer alone, each number of bits once."""

    def __init__(
        self, stats: Mapping[str, Tensor], layer: nn.Module, name: str, recipe: Recipe
    ) -> None:
        parts = ("hist", "edges", "range")
        self.stats = {key: stats[key] for part in parts if (key := f"{name}.{part}") in stats}
        self.stats["time_bin_edges"] = stats["time_bin_edges"]
        self.name, self.recipe = name, recipe
        weight: Any = layer.weight
        self.weight = weight.detach().float().cpu()
        self.weights: dict[int, Tensor] = {}
        self.activations: dict[int, dict[str, Tensor]] = {}

    def at(self, weight_bits: int, act_bits: int) -> tuple[LayerScales, Tensor, Tensor]:
        """Return the scales, (O, ...) int8 codes rounded to nearest and (T,) time buckets."""
        settings, spec = self.recipe.weights, replace(WEIGHT, bits=weight_bits)
        if weight_bits not in self.weights:
            scale = search_weight(self.weight, spec, metric=settings.metric, p=settings.p)
            self.weights[weight_bits] = scale
        scale = self.weights[weight_bits]
        if act_bits not in self.activations:
            given = ({self.name: self.weight}, self.recipe, {self.name: scale})
            bits = {self.name: (weight_bits, act_bits)}
            self.activations[act_bits] = search_scales(self.stats, *given, bits=bits)
        found = self.activations[act_bits]
        grids = (found[f"{self.name}.act_scale"], found[f"{self.name}.act_zero_point"])
        codes = nearest(self.weight, scale, spec)
        return LayerScales(*grids, scale), codes, found["bucket_of"]


@contextmanager
def one_quantized(
    denoiser: nn.Module,
    plan: LayerPlan,
    scales: LayerScales,
    codes: Tensor,
    bucket_of: Tensor,
    unit: float,
) -> Iterator[None]:
    """Put an integer layer in the place of one float layer for a while."""
    parent_name, _, leaf = plan.name.rpartition(".")
    parent, layer = denoiser.get_submodule(parent_name), denoiser.get_submodule(plan.name)
    # Not a child: the denoiser must be found as it was, also when something fails inside.
    clock = StepClock(bucket_of, unit).to(next(denoiser.parameters()).device)

    def set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clock.set(timestep_of(args, kwargs))

    handle = denoiser.register_forward_pre_hook(set_clock, with_kwargs=True)
    try:
        swap_layers(denoiser, [replace(plan, buckets=scales.act_scale.shape[1])], clock)
        twin: Any = denoiser.get_submodule(plan.name)
        grids = (scales.weight_scale, layer.bias, scales.act_scale, scales.act_zero_point)
        fill(twin, codes, *grids)
        twin.kernel = BACKENDS.get("simulated").lower(twin)
        yield
    finally:
        setattr(parent, leaf, layer)
        handle.remove()
