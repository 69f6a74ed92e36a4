"""Tensors of the sampler on 8-bit grids: the network's output, the variance, x_{t-1}.

The paper's first study asks which of mu, Sigma and x_{t-1} may be quantized. For a network that
predicts the noise, `eps` is its output, from which mu follows. `sigma` is the second half of the
output where the network predicts a variance; else it is the variance of the schedule: beta~_t =
beta_t (1 - abar_{t-1}) / (1 - abar_t) for DDPM, eta^2 sigma_t^2 for DDIM. `x_prev` is what the
scheduler returns at each step.

Source: DDPM (Ho et al. 2020), eq. 7; DDIM (Song et al. 2021), eq. 16.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION
from quantempo.errors import QuantempoError

__all__ = [
    "TENSORS",
    "Grids",
    "attach_to_scheduler",
    "learns_variance",
    "output_part",
    "quantize_output",
    "to_grid",
    "variance_grid",
]

TENSORS = ("eps", "sigma", "x_prev")
# Name -> (scale () float32, zero_point () int32).
Grids = Mapping[str, tuple[Tensor, Tensor]]


def learns_variance(denoiser: nn.Module) -> bool:
    """Return whether the network has twice as many output as input channels."""
    config: Any = denoiser.config
    return getattr(config, "out_channels", None) == 2 * config.in_channels


def to_grid(x: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
    """Return x on an unsigned 8-bit grid, same shape and dtype; error <= scale / 2 inside it."""
    scale, zero = (part.to(x.device) for part in grid)
    codes = (torch.round(x.float() / scale) + zero).clamp(ACTIVATION.qmin, ACTIVATION.qmax)
    return ((codes - zero) * scale).to(x.dtype)


def output_part(name: str, denoiser: nn.Module) -> slice | None:
    """Return the output channels of "eps" or "sigma", None for what the output does not hold."""
    config: Any = denoiser.config
    if name == "eps":
        return slice(0, config.in_channels if learns_variance(denoiser) else None)
    learned = name == "sigma" and learns_variance(denoiser)
    return slice(config.in_channels, None) if learned else None


def quantize_output(output: Any, grids: Grids, denoiser: nn.Module) -> Any:
    """Return an output (object or tuple) of the network with those of its parts on their grids."""
    sample = output[0]
    for name, grid in grids.items():
        if (part := output_part(name, denoiser)) is not None:
            sample = sample.clone()
            sample[:, part] = to_grid(sample[:, part], grid)
    return (sample, *output[1:]) if isinstance(output, tuple) else type(output)(sample=sample)


def attach_to_scheduler(scheduler: Any, grids: Grids, denoiser: nn.Module) -> None:
    """Put x_{t-1}, and the variance that no network predicts, of this instance on their grids.

    Raises QuantempoError: "sigma" with a scheduler other than DDIM and DDPM.
    """
    if "x_prev" in grids:
        _attach_step(scheduler, grids["x_prev"])
    if "sigma" in grids and not learns_variance(denoiser):
        _attach_variance(scheduler, grids["sigma"])


def _attach_step(scheduler: Any, grid: tuple[Tensor, Tensor]) -> None:
    step = scheduler.step

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def quantized(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if isinstance(result, tuple):
            return (to_grid(result[0], grid), *result[1:])
        result.prev_sample = to_grid(result.prev_sample, grid)
        return result

    scheduler.step = quantized


def _attach_variance(scheduler: Any, grid: tuple[Tensor, Tensor]) -> None:
    _check(scheduler)
    compute = scheduler._get_variance
    signature = inspect.signature(compute)

    @functools.wraps(compute)
    def quantized(*args: Any, **kwargs: Any) -> Tensor:
        variance = compute(*args, **kwargs)
        near = to_grid(variance, grid)
        if _is_ddim(scheduler):
            before = signature.bind(*args, **kwargs).arguments["prev_timestep"]
            known = scheduler.alphas_cumprod[before] if before >= 0 else None
            limit = 1 - float(scheduler.final_alpha_cumprod if known is None else known)
            # Rounded up beyond 1 - abar_prev, DDIM would take the root of a negative number; the
            # margin is for the float32 roundings in between.
            if float(near) > limit * (1 - 1e-5):
                near = near - grid[0].to(near)
        return near.clamp(min=0)

    scheduler._get_variance = quantized


def variance_grid(scheduler: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Return the grid over [0, largest variance] of a schedule of `steps` steps.

    scale = max_k variance_k / 255, zero point 0: sigma_t^2 at eta = 1 for DDIM, the variance of
    its `variance_type` for DDPM. The scheduler is not changed.

    Raises QuantempoError: another scheduler, a variance that is no number of the schedule, no
    noise.
    """
    _check(scheduler)
    own = copy.copy(scheduler)
    own.set_timesteps(steps)
    compute = type(scheduler)._get_variance
    stride = own.config.num_train_timesteps // own.num_inference_steps
    before = (stride,) if _is_ddim(scheduler) else ()
    values = [compute(own, int(t), *(int(t) - s for s in before)) for t in own.timesteps]
    largest = max(float(value) for value in values)
    if not 0 < largest < float("inf"):
        raise QuantempoError(
            f"the largest variance of {type(scheduler).__name__} with {steps} steps is {largest}; "
            "expected a positive number: leave out item T1"
        )
    return torch.tensor(largest / ACTIVATION.qmax), torch.tensor(0, dtype=torch.int32)


def _is_ddim(scheduler: Any) -> bool:
    from diffusers import DDIMScheduler

    return isinstance(scheduler, DDIMScheduler)


def _check(scheduler: Any) -> None:
    from diffusers import DDPMScheduler

    name = type(scheduler).__name__
    kind = getattr(scheduler.config, "variance_type", "fixed_small")
    known = _is_ddim(scheduler) or isinstance(scheduler, DDPMScheduler)
    # The log of a variance has no grid from 0 up.
    if not known or kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise QuantempoError(
            f"got sigma of {name} with variance_type '{kind}'; expected DDIMScheduler or "
            "DDPMScheduler with 'fixed_small' or 'fixed_large': leave out item T1"
        )
