"""Scales for a cell: trace, statistics and search of the product, without its run folder (L5)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.sources import needs_images
from quantempo.calibration.statistics import collect_statistics, state_tensors, time_bin_edges
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.models.layers import denoiser_of, sites
from quantempo.pipeline.stages import per_unit
from quantempo.quantized import measured_sites, output_side_layers
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.scales.search import schedule_scales, search_scales

__all__ = ["Calibrator"]


class Calibrator:
    """Make the scales of a recipe from a float pipeline.

    Args:
        scratch: where traces live while they are needed.
        model: hash of the float network.
        batch_size: chains in one call of the pipeline.
    """

    def __init__(self, scratch: Path, model: str, batch_size: int) -> None:
        self.scratch, self.model, self.batch_size = scratch, model, batch_size
        # Weights do not change: their scales are searched once for every metric.
        self._weight_scales: dict[tuple[Any, ...], dict[str, Tensor]] = {}

    def statistics(
        self,
        pipe: Any,
        recipe: Recipe,
        steps: int,
        seed: int,
        *,
        side: str = "input",
        call: Mapping[str, Any] | None = None,
        images: np.ndarray | None = None,
    ) -> dict[str, Tensor]:
        """Return the tensors of `stats.safetensors` of a recipe's trace under this pipeline.

        Args:
            pipe: with the scheduler to trace and the float denoiser, or a `Frontend` of it.
            recipe: its trace and layers.
            steps: of the scheduler.
            seed: of the first chain.
            side: of the layers' quantizers, see `collect_statistics`.
            call: further arguments of the pipeline.
            images: (n, H, W, C) uint8 for sources that need them.
        """
        front = denoiser_of(pipe)[1]
        denoiser = getattr(front, "network", front)
        train = int(pipe.scheduler.config.num_train_timesteps)
        self.scratch.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            data = self._trace(pipe, front, folder / "trace", recipe, steps, seed, call, images)
            unit = per_unit(data, train)
            found = collect_statistics(
                denoiser,
                self._inputs(denoiser, recipe, side),
                data,
                time_bin_edges(train),
                sites=measured_sites(recipe.layers.sites, denoiser),
                per_unit=unit,
                side=side,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return state_tensors(time_bin_edges(train), found) | {"per_unit": torch.tensor(unit)}

    def _trace(
        self,
        pipe: Any,
        denoiser: nn.Module,
        folder: Path,
        recipe: Recipe,
        steps: int,
        seed: int,
        call: Mapping[str, Any] | None,
        images: np.ndarray | None,
    ) -> TraceSet:
        settings = recipe.trace
        return trace(
            pipe,
            denoiser,
            folder,
            steps=steps,
            chains=settings.chains,
            picks=settings.picks,
            time_sampler=make_time_sampler(settings.time_sampler, settings.time_sampler_args),
            seed=seed,
            batch_size=self.batch_size,
            num_train_timesteps=int(pipe.scheduler.config.num_train_timesteps),
            call=call,
            source=settings.source,
            images=images if needs_images(settings.source) else None,
            legacy_pairing=settings.legacy_pairing,
            model_hash=self.model,
            progress=False,
        )

    def _inputs(self, denoiser: Any, recipe: Recipe, side: str) -> dict[str, tuple[int, ...]]:
        if side == "output":
            return dict.fromkeys(output_side_layers(sites(denoiser))[1], ())
        plans = plan_layers(sites(denoiser), recipe)
        return {plan.name: plan.segments for plan in plans if plan.kind == "int8"}

    def scales(
        self, pipe: Any, recipe: Recipe, stats: Mapping[str, Tensor], steps: int, side: str
    ) -> dict[str, Tensor]:
        """Return the tensors of `scales.safetensors` of a recipe, from its `statistics`.

        For side "output" the activation scales are those of outputs, and there is a weight scale
        for the last layer too, whose output stays in float.
        """
        denoiser = denoiser_of(pipe)[1]
        denoiser = getattr(denoiser, "network", denoiser)
        names = list(self._inputs(denoiser, recipe, side))
        weights = {n: denoiser.get_submodule(n).weight.detach().cpu() for n in names}
        if side == "output":
            extra = set(output_side_layers(sites(denoiser))[0]) - set(names)
            weights |= {n: denoiser.get_submodule(n).weight.detach().cpu() for n in extra}
        known = self._weight_scales.setdefault(
            (recipe.weights.bits, recipe.weights.metric, recipe.weights.p), {}
        )
        measured = measured_sites(recipe.layers.sites, denoiser)
        tensors = search_scales(
            stats, weights, recipe.override("layers", sites=measured), known=known
        )
        tensors["per_unit"] = stats["per_unit"]
        known |= {n: tensors[f"{n}.weight_scale"] for n in weights}
        return tensors | schedule_scales(
            set(recipe.layers.sites) - set(measured), pipe.scheduler, steps
        )
