"""Scales for a cell: trace, statistics and search of the product, without its run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import TraceSet, index_of
from quantempo.calibration.sources import check_source, replace_rows
from quantempo.calibration.statistics import collect_statistics
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.core import ACTIVATION
from quantempo.models.layers import denoiser_of, sites
from quantempo.quantized import plan_layers
from quantempo.recipe import WeightSettings
from quantempo.run_folder import private_folder
from quantempo.scales import search_activation
from quantempo.scales.search import search_scales
from studies.ptq4dm.cells import Cell
from studies.ptq4dm.output_side import output_side_layers
from studies.ptq4dm.released_pairs import ReleasedPairs, finished_samples, relabel, rewrite
from studies.ptq4dm.sampler_tensors import Grids, learns_variance, output_part, variance_grid

__all__ = ["Calibrator", "output_probe"]

_PROBE = "study_probe"
# As `trace` draws: not the generator of chain 0, whose numbers become its noise.
_DRAW = 0x5EED_7157


class Calibrator:
    """Make the scales of a recipe from a float pipeline.

    scratch: where traces live while they are needed; model: hash of the float network; batch_size:
    chains in one call of the pipeline.
    """

    def __init__(self, scratch: Path, model: str, batch_size: int) -> None:
        self.scratch, self.model, self.batch_size = scratch, model, batch_size
        # Weights do not change: their scales are searched once for every metric.
        self._weight_scales: dict[WeightSettings, dict[str, Tensor]] = {}

    @contextmanager
    def traced(
        self, pipe: Any, cell: Cell, seed: int, call: Mapping[str, Any] | None = None
    ) -> Iterator[TraceSet]:
        """Yield a cell's trajectories under this pipeline, on disk for that long.

        Args:
            pipe: with the scheduler to trace and the float denoiser, or a `Frontend` of it.
            cell: its recipe, pairs and calibrating sampler.
            seed: of the first chain.
            call: further arguments of the pipeline.
        """
        assert cell.recipe is not None
        settings, steps = cell.recipe.trace, cell.calibrated.steps
        law: Any = make_time_sampler(settings.time_sampler, settings.time_sampler_args)
        if cell.released:
            law = ReleasedPairs(settings.time_sampler)
        self.scratch.mkdir(parents=True, exist_ok=True)
        with private_folder(self.scratch / "trace") as folder:
            with ExitStack() as stack:
                if cell.released:
                    finished = stack.enter_context(finished_samples(pipe.scheduler))
                data = trace(
                    pipe, denoiser_of(pipe)[1], folder / "trace", steps=steps, seed=seed,
                    chains=settings.chains, picks=settings.picks, time_sampler=law, call=call,
                    batch_size=self.batch_size, model_hash=self.model,
                )  # fmt: skip
            yield relabel(data, law, finished, seed ^ _DRAW) if cell.released else data

    @contextmanager
    def sourced(
        self, data: TraceSet, pipe: Any, cell: Cell, images: np.ndarray
    ) -> Iterator[TraceSet]:
        """Yield the calibration set of a cell: its trajectories, or what its source puts there.

        Equal to a trace with that source, which would run the same trajectories once more.
        """
        assert cell.recipe is not None
        source = cell.recipe.trace.source
        if source == "trajectory":
            yield data
            return
        check_source(source, pipe, images)
        schedule, seed = pipe.scheduler.alphas_cumprod, data.info["settings"]["seed"]
        with private_folder(self.scratch / "source") as folder:
            copied = TraceSet(copy_trace(data, folder / "trace"))
            yield rewrite(
                copied, lambda t: {"x_t": replace_rows(source, t, schedule, images, seed)}
            )

    def statistics(self, denoiser: nn.Module, cell: Cell, data: TraceSet) -> dict[str, Tensor]:
        """Return the tensors of `stats.safetensors` of a cell: of layers and sampler tensors."""
        assert cell.recipe is not None
        inputs = self._inputs(denoiser, cell)
        measured = [n for n in cell.measured if n != "sigma" or learns_variance(denoiser)]
        with ExitStack() as stack:
            if cell.graph == "output":
                inputs = {f"{name}.{_PROBE}": () for name in inputs}
                for name in inputs:
                    layer = denoiser.get_submodule(name.removesuffix(f".{_PROBE}"))
                    stack.enter_context(output_probe(layer, _PROBE, lambda kwargs, out: out))
            for name in measured:
                pick = _pick(name, denoiser, data.names[0])
                stack.enter_context(output_probe(denoiser, f"{_PROBE}:{name}", pick))
                inputs[f"{_PROBE}:{name}"] = ()
            found = collect_statistics(denoiser, inputs, data)
        return {
            n.replace(f".{_PROBE}.", ".").removeprefix(f"{_PROBE}:"): s for n, s in found.items()
        }

    def _inputs(self, denoiser: nn.Module, cell: Cell) -> dict[str, tuple[int, ...]]:
        assert cell.recipe is not None
        if cell.graph == "output":
            return dict.fromkeys(output_side_layers(sites(denoiser))[1], ())
        plans = plan_layers(sites(denoiser), cell.recipe)
        return {plan.name: plan.segments for plan in plans if plan.kind == "int8"}

    def scales(
        self, denoiser: nn.Module, cell: Cell, stats: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the tensors of `scales.safetensors` of a cell, from its `statistics`.

        For graph "output" the activation scales are those of outputs, and there is a weight scale
        for the last layer too, whose output stays in float.
        """
        recipe = cell.recipe
        assert recipe is not None
        names = list(self._inputs(denoiser, cell))
        if cell.graph == "output":
            names += [n for n in output_side_layers(sites(denoiser))[0] if n not in names]
        weights: dict[str, Any] = {n: denoiser.get_submodule(n).weight for n in names}
        weights = {n: weight.detach().cpu() for n, weight in weights.items()}
        known = self._weight_scales.setdefault(recipe.weights, {})
        tensors = search_scales(stats, weights, recipe, known=known)
        known |= {key: value for key, value in tensors.items() if ".weight_" in key}
        return tensors

    def grids(self, pipe: Any, cell: Cell, stats: Mapping[str, Tensor]) -> Grids:
        """Return the 8-bit grids of the sampler tensors that are on in a cell."""
        assert cell.recipe is not None
        settings, found = cell.recipe.activations, {}
        spec = replace(ACTIVATION, symmetric=settings.symmetric)
        for name in cell.sites:
            if f"{name}.hist" not in stats:
                found[name] = variance_grid(pipe.scheduler, cell.calibrated.steps)
                continue
            hist, edges = stats[f"{name}.hist"][0], stats[f"{name}.edges"][0]
            best = search_activation(hist, edges, spec, metric=settings.metric, p=settings.p)
            zero_point = torch.tensor(best.zero_point, dtype=torch.int32)
            found[name] = (best.scale[0], zero_point)
        return found


def copy_trace(data: TraceSet, folder: Path) -> Path:
    """Copy a trace and its index to a folder that is not there yet; return it."""
    shutil.copytree(data.folder.path, folder)
    shutil.copy(index_of(data.folder.path), index_of(folder))
    return folder


def _pick(name: str, denoiser: nn.Module, sample: str) -> Callable[[Any, Any], Tensor]:
    part = output_part(name, denoiser)
    # What the scheduler returns at one step is what the network receives at the next.
    return lambda kwargs, output: kwargs[sample] if part is None else output[0][:, part]


@contextmanager
def output_probe(
    module: nn.Module, child: str, pick: Callable[[dict[str, Any], Any], Tensor]
) -> Iterator[None]:
    """Give a module a child that receives pick(keyword arguments, output) of each forward.

    Whoever listens to inputs of layers so listens to what is none.
    """
    module.add_module(child, nn.Identity())
    handle = module.register_forward_hook(
        lambda m, args, kwargs, output: (m.get_submodule(child)(pick(kwargs, output)), None)[1],
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()
        delattr(module, child)
