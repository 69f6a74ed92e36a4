"""Quantize a tiny network with min-max scales of random inputs, for tests of what executes it."""

import copy
from dataclasses import replace

import torch
from torch import nn

from quantempo.models.layers import sites
from quantempo.quantized import (
    LayerPlan,
    QConv2d,
    QLinear,
    StepClock,
    fill,
    install_clock,
    plan_layers,
    swap_layers,
)
from quantempo.recipe import LayerSettings, Recipe, RoundingSettings, WeightSettings
from quantempo.rounding import nearest
from quantempo.scales import search_groups
from tests.tiny import noise, tiny_unet

STEPS = 1000
# Calls of `tests.tiny.tiny_unet`.
INPUTS = [(noise(2, 3, 16, 16, seed=t), torch.tensor(t)) for t in (900, 500, 20)]


def make_clock(buckets: int = 1) -> StepClock:
    """Make a clock with equal intervals of time."""
    return StepClock(torch.arange(STEPS) * buckets // STEPS)


def _buckets(clock: StepClock) -> int:
    return int(clock.bucket_of.max()) + 1


def _fill(layer: QConv2d | QLinear, seed: int, plain: bool) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: torch.Size, low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    top, groups = layer.weight_format.qmax, layer.weight_group
    weight = torch.randint(-top, top + 1, layer.weight_shape, generator=generator)
    if groups is not None:
        groups = torch.randint(0, 256, groups.shape, generator=generator, dtype=torch.uint8)
        # A zero point is one of the codes.
        groups &= 0xF0 + 2**layer.weight_bits - 1
        weight = layer.weight_format.grid(layer.weight_shape, groups).round(weight.float()).long()
    scale, bias = layer.weight_scale, layer.bias
    assert bias is not None
    fill(
        layer,
        weight,
        torch.ones_like(scale) if plain else uniform(scale.shape, 1e-3, 2e-3),
        torch.zeros_like(bias) if plain else torch.randn(bias.shape, generator=generator),
        torch.ones_like(layer.act_scale) if plain else uniform(layer.act_scale.shape, 0.01, 0.03),
        torch.randint(0, layer.act_qmax + 1, layer.act_zero_point.shape, generator=generator),
        groups,
    )
    if layer.dynamic:
        layer.act_zero_point.fill_(layer.act_format.symmetric_zero_point)


Pair = tuple[int, int]
Bits = tuple[int, ...]
_BITS = ("weight_bits", "act_bits", "group")


def make_conv(
    channels: int, out: int, kernel: Pair = (3, 3), stride: Pair = (1, 1), padding: Pair = (1, 1),
    dilation: Pair = (1, 1), groups: int = 1, segments: tuple[int, ...] = (),
    clock: StepClock | None = None, seed: int = 0, plain: bool = False, bits: Bits = (8, 8),
) -> QConv2d:  # fmt: skip
    """Make a convolution of random integers; `plain`: scales 1, no bias; `bits`: w, a, group."""
    clock = clock or make_clock()
    layer = QConv2d(
        (out, channels // groups, *kernel), True, clock, segments or (channels,),
        _buckets(clock), stride=stride, padding=padding, dilation=dilation, groups=groups,
        **dict(zip(_BITS, bits, strict=False)),
    )  # fmt: skip
    _fill(layer, seed, plain)
    return layer


def make_linear(
    channels: int, out: int, segments: tuple[int, ...] = (), clock: StepClock | None = None,
    seed: int = 0, plain: bool = False, bits: Bits = (8, 8), dynamic: bool = False,
) -> QLinear:  # fmt: skip
    """Make a linear layer of random integers; `plain`: scales 1, no bias; `bits`: w, a, group."""
    clock = clock or make_clock()
    layer = QLinear(
        (out, channels), True, clock, segments or (channels,), 0 if dynamic else _buckets(clock),
        **dict(zip(_BITS, bits, strict=False)),
    )  # fmt: skip
    _fill(layer, seed, plain)
    return layer


@torch.no_grad()
def quantize_network(
    network: nn.Module,
    inputs: list[tuple],
    buckets: int = 3,
    exclude: tuple[str, ...] = (),
    bits: dict[str, str] | None = None,
    weights: WeightSettings | None = None,
) -> nn.Module:
    """Return an integer copy; scales from the layers' inputs, a few percent apart by bucket."""
    found, settings = sites(network), LayerSettings(exclude=exclude, bits=bits or {})
    how, rounding = weights or WeightSettings(), RoundingSettings(name="gptq")
    plans = [
        replace(plan, buckets=buckets if plan.kind == "int8" else 1)
        for plan in plan_layers(found, Recipe(layers=settings, weights=how, rounding=rounding))
    ]
    ranges: dict[tuple[str, int], tuple[float, float]] = {}
    hooks = []
    for site, plan in zip(found, plans, strict=True):
        if plan.kind == "int8":
            hooks.append(site.layer.register_forward_pre_hook(_watch(plan, ranges)))
    for arguments in inputs:
        network(*arguments)
    for hook in hooks:
        hook.remove()

    result = copy.deepcopy(network)
    clock = install_clock(result, torch.arange(STEPS) * buckets // STEPS)
    swap_layers(result, plans, clock)
    for site, plan in zip(found, plans, strict=True):
        layer = result.get_submodule(site.name)
        if plan.kind in ("float16", "weight_only"):
            layer.fill(site.layer)
        if plan.kind != "int8":
            continue
        weight = site.layer.weight
        top, groups = layer.weight_format.qmax, None
        scale = weight.flatten(1).abs().amax(1) / top
        if layer.weight_group is not None:
            scale, groups = search_groups(weight, layer.weight_format)
        codes = nearest(weight, scale, layer.weight_format.grid(weight.shape, groups))
        rows, zeros = [], []
        for part in range(len(layer.segments)):
            low, high = ranges[site.name, part]
            step = (high - low) / layer.act_qmax
            rows.append(step * torch.linspace(1, 1.05, buckets))
            zeros.append(round(-low / step))
        grids = torch.stack(rows), torch.tensor(zeros)
        fill(layer, codes, scale, site.layer.bias, *grids, groups)
    return result


def quantized_unet(**how) -> nn.Module:
    """Return `tiny_unet`, quantized; options of `quantize_network`."""
    return quantize_network(tiny_unet(), INPUTS, **how)


def _watch(plan: LayerPlan, ranges: dict[tuple[str, int], tuple[float, float]]):
    def hook(layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        parts = args[0].split(list(plan.segments), axis) if plan.segments else [args[0]]
        for i, part in enumerate(parts):
            low, high = ranges.get((plan.name, i), (0.0, 0.0))
            ranges[plan.name, i] = (min(low, float(part.min())), max(high, float(part.max())))

    return hook
