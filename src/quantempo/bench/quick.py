"""Quantize a denoiser in seconds without data, for timing and not for images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.checkpoint.pack import pack_denoiser
from quantempo.core import activation_format, weight_format
from quantempo.errors import QuantempoError
from quantempo.models.layers import sites
from quantempo.quantized import Float16Linear, LayerPlan, QLayer, StepClock
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding.nearest import nearest
from quantempo.scales.search import LayerScales

__all__ = ["cast_floats", "input_ranges", "quick_quantize", "quick_recipe"]

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
    plans = plan_layers(sites(denoiser), recipe)
    chosen = {plan.name: plan for plan in plans if plan.kind == "int8"}
    ranges = input_ranges(denoiser, {n: p.segments for n, p in chosen.items()}, calls)
    codes: dict[str, Tensor] = {}
    scales: dict[str, LayerScales] = {}
    for name, plan in chosen.items():
        codes[name], scale = _weight_codes(denoiser.get_submodule(name), plan.weight_bits)
        grid = _grids(
            ranges[name], activation_format(plan.act_bits).qmax, recipe.activations.symmetric
        )
        scales[name] = LayerScales(*grid, scale)
    bucket_of = torch.zeros(num_train_timesteps, dtype=torch.int64)
    device = next(denoiser.parameters()).device
    pack_denoiser(
        denoiser,
        plans,
        scales,
        codes,
        bucket_of=bucket_of.to(device),
        per_unit=per_unit,
        recipe=recipe,
        source_sha256="",
    )
    if dtype is not None:
        cast_floats(denoiser, dtype)
    log.warning(
        "quantized %d layers without data: such scales are for timing, not for images", len(chosen)
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


@torch.no_grad()
def input_ranges(
    denoiser: nn.Module, inputs: dict[str, tuple[int, ...]], calls: Iterable[dict[str, Any]]
) -> dict[str, Tensor]:
    """Return (S, 2) the smallest and largest input of each named layer, by segment.

    Args:
        denoiser: float, left as it was.
        inputs: layer name -> input channels of its segments, () for one.
        calls: keyword arguments of each forward.

    Raises:
        QuantempoError: a layer that no call reaches, or inputs that are not finite.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str, segments: tuple[int, ...]) -> Callable[..., None]:
        def see(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            parts = args[0].split(segments, dim=1) if segments else (args[0],)
            found = torch.stack([torch.stack(part.aminmax()) for part in parts]).float()
            old = seen.get(name, found)
            low, high = torch.minimum(old[:, 0], found[:, 0]), torch.maximum(old[:, 1], found[:, 1])
            seen[name] = torch.stack([low, high], 1)

        return see

    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(hook(name, segments))
        for name, segments in inputs.items()
    ]
    try:
        for call in calls:
            denoiser(**call)
    finally:
        for handle in handles:
            handle.remove()
    missed = sorted(set(inputs) - set(seen))
    if missed:
        raise QuantempoError(
            f"no input reached {len(missed)} layers ({missed[0]}, ...); give at least one call"
        )
    bad = [name for name, found in seen.items() if not bool(found.isfinite().all())]
    if bad:
        raise QuantempoError(f"the input of '{bad[0]}' is not finite; check the model")
    return seen


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
