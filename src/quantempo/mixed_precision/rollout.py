"""A short trajectory of a pipeline in which one layer is quantized."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from quantempo.core import weight_format
from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError
from quantempo.models.call import wrapped_step
from quantempo.models.sampling import call_pipeline
from quantempo.pipeline.quantize import Quantized
from quantempo.quantized import LayerPlan, Times
from quantempo.recipe import Recipe
from quantempo.rounding import nearest
from quantempo.scales import search_scales, search_weights

__all__ = ["OneLayer", "last_latent"]


def last_latent(pipe: Any, seeds: Sequence[int], steps: int, call: dict[str, Any]) -> Tensor:
    """Return the last sample that the scheduler of a pipeline made, float64 on the CPU.

    (B, C, H, W), before any decoder; 2 B where the halves of guidance stay together to the end.
    Raises QuantempoError: see `call_pipeline`; the pipeline did not step its scheduler.
    """
    last = list[Any]()

    def keep(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        last[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    with wrapped_step(pipe.scheduler, keep):
        call_pipeline(pipe, seeds, steps=steps, output_type="latent", **call)
    if not last:
        raise QuantempoError(f"{type(pipe).__name__} did not call the step of its scheduler")
    return last[0].detach().double().cpu()


@dataclass
class OneLayer:
    """Quantize one layer alone, whatever its plan's bits; scales are searched once for each."""

    denoiser: nn.Module
    stats: Mapping[str, Tensor]
    plan: LayerPlan
    recipe: Recipe
    times: Times

    def __post_init__(self) -> None:
        layer: Any = self.denoiser.get_submodule(self.plan.name)
        self.weight = layer.weight.detach().float().cpu()
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.activations: dict[int, dict[str, Tensor]] = {}

    def at(self, weight_bits: int, act_bits: int) -> nn.Module:
        """Return a copy of the denoiser in which the layer is integer, rounded to nearest."""
        name, how = self.plan.name, self.recipe.weights
        spec, bits = weight_format(weight_bits, how.group), {name: (weight_bits, act_bits)}
        if weight_bits not in self.weights:
            self.weights[weight_bits] = search_weights(name, self.weight, how, weight_bits)
        known = self.weights[weight_bits]
        if act_bits not in self.activations:
            given = (self.stats, {name: self.weight}, self.recipe, known, bits)
            self.activations[act_bits] = search_scales(*given)
        kept = {k: v for k, v in self.activations[act_bits].items() if ".weight_" not in k}
        scale, groups = known[f"{name}.weight_scale"], known.get(f"{name}.weight_group")
        group = 0 if groups is None else how.group
        plan = replace(self.plan, weight_bits=weight_bits, act_bits=act_bits, group=group)
        codes = {name: nearest(self.weight, scale, spec.grid(self.weight.shape, groups))}
        found = Quantized.of(self.recipe, [plan], kept | known, codes, self.times)
        quantized = found.install(self.denoiser, copy=True)
        layer: Any = quantized.get_submodule(name)
        layer.kernel = BACKENDS.get("simulated").lower(layer)
        return quantized
