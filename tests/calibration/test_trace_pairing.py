"""The recorded x_t carries the noise of the recorded t, checked with a network that knows x_0.

An oracle returns the true noise, so an ODE solver stays on the line
x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps with the eps that its seed decided: recorded rows are
compared with that line number by number. Ancestral sampling draws new noise, so only its level can
be compared, with a tolerance from the sampling distribution of a variance.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor, nn

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.models.sampling import swap_scheduler

SEED = 1_000


def noise_law(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return sqrt(ab_t), sqrt(1 - ab_t) for linear betas, T = 1000; t (N,) may be fractional.

    Between integers the noise-to-signal ratio is interpolated, which is how Euler-type schedulers
    define a fractional time-step. Written from the definition, not with a scheduler.
    """
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    alpha_bar = np.cumprod(1 - betas)
    ratio = np.interp(t.double().numpy(), np.arange(1000), np.sqrt((1 - alpha_bar) / alpha_bar))
    signal = torch.from_numpy(1 / np.sqrt(1 + ratio**2))
    return signal, torch.from_numpy(ratio) * signal


class Oracle(nn.Module):
    """Return the noise in x_t when the image is known: (x_t - sqrt(ab_t) x_0) / sqrt(1 - ab_t)."""

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.image = nn.Parameter(image, requires_grad=False)
        self.config = SimpleNamespace(sample_size=image.shape[-1], in_channels=image.shape[0])
        self.dtype, self.device = image.dtype, image.device

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        t = torch.as_tensor(timestep).reshape(-1).expand(len(sample))
        signal, noise = (value.view(-1, 1, 1, 1) for value in noise_law(t))
        return SimpleNamespace(sample=((sample - signal * self.image) / noise).to(sample.dtype))


def record(
    folder: Path, scheduler: str, steps: int, *, size: int, chains: int, **settings: Any
) -> tuple[TraceSet, Tensor]:
    """Trace every step of an oracle once a chain; return the trace and x_0."""
    # Bits of noise, scaled away from the clipping range of x_0.
    draw = torch.randint(0, 2, (3, size, size), generator=torch.Generator().manual_seed(5))
    image = 1.6 * draw.float() - 0.8
    pipe: Any = DDIMPipeline(Oracle(image), DDIMScheduler(**settings))
    if scheduler == "ddpm":
        pipe = DDPMPipeline(pipe.unet, DDPMScheduler(**settings))
    elif scheduler != "ddim":
        pipe = swap_scheduler(pipe, scheduler)
    data = trace(
        pipe,
        pipe.unet,
        folder / "trace",
        steps=steps,
        chains=chains,
        picks=steps,
        time_sampler=make_time_sampler("linspace"),
        seed=SEED,
        batch_size=2,
    )
    return data, image


def neighbours(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the next lower and next higher time of the schedule (or its own)."""
    times = timesteps.unique()
    place = torch.searchsorted(times, timesteps)
    return times[(place - 1).clamp(min=0)], times[(place + 1).clamp(max=len(times) - 1)]


@pytest.mark.parametrize(
    ("scheduler", "steps", "settings"),
    [
        ("ddim", 20, {}),
        ("ddim", 50, {}),
        ("ddim", 100, {}),
        ("ddim", 20, {"timestep_spacing": "trailing"}),
        ("ddim", 30, {}),
        ("dpm++", 20, {}),
        ("dpm++", 20, {"timestep_spacing": "leading"}),
        # Euler's default times are fractional and its input is x / sqrt(sigma^2 + 1)
        ("euler", 20, {}),
        ("euler", 50, {"timestep_spacing": "leading"}),
        # two calls a step
        ("heun", 12, {}),
    ],
)
def test_ode_rows_lie_on_the_line_of_their_time_and_seed(
    tmp_path: Path, scheduler: str, steps: int, settings: dict
) -> None:
    data, image = record(tmp_path, scheduler, steps, size=8, chains=3, **settings)
    assert len(data) == 3 * steps
    assert len(data.timesteps.unique()) == steps
    rows = data.rows(torch.arange(len(data)))
    # x_T of a chain from its seed alone; eps is what the oracle sees in it at the first call.
    start = torch.stack(
        [
            torch.randn(image.shape, generator=torch.Generator().manual_seed(SEED + int(c)))
            for c in data.column("chain")
        ]
    ).double()
    first = data.timesteps.max().expand(len(data))
    signal_0, noise_0 = (value.view(-1, 1, 1, 1) for value in noise_law(first))
    if scheduler in ("euler", "heun") and settings.get("timestep_spacing") != "leading":
        # these start from x_T sigma_max, which the input scaling turns into x_T noise_0
        start = start * noise_0
    eps = (start - signal_0 * image) / noise_0

    def error(timesteps: Tensor) -> Tensor:
        signal, noise = (value.view(-1, 1, 1, 1) for value in noise_law(timesteps))
        return (rows.x_t - (signal * image + noise * eps)).abs().amax((1, 2, 3))

    lower, higher = neighbours(data.timesteps)
    shifted = torch.minimum(
        error(lower).where(lower != data.timesteps, torch.inf),
        error(higher).where(higher != data.timesteps, torch.inf),
    )
    # Values up to 4 round to 2^-23 in float32, a dozen roundings a step, no growth along the line.
    # Heun works on x sqrt(sigma^2 + 1), up to 600, where one rounding is 3e-5.
    assert float(error(data.timesteps).max()) < (2e-4 if scheduler == "heun" else 1e-5)
    # The same comparison one step off fails for every single row.
    assert float(shifted.min()) > 5e-4


def test_ancestral_rows_have_the_noise_level_of_their_time(tmp_path: Path) -> None:
    """DDPM: the residual about the line through x_0 has variance 1 - ab_t at the stored t.

    Over n values its standard deviation has relative standard error 1 / sqrt(2 n). 5 errors on 20
    times: false-alarm rate 20 * 6e-7 = 1e-5 for another seed. Starting from N(0, I) instead of
    q(x_T | x_0) changes the variance by ab_T = 1e-4 of itself, a tenth of an error.
    """
    steps, chains, size = 20, 16, 64
    data, image = record(tmp_path, "ddpm", steps, size=size, chains=chains)
    n = chains * image.numel()
    level: dict[int, float] = {}
    columns = data.timesteps
    for t in columns.unique().tolist():
        x = data.rows((columns == t).nonzero()[:, 0]).x_t.double()
        slope = (x * image).sum() / (image.square().sum() * len(x))
        level[t] = float((x - slope * image).square().mean().sqrt())
    times = torch.tensor(sorted(level))
    measured = torch.tensor([level[t] for t in times.tolist()], dtype=torch.float64)
    assert len(times) == steps

    def worst(timesteps: Tensor) -> float:
        expected = noise_law(timesteps)[1]
        return float(((measured / expected - 1).abs() * math.sqrt(2 * n)).max())

    assert worst(times) < 5
    # labels one step off, and the order reversed as in the paper's released program
    assert worst((times - 50).clamp(min=0)) > 50
    assert worst((times + 50).clamp(max=999)) > 50
    assert worst(times.flip(0)) > 50
