"""Time one denoiser in every form on this machine: interleaved, medians."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

__all__ = [
    "Call",
    "cast_inputs",
    "float_candidates",
    "interleave",
    "no_grad",
    "summarize",
]

Call = Callable[[], Any]


def interleave(
    candidates: dict[str, Call], rounds: int = 7, seconds: float = 0.25
) -> dict[str, list[float]]:
    """Return milliseconds per call for each candidate, `rounds` samples each.

    One sample repeats the call for at least `seconds`. Candidates take turns, forwards then
    backwards, so that slow drifts of a shared machine fall on all of them alike.
    """
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    for i in range(rounds):
        for name in order if i % 2 == 0 else reversed(order):
            call, count, start = candidates[name], 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < seconds or count == 0:
                call()
                count += 1
            times[name].append(1000 * elapsed / count)
    return times


def float_candidates(
    denoiser: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], compiled: bool = True
) -> dict[str, Call]:
    """Return the float32 and bfloat16 baselines: eager, channels_last and compiled with freezing.

    Args:
        denoiser: float32, left untouched (copies are timed).
        inputs: args and kwargs of one call.
        compiled: include torch.compile (needs a C++ compiler; some tens of seconds each).
    """
    calls: dict[str, Call] = {}
    for dtype, label in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        args, kwargs = cast_inputs(inputs, dtype)
        # diffusers' own `to` warns about what a full cast may do to training.
        eager = nn.Module.to(copy.deepcopy(denoiser), dtype).eval()
        last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
        calls[f"eager/{label}"] = no_grad(eager, args, kwargs)
        calls[f"channels_last/{label}"] = no_grad(last, args, kwargs)
        if compiled:
            calls[f"compiled/{label}"] = no_grad(torch.compile(eager), args, kwargs)
    if compiled:
        # An option of torch.compile() with this name does nothing in torch 2.13; the global does,
        # while the first call compiles.
        import torch._inductor.config as inductor

        with inductor.patch(freezing=True), warnings.catch_warnings():
            # What the compiler thinks of diffusers' code is not our user's concern.
            warnings.simplefilter("ignore")
            for name, call in calls.items():
                if name.startswith("compiled"):
                    call()
    gc.collect()
    return calls


def cast_inputs(
    inputs: tuple[tuple[Any, ...], dict[str, Any]], dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call in another float dtype; times (one axis) and integers stay."""

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            return value.to(dtype)
        return value

    return tuple(cast(a) for a in inputs[0]), {k: cast(v) for k, v in inputs[1].items()}


def no_grad(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call of `call(*args, **kwargs)` without gradients."""

    def timed() -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    return timed


def summarize(times: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Return medians and the speed-up of candidate `ours` over the best of each float dtype."""
    middle = {name: median(values) for name, values in times.items()}
    summary: dict[str, Any] = {
        "ms_per_forward": {name: round(value, 3) for name, value in middle.items()},
        "ms_min": {name: round(min(values), 3) for name, values in times.items()},
        "engine": ours,
    }
    for key, dtype in (("speedup_vs_best_fp32", "float32"), ("speedup_vs_best_bf16", "bfloat16")):
        best = min((v for k, v in middle.items() if k.endswith(f"/{dtype}")), default=None)
        summary[key] = round(best / middle[ours], 3) if best else None
    return summary
