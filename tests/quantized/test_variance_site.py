"""The site `sigma` of a network without a learned variance: the scheduler's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.models.sampling import call_pipeline, swap_scheduler
from quantempo.models.variance import schedule_variances, variance_grid
from quantempo.quantized import SiteQuantizer, attach_variance_site
from tests.tiny import tiny_unconditional

KINDS = pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])


def formula(steps: int) -> Tensor:
    """beta~ of the schedule in float64, written from the definition; T = 1000, leading spacing."""
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64)))
    stride = 1000 // steps
    times = torch.arange(steps - 1, -1, -1) * stride
    one = torch.ones((), dtype=torch.float64)
    before = torch.where(times >= stride, abar[(times - stride).clamp(min=0)], one)
    return (1 - before) / (1 - abar[times]) * (1 - abar[times] / before)


def sigma_of(scheduler: Any, steps: int) -> SiteQuantizer:
    quantizer = SiteQuantizer()
    scale, zero = variance_grid(scheduler, steps)
    quantizer.scale.copy_(scale)
    quantizer.zero_point.copy_(zero)
    return quantizer


@KINDS
@pytest.mark.parametrize("steps", [10, 50])
def test_the_grid_covers_the_variances_of_the_schedule(kind: type, steps: int) -> None:
    scheduler, wanted = kind(), formula(steps)
    # alphas_cumprod is a float32 product of up to 1000 factors, 1 - it at t = 0 is 1e-4.
    found = schedule_variances(scheduler, steps).double()
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-7)
    scale, zero = variance_grid(scheduler, steps)
    assert scale.shape == zero.shape == () and zero.dtype == torch.int32 and int(zero) == 0
    assert float(scale) == pytest.approx(float(wanted.max()) / 255, rel=1e-3)
    # The scheduler itself was asked, not used.
    assert scheduler.num_inference_steps is None and "_get_variance" not in scheduler.__dict__


@KINDS
@pytest.mark.parametrize("steps", [4, 10, 50, 250])
def test_the_variance_is_on_the_grid_and_within_half_a_step(kind: type, steps: int) -> None:
    plain, quantized = kind(), kind()
    quantizer = sigma_of(plain, steps)
    attach_variance_site(quantized, quantizer)
    quantized.set_timesteps(steps)
    stride = 1000 // steps
    exact = schedule_variances(plain, steps)
    # What is asked of a scheduler with the site is still the schedule's own.
    assert torch.equal(schedule_variances(quantized, steps), exact)
    for t, wanted in zip(quantized.timesteps.tolist(), exact, strict=True):
        got = quantized._get_variance(*((t, t - stride) if kind is DDIMScheduler else (t,)))
        codes = got / quantizer.scale
        assert got.dtype == torch.float32 and got >= 0
        assert float((codes - codes.round()).abs()) < 1e-4
        # A code held below the limit of DDIM is at most one further down.
        assert -1.0001 <= float((got - wanted) / quantizer.scale) <= 0.5001
        if kind is DDIMScheduler and t >= stride:
            assert got <= 1 - plain.alphas_cumprod[t - stride]


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("law", "grid", "steps"), [({}, 20, 100), ({}, 100, 250), (LATENT, 20, 20), (LATENT, 100, 100)]
)
def test_ddim_never_takes_the_root_of_a_negative_number(law: dict, grid: int, steps: int) -> None:
    """In each of these a variance rounds up beyond 1 - abar_prev, by 1 to 91 %."""
    scheduler = DDIMScheduler(clip_sample=False, **law)
    attach_variance_site(scheduler, sigma_of(scheduler, grid))
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 3, 4, 4)
    for t in scheduler.timesteps:
        g = torch.Generator().manual_seed(4)
        x = scheduler.step(torch.ones_like(x), t, x, eta=1.0, generator=g).prev_sample
        assert bool(x.isfinite().all())


def images(scheduler: str, quantizer: SiteQuantizer | None, **call: Any) -> np.ndarray:
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    if quantizer is not None:
        attach_variance_site(pipe.scheduler, quantizer)
    return call_pipeline(pipe, [1, 2], steps=10, **call)


def test_no_effect_on_ddim_without_noise_and_one_with_it() -> None:
    quantizer = sigma_of(DDIMScheduler(), 10)
    assert np.array_equal(images("ddim", quantizer), images("ddim", None))
    for scheduler, call in (("ddim", {"eta": 1.0}), ("ddpm", {})):
        plain, got = images(scheduler, None, **call), images(scheduler, quantizer, **call)
        # Half a step of 255 in the variance: visible in float, far from another picture.
        assert 1e-5 < np.abs(got - plain).mean() < 0.05


@pytest.mark.parametrize("name", ["dpm++", "euler", "unipc"])
def test_samplers_without_a_variance_are_refused(name: str) -> None:
    scheduler = swap_scheduler(tiny_unconditional(), name).scheduler
    for call in (
        lambda: variance_grid(scheduler, 10),
        lambda: attach_variance_site(scheduler, SiteQuantizer()),
    ):
        with pytest.raises(QuantempoError, match=rf"{type(scheduler).__name__} has none"):
            call()


@pytest.mark.parametrize("kind", ["learned", "learned_range", "fixed_large_log"])
def test_a_variance_that_is_not_of_the_schedule_is_refused(kind: str) -> None:
    with pytest.raises(QuantempoError, match=f"variance_type '{kind}'"):
        variance_grid(DDPMScheduler(variance_type=kind), 10)
