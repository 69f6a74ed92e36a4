"""Turn a float denoiser into a packed one, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantempo import __version__
from quantempo.checkpoint.diffusers_plugin import QuantempoConfig, mark_quantized
from quantempo.engines.select import attach_lazily
from quantempo.errors import QuantempoError
from quantempo.quantized import (
    Float16Linear,
    LayerPlan,
    QLayer,
    fill,
    install_clock,
    swap_layers,
)
from quantempo.quantized.correction import OutputCorrection, install_correction
from quantempo.recipe import Recipe
from quantempo.scales.search import LayerScales

__all__ = ["pack_denoiser"]


@torch.no_grad()
def pack_denoiser(
    denoiser: nn.Module,
    plans: list[LayerPlan],
    scales: Mapping[str, LayerScales],
    codes: Mapping[str, Tensor],
    *,
    bucket_of: Tensor,
    per_unit: float,
    recipe: Recipe,
    source_sha256: str,
    correction: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the planned layers, fill them with integers and scales, and mark for saving.

    Args:
        denoiser: float, changed in place; names of modules stay.
        plans: one for each Conv2d and Linear.
        scales: of each int8 layer.
        codes: integer weight (O, ...) int8 of each int8 layer.
        bucket_of: (T,) int64 time bucket of each training time-step.
        per_unit: training time-steps in one unit of the network's time.
        recipe: written into the checkpoint.
        source_sha256: of the float denoiser.
        correction: tables of a fit, see `calibration.correction`; None for none.
    """
    floats = {p.name: denoiser.get_submodule(p.name) for p in plans if p.kind != "float"}
    swap_layers(denoiser, plans, install_clock(denoiser, bucket_of, per_unit))
    for name, layer in floats.items():
        _fill(denoiser.get_submodule(name), layer, scales.get(name), codes.get(name))
    around = {} if correction is None else _install_correction(denoiser, correction)
    int8 = [p for p in plans if p.kind == "int8"]
    config = QuantempoConfig(
        recipe=recipe.to_dict(),
        float16={p.name: p.reason or "" for p in plans if p.kind == "float16"},
        float_layers={p.name: p.reason or "" for p in plans if p.kind == "float"},
        segments={p.name: list(p.segments) for p in int8 if len(p.segments) > 1},
        buckets={p.name: p.buckets for p in int8 if p.buckets > 1},
        bits={p.name: list(bits) for p in int8 if (bits := (p.weight_bits, p.act_bits)) != (8, 8)},
        num_train_timesteps=len(bucket_of),
        per_unit=per_unit,
        correction=around,
        hashes={"recipe": recipe.sha256, "source": source_sha256},
        version=__version__,
    )
    mark_quantized(denoiser, config)
    attach_lazily(denoiser)


def _install_correction(denoiser: nn.Module, tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Install a fitted correction; return what the configuration says of it."""
    correction = OutputCorrection.of(tables).to(next(denoiser.parameters()).device)
    install_correction(denoiser, correction)
    return correction.settings


def _fill(
    twin: nn.Module, layer: nn.Module, chosen: LayerScales | None, codes: Tensor | None
) -> None:
    """Fill the quantized twin of a float layer."""
    if isinstance(twin, Float16Linear) and isinstance(layer, nn.Linear):
        twin.fill(layer)
    elif isinstance(twin, QLayer) and chosen is not None and codes is not None:
        scales = (chosen.weight_scale, layer.bias, chosen.act_scale, chosen.act_zero_point)
        fill(twin, codes, *scales)
    else:
        raise QuantempoError(f"no scales for a {type(layer).__name__}; rerun search and round")
