"""Segmentation of time against exhaustive search."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantempo.scales import CostTable, bucket_of_bin, segment_costs, segment_time


def _table(seed: int, rows: int, candidates: int = 5) -> CostTable:
    generator = torch.Generator().manual_seed(seed)
    mass = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    return CostTable(
        scale=torch.logspace(0, -1, candidates, dtype=torch.float64),
        zero_point=torch.full((candidates,), 7),
        cost=torch.rand(rows, candidates, generator=generator, dtype=torch.float64) + 0.01,
        mass=mass / mass.sum(),
    )


def _total(tables: list[CostTable], cut: list[int], smooth: float) -> float:
    """The objective from its definition, in plain loops."""
    total = 0.0
    for table in tables:
        rows, grid = table.cost.shape
        plain = [
            [float(table.mass[k] * table.cost[k, g]) for g in range(grid)] for k in range(rows)
        ]
        sums = [sum(plain[k][g] for k in range(rows)) for g in range(grid)]
        whole = min(sums)
        common = float(table.scale[sums.index(whole)])
        away = [abs(float(torch.tensor(float(s) / common).double().log())) for s in table.scale]
        share = [[smooth * whole * float(m) * a for a in away] for m in table.mass]
        for i, j in pairwise(cut):
            each = [sum(plain[k][g] + share[k][g] for k in range(i, j)) for g in range(grid)]
            total += min(each) / whole
    return total


@pytest.mark.parametrize("smooth", [0.0, 0.3])
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 3), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
def test_equals_exhaustive_search(smooth, seed, rows, layers, buckets):
    tables = [_table(seed + i, rows) for i in range(layers)]
    count = min(buckets, rows)
    every = [[0, *inner, rows] for inner in combinations(range(1, rows), count - 1)]
    want = min(_total(tables, cut, smooth) for cut in every)
    cut = segment_time(tables, buckets, smooth)
    assert cut.dtype == torch.int64 and len(cut) == count + 1
    # float32 in one logarithm of the loops above.
    assert _total(tables, cut.tolist(), smooth) == pytest.approx(want, rel=1e-6)


def test_finds_the_obvious_boundaries() -> None:
    cost = torch.full((9, 3), 1.0, dtype=torch.float64)
    cost[:2, 0], cost[2:7, 1], cost[7:, 2] = 0.1, 0.1, 0.1
    table = CostTable(
        torch.tensor([1.0, 0.5, 0.2]), torch.zeros(3).long(), cost, torch.full((9,), 1 / 9)
    )
    cut = segment_time([table], 3)
    assert cut.tolist() == [0, 2, 7, 9]
    assert bucket_of_bin(cut).tolist() == [0, 0, 1, 1, 1, 1, 1, 2, 2]
    # Layers take their own best candidate: one that prefers other scales in the same bins agrees.
    turned = CostTable(table.scale, table.zero_point, cost.flip(1) * 1e6, table.mass)
    assert segment_time([table, turned], 3).tolist() == [0, 2, 7, 9]


@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_the_size_of_activations_has_no_vote(factor: float) -> None:
    a, b = _table(0, 8), _table(1, 8)
    large = CostTable(b.scale, b.zero_point, b.cost * factor, b.mass)
    assert torch.equal(segment_time([a, b], 3), segment_time([a, large], 3))


def test_every_bucket_holds_data() -> None:
    table = _table(0, 8)
    mass = torch.tensor([0, 0, 0.2, 0, 0.3, 0.5, 0, 0], dtype=torch.float64)
    sparse = CostTable(table.scale, table.zero_point, table.cost, mass)
    for buckets in (1, 2, 3, 8):
        cut = segment_time([sparse], buckets)
        assert len(cut) == min(buckets, 3) + 1 and cut[0] == 0 and cut[-1] == 8
        assert all(float(mass[i:j].sum()) > 0 for i, j in pairwise(cut.tolist()))


def test_a_layer_without_error_does_not_decide() -> None:
    a, b = _table(0, 6), _table(1, 6)
    silent = CostTable(b.scale, b.zero_point, 0 * b.cost, b.mass)
    assert torch.equal(segment_time([a, silent], 3), segment_time([a], 3))
    assert not bool(segment_costs(silent).isnan().any())


def test_costs_of_segments() -> None:
    table = _table(3, 5)
    cost = segment_costs(table)
    assert float(cost[0, 5]) == pytest.approx(1.0)
    contribution = table.weighted()
    whole = contribution.sum(0).min()
    assert float(cost[1, 4]) == pytest.approx(float(contribution[1:4].sum(0).min() / whole))
    assert all(float(cost[i, j]) == float("inf") for i in range(5) for j in range(i + 1))
