"""The released pairing against a right trace of the same seeds in which every step is kept."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.models.sampling import call_pipeline
from quantempo.recipe import Recipe
from studies.ptq4dm.calibrations import Calibrator
from studies.ptq4dm.cells import Row, Sampler
from studies.ptq4dm.released_pairs import ReleasedPairs
from tests.tiny import tiny_unconditional

STEPS, CHAINS, SEED, BATCH = 6, 8, 70, 3


@pytest.mark.parametrize("law", ["ndtc_repo", "linspace"])
def test_label_l_holds_the_input_of_index_k_minus_2_minus_l(tmp_path: Path, law: str) -> None:
    pipe = tiny_unconditional()
    right = trace(
        pipe, pipe.unet, tmp_path / "right", steps=STEPS, chains=CHAINS, picks=STEPS,
        time_sampler=make_time_sampler("linspace"), seed=SEED, batch_size=BATCH,
    )  # fmt: skip
    inputs = right.column("x_t").view(CHAINS, STEPS, 3, 16, 16)
    assert bool((right.timesteps.view(CHAINS, STEPS).diff(dim=1) > 0).all())
    images: list[Any] = []
    for first in range(0, CHAINS, BATCH):
        seeds = range(SEED + first, SEED + min(first + BATCH, CHAINS))
        images += list(call_pipeline(pipe, seeds, steps=STEPS, first=first))
    finished = 2 * torch.from_numpy(np.stack(images)).movedim(-1, 1) - 1
    recipe = Recipe.load("ptq4dm").override("trace", chains=CHAINS, time_sampler=law)
    cell = Row("", Sampler("ddim", STEPS), 2, recipe, released=True).cells(1)[0]
    calibrator, step = Calibrator(tmp_path, "model", BATCH), pipe.scheduler.step
    with ExitStack() as stack:
        wrong: TraceSet = stack.enter_context(calibrator.traced(pipe, cell, SEED))
        labels, x_t = wrong.timesteps.tolist(), wrong.column("x_t")
    if law == "linspace":
        assert sorted(set(labels)) == list(range(STEPS))
    for chain, label in enumerate(labels):
        if label == STEPS - 1:
            # No input of the network at all; out of the pipeline it comes clipped and rounded.
            torch.testing.assert_close(x_t[chain].clamp(-1, 1), finished[chain], rtol=0, atol=1e-6)
        else:
            assert torch.equal(x_t[chain], inputs[chain, STEPS - 2 - label])
    assert pipe.scheduler.step == step and list(tmp_path.glob("tmp*")) == []


def test_labels_and_indices_are_one_draw_at_the_sizes_of_the_paper() -> None:
    """T - 2 - t at 250 steps: 74, 105 -> 174, 143; the finished image stands at index 0."""
    law = ReleasedPairs("ndtc_repo")
    draws = [torch.Generator().manual_seed(3) for _ in range(3)]
    labels, index = law.labels(4000, 250, draws[0]), law.sample(4000, 250, draws[1])
    plain = make_time_sampler("ndtc_repo").sample(4000, 250, draws[2])
    assert torch.equal(labels.sort().values, plain.sort().values)
    assert torch.equal(index, (248 - labels).clamp(min=0)) and bool((index.diff() >= 0).all())
    density = law.density(250)
    assert float(density.sum()) == pytest.approx(1) and len(density) == 250
    wanted = make_time_sampler("ndtc_repo").density(250)
    assert float(density[174]) == float(wanted[74]) and density[249] == 0
    assert float(density[0]) == pytest.approx(float(wanted[248] + wanted[249]))


@pytest.mark.parametrize("source", ["mimic", "raw", "noise"])
def test_a_source_put_into_kept_trajectories_is_that_of_a_trace(tmp_path, source):
    pipe, images = tiny_unconditional(), np.zeros((3, 16, 16, 3), np.uint8) + np.uint8(200)
    recipe = Recipe.load("ptq4dm").override("trace", chains=CHAINS, source=source)
    cell = Row("", Sampler("ddim", STEPS), 2, recipe).cells(1)[0]
    calibrator = Calibrator(tmp_path / "scratch", "model", BATCH)
    law = make_time_sampler(recipe.trace.time_sampler)
    how: dict[str, Any] = {"steps": STEPS, "chains": CHAINS, "picks": 1, "time_sampler": law}
    how |= {"seed": SEED, "batch_size": BATCH, "source": source, "images": images}
    wanted = trace(pipe, pipe.unet, tmp_path / "wanted", **how)
    with ExitStack() as stack:
        kept = stack.enter_context(calibrator.traced(pipe, cell, SEED))
        plain = kept.column("x_t")
        got = stack.enter_context(calibrator.sourced(kept, pipe, cell, images))
        for name in ("x_t", "t", "chain", "pick", "call"):
            assert torch.equal(got.column(name), wanted.column(name)), name
        assert torch.equal(kept.column("x_t"), plain)
        assert not torch.equal(got.column("x_t"), plain)
    assert list((tmp_path / "scratch").iterdir()) == []
