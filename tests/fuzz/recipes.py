"""Recipes: odd values, of wrong types, unknown keys, broken TOML; those that are valid are run."""

import json
from pathlib import Path
from random import Random
from typing import Any

from quantempo.pipeline import stages
from quantempo.recipe import Recipe
from tests.fuzz.folders import image
from tests.packed import recipe, saved

BASE = recipe(exclude=("down_blocks.*", "up_blocks.*"))
ODD: list[Any] = [
    *(True, 0, -1, 1, 2, 3, 8, 9, 0.5, -0.5, 1e-9, 1e300, 10**12, 2**70, "", "x", "mse", "w4a4"),
    *([], ["*"], ["mid*"], [1], {}, {"linear": "w4a8"}, {"x": 1}, float("nan"), float("inf")),
]
NAMES = [
    *("mse", "l1", "lp", "cosine", "kl", "linf", "nearest", "gptq", "adaround", "linspace"),
    *("trajectory", "noise", "mimic", "raw", "ndtc", "token", "auto"),
]


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return {"NaN": "nan", "Infinity": "inf"}.get(text := json.dumps(value), text)


def case(rng: Random, place: Path) -> str:
    values = BASE.to_dict()
    for _ in range(rng.choice((1, 1, 2, 4))):
        section = rng.choice([k for k, v in values.items() if isinstance(v, dict)] or ["trace"])
        group = values.setdefault(section, {})
        key = rng.choice([*group, "colour"]) if rng.random() < 0.2 else rng.choice(list(group))
        old = group.get(key)
        group[key] = rng.choice(NAMES if isinstance(old, str) else ODD)
        # Mostly of the right type, in range or near its ends.
        if rng.random() < 0.7:
            kinds = {int: rng.randrange(1, 6), float: rng.random(), bool: rng.random() < 0.5}
            group[key] = kinds.get(type(old), group[key])
    text = "\n".join(f"[{k}]\n" + "\n".join(f"{n} = {toml(x)}" for n, x in v.items())
                     for k, v in values.items() if isinstance(v, dict))  # fmt: skip
    if rng.random() < 0.1:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice("=[]\"'#\x00é0.") + text[at + 1 :]
    (place / "recipe.toml").write_text(text)
    found = Recipe.load(place / "recipe.toml")
    large = found.trace.steps * found.trace.chains * found.trace.picks > 200
    large |= found.rounding.iterations + found.rounding.samples > 400
    if large or found.activations.buckets > 8:
        return "valid, too large to run"
    folder = stages.quantize(saved("unconditional"), place / "run", found)
    assert image(folder, "unconditional", "simulated").std() > 0
    return "ran"
