"""Corrections around a network: tables, step coefficients, absorbed variance, earlier times."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.models.schedule import (
    alpha_bars,
    scale_noise,
    step_coefficients,
    stepback_times,
    wrap_stepback,
)
from quantempo.quantized import install_clock
from quantempo.quantized.correction import (
    CORRECTION_NAME,
    OutputCorrection,
    attach_correction,
    find_correction,
    install_correction,
    without_stepback,
)
from tests.tiny import tiny_unet

KINDS = pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(options: tuple[str, ...] = ("affine",), points: int = 4) -> OutputCorrection:
    """A correction of 3 channels at times 0, 100, 300, ... with random tables."""
    correction = OutputCorrection(options, points, 3, points)
    times = torch.tensor([0.0, 100.0, 300.0, 900.0])[:points]
    tables = {name: noise(points, 3, seed=i) for i, name in enumerate(("gain", "shift"))}
    correction.replace(times=times, variance_times=times, **tables)
    return correction


def test_without_a_fit_it_is_the_identity_bit_for_bit() -> None:
    x = noise(2, 6, 5, 5)
    assert torch.equal(OutputCorrection(("affine",), 3, 3)(x, torch.tensor(40)), x)


def test_tables_are_linear_in_time_and_constant_outside() -> None:
    correction, times = filled(), [-50.0, 0.0, 30.0, 100.0, 170.5, 300.0, 899.0, 900.0, 2000.0]
    got = correction.at(correction.gain, torch.tensor(times))
    points = correction.times.double().numpy()
    for c in range(3):
        wanted = np.interp(times, points, correction.gain[:, c].double().numpy())
        # One float32 rounding of the share of an interval, one of the result.
        np.testing.assert_allclose(got[:, c].numpy(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(correction.at(correction.gain, correction.times), correction.gain)


def test_every_sample_gets_the_correction_of_its_own_time() -> None:
    correction, x, t = filled(), noise(4, 3, 5, 5), torch.tensor([0, 170, 900, 33])
    whole = correction(x, t)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], correction(x[i : i + 1], t[i]))
    # A batch that is a multiple of the times, as in layers: rows of a time stand together.
    assert torch.equal(correction(x, t[:2])[:2], correction(x[:2], t[0]))


def test_a_learned_variance_and_tokens() -> None:
    correction, t = filled(), torch.tensor(170)
    x = noise(2, 6, 5, 5)
    got = correction(x, t)
    assert torch.equal(got[:, 3:], x[:, 3:]) and not torch.equal(got[:, :3], x[:, :3])
    # (B, tokens, C): the same numbers with the channels last.
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(correction(tokens, t), got.flatten(2).transpose(1, 2))
    assert correction(x.bfloat16(), t).dtype == torch.bfloat16


def test_tables_stay_float32_in_a_bfloat16_network() -> None:
    correction = filled()
    before = {name: value.clone() for name, value in correction.tables().items()}
    correction.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in correction.tables().items())


def test_options_and_tables_are_checked() -> None:
    with pytest.raises(QuantempoError, match="unknown correction 'afine'"):
        OutputCorrection(("afine",))
    with pytest.raises(QuantempoError, match="switch one of them off"):
        OutputCorrection(("absorb", "stepback"))
    with pytest.raises(QuantempoError, match="expected times, gain"):
        filled().replace(gains=torch.ones(1, 1))
    with pytest.raises(QuantempoError, match="not quantized"):
        install_correction(tiny_unet(), filled())


class Net(nn.Module):
    """A denoiser that shows what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None
        self.config = SimpleNamespace(in_channels=3, out_channels=3)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.seen = (sample, timestep)
        return (sample * 2,)


def ready(correction: OutputCorrection, per_unit: float = 1.0) -> Net:
    net = Net()
    install_clock(net, torch.zeros(1000, dtype=torch.int64), per_unit)
    install_correction(net, correction)
    return net


def test_the_hook_corrects_what_the_network_returns() -> None:
    x, correction = noise(2, 3, 4, 4), filled()
    wanted = correction(2 * x, torch.tensor(170.0))
    assert torch.equal(ready(filled())(x, torch.tensor(170))[0], wanted)
    # A network that is given t / T.
    assert torch.equal(ready(filled(), 1000.0)(x, timestep=torch.tensor(0.170))[0], wanted)
    net = ready(filled())
    with pytest.raises(QuantempoError, match="has a correction already"):
        install_correction(net, filled())


def test_it_compiles_without_a_graph_break() -> None:
    net, x, t = ready(filled()), noise(2, 3, 4, 4), torch.tensor(170)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t)[0], net(x, t)[0])


def made(kind: Any, **settings: Any) -> Any:
    scheduler = kind(num_train_timesteps=1000, clip_sample=False, **settings)
    scheduler.set_timesteps(10)
    return scheduler


def step(scheduler: Any, output: Tensor, t: int, x: Tensor, **kwargs: Any) -> Tensor:
    return scheduler.step(
        output, t, x, generator=torch.Generator().manual_seed(1), **kwargs
    ).prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("kind", "eta"), [(DDIMScheduler, 0), (DDIMScheduler, 0.7),
                                           (DDIMScheduler, 1), (DDPMScheduler, None)])  # fmt: skip
def test_coefficients_are_the_derivatives_of_the_scheduler_s_step(
    kind: Any, eta: float | None, prediction: str
) -> None:
    scheduler = made(kind, prediction_type=prediction)
    extra = {} if eta is None else {"eta": eta}
    output, x = noise(1, 1, 4, 4).double(), noise(1, 1, 4, 4, seed=1).double()
    for t in scheduler.timesteps.tolist():
        variance = 0.0 if eta is None else eta**2 * float(scheduler._get_variance(t, t - 100))
        c, r = step_coefficients(scheduler, t, variance)
        plain = step(scheduler, output, t, x, **extra)
        # Steps are linear, so differences are derivatives; abar is float32 inside the scheduler.
        by_output = step(scheduler, output + 1, t, x, **extra) - plain
        by_sample = step(scheduler, output, t, x + 1, **extra) - plain
        assert float((by_output - c).abs().max()) < 2e-5 * max(1, abs(c))
        assert float((by_sample - r).abs().max()) < 2e-5 * max(1, abs(r))


VARIANCE, ERROR = 0.3, 0.3


def variances(kind: Any, how: str, known: dict[int, float] | None = None) -> dict[int, float]:
    """Variance of x_t at every time of a toy whose x_0 ~ N(0, 0.3), down to time 300.

    eps(x) = k x with k = sqrt(1 - a) / (0.3 a + 1 - a) is exact; "noisy" adds independent noise of
    variance 0.09, "shrunk" multiplies that by its least-squares gain. Below 300 the schedule adds
    less noise than there is to absorb.

    Args:
        known: Var(x_t) of the exact network, from which the tables follow in closed form.
    """
    scheduler, correction = made(kind), OutputCorrection(("absorb",), 6)
    bars, times = alpha_bars(scheduler), made(kind).timesteps[:6]
    k = (1 - bars).sqrt() / (bars * VARIANCE + 1 - bars)
    gain = torch.ones(1000, dtype=torch.float64)
    if known is not None:
        x_var = torch.tensor([known[int(t)] for t in times], dtype=torch.float64)
        power = k[times] ** 2 * x_var
        if "shrunk" in how:
            gain[times] = power / (power + ERROR**2)
        spread = gain[times] ** 2 * (power + ERROR**2) - power
        tables = {"spread": spread, "along": (gain[times] - 1) * k[times] * x_var}
        tables = {name: value.flip(0)[:, None] for name, value in tables.items()}
        correction.replace(times=times.flip(0), **tables)
        if "absorb" in how:
            scale_noise(scheduler, correction.excess)
    extra = {"eta": 1.0} if kind is DDIMScheduler else {}
    g, found = torch.Generator().manual_seed(0), {}
    x = torch.randn((1, 1, 500, 800), generator=g)
    for t in times.tolist():
        found[t] = float(x.var())
        eps = float(k[t]) * x
        if how != "exact":
            eps = float(gain[t]) * (eps + ERROR * torch.randn(x.shape, generator=g))
        x = scheduler.step(eps, t, x, generator=g, **extra).prev_sample
    return {**found, 300: float(x.var())}


@KINDS
@pytest.mark.parametrize("how", ["noisy", "shrunk"])
def test_absorbing_restores_the_variance_of_a_gaussian_toy(kind: Any, how: str) -> None:
    exact = variances(kind, "exact")
    assert variances(kind, how, exact)[300] > 1.08 * exact[300]
    absorbed = variances(kind, how + " absorb", exact)
    for t, wanted in exact.items():
        # 400,000 values: a variance has a relative standard error of 0.22 %, a ratio of two
        # 0.32 %; 1.3 % is four of them (28 comparisons: a false alarm in 500 runs).
        assert absorbed[t] == pytest.approx(wanted, rel=0.013), t


def test_absorbing_nothing_changes_no_bit() -> None:
    for kind, extra in ((DDIMScheduler, {"eta": 1.0}), (DDPMScheduler, {})):
        plain, wrapped = made(kind), made(kind)
        scale_noise(wrapped, OutputCorrection(("absorb",)).excess)
        x, output = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=2)
        for t in plain.timesteps.tolist():
            assert torch.equal(
                step(wrapped, output, t, x, **extra), step(plain, output, t, x, **extra)
            )


def test_absorbing_says_when_it_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    excess = OutputCorrection(("absorb",)).excess
    with caplog.at_level(logging.WARNING, "quantempo"):
        scale_noise(DPMSolverMultistepScheduler(), excess)
        assert "does nothing with DPMSolverMultistepScheduler" in caplog.text
        scheduler, x = made(DDIMScheduler), noise(1, 3, 4, 4)
        scale_noise(scheduler, excess)
        caplog.clear()
        for t in scheduler.timesteps.tolist():
            step(scheduler, x, t, x)
    assert caplog.text.count("eta = 0") == 1


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])
def test_ddpm_takes_the_surplus_out_of_its_variance(kind: str) -> None:
    scheduler = made(DDPMScheduler, variance_type=kind)
    plain = made(DDPMScheduler, variance_type=kind)
    x, learned = torch.zeros(4, 3, 100, 100), kind == "learned_range"
    output = torch.zeros(4, 6, 100, 100) if learned else x
    t = scheduler.timesteps.tolist()[4]
    before = step(plain, output, t, x)
    share = torch.tensor([0.0, 0.25, 2.0])
    scale_noise(scheduler, lambda *_: share * before.double().var())
    after = step(scheduler, output, t, x)
    # The same numbers, scaled by sqrt(1 - share); the sample variance of 120,000 values stands
    # in for the true one: 0.4 %, 0.1 % of it after the root at a share of a quarter.
    assert torch.allclose(after[:, 0], before[:, 0], rtol=1e-6, atol=0)
    assert torch.allclose(after[:, 1], before[:, 1] * 0.75**0.5, rtol=6e-3, atol=0)
    assert float(after[:, 2].abs().max()) < 1e-8


def test_earlier_times_are_the_nearest_in_abar() -> None:
    bars = alpha_bars(DDIMScheduler())
    variance = noise(1000).abs().double() * 0.1
    variance[::7] = 0
    target = bars / (1 + variance)
    distance = (bars[None, :] - target[:, None]).abs()
    distance[torch.ones(1000, 1000).tril(-1).bool()] = float("inf")
    assert torch.equal(stepback_times(bars, variance), distance.argmin(1))
    assert torch.equal(stepback_times(bars, torch.zeros(1000)), torch.arange(1000))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [False, True])
def test_the_update_is_that_of_ddim_from_tau(eta: float, clip: bool) -> None:
    scheduler = DDIMScheduler(clip_sample=clip)
    scheduler.set_timesteps(10)
    bars = alpha_bars(scheduler)
    x, eps = noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=3)
    for t in scheduler.timesteps.tolist()[:-1]:
        tau, a, after = min(t + 37, 999), bars[t], bars[t - 100]
        extra = {"eta": eta, "variance_noise": noise(2, 3, 4, 4, seed=4)}
        stepped = DDIMScheduler(clip_sample=clip)
        stepped.set_timesteps(10)
        wrap_stepback(stepped, lambda _, tau=tau, a=a: (torch.tensor(tau), a, bars[tau]))
        got = stepped.step(eps, t, x, **extra).prev_sample
        # Eq. 12 of DDIM from a_tau, in float64: x' = sqrt(a_tau / a_t) x is a sample of time tau.
        moved = (bars[tau] / a).sqrt() * x.double()
        clean = (moved - (1 - bars[tau]).sqrt() * eps.double()) / bars[tau].sqrt()
        clean = clean.clamp(-1, 1) if clip else clean
        sigma = eta**2 * (1 - after) / (1 - a) * (1 - a / after)
        wanted = after.sqrt() * clean + (1 - after - sigma).sqrt() * eps
        wanted = wanted + sigma.sqrt() * extra["variance_noise"]
        # x_0 is divided by sqrt(abar), down to 0.006, twice in float32.
        limit = 1e-6 if clip else 1e-6 / float(bars[tau].sqrt())
        assert float((got - wanted).abs().max()) < 20 * limit


def test_where_nothing_is_surplus_the_sample_is_untouched() -> None:
    scheduler, x = made(DDIMScheduler), noise(2, 3, 4, 4)
    correction = OutputCorrection(("stepback",))
    net = ready(correction)
    attach_correction(scheduler, net)
    assert torch.equal(step(scheduler, x, 500, x), step(made(DDIMScheduler), x, 500, x))
    assert torch.equal(net(x, torch.tensor(500))[0], 2 * x)


def test_the_network_and_the_clock_see_the_earlier_time() -> None:
    correction, x = OutputCorrection(("affine", "stepback")), noise(2, 3, 4, 4)
    net, scheduler = ready(correction), made(DDIMScheduler)
    table = torch.arange(1000)
    net.quantempo_clock.bucket_of = table
    correction.replace(variance=torch.tensor([0.05]))
    # Not attached to a scheduler it does not act: the update would not know.
    net(x, torch.tensor(500))
    assert torch.equal(net.seen[0], x) and int(net.seen[1]) == 500
    attach_correction(scheduler, net)
    bars = alpha_bars(scheduler)
    tau = int((bars - bars[500] / 1.05).abs().argmin())
    for args, kwargs in (
        ((x, torch.tensor(500)), {}),
        ((x,), {"timestep": 500}),
        ((), {"sample": x, "timestep": torch.tensor([500, 500])}),
    ):
        net(*args, **kwargs)
        seen, time = net.seen
        assert tau > 500 and time.reshape(-1).unique().tolist() == [tau]
        wanted = x * float((bars[tau] / bars[500]).sqrt())
        torch.testing.assert_close(seen, wanted, rtol=1e-6, atol=0)
        assert net.quantempo_clock.bucket.reshape(-1).unique().tolist() == [tau]
    with without_stepback(net):
        net(x, torch.tensor(500))
    assert torch.equal(net.seen[0], x)
    assert CORRECTION_NAME in dict(net.named_children()) and find_correction(net) is correction


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (EulerDiscreteScheduler(), "cannot be used with EulerDiscreteScheduler"),
        (DDIMScheduler(prediction_type="v_prediction"), "predicts 'v_prediction'"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True), "has use_karras_sigmas"),
    ],
)
def test_stepback_refuses_what_it_cannot_do(scheduler: Any, message: str) -> None:
    with pytest.raises(QuantempoError, match=message):
        attach_correction(scheduler, ready(OutputCorrection(("stepback",))))
