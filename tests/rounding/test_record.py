"""Inputs recorded for all blocks at once are those recorded block by block."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from quantempo.calibration.rows import Law, Place
from quantempo.rounding.base import Inputs, record

LAW: Law = {"[0][0]": Place(0, 1), "[2]": Place(0, 1)}
LAWS = {"first": [LAW], "last": [LAW]}


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def calls(network: nn.Module) -> list[tuple[int, Callable[[], torch.Tensor]]]:
    torch.manual_seed(1)
    parts = [torch.randn(rows, 4) for rows in (1, 3, 2)]
    return [(len(x), lambda x=x: network(x)) for x in parts]


def test_all_at_once_is_one_by_one_bit_for_bit(network: nn.Sequential) -> None:
    modules = {"first": network[0], "last": network[2]}
    found = record(modules, calls(network), budget=10**6, laws=LAWS)
    assert found is not None
    rows = torch.arange(6)
    for name, module in modules.items():
        alone = record({name: module}, calls(network), budget=10**6, laws=LAWS)
        assert alone is not None
        (one,), (other,) = (f[name].take(rows, torch.device("cpu"))[0] for f in (found, alone))
        assert torch.equal(one, other)
    assert not network[0]._forward_pre_hooks


def test_over_the_budget_nothing_is_kept(network: nn.Sequential) -> None:
    # 6 rows of 4 + 6 float32: 240 bytes.
    modules = {"first": network[0], "last": network[2]}
    assert record(modules, calls(network), budget=239, laws=LAWS) is None
    assert record(modules, calls(network), budget=240, laws=LAWS) is not None
    assert not network[0]._forward_pre_hooks


def test_calls_of_other_lengths_are_taken_apart() -> None:
    """A mask that only captions of several lengths need, as Lumina2's blocks get it."""
    law: Law = {"[0][0]": Place(0, 1), "[1]['mask']": Place(0, 1)}
    inputs = Inputs(5, 10**6, law)
    for first, rows, length, mask in ((0, 1, 4, False), (1, 2, 6, True), (3, 2, 4, False)):
        x = torch.arange(first, first + rows)[:, None].expand(-1, length).float()
        inputs.add(rows, (x,), {"mask": x > 1 if mask else None})
    inputs.close()
    assert [rows.tolist() for rows in inputs.groups()] == [[0, 3, 4], [1, 2]]
    here = torch.device("cpu")
    (x,), given = inputs.take(torch.tensor([4, 0]), here)
    assert x[:, 0].tolist() == [4, 0] and given == {"mask": None}
    (x,), given = inputs.take(torch.tensor([2, 1]), here)
    assert x.shape == (2, 6) and given["mask"][:, 0].tolist() == [True, False]
    drawn = inputs.alike(torch.tensor([1, 0, 2, 3]))
    assert drawn[[0, 2]].tolist() == [1, 2] and set(drawn.tolist()) == {1, 2}
