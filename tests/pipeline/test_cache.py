"""Keys of stages, and arguments of a call that are tensors."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.pipeline import stages
from quantempo.pipeline.cache import ARTEFACTS, Cache
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder, hash_of
from tests.packed import recipe, saved
from tests.tiny import tiny_embeds

# Section of the recipe -> the first stage that reads it.
FIRST = {
    "trace": "trace",
    "layers": "calibrate",
    "attention": "calibrate",
    "activations": "search",
    "weights": "search",
    "rounding": "round",
}
SETTINGS = [
    (section.name, setting.name)
    for section in fields(Recipe)
    if section.name != "name"
    for setting in fields(getattr(Recipe(), section.name))
]


class Fixed(Cache):
    """A cache without a model."""

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": "m"}


def keys(chosen: Recipe) -> dict[str, str]:
    cache = Fixed(RunFolder("nowhere"), chosen, False)
    return {stage: cache.key(stage) for stage in ARTEFACTS}


def other(value: Any) -> Any:
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return {"linear": "w4a8"} if isinstance(value, dict) else (*value, "conv")


@pytest.mark.parametrize(("section", "setting"), SETTINGS)
def test_a_setting_changes_the_key_of_its_stage_and_of_all_later_ones(section, setting):
    base = Recipe()
    group = getattr(base, section)
    # In range: fractions and bits go down, not up.
    value = getattr(group, setting)
    known = {"bits": 4, "group": 16, "min_gain": 0.5, "drop": 0.25, "granularity": "auto"}
    value = known.get(setting) or other(value)
    if (section, setting) == ("layers", "bits"):
        value = {"linear": "w4a8"}
    changed = replace(base, **{section: replace(group, **{setting: value})})
    before, after = keys(base), keys(changed)
    first = FIRST[section]
    # Statistics are of the float model: the same for any bits.
    first = "search" if setting in ("bits", "float_macs") else first
    # Unless the error of scales by token is measured.
    first = "calibrate" if setting == "granularity" else first
    order = list(ARTEFACTS)
    differing = [stage for stage in order if before[stage] != after[stage]]
    assert differing == order[order.index(first) :]


def test_tensors_of_a_call_are_hashed_by_content_and_kept(tmp_path: Path) -> None:
    embeds = tiny_embeds(2)
    call = {**embeds, "guidance_scale": 2.0}
    small = recipe(exclude=("*_blocks.*",))
    session = stages.load(saved("text"), tmp_path / "run", small, call=call)
    stages.trace(session)
    again = stages.reopen(tmp_path / "run")
    assert again.call.keys() == call.keys() and again.call["guidance_scale"] == 2.0
    assert all(torch.equal(again.call[name], value) for name, value in embeds.items())
    assert again.key("trace") == session.key("trace") and not again.stale("trace")
    # One number in the middle, which the text of a tensor leaves out.
    changed = {name: value.clone() for name, value in call.items() if name in embeds}
    changed["prompt_embeds"][1, 4, 7] += 1
    with pytest.raises(QuantempoError, match="made with other settings"):
        stages.load(saved("text"), tmp_path / "run", small, call={**call, **changed})


def test_what_a_run_folder_cannot_keep_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(QuantempoError, match=r"cannot keep the argument 'image' .*\(it holds a"):
        stages.load(saved("text"), tmp_path / "run", recipe(), call={"image": [object()]})
    assert not (tmp_path / "run").exists()


def test_hashes_know_arrays_and_infinities_and_nothing_by_its_text() -> None:
    values = [torch.zeros(2000), torch.zeros(2000).index_fill(0, torch.tensor([1000]), 1)]
    assert hash_of(values[0]) != hash_of(values[1])
    assert hash_of(values[1]) != hash_of(values[1].numpy())
    assert hash_of({"a": float("inf")}) != hash_of({"a": float("-inf")})
    with pytest.raises(TypeError, match="it holds a object"):
        hash_of([object()])
