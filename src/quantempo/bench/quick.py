"""Quantize a denoiser in seconds without data, for timing and not for images."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import MemorySet
from quantempo.calibration.statistics import collect_ranges
from quantempo.core import activation_format, weight_format
from quantempo.pipeline.quantize import Quantized, plan, segments_of
from quantempo.quantized import Float16Linear, LayerPlan, QLayer, StepClock
from quantempo.recipe import Recipe
from quantempo.rounding import nearest
from quantempo.scales import LayerScales

__all__ = ["cast_floats", "quick_quantize", "quick_recipe"]

log = logging.getLogger("quantempo")

# Of a weight channel or an input that is zero throughout: any would do.
_EMPTY = 2.0**-30
_STATEFUL = (QLayer, Float16Linear, StepClock)


def quick_recipe(name: str = "w8a8") -> Recipe:
    """Return a shipped recipe's layers and bits, rounded to nearest and nothing corrected."""
    recipe = Recipe.load(name).override("rounding", name="nearest", bias=False, refine=0)
    recipe = recipe.override("correction", affine=False)
    return recipe.override("activations", buckets=1)


@torch.no_grad()
def quick_quantize(
    denoiser: nn.Module,
    calls: Iterable[dict[str, Any]],
    recipe: Recipe | None = None,
    *,
    dtype: torch.dtype | None = None,
    num_train_timesteps: int = 1000,
    per_unit: float = 1.0,
) -> list[LayerPlan]:
    """Quantize a float denoiser in place: one bucket, min-max scales, weights to nearest.

    Such scales see a few random inputs: good enough to time kernels with real code paths, not to
    make images.

    Args:
        denoiser: float32, on the device that runs it.
        calls: keyword arguments of the forwards that the ranges are taken from.
        recipe: layers and bits; `quick_recipe()` by default.
        dtype: of what stays in float; None leaves it.
        num_train_timesteps: T.
        per_unit: training time-steps in one unit of the time the network receives.

    Returns:
        What each layer became.

    Raises:
        QuantempoError: no calls, or activations that are not finite.
    """
    recipe = recipe or quick_recipe()
    data = MemorySet.of_calls(denoiser, calls, num_train_timesteps)
    plans = plan(denoiser, recipe)
    ranges = collect_ranges(denoiser, segments_of(plans), data)
    codes: dict[str, Tensor] = {}
    scales: dict[str, LayerScales] = {}
    for p in plans:
        if p.kind == "int8":
            codes[p.name], scale = _weight_codes(denoiser.get_submodule(p.name), p.weight_bits)
            grid = _grids(
                ranges[p.name].edges(),
                activation_format(p.act_bits).qmax,
                recipe.activations.symmetric,
            )
            scales[p.name] = LayerScales(*grid, scale)
    bucket_of = torch.zeros(num_train_timesteps, dtype=torch.int64)
    Quantized(recipe, plans, scales, codes, bucket_of, per_unit).install(denoiser)
    if dtype is not None:
        cast_floats(denoiser, dtype)
    log.warning(
        "quantized %d layers without data: such scales are for timing, not for images", len(codes)
    )
    return plans


def _weight_codes(layer: Any, bits: int) -> tuple[Tensor, Tensor]:
    """Return int8 codes (O, ...) and min-max scales (O,) of a layer's weight."""
    weight, spec = layer.weight.detach().float(), weight_format(bits)
    peak = weight.flatten(1).abs().amax(1)
    scale = torch.where(peak > 0, peak / spec.qmax, _EMPTY)
    return nearest(weight, scale, spec), scale


def _grids(ranges: Tensor, qmax: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale (S, 1) and zero point (S,) of grids that cover ranges (S, 2) and 0."""
    low, high = ranges[:, 0].clamp(max=0).double(), ranges[:, 1].clamp(min=0).double()
    if symmetric:
        zero = torch.full_like(low, (qmax + 1) // 2)
        scale = torch.maximum(-low / zero, high / (qmax - zero))
    else:
        scale = (high - low) / qmax
        zero = (-low / scale.clamp_min(_EMPTY)).round().clamp(0, qmax)
    scale = torch.where(scale > 0, scale, _EMPTY)
    return scale.float()[:, None], zero.to(torch.int32)


def cast_floats(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is left in float in place; integers, scales and biases of integer layers stay."""
    for module in denoiser.modules():
        if isinstance(module, _STATEFUL):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))
