"""Recipes round-trip through TOML, and every mistake gets its own sentence."""

import inspect
import tomllib

import pytest

from quantempo.errors import QuantempoError
from quantempo.pipeline import stages as pipeline
from quantempo.recipe import Recipe
from quantempo.registry import Registry


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a8-adaround", "ptq4dm"])
def test_shipped_recipes_round_trip(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.from_dict(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.from_dict(recipe.to_dict()).sha256 == recipe.sha256


def test_w8a8_is_the_default_and_ptq4dm_is_the_papers():
    for verb in (pipeline.load, pipeline.quantize):
        assert inspect.signature(verb).parameters["recipe"].default == "w8a8"
    ours = Recipe.load("w8a8")
    assert (ours.weights.bits, ours.activations.bits) == (8, 8) and not ours.layers.bits
    paper = Recipe.load("ptq4dm")
    assert paper.activations.symmetric and paper.layers.float_roles == ()
    assert (paper.activations.metric, paper.activations.p) == ("lp", 2.4)


def test_override_changes_one_section_and_the_hash(tmp_path):
    recipe = Recipe().override("trace", steps=20, chains=None)
    assert (recipe.trace.steps, recipe.trace.chains) == (20, Recipe().trace.chains)
    assert recipe.sha256 != Recipe().sha256
    file = tmp_path / "mine.toml"
    file.write_text(recipe.to_toml())
    assert Recipe.load(file) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tracee": {}}, "unknown recipe key 'tracee'; did you mean 'trace'"),
        ({"trace": {"step": 3}}, "unknown recipe key 'trace.step'; did you mean 'trace.steps'"),
        ({"trace": {"steps": "50"}}, "expected int"),
        ({"trace": {"steps": True}}, "expected int"),
        ({"trace": 3}, "expected a \\[trace\\] section"),
        ({"layers": {"float_roles": "input"}}, "expected a list of names"),
        ({"activations": {"bits": 9}}, "activations.bits = 9; expected 2 to 8"),
        ({"activations": {"buckets": 0}}, "expected 1 to 64"),
    ],
)
def test_mistakes_are_named(values, message):
    with pytest.raises(QuantempoError, match=message):
        Recipe.from_dict(values)


def test_recipes_from_before_the_sources_stay_valid():
    old = Recipe().to_dict()
    del old["trace"]["source"]
    assert Recipe.from_dict(old) == Recipe()


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(QuantempoError, match="did you mean 'w8a8'"):
        Recipe.load("w8a9")
    file = tmp_path / "bad.toml"
    file.write_text("[trace\n")
    with pytest.raises(QuantempoError, match="not valid TOML"):
        Recipe.load(file)


def test_registry_names_the_nearest_and_refuses_doubles():
    registry: Registry[int] = Registry("metric")
    registry.register("cosine")(1)
    assert registry.get("cosine") == 1
    with pytest.raises(QuantempoError, match="unknown metric 'cosin'; did you mean 'cosine'"):
        registry.get("cosin")
    with pytest.raises(ValueError, match="twice"):
        registry.register("cosine")(2)
