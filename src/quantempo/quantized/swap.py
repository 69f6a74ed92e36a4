"""Decide what each layer of a denoiser becomes, replace layers in place, list them."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core.instance import keep, touched
from quantempo.errors import QuantempoError, log
from quantempo.models.layers import LAYERS, ROLES, Site, check_roles, clock_time, timestep_place
from quantempo.quantized.clock import CLOCK_NAME, StepClock, Times
from quantempo.quantized.layers import Float16Linear, QConv2d, QLayer, QLinear, QPatches
from quantempo.quantized.weight_only import WeightOnlyLinear
from quantempo.recipe import Recipe, parse_bits
from quantempo.registry import nearest

__all__ = [
    "PADDED", "LayerPlan", "bits_of", "check_bits", "fill", "find_clock", "install_clock",
    "named_bits", "odd_padding", "plan_layers", "quantized_layers", "swap_layers",
    "weight_only_layers",
]  # fmt: skip

# Attribute of a denoiser: what `odd_padding` was when it was quantized.
PADDED = "_quantempo_padded"
# What peft has of a denoiser; without it diffusers itself refuses these.
_PEFT = (
    "load_lora_adapter", "add_adapter", "set_adapters", "delete_adapters", "enable_lora",
    "disable_lora", "fuse_lora", "unload_lora",
)  # fmt: skip
_REASONS = {
    "input": "input layer: reads x_t itself, a fraction of a percent of the work",
    "output": "output layer: its error goes straight into the image",
    "time": "time embedding: one row a step, error would reach every block",
    "modulation": "modulation of a block: one row a step, its weight alone is int8",
    "packed": "modulation of a block: one row a step, its weight alone is in groups, by GPTQ",
}
# Of linear layers that read the time.
_STORED: dict[str, Any] = {"float16": Float16Linear, "weight_only": WeightOnlyLinear}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes.

    kind: "int8" (QConv2d or QLinear, whatever its bits), "float16" (Float16Linear), "weight_only"
    (WeightOnlyLinear; act_bits 32 in groups) or "float" (left alone); buckets: columns of its scale
    table, 0 for a scale for every token; reason: why it is not int8, or has such scales; group:
    input channels with a scale of their own, 0: all; role: a key of ROLES.
    """

    name: str
    kind: str = "int8"
    segments: tuple[int, ...] = ()
    buckets: int = 1
    reason: str | None = None
    weight_bits: int = 8
    act_bits: int = 8
    group: int = 0
    role: str = field(default="linear", kw_only=True)


def bits_of(plans: list[LayerPlan]) -> dict[str, tuple[int, int]]:
    """Return (weight bits, activation bits) of each integer layer."""
    return {p.name: (p.weight_bits, p.act_bits) for p in plans if p.kind == "int8"}


def plan_layers(sites: list[Site], recipe: Recipe) -> list[LayerPlan]:
    """Return one plan per site, `buckets` still 1 (the search decides).

    Kept in float, in this order of reasons: what no integer kernel takes; names that match
    `exclude`; roles in `float_roles`. Linear layers of the time embedding are stored in float16,
    modulations of blocks in int8 or in groups. Raises QuantempoError: unknown role.
    """
    settings = recipe.layers
    check_roles(settings.float_roles)
    plans = []
    for site in sites:
        pattern = next((p for p in settings.exclude if fnmatchcase(site.name, p)), None)
        if site.unsupported is not None:
            plans.append(LayerPlan(site.name, "float", reason=site.unsupported))
        elif pattern is not None:
            plans.append(LayerPlan(site.name, "float", reason=f"excluded by '{pattern}'"))
        elif site.role in settings.float_roles:
            stored = site.role == "time" and isinstance(site.layer, nn.Linear)
            kind, what, bits = "float16" if stored else "float", site.role, (8, 8, 0)
            if stored and site.modulates:
                kind, what, few = "weight_only", "modulation", _bits(site, recipe)
                if few[2] and recipe.rounding.name != "nearest":
                    what, bits = "packed", (few[0], 32, few[2])
            reason = _REASONS.get(what, f"role '{site.role}' is kept in float by the recipe")
            plans.append(LayerPlan(site.name, kind, (), 1, reason, *bits))
        else:
            segments = site.segments if settings.split_skips else ()
            plans.append(LayerPlan(site.name, "int8", segments, 1, None, *_bits(site, recipe)))
        plans[-1] = replace(plans[-1], role=site.role)
    return plans


def check_bits(sites: list[Site], recipe: Recipe) -> None:
    """Raise QuantempoError for a key of `layers.bits` that is no role and matches no layer."""
    for key in recipe.layers.bits:
        if key not in ROLES and not any(fnmatchcase(site.name, key) for site in sites):
            raise QuantempoError(
                f"layers.bits has '{key}', which is no role and matches no layer of this model"
                f"{nearest(key, list(ROLES))} (roles: {', '.join(ROLES)})"
            )


def named_bits(site: Site, recipe: Recipe) -> str | None:
    """Return what `layers.bits` says of a layer, by its name, else by its role; None: nothing."""
    named = recipe.layers.bits
    patterns = (key for key in named if key not in ROLES and fnmatchcase(site.name, key))
    return named.get(next(patterns, site.role))


def _bits(site: Site, recipe: Recipe) -> tuple[int, int, int]:
    text, common = named_bits(site, recipe), (recipe.weights.bits, recipe.activations.bits)
    weight, act = common if text is None else parse_bits(text, site.name)
    return weight, act, recipe.weights.group if weight <= 4 else 0


def install_clock(denoiser: nn.Module, bucket_of: Tensor, times: Times | None = None) -> StepClock:
    """Add the clock (see `StepClock`) as a child of the denoiser, set at every call; return it."""
    if find_clock(denoiser) is not None:
        raise QuantempoError("this denoiser is quantized already; start from the float model")
    clock = StepClock(bucket_of, times)
    denoiser.add_module(CLOCK_NAME, clock)
    set_clock = functools.partial(_set_clock, timestep_place(denoiser))
    denoiser.register_forward_pre_hook(set_clock, with_kwargs=True)
    for name in _PEFT:
        keep(denoiser, name, _refuse_peft)
    return clock


def _refuse_peft(*args: Any, **kwargs: Any) -> None:
    text = "peft cannot follow quantized layers"
    raise QuantempoError(f"{text}; call quantempo.load_lora(pipe, FILE) or unload_lora")


def _set_clock(place: Any, denoiser: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    # Where x_t is: the network may be brought there by what others have wrapped around its forward.
    devices = (value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    t = clock_time(denoiser, args, kwargs, place)
    # Asked of the module at hand: a copy of the denoiser has a clock of its own.
    getattr(denoiser, CLOCK_NAME)(t, next(devices, None))


def find_clock(denoiser: nn.Module) -> StepClock | None:
    """Return the denoiser's clock, or None if it is not quantized."""
    return getattr(denoiser, CLOCK_NAME, None)


def swap_layers(
    denoiser: nn.Module, plans: list[LayerPlan], clock: StepClock,
    fill: Callable[[str, nn.Module, Any], None] | None = None,
) -> None:  # fmt: skip
    """Put an empty quantized copy, uninitialised until filled, in the place of every planned layer.

    fill: called with the name, the new and the old layer before the next one is made. Hooks and
    forwards that others have set on a layer go with it, which is said.
    Raises QuantempoError: a plan names a layer the model does not have, or one of another type.
    """
    lost = []
    for plan in plans:
        if plan.kind == "float":
            continue
        try:
            layer: Any = denoiser.get_submodule(plan.name)
        except AttributeError as error:
            text = f"the checkpoint names a layer '{plan.name}' that this model does not have"
            raise QuantempoError(f"{text}; it belongs to another model") from error
        if not isinstance(layer, LAYERS):
            text = f"cannot quantize '{plan.name}' ({type(layer).__name__})"
            raise QuantempoError(f"{text}; expected a convolution or Linear")
        if touched(layer):
            lost.append(plan.name)
        empty: nn.Module
        if plan.kind in _STORED and isinstance(layer, nn.Linear):
            packed = (plan.weight_bits, plan.group) if plan.group else ()
            empty = _STORED[plan.kind](layer, *packed)
        else:
            kinds = {nn.Linear: QLinear, nn.Conv2d: QConv2d}
            kind = next((q for old, q in kinds.items() if isinstance(layer, old)), QPatches)
            bits = {name: getattr(plan, name) for name in ("weight_bits", "act_bits", "group")}
            empty = kind.like(layer, clock, plan.segments, plan.buckets, **bits)
        denoiser.set_submodule(plan.name, empty.train(layer.training))
        if fill is not None:
            fill(plan.name, empty, layer)
    if lost and fill is not None:
        text = "%d layers lose hooks or forwards that others have set on them, the first is '%s'"
        log.warning(f"{text}; set them on the quantized network", len(lost), lost[0])
    keep(denoiser, PADDED, odd_padding(denoiser))
    # Where diffusers asks for the type of a network, these weights do not answer.
    exact = [p.name for p in plans if p.kind == "float16"]
    known = getattr(denoiser, "_keep_in_fp32_modules", None) or []
    keep(denoiser, "_keep_in_fp32_modules", [*known, *exact])


def odd_padding(denoiser: nn.Module) -> set[str]:
    """Return the names of float convolutions that pad by something else than zeros."""
    return {
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Conv2d)
        and (layer.padding_mode != "zeros" or "_conv_forward" in layer.__dict__)
    }


@torch.no_grad()
def fill(
    layer: QLayer, weight_int: Tensor, weight_scale: Tensor, bias: Tensor | None, act_scale: Tensor,
    act_zero_point: Tensor, weight_group: Tensor | None = None,
) -> None:  # fmt: skip
    """Copy integers and scales into a layer; shapes and dtypes are those of its buffers."""
    if layer.weight_group is not None:
        assert weight_group is not None
        layer.weight_group.copy_(weight_group)
    layer.set_codes(weight_int)
    layer.weight_scale.copy_(weight_scale)
    layer.act_scale.copy_(act_scale)
    layer.act_zero_point.copy_(act_zero_point)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)


def quantized_layers(denoiser: nn.Module) -> Iterator[tuple[str, QLayer]]:
    """Yield (name, layer) for each integer layer in the order of the module tree."""
    for name, module in denoiser.named_modules():
        if isinstance(module, QLayer):
            yield name, module


def weight_only_layers(denoiser: nn.Module) -> list[WeightOnlyLinear]:
    """Return the layers of float inputs with integer weights."""
    return [module for module in denoiser.modules() if isinstance(module, WeightOnlyLinear)]
