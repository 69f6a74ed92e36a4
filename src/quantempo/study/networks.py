"""The networks that cells run: the float one, and quantized twins that are refilled.

A twin is built once for every structure and afterwards only refilled with another calibration's
integers and scales, so that a compiled network is compiled once for a whole study.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.checkpoint.pack import pack_denoiser
from quantempo.core import WEIGHT
from quantempo.engines.select import attach
from quantempo.models.layers import sites
from quantempo.quantized import (
    LayerPlan,
    fill,
    find_clock,
    install_output_side,
    install_sites,
    output_side_layers,
    quantized_layers,
)
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.rounding import round_by_weights
from quantempo.scales.search import LayerScales

__all__ = ["Frontend", "Networks"]


class Frontend(nn.Module):
    """Stand for a denoiser in its pipeline: a place for hooks outside the compiled network.

    Args:
        network: what computes.
        fast: a compiled form of it for the batches of the sampler, or None.
    """

    def __init__(self, network: nn.Module, fast: Any = None) -> None:
        super().__init__()
        # Not children: a hook or a quantizer of this instance must not reach the network.
        object.__setattr__(self, "network", network)
        object.__setattr__(self, "fast", fast)
        self.config: Any = network.config
        self.compiled = fast is not None

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
        """Call the network with what came."""
        return (self.fast if self.compiled else self.network)(*args, **kwargs)

    network: nn.Module
    fast: Any


class Networks:
    """Hand out the networks of one float denoiser.

    Args:
        denoiser: float, on its device, never changed.
        compiled: compile what the sampler calls.
    """

    def __init__(self, denoiser: nn.Module, compiled: bool) -> None:
        self.denoiser = denoiser
        self.compiled = compiled
        self.sites = sites(denoiser)
        if compiled:
            # One code object for all: float, and a twin of every structure.
            torch._dynamo.config.recompile_limit = 64
        self._float = self._fast(denoiser)
        self._twins: dict[tuple[Any, ...], tuple[nn.Module, Any]] = {}

    def _fast(self, network: nn.Module) -> Any:
        return torch.compile(network) if self.compiled else None

    def exact(self) -> Frontend:
        """Return the float network."""
        return Frontend(self.denoiser, self._float)

    def with_sites(self, network: Frontend, names: tuple[str, ...], scales: Any) -> Frontend:
        """Return the network with the named sites of the sampler on their grids."""
        for name, quantizer in install_sites(network, names).items():
            quantizer.scale.copy_(scales[f"site:{name}.scale"])
            quantizer.zero_point.copy_(scales[f"site:{name}.zero_point"])
        return network.to(network.device)

    def input_side(self, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Frontend:
        """Return the network with the integers and scales of `search_scales`, as the packed one."""
        chosen = LayerScales.read(tensors)
        buckets = recipe.activations.buckets
        plans = [
            replace(plan, buckets=buckets) if plan.kind == "int8" else plan
            for plan in plan_layers(self.sites, recipe)
        ]
        # Every layer gets the full table: which of them keep one scale differs between cells.
        wide = {}
        for name, layer in chosen.items():
            last = layer.act_scale[:, -1:].expand(-1, buckets - layer.act_scale.shape[1])
            wide[name] = replace(layer, act_scale=torch.cat([layer.act_scale, last], 1))
        codes = self._codes(recipe, wide)
        key = tuple(replace(plan, reason=None) for plan in plans)
        if key not in self._twins:
            self._twins[key] = self._build(plans, wide, codes, tensors, recipe)
        else:
            self._refill(self._twins[key][0], wide, codes, tensors["bucket_of"])
        return Frontend(*self._twins[key])

    def _build(
        self,
        plans: list[LayerPlan],
        scales: Mapping[str, LayerScales],
        codes: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        recipe: Recipe,
    ) -> tuple[nn.Module, Any]:
        twin = copy.deepcopy(self.denoiser)
        pack_denoiser(
            twin,
            plans,
            scales,
            codes,
            bucket_of=tensors["bucket_of"],
            per_unit=float(tensors["per_unit"]),
            sites={},
            recipe=recipe,
            source_sha256="",
        )
        twin = twin.to(next(self.denoiser.parameters()).device)
        attach(twin, "simulated")
        self._prepare(twin)
        return twin, self._fast(twin)

    def _refill(
        self,
        twin: nn.Module,
        scales: Mapping[str, LayerScales],
        codes: Mapping[str, Tensor],
        bucket_of: Tensor,
    ) -> None:
        clock = find_clock(twin)
        assert clock is not None
        clock.bucket_of.copy_(bucket_of)
        for name, layer in quantized_layers(twin):
            found = scales[name]
            fill(layer, codes[name], found.weight_scale, None, found.act_scale,
                 found.act_zero_point)  # fmt: skip
        self._prepare(twin)

    def _prepare(self, twin: nn.Module) -> None:
        # What layers would otherwise read at their first call, when the compiler is watching.
        for _, layer in quantized_layers(twin):
            kernel: Any = layer.kernel
            kernel.prepare(layer.weight_scale.device)

    def _codes(self, recipe: Recipe, scales: Mapping[str, LayerScales]) -> dict[str, Tensor]:
        spec = replace(WEIGHT, bits=recipe.weights.bits)
        return round_by_weights(
            recipe.rounding.name,
            {name: self.denoiser.get_submodule(name).weight.detach() for name in scales},
            {name: layer.weight_scale for name, layer in scales.items()},
            dict.fromkeys(scales, spec),
        )

    def output_side(self, recipe: Recipe, tensors: Mapping[str, Tensor]) -> Frontend:
        """Return a network as the released program had it: quantizers on outputs, not compiled."""
        twin = copy.deepcopy(self.denoiser)
        weights, outputs = output_side_layers(self.sites)
        floats = {name: self.denoiser.get_submodule(name).weight.detach() for name in weights}
        scales = {name: tensors[f"{name}.weight_scale"].to(floats[name].device) for name in floats}
        grids_of = dict.fromkeys(floats, replace(WEIGHT, bits=recipe.weights.bits))
        codes = round_by_weights(recipe.rounding.name, floats, scales, grids_of)
        dequantized = {
            name: code.float() * scales[name].reshape(-1, *[1] * (code.ndim - 1))
            for name, code in codes.items()
        }
        grids = {
            name: (tensors[f"{name}.act_scale"][0, 0], tensors[f"{name}.act_zero_point"][0])
            for name in outputs
        }
        install_output_side(twin, dequantized, grids)
        return Frontend(twin)
