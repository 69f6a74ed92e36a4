"""A stage killed at any moment ends with the same bytes, and no finished part is done twice."""

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from quantempo.calibration import statistics
from quantempo.checkpoint import write
from quantempo.errors import QuantempoError
from quantempo.pipeline import stages
from quantempo.pipeline.quantize import Quantized
from quantempo.recipe import Recipe
from quantempo.scales import search
from tests.pipeline.test_large import counted, same
from tests.tiny import tiny_dit

# Chunks of 32 rows, so that each pass over the data has three batches.
RECIPE = Recipe.load("w8a8").override("trace", steps=2, chains=34, picks=2)
RECIPE = RECIPE.override("rounding", name="nearest", bias=False)
CALL = {"class_labels": [1, 2]}
# What is called all along a stage, and in how many parts, of which one may be done again.
PLACES: dict[str, tuple[Any, str, int]] = {
    "ranges": (statistics.MinMax, "update", 3),
    "histograms": (statistics.Histogram, "update", 3),
    "search": (search, "search_weights", 10**9),
    "layers": (Quantized, "_fill", 10**9),
    "rows": (stages, "measured_rows", 10**9),
    "disk": (os, "fsync", 1),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("resume")
    tiny_dit().save_pretrained(folder / "float")
    with pytest.MonkeyPatch.context() as patch:
        seen = {name: counted(patch, *PLACES[name][:2]) for name in PLACES}
        stages.quantize(folder / "float", folder / "run", RECIPE, call=CALL)
    return folder / "float", folder / "run", {name: len(calls) for name, calls in seen.items()}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_stage_goes_on(
    whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    (owner, name, parts), (source, run, counts) = PLACES[place], whole
    error: Any = OSError(errno.ENOSPC, "full") if place == "disk" else KeyboardInterrupt()
    kill, kind = random.Random(place).randint(1, counts[place]), (KeyboardInterrupt, QuantempoError)
    with monkeypatch.context() as patch, pytest.raises(kind) as raised:
        if place == "rows":
            kill = len(counted(patch, write, "save_network", 1))
        calls = counted(patch, owner, name, kill, error)
        stages.quantize(source, tmp_path / "run", RECIPE, call=CALL)
    assert place != "disk" or "the disk is full while writing" in str(raised.value)
    with monkeypatch.context() as patch:
        more = counted(patch, owner, name)
        stages.quantize(source, tmp_path / "run", RECIPE, call=CALL)
    same(run, tmp_path / "run")
    assert len(calls) + len(more) <= counts[place] + max(kill > 0, counts[place] // parts)


def test_what_is_no_number_names_its_layer(whole: Any, tmp_path: Path) -> None:
    stages.trace(session := stages.load(whole[0], tmp_path / "run", RECIPE, call=CALL))
    layer = session.denoiser.get_submodule(name := "transformer_blocks.1.ff.net.2")
    layer.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),))
    with pytest.raises(QuantempoError, match=f"layer '{name}': got NaN"):
        stages.calibrate(session)
