"""Pipelines whose networks move about are quantized like others; budgets of time are kept."""

from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from quantempo.calibration import trace
from quantempo.errors import QuantempoError
from quantempo.pipeline import session, stages
from tests.packed import CALLS, recipe, saved
from tests.tiny import tiny_text

CPU: Any = {"device": "cpu"}
LEAVES: Any = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}


@pytest.mark.parametrize("how", ["model", "sequential", "group", "map"])
def test_an_offloaded_pipeline_gives_the_same_bytes(how: str, tmp_path: Path, caplog: Any) -> None:
    pipe = tiny_text()
    if how == "map":
        dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)
        pipe.hf_device_map = {"unet": "cpu"}
    elif how == "group":
        pipe.enable_group_offload(**LEAVES)
    else:
        getattr(pipe, f"enable_{how}_cpu_offload")(**CPU)
    sessions = [
        stages.load(source, tmp_path / str(i), recipe(), call=CALLS["text"])
        for i, source in enumerate((saved("text"), pipe))
    ]
    one, two = (stages.trace(one).info["chunks"] for one in sessions)
    assert one == two and sessions[0].identity == sessions[1].identity
    assert "are removed" in caplog.text and pipe.hf_device_map is None


def test_a_budget_is_kept_and_chosen_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level("INFO", "quantempo")
    how: Any = {"recipe": recipe().override("trace", steps=50, chains=32, picks=8)}
    # One second a call: 300 of the budget of 10 minutes, of which chain and step take one.
    monkeypatch.setattr(trace, "time", SimpleNamespace(perf_counter=count().__next__))
    found = stages.load(saved("unconditional"), tmp_path / "run", minutes=10, **how).recipe.trace
    assert 150 < found.chains * (found.steps + 8 * min(found.steps, 8)) <= 300
    assert f"{found.chains} chains of {found.steps} steps" in caplog.text
    monkeypatch.setattr(session, "affordable", None)
    again = stages.load(saved("unconditional"), tmp_path / "run", minutes=10, **how)
    assert again.recipe.trace == stages.reopen(tmp_path / "run").recipe.trace == found
    # Also by force.
    assert stages.reopen(tmp_path / "run", force=True).recipe.trace == found
    # What was asked otherwise is measured anew; few steps count as well.
    monkeypatch.setattr(session, "affordable", trace.affordable)
    how["recipe"] = how["recipe"].override("trace", steps=3)
    few = stages.load(saved("unconditional"), tmp_path / "run", minutes=10, **how).recipe.trace
    assert few.steps == 3 and 150 < few.chains * (3 + 8 * 3) <= 300
    for minutes in (-1.0, float("inf"), float("nan")):
        with pytest.raises(QuantempoError, match="minutes; expected"):
            stages.load(saved("unconditional"), tmp_path / "wrong", minutes=minutes, **how)
    assert not (tmp_path / "wrong").exists()
