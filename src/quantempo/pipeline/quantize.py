"""Quantize a denoiser in memory: layers -> statistics -> scales -> integers."""

import copy as copies
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from quantempo import quantized
from quantempo.calibration.dataset import CalibrationData
from quantempo.calibration.statistics import attention_errors, collect_statistics, measure_roles
from quantempo.core import Paged, merged, mine, page_out, rank, spilled, weight_format, whole
from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError
from quantempo.models.layers import check_roles, sites
from quantempo.models.macs import ATTENTION_MATMULS, count_macs
from quantempo.quantized.attention import mark_attention
from quantempo.recipe import Recipe
from quantempo.rounding import ROUNDINGS, check_start, round_alone, round_by_weights, round_denoiser
from quantempo.scales import MEAN_METRICS, LayerScales, make_metric, search_scales

__all__ = [
    "LayerPlan", "Quantized", "bar_of", "calibrate", "check_recipe", "error_shares", "keep_costly",
    "plan", "quantize", "round_weights", "search",
]  # fmt: skip

LayerPlan = quantized.LayerPlan
# Times its share of the work that a layer's share of the error has to be, to stay in float.
WORTH = 3
_COST = ".attention_error"


@dataclass(frozen=True)
class Quantized:
    """A quantized denoiser as plain data.

    plans: one for each Conv2d and Linear; scales, codes: int8 (O, ...), of integer layers;
    bucket_of: (T,) int64 time bucket of each place of `times`; biases: (O,) float32 that the
    rounding changed; attention: errors; weight_only: codes, scales and groups of layers of float
    inputs.
    """

    recipe: Recipe
    plans: list[LayerPlan]
    scales: dict[str, LayerScales]
    codes: dict[str, Tensor]
    bucket_of: Tensor
    times: quantized.Times | None = None
    biases: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Any] = field(default_factory=dict)
    weight_only: dict[str, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, recipe: Recipe, plans: list[LayerPlan], scales: Mapping[str, Tensor],
        rounding: Mapping[str, Tensor], times: quantized.Times | None = None,
    ) -> "Quantized":  # fmt: skip
        """Join the tensors of `search_scales` and of `round_weights`."""
        found = {}
        for name, layer in LayerScales.read(scales).items():
            better = {k: rounding.get(f"{name}.{k}") for k in ("weight_scale", "weight_group")}
            found[name] = replace(layer, **{k: v for k, v in better.items() if v is not None})
        codes = {name: rounding[name] for name in found}
        biases = {n: rounding[f"{n}.bias"] for n in found if f"{n}.bias" in rounding}
        # The search decides which layers have several buckets.
        plans = [
            replace(p, buckets=found[p.name].act_scale.shape[1]) if p.name in found else p
            for p in _final(plans, scales, recipe)
        ]
        errors = {k.removesuffix(_COST): v.tolist() for k, v in scales.items() if k.endswith(_COST)}
        parts = ("", ".weight_scale", ".weight_group")
        names = [p.name for p in plans if p.kind == "weight_only" and p.name in rounding]
        alone = {name: [rounding[f"{name}{part}"] for part in parts] for name in names}
        return cls(recipe, plans, found, codes, scales["bucket_of"], times, biases, errors, alone)

    def saved(self, denoiser: nn.Module) -> dict[str, Tensor]:
        """Return what the quantized denoiser will have to save, on the meta device."""
        state = [*denoiser.parameters(), *denoiser.buffers()]
        empty = {id(t): torch.empty(t.shape, dtype=t.dtype, device="meta") for t in state}
        network = copies.deepcopy(denoiser, empty)
        clock = quantized.install_clock(network, self.bucket_of, self.times)
        quantized.swap_layers(network, self.plans, clock)
        return network.state_dict()

    @torch.no_grad()
    def install(
        self, denoiser: nn.Module, *, copy: bool = False, folder: Path | None = None,
        store: Callable[..., None] | None = None,
    ) -> nn.Module:  # fmt: skip
        """Replace the planned layers of a float denoiser by integer ones, in place; names stay.

        copy: return a quantized copy instead, which shares all parameters that stay float; folder:
        where integers of layers that are paged are kept, None: in memory; store: see `Shards`.
        Raises QuantempoError: the denoiser is quantized already, or is another network.
        """
        if copy:
            state = [*denoiser.parameters(), *denoiser.buffers()]
            denoiser = copies.deepcopy(denoiser, {id(tensor): tensor for tensor in state})
        device = next(denoiser.parameters()).device
        clock = quantized.install_clock(denoiser, self.bucket_of.to(device), self.times)

        def fill_layer(name: str, layer: nn.Module, old: Any) -> None:
            fill = partial(self._fill, name, layer, old)
            fill() if store is None else store(name, layer, old, fill)
            if folder is not None and isinstance(old.weight, Paged):
                page_out(layer, folder / f"{name}.safetensors")

        quantized.swap_layers(denoiser, self.plans, clock, fill_layer)
        if self.attention:
            mark_attention(denoiser, self.attention, self.recipe.attention.max_error)
        return denoiser

    def _fill(self, name: str, layer: nn.Module, old: Any) -> None:
        """Fill the layer that took the place of an old one."""
        alone = self.weight_only.get(name, [])
        group = getattr(layer, "weight_group", None)
        needed = isinstance(layer, quantized.QLayer) or group is not None
        if needed and not alone and not (name in self.scales and name in self.codes):
            raise QuantempoError(f"no scales or codes for '{name}'; rerun search and round")
        if not isinstance(layer, quantized.QLayer):
            layer.fill(old, *alone)  # type: ignore[operator]
            return
        chosen, bias = self.scales[name], self.biases.get(name, old.bias)
        scales = (chosen.weight_scale, bias, chosen.act_scale, chosen.act_zero_point)
        quantized.fill(layer, self.codes[name], *scales, chosen.weight_group)


def check_recipe(recipe: Recipe, denoiser: nn.Module, *others: nn.Module) -> None:
    """Raise QuantempoError for a quantized denoiser, and for names that it and others lack."""
    if quantized.find_clock(denoiser) is not None:
        raise QuantempoError("this denoiser is quantized already; start from the float model")
    make_metric(recipe.activations.metric, recipe.activations.p)
    make_metric(recipe.weights.metric, recipe.weights.p)
    how, known = recipe.activations, sorted(MEAN_METRICS)
    if how.granularity != "time" and how.metric not in known:
        raise QuantempoError(
            f"got activations.granularity = '{how.granularity}' with metric '{how.metric}', which "
            f"is no mean over elements; expected a metric of: {', '.join(known)}"
        )
    if ROUNDINGS.get(recipe.rounding.name).needs == "block":
        check_start(recipe.rounding)
    check_roles(recipe.layers.float_roles)
    quantized.check_bits([site for part in (denoiser, *others) for site in sites(part)], recipe)


def bar_of(denoiser: nn.Module, recipe: Recipe, networks: int) -> AbstractContextManager[None]:
    """Show one bar for all stages, by what each costs in calls of the network for one image."""
    how, layers = recipe.trace, len(sites(denoiser))
    rows, learned = how.chains * how.picks, ROUNDINGS.get(recipe.rounding.name).needs != "weights"
    costs = {"trace": how.chains * how.steps, "ranges": 1.5 * rows, "histograms": 3.0 * rows}
    costs |= {"buckets": 2.0 * layers * (recipe.activations.buckets > 1), "search": 2.0 * layers}
    return whole(costs | {"round": 8.0 * min(recipe.rounding.samples, rows) * learned}, networks)


def plan(
    denoiser: nn.Module, recipe: Recipe, data: CalibrationData | None = None
) -> list[LayerPlan]:
    """Return what each layer becomes, see `plan_layers`; without data, roles are guessed."""
    measured = None if data is None else measure_roles(denoiser, data)
    return quantized.plan_layers(sites(denoiser, measured), recipe)


def calibrate(
    denoiser: nn.Module, data: CalibrationData, plans: list[LayerPlan], recipe: Recipe, **more: Any
) -> dict[str, Tensor]:
    """Return the statistics of the inputs of all integer layers, see `collect_statistics`."""
    how = recipe.activations
    tokens = None if how.granularity == "time" else make_metric(how.metric, how.p)
    inputs = {plan.name: plan.segments for plan in plans if plan.kind == "int8"}
    errors = attention_errors(denoiser, data) if recipe.attention.max_error else {}
    found = collect_statistics(denoiser, inputs, data, tokens=tokens, **more)
    return found | {f"{name}{_COST}": torch.tensor(error) for name, error in errors.items()}


def search(
    denoiser: nn.Module, stats: Mapping[str, Tensor], plans: list[LayerPlan], recipe: Recipe,
    **more: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the scales of all integer layers, see `search_scales`, and errors of attentions."""
    weights = _weights(denoiser, plans)
    scales = search_scales(stats, weights, recipe, bits=quantized.bits_of(plans), **more)
    return scales | {k: v for k, v in stats.items() if k.endswith(_COST)}


def keep_costly(
    denoiser: nn.Module, data: CalibrationData, plans: list[LayerPlan],
    scales: Mapping[str, Tensor], recipe: Recipe,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the scales without those of the shortcuts that cost more than they save.

    One whose share of the error (`error_shares`) is over WORTH times its share of the work stays in
    float, the worst first, up to `layers.float_macs` of the work: `NAME.costly` (2,) holds both.
    Shortcuts read the sum of all blocks so far without a norm, and engines go on fusing the blocks
    around them. One whose bits the recipe names (`layers.bits`) is an integer.
    """
    left, result = recipe.layers.float_macs, dict(scales)
    found = [s for s in sites(denoiser) if s.role == "shortcut" and f"{s.name}.act_scale" in scales]
    names = [site.name for site in found if not quantized.named_bits(site, recipe)]
    if not left or not names:
        return result
    codes = _round(denoiser, plans, scales, "nearest")
    # Modulations in int8 do: they have no codes yet.
    plans = [p if p.kind == "int8" else replace(p, weight_bits=8, group=0) for p in plans]
    copied = Quantized.of(recipe, plans, scales, codes, data.times).install(denoiser, copy=True)
    shares = error_shares(denoiser, copied, data, names)
    for name, (error, work) in sorted(shares.items(), key=lambda item: -item[1][0] / item[1][1]):
        if error > WORTH * work and work <= left:
            left -= work
            result = {key: v for key, v in result.items() if key.rpartition(".")[0] != name}
            result[f"{name}.costly"] = torch.tensor([error, work])
    return result


@torch.no_grad()
def error_shares(
    denoiser: nn.Module, copied: nn.Module, data: CalibrationData, names: list[str]
) -> dict[str, tuple[float, float]]:
    """Return what layers cost in the output of the network, and do of its work, as shares.

        error = mean over rows of |f_l(x) - f(x)|^2 / |f_q(x) - f(x)|^2

    f is the float network (left as it was), f_l has layer l alone in integers, f_q = `copied` all
    of them (it gets simulated kernels): to first order the shares of all layers add up to 1. Each
    of 16 rows counts the same: a late step has most of the error and least of the image.
    """
    clock = quantized.find_clock(copied.to(next(denoiser.parameters()).device))
    assert clock is not None
    for _, layer in quantized.quantized_layers(copied):
        layer.kernel = BACKENDS.get("simulated").lower(layer)
    batch = data.rows(data.spread(16))
    exact = data.replay(denoiser, batch)

    def error(network: nn.Module) -> Tensor:
        return (data.replay(network, batch) - exact).double().square().flatten(1).mean(1)

    whole, errors = error(copied).clamp_min(1e-30), {}
    clock.set(batch.t)
    for name in mine(names):
        layer = denoiser.get_submodule(name)
        # Not a hook: those of others on the layer act as before, once.
        with patch.object(layer, "forward", copied.get_submodule(name).forward):
            errors[name] = float((error(denoiser) / whole).mean())
    errors = merged(errors)
    macs = count_macs(denoiser, lambda: data.replay(denoiser, batch), len(batch.x_t))
    work = sum(macs.values()) - macs[ATTENTION_MATMULS]
    return {name: (errors[name], max(macs.get(name, 0), 1) / work) for name in names}


def _final(plans: list[LayerPlan], scales: Mapping[str, Tensor], recipe: Recipe) -> list[LayerPlan]:
    """Return the plans with what was measured: layers left in float by `keep_costly`, scales."""
    result = []
    for plan in plans:
        if (errors := scales.get(f"{plan.name}.errors")) is not None:
            time, token = (f"{float(error):.3g}" for error in errors)
            kind = f"{recipe.activations.metric} of inputs"
            plan = replace(plan, reason=f"{kind}: {token} with a scale a token, {time} by time")
        both = scales.get(f"{plan.name}.costly")
        if both is not None:
            reason = f"measured: {both[0]:.0%} of the output's error for {both[1]:.1%} of the work"
            plan = LayerPlan(plan.name, "float", reason=reason, role=plan.role)
        result.append(plan)
    return result


def _weights(denoiser: nn.Module, plans: list[LayerPlan]) -> dict[str, Tensor]:
    """Return the float weight (O, ...) of each integer layer."""
    layers: dict[str, Any] = {n: denoiser.get_submodule(n) for n in quantized.bits_of(plans)}
    return {name: layer.weight.detach() for name, layer in layers.items()}


def _round(
    denoiser: nn.Module, plans: list[LayerPlan], scales: Mapping[str, Tensor], name: str,
    folder: Path | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the codes of all integer layers by weights alone; folder: for those of paged ones."""
    weights = _weights(denoiser, plans)
    specs = {p.name: weight_format(p.weight_bits, p.group) for p in plans if p.name in weights}
    steps = {name: scales[f"{name}.weight_scale"] for name in weights}
    cut = {n: scales.get(f"{n}.weight_group") for n in weights}
    groups = {n: v for n, v in cut.items() if v is not None}
    codes: dict[str, Tensor] = {}
    for layer, weight in weights.items():
        (found,) = round_by_weights(name, {layer: weight}, steps, specs, groups).values()
        codes[layer] = found.cpu()
        if folder is not None and isinstance(weight, Paged):
            codes |= spilled({layer: codes[layer]}, folder / f"{layer}.safetensors")
    return codes


def round_weights(
    denoiser: nn.Module, data: CalibrationData, recipe: Recipe, plans: list[LayerPlan],
    scales: Mapping[str, Tensor], *, scratch: Path | None = None, **kept: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Choose the integers as `round_denoiser` does; scratch: for integers of paged weights."""
    settings, plans = recipe.rounding, _final(plans, scales, recipe)
    own = round_alone(denoiser, data, plans, settings, **kept)
    alone = ROUNDINGS.get(settings.name).needs == "weights"
    if rank() and alone and not settings.bias:
        # The first rank, which writes them, is as fast alone.
        return {}
    codes = _round(denoiser, plans, scales, settings.name if alone else "nearest", scratch)
    if not codes or (alone and not settings.bias):
        return own | codes
    start = Quantized.of(recipe, plans, scales, own | codes, data.times)
    # A layer takes the place of its codes on disk, which are as large.
    copied = start.install(denoiser, copy=True, folder=scratch)
    return own | round_denoiser(denoiser, copied, data, settings, **kept)


def quantize(denoiser: nn.Module, data: CalibrationData, recipe: Recipe) -> Quantized:
    """Quantize a float32 denoiser, left as it was, from the inputs it is to be good at.

    data: a `TraceSet`, or a `MemorySet`; recipe: its trace section is not read.
    Raises QuantempoError: a recipe that does not fit, or activations that are not finite.
    """
    check_recipe(recipe, denoiser)
    plans = plan(denoiser, recipe, data)
    statistics = calibrate(denoiser, data, plans, recipe)
    scales = search(denoiser, statistics, plans, recipe)
    scales = keep_costly(denoiser, data, plans, scales, recipe)
    codes = round_weights(denoiser, data, recipe, plans, scales)
    return Quantized.of(recipe, plans, scales, codes, data.times)
