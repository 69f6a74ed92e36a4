"""Networks to time: of a run folder, of a preset's shape, or of any diffusers folder."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantempo.bench.candidates import Subject
from quantempo.bench.cpu import cast_inputs
from quantempo.bench.quick import quick_quantize
from quantempo.calibration.dataset import TraceSet
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.presets import PRESETS, build_preset, random_inputs
from quantempo.recipe import Recipe

__all__ = ["Workload", "model_workload", "quick_workload", "trace_inputs"]

# Training time-steps of the forwards that a quick quantization takes its ranges from.
_TIMES = (900.0, 300.0)
_RANGE_BATCH = 2


@dataclass(frozen=True)
class Workload:
    """A network in float32 and quantized, with a source of inputs.

    inputs: keyword arguments of a call of so many rows, float32, on the device; scheduler: of its
    pipeline, None for DDIM's defaults; scales: where those of the quantized network come from.
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
        inputs = cast_inputs(((), self.inputs(batch)), self.dtype)
        return Subject(self.floating, self.packed, inputs, engine, self.dtype)


def trace_inputs(data: TraceSet, size: int, like: torch.Tensor | None = None) -> dict[str, Any]:
    """Return recorded rows, repeated to the batch size, all at one time-step as in sampling.

    Args:
        data: the trace.
        size: rows.
        like: on whose device and in whose dtype; None leaves x_t where and as it was recorded.
    """
    index = torch.arange(size) % len(data)
    batch = data.rows(index)
    # One number for all rows, as pipelines pass it: a batch of equal times is a mixed one to us.
    batch = batch._replace(t=batch.t[0])
    return data.arguments(batch, batch.x_t if like is None else like)


def model_workload(
    source: str,
    device: torch.device | str = "cuda",
    *,
    recipe: Recipe | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Workload:
    """Return a preset ("sd15") or the denoiser of a diffusers folder, quantized without data.

    Raises:
        QuantempoError: neither a preset nor a pipeline, or one whose inputs are not known.
    """
    scheduler = None
    if source in PRESETS or not Path(source).exists():
        # An unknown name is refused there, with the known ones.
        floating = build_preset(source, device)
    else:
        pipe = load_pipeline(source)
        scheduler = pipe.scheduler
        floating = nn.Module.to(denoiser_of(pipe)[1], device).eval()
        del pipe
        gc.collect()
    name = source if source in PRESETS else Path(source).name
    return quick_workload(name, floating, scheduler, recipe=recipe, dtype=dtype)


def quick_workload(
    name: str,
    floating: nn.Module,
    scheduler: Any = None,
    *,
    recipe: Recipe | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Workload:
    """Return a workload of a float32 denoiser on its device, quantized without data."""
    packed = copy.deepcopy(floating)
    calls = (
        random_inputs(floating, _RANGE_BATCH, time=time, seed=i + 1)
        for i, time in enumerate(_TIMES)
    )
    steps = int(scheduler.config.num_train_timesteps) if scheduler is not None else 1000
    quick_quantize(packed, calls, recipe, dtype=dtype, num_train_timesteps=steps)

    def inputs(batch: int) -> dict[str, Any]:
        return random_inputs(floating, batch)

    return Workload(name, floating, packed, inputs, scheduler, "random inputs, for timing", dtype)
