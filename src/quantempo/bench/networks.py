"""Networks to time: of a run folder, of a preset's shape, or of any diffusers folder."""

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.bench.candidates import Subject, cast_inputs
from quantempo.calibration.dataset import MemorySet, TraceSet
from quantempo.errors import log
from quantempo.models.layers import denoiser_of, hooked, input_of
from quantempo.models.load import load_pipeline
from quantempo.models.presets import PRESETS, build_preset, random_inputs
from quantempo.pipeline.quantize import plan, quantize
from quantempo.pipeline.session import Session
from quantempo.quantized import QLayer, StoredLinear, bits_of, fill, install_clock, swap_layers
from quantempo.quantized.attention import mark_attention, measured_attention
from quantempo.recipe import Recipe

__all__ = ["Network", "model_network", "quick_network", "run_network"]

# Training time-steps of the forwards that a quick quantization takes its ranges from.
_TIMES = (900.0, 300.0)
_RANGE_BATCH = 2


@dataclass(frozen=True)
class Network:
    """A network in float32 (large ones in bfloat16) and quantized, with a source of inputs.

    inputs: keyword arguments of a call of so many rows, float32, on the device; scheduler: of its
    pipeline, None for DDIM's defaults; scales: where those of the quantized network come from;
    dtype: of what the quantized network keeps in float.
    """

    name: str
    floating: nn.Module
    packed: nn.Module | None
    inputs: Callable[[int], dict[str, Any]]
    scheduler: Any = None
    scales: str = "recipe"
    dtype: torch.dtype = torch.bfloat16

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.floating.parameters()).device

    def subject(self, batch: int, engine: str = "triton", memory: Any = None) -> Subject:
        """Return what the candidates of one batch size are made from."""
        given = self.inputs(batch)
        return Subject(self.floating, self.packed, given, engine, self.dtype, memory)


def _float_type(device: torch.device) -> torch.dtype:
    """Return the dtype of float layers beside integer ones: on a CPU bfloat16 costs 1.1 dB."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def run_network(session: Session) -> Network:
    """Return the float and the packed network of a run folder, on the session's device."""
    part = next(part for part in session.parts if len(TraceSet(part.run / "trace")))
    data, floating = TraceSet(part.run / "trace"), part.denoiser
    like = next(floating.parameters())
    dtype = _float_type(like.device)
    pipe = load_pipeline(session.require_packed(), dtype)
    packed = nn.Module.to(getattr(pipe, part.component), like.device).eval()

    def inputs(rows: int) -> dict[str, Any]:
        alike = data.calls(torch.arange(len(data)), len(data))[0]
        batch = data.rows(alike[torch.arange(rows) % len(alike)])
        # As pipelines pass it: U-Nets one number (a row would be a mixed batch), others a row.
        one = batch.t[0] if "UNet" in type(floating).__name__ else batch.t[:1].expand(rows)
        return data.arguments(batch._replace(t=one), like)

    name = Path(session.source).name
    return Network(name, floating, packed, inputs, session.pipe.scheduler, "run folder", dtype)


def model_network(source: str, device: torch.device | str) -> Network:
    """Return a preset ("sd15") or a diffusers folder's denoiser, quantized without data."""
    if source in PRESETS or not Path(source).exists():
        return quick_network(source, build_preset(source, device))
    pipe = load_pipeline(source)
    floating, scheduler = denoiser_of(pipe)[1], pipe.scheduler
    del pipe
    gc.collect()
    floating = nn.Module.to(floating, device).eval()
    return quick_network(Path(source).name, floating, scheduler)


def quick_network(
    name: str, floating: nn.Module, scheduler: Any = None, recipe: Recipe | None = None
) -> Network:
    """Return a denoiser on its device and its copy, quantized from random inputs.

    `recipe` is by default `quick_recipe`; `scheduler` that of its pipeline, None for DDIM's. A
    transformer in bfloat16 is one of which there is no room for copies, see `_packed_by_layer`.
    """
    own = next(floating.parameters())
    large, times = own.dtype == torch.bfloat16, enumerate(_TIMES)
    rows = 1 if large else _RANGE_BATCH
    calls = [random_inputs(floating, rows + i, time=t, seed=i + 1) for i, t in times]
    recipe, dtype = recipe or quick_recipe(), own.dtype if large else _float_type(own.device)
    if large:
        packed = _packed_by_layer(floating, [cast_inputs(call, dtype) for call in calls], recipe)
    else:
        data = MemorySet.of_calls(floating, calls)
        packed = quantize(floating, data, recipe).install(copy.deepcopy(floating))
        nn.Module.to(packed, dtype)
    log.warning("%s: scales are from random inputs, for timing and not for images", name)
    inputs, scales = partial(random_inputs, floating), "random inputs, for timing"
    return Network(name, floating, packed, inputs, scheduler, scales, dtype)


@torch.no_grad()
def _packed_by_layer(floating: nn.Module, calls: list[Any], recipe: Recipe) -> nn.Module:
    """Return a quantized copy by scales of largest values; one layer at a time is in float32."""
    ends: dict[str, list[Tensor]] = {}
    data = MemorySet.of_calls(floating, calls)
    plans = {layer.name: layer for layer in plan(floating, recipe, data)}
    layers = {name: floating.get_submodule(name) for name in plans}

    def see(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        x = input_of(args, kwargs)
        parts = x.split(plans[name].segments or x.shape[-1:], -1)
        ends.setdefault(name, []).append(torch.stack([torch.stack(p.aminmax()) for p in parts]))

    inputs = {name: layers[name] for name in bits_of([*plans.values()])}
    some = recipe.attention.max_error > 0
    measured: Any = measured_attention(floating) if some else nullcontext({})
    with hooked(inputs, see, before=True), measured as errors:
        for call in calls:
            floating(**call)
    state = [*floating.parameters(), *floating.buffers()]
    packed = copy.deepcopy(floating, {id(tensor): tensor for tensor in state})
    clock = install_clock(packed, torch.zeros(1, dtype=torch.int64, device=state[0].device))
    mark_attention(packed, errors, recipe.attention.max_error)
    for planned in plans.values():
        if planned.kind == "int8" and planned.name not in ends:
            continue
        swap_layers(packed, [planned], clock)
        old, layer = layers[planned.name], packed.get_submodule(planned.name)
        if isinstance(layer, StoredLinear):
            layer.fill(old)
        elif isinstance(layer, QLayer):
            weight, found = old.weight.float(), torch.stack(ends[planned.name]).float()
            step = weight.abs().flatten(1).amax(1) / 127
            low, high = found[..., 0].amin(0).clamp_max(0), found[..., 1].amax(0).clamp_min(0)
            scale = ((high - low) / layer.act_qmax)[:, None]
            codes = (weight / step.view(-1, *[1] * (weight.ndim - 1))).round().to(torch.int8)
            fill(layer, codes, step, old.bias, scale, (-low[:, None] / scale).round()[:, 0])
    return packed


def quick_recipe() -> Recipe:
    """Return the layers and bits of w8a8, one bucket, rounded to nearest."""
    recipe = Recipe.load("w8a8").override("rounding", name="nearest", bias=False)
    # Random weights have no shortcuts that cost more than others.
    return recipe.override("activations", buckets=1).override("layers", float_macs=0.0)
