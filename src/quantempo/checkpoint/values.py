"""Check what a checkpoint says before it is run, because kernels trust it.

A time bucket beyond the table of scales is a read out of bounds on a GPU; a hash finds no malice.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.quantized import LayerPlan, QLayer, Times, WeightOnlyLinear, find_clock

__all__ = ["check_layers", "check_plans", "check_tensor", "check_times"]

MAX_TIMESTEPS = 100_000


def check_times(given: Any) -> Times:
    """Return the places in time that a configuration holds; QuantempoError unless they are some."""
    known = {field.name for field in fields(Times)}
    whole = isinstance(given, dict) and {"count"} <= set(given) <= known
    whole = whole and isinstance(given.get("values", []), list | tuple)
    _expect(whole, f"times {given!r}", "the fields of places in time")
    times = Times(**given)
    count = type(times.count) is int and 1 <= times.count <= MAX_TIMESTEPS
    _expect(count, f"{times.count!r} places in time", f"1 to {MAX_TIMESTEPS}")
    values = [times.first, times.per_unit, *times.values]
    finite = all(type(n) in (int, float) and math.isfinite(n) for n in values)
    _expect(finite and times.per_unit != 0, f"times {values[:3]}", "finite numbers, per_unit not 0")
    order = list(times.values) in (sorted(set(times.values)), sorted(set(times.values))[::-1])
    fits = order and len(times.values) in (0, times.count)
    _expect(fits, "times without order", f"{times.count} that rise or fall")
    return times


def check_plans(denoiser: nn.Module, plans: list[LayerPlan]) -> None:
    """Raise QuantempoError unless the inputs of all layers are cut as they are wide."""
    for plan in plans:
        layer: Any = denoiser.get_submodule(plan.name)
        width = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        parts = plan.segments or (width,)
        whole = sum(parts) == width and min(parts) > 0
        _expect(whole, f"segments {list(parts)} of {plan.name}", f"parts of {width} channels")
        # 0: a scale for every token, of which only linear layers have some.
        least = 0 if isinstance(layer, nn.Linear) else 1
        known = type(plan.buckets) is int and plan.buckets >= least
        _expect(known, f"{plan.buckets!r} buckets of {plan.name}", f"{least} or more")


def check_tensor(name: str, tensor: Tensor, buffer: Tensor | None, half: bool) -> None:
    """Raise QuantempoError unless a tensor is finite and fits its buffer, if any; half: float16."""
    if tensor.is_floating_point():
        owner, _, leaf = name.rpartition(".")
        finite = bool(tensor.isfinite().all())
        _expect(finite, f"a bad value in {leaf} of {owner}", "finite ones")
    if buffer is not None:
        dtypes = (buffer.dtype, torch.float16) if half else (buffer.dtype,)
        fits = tensor.shape == buffer.shape and tensor.dtype in dtypes
        wanted = f"{buffer.dtype} of shape {tuple(buffer.shape)}"
        _expect(fits, f"{name} as {tensor.dtype} of shape {tuple(tensor.shape)}", wanted)


def check_layers(denoiser: nn.Module) -> None:
    """Raise QuantempoError unless every scale, zero point and time bucket can be used."""
    clock = find_clock(denoiser)
    assert clock is not None
    _inside("time buckets", clock.bucket_of, 0, len(clock.bucket_of) - 1)
    for name, module in denoiser.named_modules():
        if not isinstance(module, QLayer | WeightOnlyLinear):
            continue
        codes = module.weight_format
        given = (module.weight_int, module.weight_shape, module.weight_group, torch.int16)
        _inside(f"codes of {name}", codes.decode(*given), codes.qmin, codes.qmax)
        if isinstance(module, QLayer):
            if (columns := module.act_scale.shape[1]) > 1:
                _inside(f"time buckets of {name}", clock.bucket_of, 0, columns - 1)
            ends = module.act_format.qmin, module.act_qmax
            if module.dynamic:
                ends = (module.act_format.symmetric_zero_point,) * 2
            _inside(f"zero points of {name}", module.act_zero_point, *ends)
        for scale in ("act_scale", "weight_scale"):
            value = getattr(module, scale, module.weight_scale)
            positive = bool(((value > 0) & value.isfinite()).all())
            _expect(positive, f"a bad value in {scale} of {name}", "positive and finite ones")


def _inside(what: str, values: Tensor, low: int, high: int) -> None:
    least, largest = int(values.min()), int(values.max())
    inside = low <= least and largest <= high
    _expect(inside, f"{what} from {least} to {largest}", f"{low} to {high}")


def _expect(good: bool, got: str, want: str) -> None:
    if not good:
        raise QuantempoError(f"this checkpoint has {got}; expected {want}: save or fetch it again")
