"""Places in time: every unit, direction and spacing that networks receive."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from quantempo.quantized import Times

STEPS = 20
EVEN = torch.linspace(1, 0, STEPS + 1)[:-1].double()
SHIFTED = 7 * EVEN / (1 + 6 * EVEN)
SIGMAS = torch.logspace(3, -2, STEPS).double()

# What networks receive from the first call to the last.
RUNS: dict[str, Tensor] = {
    "t / 1000": EVEN, "t / 1000, shifted": SHIFTED, "t of 1000, shifted": 1000 * SHIFTED,
    "1 - t / 1000": 1 - EVEN, "1 - t / 1000, shifted": 1 - SHIFTED, "bfloat16": SHIFTED.bfloat16(),
    "ln(sigma) / 4": SIGMAS.log() / 4, "consistency model": 250 * SIGMAS.log(), "sigma": SIGMAS,
    "few steps": torch.tensor([1.0, 0.75]), "one step": torch.tensor([999]),
    "t of 1000 to 900": torch.arange(1000.0, 900.0, -5.0),
}  # fmt: skip


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
@pytest.mark.parametrize("steps", [None, 1000, 40])
def test_places_are_ranks_from_the_image_on(run: Tensor, steps: int | None) -> None:
    times = Times.of(list(run), steps)
    ranks = torch.arange(len(run)).flip(0)
    if times.count == steps:
        assert torch.equal(times.index(run), run.round().long().clamp(max=steps - 1))
        return
    assert times.count == len(run) and torch.equal(times.index(run), ranks)
    # Between two: the nearer one. Beyond the ends: held there.
    for near, far in itertools.pairwise(run):
        middle = near.double() + 0.45 * (far.double() - near.double())
        assert int(times.index(middle)) == int(times.index(near))
    ends = torch.tensor([-1e6, 1e6]) * (-1 if bool(run[-1] > run[0]) else 1)
    assert times.index(ends.double()).tolist() == [0, len(run) - 1]


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 30, 50, 100, 250, 600, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_runs_over_all_training_time_steps_keep_these(steps: int, spacing: str) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = Times.of(list(scheduler.timesteps), 1000)
    assert times == Times(1000) or steps == 1
    t = torch.tensor([-3.0, 0.0, 61.4, 61.6, 999.0, 1000.0])
    if steps > 1:
        assert times.index(t).tolist() == [0, 0, 61, 62, 999, 999]


def test_repeated_and_unordered_calls_are_one_time() -> None:
    run = torch.tensor([0.9, 0.7, 0.7, 0.9, 0.4, 0.1])
    assert Times.of(list(run)).index(run).tolist() == [3, 2, 2, 3, 1, 0]


@pytest.mark.parametrize("run", [1000 * SHIFTED, 1000 * EVEN, SHIFTED])
def test_clean_tokens_have_a_place_of_their_own(run: Tensor) -> None:
    calls = [torch.tensor([[0.0, t, t], [0.0, t, t]]) for t in run]
    times = Times.of(calls, 1000)
    assert times.clean and times.count == len(run) + 1
    assert times.index(calls[0]).tolist() == [[0, STEPS, STEPS]] * 2
    assert [int(times.noisiest(call)[0]) for call in calls] == list(range(STEPS, 0, -1))
