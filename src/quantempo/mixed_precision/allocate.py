"""Choose an option for each layer so that the sum of losses is small within budgets.

    minimise sum_l loss[l, choice_l]   subject to   sum_l cost[m, l, choice_l] <= budget[m]

Numbers in, indices out: what an option is, and how its loss was measured, is not known here.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from quantempo.errors import QuantempoError

__all__ = ["Allocation", "allocate"]

# Mixtures of two budgets that are tried; each is a sweep over all prices.
_MIXTURES = 65


class Allocation(NamedTuple):
    """Hold `choice` (L,) int64, their `loss`, and `bound`: no choice within budgets has less."""

    choice: np.ndarray
    loss: float
    bound: float


def allocate(
    losses: ArrayLike, costs: ArrayLike, budgets: ArrayLike, names: Sequence[str] = ()
) -> Allocation:
    """Choose one option a layer with the least sum of losses that every budget allows.

    For one budget: the options on each layer's lower convex hull are taken in the order of loss
    saved per cost, which is the sweep over the Lagrangian price at all its break points; from the
    first that does not fit, those that still do fill the rest. For several, the cost is a mixture
    of costs / budgets, the best of 65. Finite losses (L, O), costs >= 0, (L, O) or (M, L, O), M <=
    2.
    Raises QuantempoError: shapes or values without sense, budgets below the least possible or that
    no mixture meets together.
    Error: with one budget the loss is above the least possible by less than the largest step of one
    layer along its hull, and never grows with the budget; with two see `Allocation.bound`.
    Source: Shoham & Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers".
    """
    losses, costs = np.asarray(losses, np.float64), np.asarray(costs, np.float64)
    costs = costs[None] if costs.ndim == 2 else costs
    limits = np.atleast_1d(np.asarray(budgets, np.float64))
    _check(losses, costs, limits, names)
    shares = np.linspace(0, 1, _MIXTURES) if len(limits) > 1 else np.ones(1)
    found: list[tuple[float, np.ndarray]] = []
    bound = float(losses.min(1).sum())
    for share in shares:
        mixture = np.array([share, 1 - share])[: len(limits)] / limits
        choice, price = _sweep(losses, costs, limits, mixture)
        prices = price * mixture
        priced = losses + np.tensordot(prices, costs, 1)
        bound = max(bound, float(priced.min(1).sum() - prices @ limits))
        if choice is not None:
            found.append((float(_pick(losses, choice).sum()), choice))
    if not found:
        raise QuantempoError(
            f"found no choice that meets {' and '.join(_named(names, limits))} together, though "
            "each can be met alone; raise one of them, or add options with fewer bits of both"
        )
    loss, choice = min(found, key=lambda pair: pair[0])
    # Rounding of the sums must not put the bound above what was reached.
    return Allocation(choice, loss, min(bound, loss))


def _sweep(
    losses: np.ndarray, costs: np.ndarray, limits: np.ndarray, mixture: np.ndarray
) -> tuple[np.ndarray | None, float]:
    """Return (choice along one mixture of costs or None, price where it first stopped or 0)."""
    mixed = np.tensordot(mixture, costs, 1)
    hulls = [_hull(loss, cost) for loss, cost in zip(losses, mixed, strict=True)]
    choice = np.array([hull[0] for hull in hulls])
    spent = _pick(costs, choice).sum(-1)
    moves = []
    for layer, hull in enumerate(hulls):
        for place, (a, b) in enumerate(itertools.pairwise(hull)):
            saved = losses[layer, a] - losses[layer, b]
            moves.append((-saved / (mixed[layer, b] - mixed[layer, a]), layer, place, b))
    moves.sort()
    if (spent > limits).any():
        return None, -moves[0][0] if moves else 0.0
    price, closed = 0.0, set[int]()
    for slope, layer, _, option in moves:
        if layer in closed:
            continue
        after = spent + costs[:, layer, option] - costs[:, layer, choice[layer]]
        if (after <= limits).all():
            choice[layer], spent = option, after
        else:
            # Later moves of this layer start where this one would have ended.
            closed.add(layer)
            price = price or -slope
    return choice, price


def _hull(loss: np.ndarray, cost: np.ndarray) -> list[int]:
    """Return the options on the lower convex hull, cheapest first, each of less loss."""
    hull: list[int] = []
    for option in np.lexsort((loss, cost)):
        if hull and loss[option] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2:]
            # b above the line from a to this option: never the best at any price.
            left = (loss[a] - loss[b]) * (cost[option] - cost[a])
            if left > (loss[a] - loss[option]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(int(option))
    return hull


def _pick(values: np.ndarray, choice: np.ndarray) -> np.ndarray:
    """Return (..., L): the chosen option's entry of (..., L, O)."""
    return values[..., np.arange(len(choice)), choice]


def _named(names: Sequence[str], limits: np.ndarray) -> list[str]:
    known = [*names, *(f"budget {i}" for i in range(len(names), len(limits)))]
    return [f"{name} = {limit:,.0f}" for name, limit in zip(known, limits, strict=False)]


def _check(losses: np.ndarray, costs: np.ndarray, limits: np.ndarray, names: Sequence[str]) -> None:
    """Raise QuantempoError for inputs that make no sense or a budget nothing can meet."""
    if losses.ndim != 2 or not losses.size or costs.shape[1:] != losses.shape:
        raise QuantempoError(
            f"got losses {losses.shape} and costs {costs.shape}; expected (L, O) and (M, L, O)"
        )
    if limits.shape != costs.shape[:1] or not 1 <= len(limits) <= 2:
        raise QuantempoError(f"got {len(limits)} budgets for {len(costs)} costs; expected 1 or 2")
    if not np.isfinite(losses).all() or not np.isfinite(costs).all() or (costs < 0).any():
        raise QuantempoError("got a loss that is not finite or a cost that is not at least 0")
    least = costs.min(-1).sum(-1)
    for text, limit, low in zip(_named(names, limits), limits, least, strict=True):
        if not limit > 0 or limit < low:
            text = f"got {text}; the options need at least {low:,.0f}: raise the budget"
            raise QuantempoError(f"{text}, or add options with fewer bits")
