"""What a scheduler does with the network's output: coefficients, noise, times.

Numbers of the schedule, for corrections around the network (`quantizers.correction`): how a change
of the output or of x_t reaches the next sample, how much noise is added, and which earlier
training time-step has a given share of noise. No class of diffusers is changed, only instances.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = [
    "adds_noise",
    "alpha_bars",
    "check_stepback",
    "scale_noise",
    "step_coefficients",
    "stepback_times",
    "wrap_stepback",
]

log = logging.getLogger("quantempo")

# More noise than the schedule's is added up to this factor of its variance: beyond it a correction
# measured elsewhere would do more harm than good.
MAX_NOISE_FACTOR = 2.0
# Their sample is sqrt(abar) x_0 + sqrt(1 - abar) noise, and their update reads nothing but it, the
# output at it and data predictions of earlier steps.
_STEPBACK = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DEISMultistepScheduler",
)
_OTHER_SIGMAS = tuple(
    f"use_{name}" for name in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "flow_sigmas")
)


def alpha_bars(scheduler: Any) -> Tensor:
    """Return abar_t of every training time-step: (T,) float64, descending.

    Raises:
        QuantempoError: a scheduler without them (flow matching).
    """
    found = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(found, Tensor):
        raise QuantempoError(
            f"{type(scheduler).__name__} has no alphas_cumprod; this correction is for models "
            "trained with a noise schedule: switch it off"
        )
    return found.detach().double().cpu()


def adds_noise(scheduler: Any) -> bool:
    """Return whether the noise of this scheduler's steps can be changed: DDIM (eta > 0), DDPM."""
    return _is(scheduler, "DDIMScheduler") or _is(scheduler, "DDPMScheduler")


def step_coefficients(scheduler: Any, t: int, variance: float = 0.0) -> tuple[float, float]:
    """Return (c, r) of one step x' = r x + c output + noise, clipping of x_0 left aside.

    With x_0 = p x + q output and eps = u x + w output,
        prediction "epsilon": p = 1 / sqrt(a), q = -sqrt((1 - a) / a), u = 0, w = 1,
        "v_prediction": p = sqrt(a), q = -sqrt(1 - a), u = sqrt(1 - a), w = sqrt(a),
        "sample": p = 0, q = 1, u = 1 / sqrt(1 - a), w = -sqrt(a / (1 - a)),
    and x' = A x_0 + B eps + C x + noise, where a' is abar of the next time and n^2 the variance
    that the step adds,
        DDIM: A = sqrt(a'), B = sqrt(1 - a' - n^2), C = 0,
        DDPM: A = sqrt(a') b / (1 - a), B = 0, C = sqrt(a / a') (1 - a') / (1 - a), b = 1 - a / a',
    c = A q + B w and r = A p + B u + C. For "epsilon" and DDIM this is
    c = sqrt(1 - a' - n^2) - sqrt(a' (1 - a) / a), r = sqrt(a' / a).

    Args:
        scheduler: a DDIMScheduler or DDPMScheduler with its time-steps set.
        t: training time-step.
        variance: n^2; DDIM only.

    Raises:
        QuantempoError: another scheduler or prediction type.

    Source: DDIM (Song et al. 2021), eq. 12; DDPM (Ho et al. 2020), eq. 7; the sum is our own.
    """
    if not adds_noise(scheduler):
        raise QuantempoError(
            f"got {type(scheduler).__name__}; expected DDIMScheduler or DDPMScheduler"
        )
    now = float(scheduler.alphas_cumprod[t])
    before = _next_time(scheduler, t)
    ddim = _is(scheduler, "DDIMScheduler")
    last = float(scheduler.final_alpha_cumprod) if ddim else 1.0
    after = float(scheduler.alphas_cumprod[before]) if before >= 0 else last
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind == "epsilon":
        p, q, u, w = now**-0.5, -(((1 - now) / now) ** 0.5), 0.0, 1.0
    elif kind == "v_prediction":
        p, q, u, w = now**0.5, -((1 - now) ** 0.5), (1 - now) ** 0.5, now**0.5
    elif kind == "sample":
        p, q, u, w = 0.0, 1.0, (1 - now) ** -0.5, -((now / (1 - now)) ** 0.5)
    else:
        raise QuantempoError(
            f"prediction type '{kind}' has no step coefficients here; expected 'epsilon', "
            "'v_prediction' or 'sample'"
        )
    if ddim:
        big_a, big_b, big_c = after**0.5, max(0.0, 1 - after - variance) ** 0.5, 0.0
    else:
        big_a, big_b = after**0.5 * (1 - now / after) / (1 - now), 0.0
        big_c = (now / after) ** 0.5 * (1 - after) / (1 - now)
    return big_a * q + big_b * w, big_a * p + big_b * u + big_c


def scale_noise(scheduler: Any, excess: Callable[[int, float, float], Tensor]) -> None:
    """Let this scheduler instance add less noise: n'^2 = n^2 - excess, within [0, 2 n^2].

    DDIM takes the noise itself as an argument of its step, so there the noise alone is scaled and
    the direction keeps its sqrt(1 - a' - n^2): with a smaller variance in both, DDIM would keep
    the marginal of every step and nothing would be absorbed. DDPM's variance is used for the noise
    alone and is replaced.

    Args:
        scheduler: any; one that adds no noise that can be changed is left alone, with a warning,
            and so is DDIM at eta = 0 when it is used.
        excess: of (t, c, r), see `step_coefficients`: (C,) variance to be taken out, negative to
            be put in.
    """
    if _is(scheduler, "DDIMScheduler"):
        _scale_ddim(scheduler, excess)
    elif _is(scheduler, "DDPMScheduler"):
        _scale_ddpm(scheduler, excess)
    else:
        log.warning(
            "correction.absorb does nothing with %s: it acts on the noise of DDPM, and of DDIM "
            "with eta > 0",
            type(scheduler).__name__,
        )


def _scale_ddim(scheduler: Any, excess: Callable[[int, float, float], Tensor]) -> None:
    step, signature, said = scheduler.step, inspect.signature(scheduler.step), False

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def quieter(*args: Any, **kwargs: Any) -> Any:
        from diffusers.utils.torch_utils import randn_tensor

        nonlocal said
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given, t = bound.arguments, int(bound.arguments["timestep"])
        if not given["eta"] > 0:
            if not said:
                log.warning("correction.absorb does nothing with DDIM at eta = 0: it adds no noise")
            said = True
            return step(*args, **kwargs)
        variance = given["eta"] ** 2 * float(scheduler._get_variance(t, _next_time(scheduler, t)))
        output = given["model_output"]
        noise = given["variance_noise"]
        if noise is None:
            # The numbers that the step itself would draw.
            noise = randn_tensor(
                output.shape,
                generator=given["generator"],
                device=output.device,
                dtype=output.dtype,
            )
        if variance > 0:
            amount = excess(t, *step_coefficients(scheduler, t, variance)).to(noise.device)
            factor = (1 - amount / variance).clamp(0, MAX_NOISE_FACTOR).sqrt()
            noise = noise * _channels(factor, noise).to(noise.dtype)
        given["variance_noise"], given["generator"] = noise, None
        return step(*bound.args, **bound.kwargs)

    scheduler.step = quieter


def _scale_ddpm(scheduler: Any, excess: Callable[[int, float, float], Tensor]) -> None:
    compute = scheduler._get_variance

    @functools.wraps(compute)
    def reduced(t: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = torch.as_tensor(compute(t, *args, **kwargs))
        step = int(t)
        if step <= 0:
            return value
        kind = scheduler.variance_type
        variance = value
        if kind == "fixed_small_log":
            # A standard deviation, by that name.
            variance = value**2
        elif kind in ("learned_range", "fixed_large_log"):
            variance = value.exp()
        amount = excess(step, *step_coefficients(scheduler, step)).to(value)
        amount = amount.reshape(1, -1, 1, 1)
        most = MAX_NOISE_FACTOR * variance
        variance = torch.minimum((variance - amount).clamp(min=1e-20), most)
        if kind == "fixed_small_log":
            return variance.sqrt()
        return variance.log() if kind in ("learned_range", "fixed_large_log") else variance

    scheduler._get_variance = reduced


def check_stepback(scheduler: Any) -> None:
    """Refuse schedulers whose update from an earlier time cannot be had by changing the sample.

    Raises:
        QuantempoError: not DDIM, DDPM, DPM-Solver++ multistep or DEIS, a schedule of other
            sigmas, or a network that predicts something else than the noise.
    """
    name = type(scheduler).__name__
    if not any(_is(scheduler, known) for known in _STEPBACK):
        raise QuantempoError(
            f"correction.stepback cannot be used with {name}; expected one of: "
            f"{', '.join(_STEPBACK)}; choose such a scheduler or switch it off"
        )
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind != "epsilon":
        raise QuantempoError(
            f"correction.stepback needs a network that predicts the noise; this one predicts "
            f"'{kind}': switch it off"
        )
    for setting in _OTHER_SIGMAS:
        if getattr(scheduler.config, setting, False):
            raise QuantempoError(
                f"correction.stepback needs the noise law of training; {name} has {setting}: "
                "switch one of the two off"
            )


def stepback_times(bars: Tensor, variance: Tensor) -> Tensor:
    """Return tau of every training time-step: the time whose noise x_t has.

    tau = argmin over tau >= t of |abar_tau - abar_t / (1 + v_t)|.

    Args:
        bars: (T,) abar, descending.
        variance: (T,) v_t >= 0, variance of the error in x_t.

    Returns:
        (T,) int64, tau >= t.

    Source: StepbaQ (Chiu et al., NeurIPS 2024); a_tau from Var[x_t + e] = Var[x_t] + v.
    """
    target = bars / (1 + variance.to(bars))
    # searchsorted wants ascending values: the first time whose abar is below the target.
    after = torch.searchsorted(-bars, -target).clamp(max=len(bars) - 1)
    before = (after - 1).clamp(min=0)
    nearer = (bars[before] - target).abs() < (bars[after] - target).abs()
    return torch.maximum(torch.where(nearer, before, after), torch.arange(len(bars)))


def wrap_stepback(scheduler: Any, times: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
    """Give this scheduler instance the sample from which its update is the update from tau.

    The output eps was computed at tau on x' = sqrt(a_tau / a_t) x, so
        x_0 = (x' - sqrt(1 - a_tau) eps) / sqrt(a_tau),  x'' = sqrt(a_t) x_0 + sqrt(1 - a_t) eps;
    the update at t finds this x_0 and this eps in (x'', eps). Where tau = t, x'' is x bit for bit.

    Args:
        scheduler: see `check_stepback`.
        times: of t () int64: (tau, a_t, a_tau), each ().

    Raises:
        QuantempoError: see `check_stepback`.
    """
    check_stepback(scheduler)
    step, signature = scheduler.step, inspect.signature(scheduler.step)

    @functools.wraps(step)
    def stepped(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        x, output = bound.arguments["sample"], bound.arguments["model_output"]
        t = torch.as_tensor(bound.arguments["timestep"])
        tau, now, earlier = (value.to(x.device) for value in times(t))
        eps = output[:, : x.shape[1]].float()
        scaled = x.float() * (earlier / now).sqrt()
        clean = (scaled - (1 - earlier).sqrt() * eps) / earlier.sqrt()
        moved = (now.sqrt() * clean + (1 - now).sqrt() * eps).to(x.dtype)
        bound.arguments["sample"] = torch.where(tau > t.to(tau), moved, x)
        return step(*bound.args, **bound.kwargs)

    scheduler.step = stepped


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """Shape (C,) values to broadcast over (B, C, ...)."""
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _next_time(scheduler: Any, t: int) -> int:
    if _is(scheduler, "DDIMScheduler"):
        return t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return int(scheduler.previous_timestep(t))


def _is(scheduler: Any, name: str) -> bool:
    import diffusers

    return isinstance(scheduler, getattr(diffusers, name))
