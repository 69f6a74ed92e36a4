"""Bit allocation against brute force over every choice."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from quantempo.core import weight_format
from quantempo.errors import QuantempoError
from quantempo.mixed_precision.allocate import allocate
from quantempo.quantized import QConv2d, QLinear, StepClock

seeds = pytest.mark.parametrize("seed", range(8))


def draw(seed: int, budgets: int = 1) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Return losses (L, O) over three decades, costs (M, L, O), and what drew them."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(2, 6, 2))
    losses = rng.exponential(1.0, shape) * 10 ** rng.uniform(-2, 1, (shape[0], 1))
    return losses, rng.integers(1, 30, (budgets, *shape)).astype(float), rng


def brute(losses: np.ndarray, costs: np.ndarray, limits: np.ndarray) -> float:
    """Return the least sum of losses of all choices within the limits, inf if there is none."""
    layers, options = losses.shape
    best = np.inf
    for choice in itertools.product(range(options), repeat=layers):
        picked = np.arange(layers), np.array(choice)
        if (costs[:, *picked].sum(1) <= limits).all():
            best = min(best, losses[picked].sum())
    return best


def largest_step(losses: np.ndarray) -> float:
    return float(np.ptp(losses, axis=1).max())


@seeds
def test_one_budget_is_within_one_layers_step_of_brute_force(seed: int) -> None:
    losses, costs, rng = draw(seed)
    low, high = costs.min(2).sum(), costs.max(2).sum()
    for limit in rng.uniform(low, high, 6):
        found, best = allocate(losses, costs[0], limit), brute(losses, costs, np.array([limit]))
        picked = np.arange(len(losses)), found.choice
        assert found.loss == pytest.approx(losses[picked].sum(), rel=1e-12)
        assert costs[0][picked].sum() <= limit
        assert found.bound <= best + 1e-12 and best <= found.loss + 1e-12
        assert found.loss - best <= largest_step(losses)
        # The stated bound is the price of one layer: no looser than that step either.
        assert found.loss - found.bound <= largest_step(losses) + 1e-12


@seeds
def test_two_budgets_hold_both_and_the_bound_is_below_brute_force(seed: int) -> None:
    losses, costs, rng = draw(100 + seed, budgets=2)
    # Bits cost both: an option that is cheap in one is cheap in the other, as in practice.
    costs = np.sort(costs, axis=2)
    for share in rng.uniform(0.05, 1, 4):
        limits = costs.min(2).sum(1) * (1 - share) + costs.max(2).sum(1) * share
        found, best = allocate(losses, costs, limits), brute(losses, costs, limits)
        assert (costs[:, np.arange(len(losses)), found.choice].sum(1) <= limits).all()
        assert found.bound <= best + 1e-12 and best <= found.loss + 1e-12
        assert found.loss - best <= 2 * largest_step(losses)


@seeds
def test_a_larger_budget_never_loses_more(seed: int) -> None:
    losses, costs, _ = draw(200 + seed)
    limits = np.linspace(costs.min(2).sum(), costs.max(2).sum(), 60)
    found = [allocate(losses, costs[0], limit).loss for limit in limits]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found))
    assert found[-1] == pytest.approx(losses.min(1).sum())


def test_the_order_of_layers_and_options_does_not_matter() -> None:
    losses, costs, rng = draw(3)
    limit = float(costs.mean(2).sum())
    layers, options = rng.permutation(len(losses)), rng.permutation(losses.shape[1])
    found = allocate(losses, costs[0], limit)
    moved = allocate(losses[layers][:, options], costs[0][layers][:, options], limit)
    assert moved.loss == pytest.approx(found.loss, rel=1e-12)
    assert options[moved.choice].tolist() == found.choice[layers].tolist()


def test_what_does_not_fit_leaves_room_for_what_does() -> None:
    # Layer 0 saves most per byte but costs too much; layer 1 fits.
    found = allocate(np.array([[9.0, 0.0], [2.0, 1.0]]), np.array([[0, 8], [0, 2]]), 7)
    assert found.choice.tolist() == [0, 1]
    assert found.loss == 10.0 and found.bound < 10


def test_the_bound_is_that_of_the_first_price() -> None:
    # Relaxed, 7 bytes all go to layer 0 at 9 / 8 a byte: 11.5 - 7.875. Layer 2's price is 0.005.
    losses = np.array([[9.0, 0.0], [2.0, 1.0], [0.5, 0.0]])
    found = allocate(losses, np.array([[0, 8], [0, 2], [0, 100]]), 7)
    assert found.choice.tolist() == [0, 1, 0]
    assert found.bound == pytest.approx(3.625, rel=1e-12)


def test_options_that_never_pay_are_left_out() -> None:
    # Dearer and worse; as dear and worse; above the hull (price 1 a byte, then 9).
    found = allocate(np.array([[5.0, 7.0, 5.5, 0.0]]), np.array([[1, 4, 1, 3]]), 4)
    assert found.choice.tolist() == [3]


def test_a_budget_that_cannot_be_met_names_the_least_possible() -> None:
    losses, costs = np.ones((2, 2)), np.array([[[3, 5], [4, 9]], [[10, 20], [10, 20]]])
    with pytest.raises(QuantempoError, match=r"bytes = 6; the options need at least 7"):
        allocate(losses, costs, [6, 99], ["bytes", "bops"])
    with pytest.raises(QuantempoError, match=r"bops = 19; .* at least 20"):
        allocate(losses, costs, [7, 19], ["bytes", "bops"])
    # Each alone can be met, both cannot: bytes want option 0, operations option 1.
    opposed = np.array([[[1, 9], [1, 9]], [[9, 1], [9, 1]]])
    with pytest.raises(QuantempoError, match="together, though each can be met alone"):
        allocate(losses, opposed, [3, 3])


@pytest.mark.parametrize(
    ("losses", "costs", "limits"),
    [
        (np.ones((2, 2)), np.ones((2, 3)), 4),
        (np.ones(2), np.ones(2), 4),
        (np.ones((2, 2)), np.ones((3, 2, 2)), [4, 4, 4]),
        (np.array([[1.0, np.nan]]), np.ones((1, 2)), 4),
        (np.ones((1, 2)), -np.ones((1, 2)), 4),
        (np.ones((1, 2)), np.zeros((1, 2)), 0),
    ],
)
def test_nonsense_is_refused(losses: np.ndarray, costs: np.ndarray, limits: object) -> None:
    with pytest.raises(QuantempoError, match=r"^got "):
        allocate(losses, costs, limits)


@pytest.mark.parametrize(
    ("bits", "group"), [*((bits, 0) for bits in range(2, 9)), (4, 16), (3, 32), (8, 16)]
)
def test_bytes_are_those_of_the_stored_buffers(bits: int, group: int) -> None:
    clock = StepClock(torch.zeros(4, dtype=torch.int64))
    # Odd lengths: the last byte of a row of 4-bit codes is half empty.
    for layer, kind in ((nn.Conv2d(3, 5, 3), QConv2d), (nn.Linear(7, 3), QLinear)):
        copied = kind.like(layer, clock, (), 1, weight_bits=bits, group=group)
        names = ("weight_int", "weight_group", "weight_scale")
        stored = [copied.get_buffer(name) for name in names if name in copied.state_dict()]
        wanted = weight_format(bits, group).nbytes(layer.weight.shape)
        assert wanted == sum(value.nbytes for value in stored)
        assert len(stored) == 2 + (group > 0 and bits <= 4)
