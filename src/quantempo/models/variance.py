"""The variance of a sampler whose network does not predict one.

DDPM adds noise of variance beta~_t = beta_t (1 - abar_{t-1}) / (1 - abar_t) at each step, DDIM
noise of variance eta^2 sigma_t^2: numbers of the schedule, not of the network. Here they are listed
and replaced; which grid they go on is decided elsewhere.

Source: DDPM (Ho et al. 2020), eq. 7; DDIM (Song et al. 2021), eq. 16.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION
from quantempo.errors import QuantempoError

__all__ = ["has_learned_variance", "schedule_variances", "variance_grid", "wrap_variance"]


def has_learned_variance(denoiser: nn.Module) -> bool:
    """Return whether the network's configuration has twice as many output as input channels."""
    config = getattr(denoiser, "config", None)
    channels, output = getattr(config, "in_channels", None), getattr(config, "out_channels", None)
    return channels is not None and output == 2 * channels


def schedule_variances(scheduler: Any, steps: int) -> Tensor:
    """Return (K,) float32 variances of a schedule of `steps` steps, in sampling order.

    They are what the scheduler computes itself: sigma_t^2 at eta = 1 for DDIM, and for DDPM the
    variance of its `variance_type`. The scheduler is not changed.

    Raises:
        QuantempoError: a scheduler other than DDIM and DDPM, or a variance that the network has to
            predict.
    """
    _check(scheduler)
    own = copy.copy(scheduler)
    own.set_timesteps(steps)
    compute = type(scheduler)._get_variance
    if _is_ddim(scheduler):
        stride = own.config.num_train_timesteps // own.num_inference_steps
        values = [compute(own, int(t), int(t) - stride) for t in own.timesteps]
    else:
        values = [compute(own, int(t)) for t in own.timesteps]
    return torch.stack([torch.as_tensor(value, dtype=torch.float32).cpu() for value in values])


def variance_grid(scheduler: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Return (scale () float32, zero_point () int32) of the 8-bit grid over [0, max variance].

    scale = max_k variance_k / 255, zero point 0: the values are known, nothing is calibrated.
    Variances of a schedule with other steps may lie above it and are clipped.

    Raises:
        QuantempoError: see `schedule_variances`; a schedule without noise.
    """
    largest = float(schedule_variances(scheduler, steps).max())
    if not 0 < largest < float("inf"):
        raise QuantempoError(
            f"the largest variance of {type(scheduler).__name__} with {steps} steps is {largest}; "
            "expected a positive number: remove 'sigma' from layers.sites"
        )
    return torch.tensor(largest / ACTIVATION.qmax), torch.tensor(0, dtype=torch.int32)


def wrap_variance(scheduler: Any, function: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """Let this scheduler instance use function(variance, limit) wherever it computes a variance.

    variance: () float32. limit: () the largest variance that the update can take, which is
    1 - abar_prev for DDIM (its root of 1 - abar_prev - sigma^2 has no value above), None for DDPM.

    Raises:
        QuantempoError: as for `schedule_variances`.
    """
    _check(scheduler)
    compute = scheduler._get_variance
    signature = inspect.signature(compute)

    @functools.wraps(compute)
    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        limit = None
        if _is_ddim(scheduler):
            before = signature.bind(*args, **kwargs).arguments["prev_timestep"]
            known = (
                scheduler.final_alpha_cumprod if before < 0 else scheduler.alphas_cumprod[before]
            )
            limit = 1 - known
        return function(compute(*args, **kwargs), limit)

    scheduler._get_variance = replaced


def _is_ddim(scheduler: Any) -> bool:
    from diffusers import DDIMScheduler

    return isinstance(scheduler, DDIMScheduler)


def _check(scheduler: Any) -> None:
    from diffusers import DDPMScheduler

    name = type(scheduler).__name__
    if not _is_ddim(scheduler) and not isinstance(scheduler, DDPMScheduler):
        raise QuantempoError(
            f"site 'sigma' acts on the variance of DDIMScheduler or DDPMScheduler; {name} has none "
            "to quantize: choose one of those, or remove 'sigma' from layers.sites"
        )
    kind = getattr(scheduler.config, "variance_type", "fixed_small")
    # The log of a variance has no grid from 0 up.
    if kind not in ("fixed_small", "fixed_small_log", "fixed_large"):
        raise QuantempoError(
            f"site 'sigma' cannot quantize variance_type '{kind}' of {name} for a network that "
            "predicts no variance; set it to 'fixed_small', or remove 'sigma' from layers.sites"
        )
