"""The networks that cells run: the float one, and quantized copies that are refilled.

A copy is built once for every structure and afterwards only refilled with another calibration's
integers and scales, so that a compiled network is compiled once for a whole study.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import TraceSet
from quantempo.core import weight_format
from quantempo.engines.select import attach
from quantempo.models.layers import sites
from quantempo.pipeline.quantize import Quantized, round_weights
from quantempo.quantized import LayerPlan, fill, find_clock, plan_layers, quantized_layers
from quantempo.recipe import Recipe
from quantempo.rounding import round_by_weights
from quantempo.scales import LayerScales
from studies.ptq4dm.output_side import install_output_side, output_side_layers
from studies.ptq4dm.sampler_tensors import Grids, quantize_output

__all__ = ["Frontend", "Networks"]


class Frontend(nn.Module):
    """Stand for a denoiser in its pipeline: quantize its output outside the compiled network.

    network: what computes; fast: a compiled form of it for the batches of the sampler, or None.
    """

    network: nn.Module
    fast: Any

    def __init__(self, network: nn.Module, fast: Any = None) -> None:
        super().__init__()
        # Not children: hooks of this instance must not reach the network.
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "fast", fast)
        self.config: Any = network.config
        self.compiled = fast is not None
        self.grids: Grids = {}

    @property
    def _orig_mod(self) -> nn.Module:
        # As of a compiled module: whoever names the arguments of a call reads its signature.
        return self.network

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's parameters."""
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters."""
        return next(self.network.parameters()).device

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the network's parameters."""
        return self.network.parameters(recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network with what came; put parts of its output on `grids`."""
        output = (self.fast if self.compiled else self.network)(*args, **kwargs)
        return quantize_output(output, self.grids, self.network) if self.grids else output


class Networks:
    """Hand out the networks of one float denoiser.

    denoiser: float, on its device, never changed; compiled: compile what the sampler calls.
    """

    def __init__(self, denoiser: nn.Module, compiled: bool) -> None:
        self.denoiser = denoiser
        self.compiled = compiled
        self.sites = sites(denoiser)
        self._float = self._fast(denoiser)
        self._copies: dict[tuple[Any, ...], tuple[nn.Module, Any]] = {}

    def _fast(self, network: nn.Module) -> Any:
        return torch.compile(network) if self.compiled else None

    def exact(self) -> Frontend:
        """Return the float network."""
        return Frontend(self.denoiser, self._float)

    def input_side(self, recipe: Recipe, tensors: Mapping[str, Tensor], data: TraceSet) -> Frontend:
        """Return the network as it would be packed, with the scales of `search_scales`.

        recipe: its rounding and layers; tensors: from `Calibrator.scales`; data: the calibration
        set, for roundings that look at it.
        """
        buckets = recipe.activations.buckets
        plans = [
            replace(plan, buckets=buckets) if plan.kind == "int8" else plan
            for plan in plan_layers(self.sites, recipe)
        ]
        # Every layer gets the full table: which of them keep one scale differs between cells.
        wide = {}
        for name, layer in LayerScales.read(tensors).items():
            last = layer.act_scale[:, -1:].expand(-1, buckets - layer.act_scale.shape[1])
            wide[name] = replace(layer, act_scale=torch.cat([layer.act_scale, last], 1))
        full = {**tensors, **{f"{name}.act_scale": layer.act_scale for name, layer in wide.items()}}
        codes = round_weights(self.denoiser, data, recipe, plans, full)
        key = tuple(replace(plan, reason=None) for plan in plans)
        if key not in self._copies:
            packed = self._pack(recipe, plans, wide, codes, tensors)
            attach(packed, "simulated")
            self._copies[key] = (packed, self._fast(packed))
        packed = self._copies[key][0]
        clock = find_clock(packed)
        assert clock is not None
        clock.bucket_of.copy_(tensors["bucket_of"])
        for name, layer in quantized_layers(packed):
            bias = codes.get(f"{name}.bias", self.denoiser.get_submodule(name).bias)
            found, act_scale = wide[name], codes.get(f"{name}.act_scale", wide[name].act_scale)
            scales = (found.weight_scale, bias, act_scale, found.act_zero_point)
            fill(layer, codes[name], *scales, found.weight_group)
        self._prepare(packed)
        return Frontend(*self._copies[key])

    def _pack(
        self,
        recipe: Recipe,
        plans: list[LayerPlan],
        scales: Mapping[str, LayerScales],
        codes: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
    ) -> nn.Module:
        codes = {name: codes[name] for name in scales}
        found = Quantized(recipe, plans, dict(scales), codes, tensors["bucket_of"])
        return found.install(self.denoiser, copy=True)

    def _prepare(self, packed: nn.Module) -> None:
        # What layers would otherwise read at their first call, when the compiler is watching.
        for _, layer in quantized_layers(packed):
            kernel: Any = layer.kernel
            kernel.prepare(layer.weight_scale.device)

    def output_side(self, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Frontend:
        """Return a network as the released program had it: quantizers on outputs, not compiled."""
        copied = copy.deepcopy(self.denoiser)
        weights, outputs = output_side_layers(self.sites)
        floats = {name: self.denoiser.get_submodule(name).weight.detach() for name in weights}
        scales = {name: tensors[f"{name}.weight_scale"].to(floats[name].device) for name in floats}
        grids_of = dict.fromkeys(floats, weight_format(recipe.weights.bits))
        codes = round_by_weights(recipe.rounding.name, floats, scales, grids_of)
        dequantized = {
            name: code.float() * scales[name].reshape(-1, *[1] * (code.ndim - 1))
            for name, code in codes.items()
        }
        grids = {
            name: (tensors[f"{name}.act_scale"][0, 0], tensors[f"{name}.act_zero_point"][0])
            for name in outputs
        }
        install_output_side(copied, dequantized, grids)
        return Frontend(copied)
