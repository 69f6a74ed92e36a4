"""Choose the bits of each layer within budgets by what they cost in the image."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from quantempo.core import weight_format
from quantempo.errors import QuantempoError, log
from quantempo.evaluation.fidelity import psnr_db
from quantempo.evaluation.judge import interval
from quantempo.mixed_precision.allocate import Allocation, allocate
from quantempo.mixed_precision.losses import (
    ARTEFACT,
    OPTIONS,
    SEED,
    grouped,
    measure,
    outline,
    write_plot,
)
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline.samples import open_model
from quantempo.pipeline.session import Session
from quantempo.pipeline.stages import finish
from quantempo.recipe import Recipe, parse_bits
from quantempo.run_folder import RunFolder, hash_of, reading

__all__ = ["choose_bits", "limit_loss", "recall"]

# Bits of weights to choose from where a budget of bytes alone says nothing of activations.
_WEIGHT_BITS = (4, 8)
# That a choice is tried with, by `limit_loss`.
_IMAGES = 16


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
    rollout = _rollout(session, rollout)
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


def limit_loss(session: Session, max_loss_db: float, **rollout: int) -> dict[str, Any]:
    """Choose the fewest layers at 8 bits, others at 4, that lose at most so many dB; pack them.

        loss = mean over 16 images of PSNR(8 bits everywhere) - PSNR(choice), to the float images

    of seeds that nothing else sees. Layers are taken in the order of loss saved a byte, their
    number is bisected; each choice is tried as a whole, quantized and sampled. A killed run goes
    on with those that are tried. Returns and keeps the choice, as `choose_bits` does.

    Raises QuantempoError: a loss below 0, or see `choose_bits`.
    Error: of the choices that are tried the smallest that passes; PSNR need not grow with layers.
    """
    budgets, options, base, request = _asked(session.recipe, max_loss_db=max_loss_db)
    if not 0 <= max_loss_db < math.inf:
        raise QuantempoError(f"got a loss of {max_loss_db} dB; expected a number, 0 or more")
    table = measure(session, options, **_rollout(session, rollout))
    rows, sizes = table["layers"], np.array(_costs(table, options)["bytes"])
    losses = np.array([[row["losses"][option] for option in options] for row in rows])
    extra, given = np.diff(sizes)[:, 0], session.force
    # Groups of few channels take more bytes than 8 bits do.
    order = np.argsort(np.where(extra > 0, np.diff(losses)[:, 0] / np.maximum(extra, 1), -np.inf))
    seeds, how = range(SEED, SEED + _IMAGES), {"steps": base.trace.steps, **session.call}
    exact = run_pipeline(session.pipe, seeds, **how)
    known = table.setdefault("trials", {}).setdefault(request, {})
    session.force = given or (table["choice"] or {}).get("request") == request

    def tried(kept: int) -> np.ndarray:
        """Return the PSNR of each image with so many layers at 8 bits."""
        choice = (extra <= 0).astype(np.int64)
        choice[order[:kept]] = 1
        found = {"request": request, "budgets": budgets, **_described(table, options, choice)}
        packed = _packed(session, base, table, found)
        if str(kept) not in known:
            pipe = open_model(packed, scheduler=session.scheduler, device=session.device)
            known[str(kept)] = psnr_db(exact, run_pipeline(pipe, seeds, **how)).tolist()
            session.run.write_json(ARTEFACT, table)
        return np.array(known[str(kept)])

    least, most = 0, len(rows)
    whole = tried(most)
    while least < most:
        middle = (least + most) // 2
        fits = (whole - tried(middle)).mean() <= max_loss_db
        least, most = (least, middle) if fits else (middle + 1, most)
    lost, session.force = whole - tried(most), given
    write_plot(session.run, table)
    kept, size = list(table["choice"]["bits"].values()).count(options[1]), sizes[:, 1].sum() / 1e6
    text = "%d of %d layers at 8 bits: %.2f MB of weights, with all %.2f; lost %.2f dB [%.2f, %.2f]"
    spent = table["choice"]["spent"]["bytes"] / 1e6
    log.info(text, kept, len(rows), spent, size, lost.mean(), *interval(lost))
    return {**table["choice"], "kept": kept, "loss_db": float(lost.mean())}


def _packed(session: Session, base: Recipe, table: dict[str, Any], found: dict[str, Any]) -> Path:
    """Quantize with a choice; kept before it is tried, so that a killed run goes on with it."""
    plain = f"w{base.weights.bits}a{base.activations.bits}"
    # Layers of the recipe's own bits are not named: it may leave them in float.
    named = {name: option for name, option in found["bits"].items() if option != plain}
    _adopt(session, base.override("layers", bits=named))
    session.force = True
    table["choice"] = {**found, "named": named, "bound": found["loss"]}
    session.run.write_json(ARTEFACT, table)
    return finish(session)


def _rollout(session: Session, given: dict[str, int]) -> dict[str, int]:
    """Return settings of `measure`: what was measured before decides, not again with others."""
    if len(session.parts) > 1:
        raise QuantempoError("bits are chosen for one network at a time; name it (--only NAME)")
    before = session.run.has(ARTEFACT) and not given
    return session.run.read_json(ARTEFACT)["settings"] if before else given


def _choice(table: Any, budgets: dict[str, int], options: Sequence[str]) -> dict[str, Any]:
    """Return the best choice of a whole table within budgets, and what it spends."""
    rows, costs = table["layers"], _costs(table, options)
    losses = np.array([[row["losses"][option] for option in options] for row in rows])
    found = _allocate(losses, costs, budgets)
    loss = {"loss": found.loss, "bound": found.bound}
    return {"budgets": budgets, **_described(table, options, found.choice), **loss}


def _described(table: Any, options: Sequence[str], choice: np.ndarray) -> dict[str, Any]:
    """Return what a choice is and spends; its loss by the table."""
    rows = table["layers"]
    spent = {
        name: sum(row[i] for row, i in zip(cost, choice, strict=True))
        for name, cost in _costs(table, options).items()
    }
    weights = sum(math.prod(row["weight_shape"]) for row in rows)
    bits = {row["name"]: options[i] for row, i in zip(rows, choice, strict=True)}
    return {
        "options": list(options), "bits": bits, "spent": spent,
        "effective_bits": 8 * spent["bytes"] / weights,
        "loss": sum(row["losses"][bits[row["name"]]] for row in rows),
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
        return base.override("layers", bits=choice.get("named", choice["bits"]))


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
    options: Sequence[str] | None = None, max_loss_db: float | None = None,
) -> tuple[dict[str, Any], tuple[str, ...], Recipe, str]:  # fmt: skip
    """Return budgets by name, the bits to choose from, the recipe without bits, and their hash."""
    given = {"bytes": budget_bytes, "bops": budget_bops, "max_loss_db": max_loss_db}
    budgets = {name: value for name, value in given.items() if value is not None}
    if not budgets:
        raise QuantempoError("got no budget; give bytes, bit operations or both")
    if max_loss_db is not None and len(budgets) > 1:
        raise QuantempoError("got a budget and a loss in dB; give one of them")
    if options is None:
        few = (f"w{bits}a{recipe.activations.bits}" for bits in _WEIGHT_BITS)
        options = OPTIONS if budget_bops is not None else tuple(few)
    options, base = tuple(dict.fromkeys(options)), grouped(recipe).override("layers", bits={})
    return budgets, options, base, hash_of([base.sha256, budgets, list(options)])
