"""The rungs of the ladder: from the paper's recipe to each shipped one, one idea a rung.

Derived from the shipped recipes, so that a change in one of them changes its rungs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quantempo.recipe import Recipe

__all__ = ["Rung", "rungs"]


@dataclass(frozen=True)
class Rung:
    """One recipe of the ladder.

    family: its bits; idea: what it adds to the rung before it; full: also scored on the larger
    set of images; variant: what quantempo does not ship of it, see `studies.ablation.variants`.
    """

    name: str
    family: str
    idea: str
    recipe: Recipe
    full: bool = False
    variant: str = ""


# Beside the chain, w4a8 each: name, idea, variant, settings that differ.
BESIDE: tuple[tuple[str, str, str, dict[str, dict[str, Any]]], ...] = (
    ("w4a8-group32", "scales for 32", "", {"weights": {"group": 32}}),
    ("w4a8-smooth", "smoothing, strength 0.5", "smooth=0.5", {}),
    ("w4a8-rotate", "Hadamard rotation of 256 channels", "rotate=256", {}),
    ("w4a8-rank16", "low-rank branch in 16 bits, rank 16", "lowrank=16", {}),
    ("w4a8-bytes16", "the bytes of rank 16 as int8 layers", "int8=16", {}),
    ("w4a8-rank32", "low-rank branch in 16 bits, rank 32", "lowrank=32", {}),
    ("w4a8-bytes32", "the bytes of rank 32 as int8 layers", "int8=32", {}),
)


def rungs() -> list[Rung]:
    """Return the ladder: the paper's recipe and plain min-max, then one idea after the other."""
    paper, found = Recipe.load("ptq4dm"), []

    def add(name: str, family: str, idea: str, recipe: Recipe, full: bool = False) -> Recipe:
        found.append(Rung(name, family, idea, replace(recipe, name=name), full))
        return recipe

    def beside(name: str, idea: str, variant: str, recipe: Recipe) -> None:
        made, text = replace(recipe, name=name), f"beside the chain: {idea}"
        found.append(Rung(name, "W4A8", text, made, variant=variant))

    final = Recipe.load("w8a8")
    plain = replace(paper, trace=final.trace)
    minmax = plain.override("activations", metric="linf", symmetric=False)
    minmax = minmax.override("weights", metric="linf")
    add("minmax", "W8A8", "round to nearest, min-max, every layer", minmax, full=True)
    add("ptq4dm", "W8A8", "the paper: symmetric, p = 2.4, released law", paper, full=True)
    now = plain.override("activations", symmetric=False)
    now = add("affine", "W8A8", "affine activations, truncated law", now)
    now = now.override("activations", metric=final.activations.metric)
    now = add("metric", "W8A8", "squared error for activations", now)
    time = now.override("layers", float_roles=("time",))
    now = add("time", "W8A8", "time embedding exact", time)
    now = now.override("layers", float_roles=final.layers.float_roles)
    now = add("ends", "W8A8", "first and last layer in float", now)
    now = add("split", "W8A8", "shortcuts split in two", now.override("layers", split_skips=True))
    buckets = {"buckets": final.activations.buckets, "min_gain": final.activations.min_gain}
    now = add("buckets", "W8A8", "scales per time", now.override("activations", **buckets))
    costly = now.override("layers", float_macs=final.layers.float_macs)
    now = add("costly", "W8A8", "costly shortcuts in float", costly)
    _towards(now, final, "w8a8", "W8A8", add)
    final = Recipe.load("w4a8")
    whole = replace(final, rounding=plain.rounding).override("weights", group=0)
    at = add("w4a8-nearest", "W4A8", "the W8A8 recipe with 4 bits a weight, nearest", whole)
    groups = at.override("weights", group=final.weights.group)
    at = add("w4a8-groups", "W4A8", f"scales and zero points for {final.weights.group}", groups)
    gptq = replace(at, rounding=replace(final.rounding, correct=0.0))
    beside("w4a8-stored", "GPTQ, columns as stored", "stored", gptq)
    _towards(at, final, "w4a8", "W4A8", add)
    for name, idea, variant, settings in BESIDE:
        changed = final
        for section, values in settings.items():
            changed = changed.override(section, **values)
        beside(name, idea, variant, changed)
    learned = Recipe.load("w4a8-adaround")
    add(learned.name, "W4A8", "beside the chain: AdaRound by blocks, QDrop", learned, full=True)
    return found


def _towards(now: Recipe, final: Recipe, name: str, family: str, add: Any) -> None:
    """Add the rungs that lead from a recipe with scales to a shipped one, the last of them it."""
    steps: list[tuple[str, str]] = []
    recipes: list[Recipe] = []

    def step(suffix: str, idea: str, recipe: Recipe) -> None:
        if replace(recipe, name=now.name) != (recipes[-1] if recipes else now):
            steps.append((f"{name}-{suffix}", idea))
            recipes.append(replace(recipe, name=now.name))

    def last() -> Recipe:
        return recipes[-1] if recipes else now

    scales = replace(now, trace=final.trace, layers=final.layers, activations=final.activations)
    step("scales", "what else differs in its scales", replace(scales, weights=final.weights))
    chosen = final.rounding
    if chosen.name == "gptq":
        start = replace(chosen, name="gptq", correct=0.0, bias=False)
        step("gptq", "GPTQ, most read columns first", replace(last(), rounding=start))
        start = replace(start, correct=chosen.correct)
        step("correct", "errors of inputs made up for", replace(last(), rounding=start))
    if chosen.bias:
        step("bias", "bias correction", replace(last(), rounding=chosen))
    step("final", "as shipped", final)
    # The recipe as it ships has its own name, whatever it adds last.
    for (rung, idea), recipe in zip(steps[:-1], recipes[:-1], strict=True):
        add(rung, family, idea, recipe)
    add(name, family, steps[-1][1] if steps else "as shipped", final, full=True)
