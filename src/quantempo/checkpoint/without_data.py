"""Quantize a network that is in memory from its weights alone, in place.

Linear layers measure the scale of each token as it comes, so they need no calibration; convolutions
would, and stay in float.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantempo import quantized
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import sites, timestep_place
from quantempo.recipe import Recipe
from quantempo.registry import check_known
from quantempo.scales import search_weights

__all__ = ["has_time", "install", "quantize_", "resolved"]

_CONVOLUTION = "without data: a convolution needs scales that were found on inputs"


def resolved(recipe: Any) -> Recipe:
    """Return the recipe of a name, a file, a dictionary, or a configuration that has one."""
    found = getattr(recipe, "recipe", recipe)
    if not isinstance(found, Recipe):
        found = Recipe.from_dict(found) if isinstance(found, dict) else Recipe.load(found)
    return found.override("rounding", name="nearest").override("activations", granularity="token")


def has_time(module: nn.Module) -> bool:
    """Return whether a module is called with a time-step, as a denoiser is."""
    return timestep_place(module)[0] in inspect.signature(type(module).forward).parameters


@torch.no_grad()
def install(
    module: nn.Module, config: Any, clock: Callable[[Tensor], quantized.StepClock],
    codes: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> tuple[Recipe, list[quantized.LayerPlan]]:  # fmt: skip
    """Replace layers in place by filled ones with a clock of this table; return what was done.

    codes: int8 (O, K) and scales (O,) of the layers that become integers, and no others do.
    Raises QuantempoError, before anything is replaced, where no layer would be an integer one.
    """
    recipe, found, plans = resolved(config), sites(module), []
    quantized.check_bits(found, recipe)
    for site, plan in zip(found, quantized.plan_layers(found, recipe), strict=True):
        if plan.kind == "int8" and isinstance(site.layer, nn.Linear):
            plan = replace(plan, buckets=0)
        elif plan.kind == "int8":
            plan = quantized.LayerPlan(plan.name, "float", reason=_CONVOLUTION, role=plan.role)
        if codes is not None:
            kind = "int8" if site.name in codes else "float"
            plan = quantized.LayerPlan(site.name, kind, buckets=0, role=site.role)
        plans.append(plan)
    if not any(plan.kind == "int8" for plan in plans):
        text = f"{type(module).__name__} has no linear layer to quantize without data"
        raise QuantempoError(f"{text}; call quantempo.quantize(pipeline, run)")
    if left := sum(plan.reason == _CONVOLUTION for plan in plans):
        log.warning("%d convolutions stay in float; quantempo.quantize finds their scales", left)

    def fill(name: str, layer: Any, old: Any) -> None:
        if not isinstance(layer, quantized.QLayer):
            layer.fill(old)
            return
        zero = torch.full_like(layer.act_zero_point, layer.act_format.symmetric_zero_point)
        if codes is not None:
            quantized.fill(layer, *codes[name], old.bias, layer.act_scale, zero, None)
            return
        weight, spec = old.weight.detach().float(), layer.weight_format
        found = search_weights(name, weight, recipe.weights, layer.weight_bits)
        scale, group = found[f"{name}.weight_scale"], found.get(f"{name}.weight_group")
        near = spec.grid(weight.shape, group).round(weight / scale[:, None]).to(torch.int8)
        quantized.fill(layer, near, scale, old.bias, layer.act_scale, zero, group)

    table = torch.zeros(1, dtype=torch.int64, device=next(module.parameters()).device)
    quantized.swap_layers(module, plans, clock(table), fill)
    return recipe, plans


def quantize_(module: nn.Module, config: Any = "w8a8", *, engine: str = "auto") -> nn.Module:
    """Make the linear layers of a module integers, in place, without data; return the module.

    It may be compiled at once: `torch.compile(quantize_(module))`. A denoiser of diffusers can be
    saved by `save_pretrained` too; any other runs layer by layer, on the device where it is now.

    Args:
        module: any float module; a denoiser of diffusers gets all that an engine fuses.
        config: a recipe (its bits, and which layers), its name or file, or a `QuantempoConfig`.
        engine: what is to run it, see `attach`.

    Raises QuantempoError: quantized already, no linear layer, an engine that cannot run here.
    """
    from quantempo.checkpoint import diffusers_plugin as plugin
    from quantempo.engines import ENGINES, attach
    from quantempo.engines.base import BACKENDS

    if quantized.find_clock(module) is not None or any(quantized.quantized_layers(module)):
        raise QuantempoError("this module is quantized already; start from the float one")
    if engine != "auto" and (reason := ENGINES.get(engine).missing()):
        raise QuantempoError(f"engine '{engine}' cannot run here: {reason}")
    if has_time(module) and hasattr(module, "register_to_config"):
        plugin.mark_quantized(module, plugin.quantize_without_data(module, config))
        attach(module, engine)
        return module
    device = next(module.parameters()).device.type
    names = [name for name in BACKENDS.names() if ENGINES.get(name).missing() is None]
    able = [name for name in names if {device, "any"} & {*ENGINES.get(name).devices}]
    chosen = able[0] if engine == "auto" else engine
    check_known([chosen], able, "layer by layer, got engine")
    install(module, config, quantized.StepClock)
    ENGINES.get(chosen).attach_layers(module)  # type: ignore[attr-defined]
    return module
