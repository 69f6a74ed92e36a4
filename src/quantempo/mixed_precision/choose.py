"""Choose the bits of each layer within budgets by what they cost in the image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantempo.core import weight_format
from quantempo.errors import QuantempoError, log
from quantempo.mixed_precision.allocate import Allocation, allocate
from quantempo.mixed_precision.losses import (
    ARTEFACT,
    OPTIONS,
    grouped,
    measure,
    outline,
    write_plot,
)
from quantempo.pipeline.session import Session
from quantempo.recipe import Recipe, parse_bits
from quantempo.run_folder import RunFolder, hash_of, reading

__all__ = ["choose_bits", "recall"]

# Bits of weights to choose from where a budget of bytes alone says nothing of activations.
_WEIGHT_BITS = (4, 8)


def choose_bits(
    session: Session, *, budget_bytes: int | None = None, budget_bops: int | None = None,
    options: Sequence[str] | None = None, **rollout: int,
) -> dict[str, Any]:  # fmt: skip
    """Choose bits for every integer layer within budgets and put them into the session's recipe.

    They replace `layers.bits`, weights of up to 4 bits being in groups (`grouped`); the choice,
    which is returned, stands in `sensitivity.json`. To be called before `pipeline.finish`.

    Args:
        budget_bytes: of the integer weights as stored, see `Format.nbytes`; what does not depend on
            the choice (biases, activation scales, layers in float) is not counted.
        budget_bops: MACs * weight bits * activation bits of the integer layers, of one image and
            step.
        options: bits to choose from; all of OPTIONS, or 4- and 8-bit weights with the recipe's
            activations if bytes are the only budget.
        rollout: of `measure`; by default those of `sensitivity.json` where there is one.

    Raises QuantempoError: no budget, one that cannot be met (before anything is measured), later
    stages of other bits without `force`, or see `measure`.
    """
    budgets, options, base, request = _asked(session.recipe, budget_bytes, budget_bops, options)
    if len(session.parts) > 1:
        raise QuantempoError("bits are chosen for one network at a time; name it (--only NAME)")
    if not rollout and session.run.has(ARTEFACT):
        # What was measured before decides; not again with other settings.
        rollout = session.run.read_json(ARTEFACT)["settings"]
    # Refused before anything is measured, as it would be once all losses are known.
    costs = _costs(outline(session, options, **rollout), options)
    _allocate(np.zeros(np.shape(costs["bytes"])), costs, budgets)
    table = measure(session, options, **rollout)
    choice = {"request": request, **_choice(table, budgets, options)}
    _adopt(session, base.override("layers", bits=choice["bits"]))
    table["choice"] = choice
    session.run.write_json(ARTEFACT, table)
    write_plot(session.run, table)
    chosen = list(choice["bits"].values())
    counts = ", ".join(f"{chosen.count(option)} at {option}" for option in options)
    text = "bits chosen: %s; %.2f bits a weight with scales, loss %.3g (at least %.3g)"
    log.info(text, counts, choice["effective_bits"], choice["loss"], choice["bound"])
    return choice


def _choice(table: Any, budgets: dict[str, int], options: Sequence[str]) -> dict[str, Any]:
    """Return the best choice of a whole table within budgets, and what it spends."""
    rows, costs = table["layers"], _costs(table, options)
    losses = np.array([[row["losses"][option] for option in options] for row in rows])
    found = _allocate(losses, costs, budgets)
    spent = {
        name: sum(row[i] for row, i in zip(cost, found.choice, strict=True))
        for name, cost in costs.items()
    }
    weights = sum(math.prod(row["weight_shape"]) for row in rows)
    bits = {row["name"]: options[i] for row, i in zip(rows, found.choice, strict=True)}
    mean = 8 * spent["bytes"] / weights
    return {
        "budgets": budgets, "options": list(options), "bits": bits, "spent": spent,
        "effective_bits": mean, "loss": found.loss, "bound": found.bound,
    }  # fmt: skip


def _costs(table: dict[str, Any], options: Sequence[str]) -> dict[str, list[list[int]]]:
    """Return budget -> (L, O) what each layer takes of it at each option."""
    rows, pairs = table["layers"], [parse_bits(option, "options") for option in options]
    stored = [weight_format(w, table["group"]) for w, _ in pairs]
    return {
        "bytes": [[spec.nbytes(row["weight_shape"]) for spec in stored] for row in rows],
        # As in UNIQ, Baskin et al. 2018: nominal, the kernels multiply bytes whatever the bits.
        "bops": [[row["macs"] * w * a for w, a in pairs] for row in rows],
    }


def _allocate(
    losses: np.ndarray, costs: dict[str, list[list[int]]], budgets: dict[str, int]
) -> Allocation:
    limited = np.array([costs[name] for name in budgets])
    names = [f"a budget of {name}" for name in budgets]
    return allocate(losses, limited, list(budgets.values()), names)


def recall(run: str | Path, recipe: Recipe, **request: Any) -> Recipe:
    """Return the recipe with the bits that the same request chose before in a run folder, if any.

    So that a killed run resumes: stages after the choice were made with those bits.
    """
    folder = RunFolder(run)
    choice = folder.read_json(ARTEFACT).get("choice") if folder.has(ARTEFACT) else None
    _, _, base, asked = _asked(recipe, **request)
    with reading(folder / ARTEFACT):
        if choice is None or choice["request"] != asked:
            return recipe
        return base.override("layers", bits=choice["bits"])


def _adopt(session: Session, recipe: Recipe) -> None:
    """Give a session another recipe, and its manifest too; all is as it was after an error."""
    before, session.recipe = session.recipe, recipe
    # Those of the recipe before, if measuring has asked for them.
    vars(session).pop("plans", None)
    if not session.force:
        try:
            session.refuse_stale()
        except QuantempoError:
            session.recipe = before
            raise
    entries = {"recipe": recipe.to_dict(), "recipe_toml": recipe.to_toml()}
    session.run.update_manifest(**entries, recipe_sha256=recipe.sha256)


def _asked(
    recipe: Recipe, budget_bytes: int | None = None, budget_bops: int | None = None,
    options: Sequence[str] | None = None,
) -> tuple[dict[str, int], tuple[str, ...], Recipe, str]:  # fmt: skip
    """Return budgets by name, the bits to choose from, the recipe without bits, and their hash."""
    given = {"bytes": budget_bytes, "bops": budget_bops}
    budgets = {name: value for name, value in given.items() if value is not None}
    if not budgets:
        raise QuantempoError("got no budget; give bytes, bit operations or both")
    if options is None:
        few = (f"w{bits}a{recipe.activations.bits}" for bits in _WEIGHT_BITS)
        options = OPTIONS if budget_bops is not None else tuple(few)
    options, base = tuple(dict.fromkeys(options)), grouped(recipe).override("layers", bits={})
    return budgets, options, base, hash_of([base.sha256, budgets, list(options)])
