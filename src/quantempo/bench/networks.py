"""Networks to time: of a run folder, of a preset's shape, or of any diffusers folder."""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantempo.bench.candidates import Subject
from quantempo.calibration.dataset import MemorySet, TraceSet
from quantempo.errors import log
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.presets import PRESETS, build_preset, random_inputs
from quantempo.pipeline.quantize import quantize
from quantempo.pipeline.session import Session
from quantempo.quantized import Float16Linear, QLayer, StepClock
from quantempo.recipe import Recipe

__all__ = ["Network", "cast_floats", "model_network", "quick_network", "run_network"]

# Training time-steps of the forwards that a quick quantization takes its ranges from.
_TIMES = (900.0, 300.0)
_RANGE_BATCH = 2
_STATEFUL = (QLayer, Float16Linear, StepClock)


@dataclass(frozen=True)
class Network:
    """A network in float32 and quantized, with a source of inputs.

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

    def subject(self, batch: int, engine: str = "triton") -> Subject:
        """Return what the candidates of one batch size are made from."""
        return Subject(self.floating, self.packed, self.inputs(batch), engine, self.dtype)


def _float_type(device: torch.device) -> torch.dtype:
    """Return the dtype of float layers beside integer ones: on a CPU bfloat16 costs 1.1 dB."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def run_network(session: Session) -> Network:
    """Return the float and the packed network of a run folder, on the session's device.

    Inputs are recorded rows, repeated to the batch size, all at one time-step as in sampling.

    Raises:
        QuantempoError: nothing packed yet, or no trace.
    """
    part = next(part for part in session.parts if len(TraceSet(part.run / "trace")))
    data, floating = TraceSet(part.run / "trace"), part.denoiser
    like = next(floating.parameters())
    dtype = _float_type(like.device)
    pipe = load_pipeline(session.require_packed(), dtype)
    packed = nn.Module.to(getattr(pipe, part.component), like.device).eval()

    def inputs(rows: int) -> dict[str, Any]:
        alike = data.calls(torch.arange(len(data)), len(data))[0]
        batch = data.rows(alike[torch.arange(rows) % len(alike)])
        # One number for all rows, as pipelines pass it: a batch of equal times is a mixed one.
        return data.arguments(batch._replace(t=batch.t[0]), like)

    name = Path(session.source).name
    return Network(name, floating, packed, inputs, session.pipe.scheduler, "run folder", dtype)


def model_network(source: str, device: torch.device | str) -> Network:
    """Return a preset ("sd15") or the denoiser of a diffusers folder, quantized without data.

    Raises:
        QuantempoError: neither a preset nor a pipeline, or one whose inputs are not known.
    """
    if source in PRESETS or not Path(source).exists():
        # An unknown name is refused there, with the known ones.
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
    """Return a float32 denoiser on its device and its copy, quantized from random inputs.

    `recipe` is by default `quick_recipe`; `scheduler` that of its pipeline, None for DDIM's.
    """
    dtype = _float_type(next(floating.parameters()).device)
    times = enumerate(_TIMES)
    calls = [random_inputs(floating, _RANGE_BATCH + i, time=t, seed=i + 1) for i, t in times]
    data = MemorySet.of_calls(floating, calls)
    recipe = recipe or quick_recipe()
    packed = quantize(floating, data, recipe).install(copy.deepcopy(floating))
    cast_floats(packed, dtype)
    log.warning("%s: scales are from random inputs, for timing and not for images", name)
    inputs, scales = partial(random_inputs, floating), "random inputs, for timing"
    return Network(name, floating, packed, inputs, scheduler, scales, dtype)


def quick_recipe() -> Recipe:
    """Return the layers and bits of w8a8, one bucket, rounded to nearest."""
    recipe = Recipe.load("w8a8").override("rounding", name="nearest", bias=False, refine=0)
    # Random weights have no shortcuts that cost more than others.
    return recipe.override("activations", buckets=1).override("layers", float_macs=0.0)


def cast_floats(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is left in float in place; integers, scales and biases of integer layers stay."""
    for module in denoiser.modules():
        if not isinstance(module, _STATEFUL):
            for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if value.is_floating_point():
                    value.data = value.data.to(dtype)
