"""Tensors of the sampler on 8-bit grids: which numbers each one changes."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.models.sampling import call_pipeline, swap_scheduler
from studies.ptq4dm.calibrations import output_probe
from studies.ptq4dm.networks import Frontend
from studies.ptq4dm.sampler_tensors import attach_to_scheduler, to_grid, variance_grid
from tests.tiny import tiny_dit, tiny_unconditional, tiny_unet

SCALE, ZERO = 0.125, 100
GRID = (torch.tensor(SCALE), torch.tensor(ZERO, dtype=torch.int32))
KINDS = pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])


def on_grid(x: Tensor) -> Tensor:
    """Return scale * (clamp(round(x / scale) + zero, 0, 255) - zero) in float64."""
    return SCALE * ((x.double() / SCALE).round() + ZERO).clamp(0, 255).sub(ZERO)


def noise(*shape: int) -> Tensor:
    # Wide enough that both ends of the grid clip.
    return 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(net: nn.Module, x: Tensor, **more: Any) -> Any:
    label = {"class_labels": torch.tensor([1, 2])} if net.config.in_channels == 4 else {}
    with torch.no_grad():
        return net(x, torch.tensor([500, 500]), **label, **more)[0]


def quantized(net: nn.Module, *names: str) -> Frontend:
    front = Frontend(net)
    front.grids = dict.fromkeys(names, GRID)
    return front


def test_the_grid_has_eight_bits() -> None:
    x = noise(4, 5)
    y = to_grid(x, GRID)
    assert torch.equal(y.double(), on_grid(x))
    assert y.min() == -ZERO * SCALE and y.max() == (255 - ZERO) * SCALE


@pytest.mark.parametrize("return_dict", [True, False])
def test_eps_covers_the_whole_output_of_a_plain_network(return_dict: bool) -> None:
    net, x = tiny_unet(), noise(2, 3, 16, 16)
    got = run(quantized(net, "eps", "sigma", "x_prev"), x, return_dict=return_dict)
    assert torch.equal(got.double(), on_grid(run(net, x)))


@pytest.mark.parametrize("names", [("eps",), ("sigma",), ("eps", "sigma")])
def test_halves_of_a_learned_variance(names: tuple[str, ...]) -> None:
    net, x = tiny_dit().transformer, noise(2, 4, 8, 8)
    plain, got = run(net, x), run(quantized(net, *names), x)
    for part, name in ((slice(0, 4), "eps"), (slice(4, 8), "sigma")):
        wanted = on_grid(plain[:, part]) if name in names else plain[:, part].double()
        assert torch.equal(got[:, part].double(), wanted)


@pytest.mark.parametrize("return_dict", [True, False])
@KINDS
def test_x_prev_acts_on_what_the_scheduler_returns(kind: type, return_dict: bool) -> None:
    eps, x = noise(2, 3, 4, 4), noise(2, 3, 4, 4).flip(0)
    results = []
    for grids in ({}, {"x_prev": GRID}):
        scheduler: Any = kind()
        attach_to_scheduler(scheduler, grids, tiny_unet())
        scheduler.set_timesteps(10)
        g = torch.Generator().manual_seed(4)
        t = scheduler.timesteps[3]
        results.append(scheduler.step(eps, t, x, generator=g, return_dict=return_dict))
    assert torch.equal(results[1][0].double(), on_grid(results[0][0]))
    # The prediction of x_0 is not the sample.
    assert torch.equal(results[1][1], results[0][1])


def test_a_probe_hears_each_output_and_goes_again() -> None:
    net, x, heard = tiny_unet(), noise(2, 3, 16, 16), []
    layer = net.conv_in
    with output_probe(layer, "probe", lambda kwargs, output: output):
        layer.probe.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
        plain = run(net, x)
    with torch.no_grad():
        assert len(heard) == 1 and torch.equal(heard[0], layer(x))
    assert torch.equal(run(net, x), plain)
    assert not layer._forward_hooks and not hasattr(layer, "probe")


def formula(steps: int) -> Tensor:
    """beta~ of the schedule in float64, written from the definition; T = 1000, leading spacing."""
    abar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64)))
    stride = 1000 // steps
    times = torch.arange(steps - 1, -1, -1) * stride
    one = torch.ones((), dtype=torch.float64)
    before = torch.where(times >= stride, abar[(times - stride).clamp(min=0)], one)
    return (1 - before) / (1 - abar[times]) * (1 - abar[times] / before)


@KINDS
@pytest.mark.parametrize("steps", [4, 10, 50, 250])
def test_the_variance_is_on_the_grid_and_within_half_a_step(kind: type, steps: int) -> None:
    scheduler, wanted = kind(), formula(steps)
    scale, zero = variance_grid(scheduler, steps)
    # alphas_cumprod is a float32 product of up to 1000 factors, 1 - it at t = 0 is 1e-4.
    assert float(scale) == pytest.approx(float(wanted.max()) / 255, rel=2e-3) and int(zero) == 0
    # The scheduler itself was asked, not used.
    assert scheduler.num_inference_steps is None and "_get_variance" not in scheduler.__dict__
    attach_to_scheduler(scheduler, {"sigma": (scale, zero)}, tiny_unet())
    scheduler.set_timesteps(steps)
    stride = 1000 // steps
    for t, exact in zip(scheduler.timesteps.tolist(), wanted.tolist(), strict=True):
        got = scheduler._get_variance(*((t, t - stride) if kind is DDIMScheduler else (t,)))
        codes = got / scale
        assert got >= 0 and float((codes - codes.round()).abs()) < 1e-4
        # A code held below the limit of DDIM is at most one further down; 0.1 for `formula`.
        assert -1.1 <= float((got - exact) / scale) <= 0.6


LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("law", "grid", "steps"), [({}, 20, 100), ({}, 100, 250), (LATENT, 20, 20), (LATENT, 100, 100)]
)
def test_ddim_never_takes_the_root_of_a_negative_number(law: dict, grid: int, steps: int) -> None:
    """In each of these a variance rounds up beyond 1 - abar_prev, by 1 to 91 %."""
    scheduler = DDIMScheduler(clip_sample=False, **law)
    attach_to_scheduler(scheduler, {"sigma": variance_grid(scheduler, grid)}, tiny_unet())
    scheduler.set_timesteps(steps)
    x = torch.ones(1, 3, 4, 4)
    for t in scheduler.timesteps:
        g = torch.Generator().manual_seed(4)
        x = scheduler.step(torch.ones_like(x), t, x, eta=1.0, generator=g).prev_sample
        assert bool(x.isfinite().all())


def images(scheduler: str, grids: Any, **call: Any) -> np.ndarray:
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    attach_to_scheduler(pipe.scheduler, grids, pipe.unet)
    return call_pipeline(pipe, [1, 2], steps=10, **call)


def test_no_effect_on_ddim_without_noise_and_one_with_it() -> None:
    grids = {"sigma": variance_grid(DDIMScheduler(), 10)}
    assert np.array_equal(images("ddim", grids), images("ddim", {}))
    for scheduler, call in (("ddim", {"eta": 1.0}), ("ddpm", {})):
        plain, got = images(scheduler, {}, **call), images(scheduler, grids, **call)
        # Half a step of 255 in the variance: visible in float, far from another picture.
        assert 1e-5 < np.abs(got - plain).mean() < 0.05


def test_samplers_without_a_variance_are_refused() -> None:
    scheduler = swap_scheduler(tiny_unconditional(), "euler").scheduler
    for refused in (
        lambda: variance_grid(scheduler, 10),
        lambda: attach_to_scheduler(scheduler, {"sigma": GRID}, tiny_unet()),
    ):
        with pytest.raises(QuantempoError, match="got sigma of EulerDiscreteScheduler"):
            refused()
    learned = DDPMScheduler(variance_type="learned_range")
    with pytest.raises(QuantempoError, match="variance_type 'learned_range'"):
        variance_grid(learned, 10)
