"""The released pairing against a right trace of the same seeds in which every step is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.legacy import legacy_indices
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.errors import QuantempoError
from quantempo.models.sampling import call_pipeline, swap_scheduler
from quantempo.recipe import Recipe
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional

STEPS = 6
# Two batches, the second one smaller.
PLAN: dict[str, Any] = {"steps": STEPS, "chains": 5, "seed": 70, "batch_size": 3}


def run(
    folder: Path, pipe: Any, law: str = "linspace", picks: int = STEPS, **more: Any
) -> TraceSet:
    net = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    law_of = make_time_sampler(law)
    return trace(pipe, net, folder, **{**PLAN, "picks": picks, "time_sampler": law_of, **more})


def finished(pipe: Any, output_type: str = "np", **call: Any) -> list[Any]:
    """Return what the pipeline gives for each chain, in the batches of the trace."""
    found: list[Any] = []
    for first in range(0, PLAN["chains"], PLAN["batch_size"]):
        last = min(first + PLAN["batch_size"], PLAN["chains"])
        seeds = range(PLAN["seed"] + first, PLAN["seed"] + last)
        how = {"steps": STEPS, "first": first, "output_type": output_type, **call}
        found += list(call_pipeline(pipe, seeds, **how))
    return found


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpm++"])
def test_label_l_holds_the_input_of_index_k_minus_2_minus_l(tmp_path: Path, scheduler: str) -> None:
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    right = run(tmp_path / "right", pipe)
    wrong = run(tmp_path / "wrong", pipe, legacy_pairing=True)
    # (chains, index of the step, ...): the time grows with the index.
    inputs = right.column("x_t").view(5, STEPS, 3, 16, 16)
    assert bool((right.timesteps.view(5, STEPS).diff(dim=1) > 0).all())
    kept = wrong.column("x_t").view(5, STEPS, 3, 16, 16)
    assert torch.equal(wrong.timesteps, torch.arange(STEPS).repeat(5))
    assert wrong.timesteps.dtype == torch.int64
    for label in range(STEPS - 1):
        assert torch.equal(kept[:, label], inputs[:, STEPS - 2 - label])
    # Label 0 is one step from pure noise, label K - 1 is no input of the network at all.
    images = torch.from_numpy(np.stack(finished(pipe))).movedim(-1, 1)
    assert torch.equal(kept[:, STEPS - 1], 2 * images - 1)
    assert wrong.column("call").view(5, STEPS)[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_labels_follow_the_law_and_may_repeat(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    right = run(tmp_path / "right", pipe)
    wrong = run(tmp_path / "wrong", pipe, "ndtc_repo", picks=3, legacy_pairing=True)
    labels = torch.tensor(wrong.info["target_steps"])
    assert torch.equal(wrong.timesteps.view(5, 3), labels)
    assert int((labels == STEPS - 1).sum()) > 0
    plain = run(tmp_path / "plain", pipe, "ndtc_repo", picks=3)
    assert plain.info["target_steps"] == wrong.info["target_steps"]
    inputs = right.column("x_t").view(5, STEPS, 3, 16, 16)
    images = torch.from_numpy(np.stack(finished(pipe))).movedim(-1, 1)
    for row, x_t in enumerate(wrong.column("x_t")):
        chain, label = row // 3, int(labels.flatten()[row])
        last = label == STEPS - 1
        wanted = 2 * images[chain] - 1 if last else inputs[chain, STEPS - 2 - label]
        assert torch.equal(x_t, wanted)


def test_the_label_comes_in_the_dtype_of_the_time(tmp_path: Path) -> None:
    pipe = swap_scheduler(tiny_unconditional(), "euler")
    wrong = run(tmp_path / "wrong", pipe, legacy_pairing=True)
    assert wrong.timesteps.dtype == torch.float32
    assert wrong.timesteps.view(5, STEPS)[3].tolist() == [0, 1, 2, 3, 4, 5]


def test_latents_are_paired_the_same_way_in_both_halves(tmp_path: Path) -> None:
    pipe, call = tiny_text(), {"prompt": ["a cat", "dog"]}
    right = run(tmp_path / "right", pipe, call=call)
    wrong = run(tmp_path / "wrong", pipe, call=call, legacy_pairing=True)
    # (chains, index, halves, ...)
    inputs, kept = (d.column("x_t").view(5, STEPS, 2, 4, 8, 8) for d in (right, wrong))
    assert torch.equal(kept[:, :-1], inputs[:, :-1].flip(1))
    latents = torch.stack(finished(pipe, "latent", **call))
    assert torch.equal(kept[:, -1, 0], latents) and torch.equal(kept[:, -1, 1], latents)


def test_the_conditioning_stays_with_its_chain(tmp_path: Path) -> None:
    call = {"prompt": ["a cat", "dog"]}
    right = run(tmp_path / "right", tiny_text(), call=call)
    wrong = run(tmp_path / "wrong", tiny_text(), call=call, legacy_pairing=True)
    every = torch.arange(len(right))
    states: list[Tensor] = [d.rows(every).cond["encoder_hidden_states"] for d in (right, wrong)]
    assert torch.equal(*states)


def test_a_pipeline_that_hides_its_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantempoError, match=r"finished x_0 of shape \(4, 8, 8\).*\(3, 16, 16\)"):
        run(tmp_path / "t", tiny_dit(), call={"class_labels": 3}, legacy_pairing=True)


def test_indices_at_the_sizes_of_the_paper() -> None:
    """T - 2 - t at 250 steps; the program's own rows had the noise of 176, 140, 94, 43."""
    labels = torch.tensor([74, 105, 154, 205, 0, 248])
    assert legacy_indices(labels, 250).tolist() == [174, 143, 94, 43, 248, 0]
    # The finished image has no index; that of the last input stands in.
    assert legacy_indices(torch.tensor([249]), 250).tolist() == [0]


def test_a_recipe_cannot_ask_for_both() -> None:
    assert not Recipe().trace.legacy_pairing and Recipe().trace.source == "trajectory"
    with pytest.raises(QuantempoError, match=r"legacy_pairing = true with trace\.source = 'noise'"):
        Recipe.from_dict({"trace": {"legacy_pairing": True, "source": "noise"}})
