"""Activation search: brute force, bounds against exact data, degenerate inputs, buckets."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantempo.core import Format
from quantempo.errors import QuantempoError
from quantempo.scales import (
    METRICS,
    Candidates,
    Histogram,
    MinMax,
    bin_centers,
    bucket_gain,
    cost_table,
    search_activation,
)
from tests.scales.reference import METRIC_OF, candidates, levels
from tests.tiny import noise

every_metric = pytest.mark.parametrize("metric", METRICS.names())
seeds = st.integers(0, 2**32 - 1)
SMALL = Candidates(steps=7, floor=0.1, shrink=(1.0, 0.7, 0.4))


def on_grid(x: Tensor, scale: Tensor, zero: int, spec: Format) -> Tensor:
    """Return what the codes of x stand for, through the float32 arithmetic of layers."""
    codes = (torch.round(x.float() / scale) + zero).clamp(spec.qmin, spec.qmax)
    return ((codes - zero) * scale).to(x.dtype)


def _silu_rows(seed: int, bins: int = 48, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Return (hist (K, N), edges (2,)) of SiLU of normal data whose width grows with time."""
    generator = torch.Generator().manual_seed(seed)
    width = torch.linspace(0.3, 2, rows)[:, None] * (0.5 + torch.rand(1, generator=generator))
    x = torch.nn.functional.silu(torch.randn(rows, 2000, generator=generator) * width)
    ranges = MinMax(1, rows)
    ranges.update(x, torch.arange(rows))
    histogram = Histogram(ranges.edges(), rows, bins)
    histogram.update(x, torch.arange(rows))
    return histogram.counts[0], histogram.edges[0]


def _one(x: Tensor, bins: int = 2048) -> tuple[Tensor, Tensor]:
    ranges = MinMax()
    ranges.update(x)
    histogram = Histogram(ranges.edges(), bins=bins)
    histogram.update(x)
    return histogram.counts[0], histogram.edges[0]


def _brute_force(
    hist: Tensor, edges: Tensor, spec: Format, metric: str
) -> tuple[dict[int, float], dict[tuple[int, float], np.ndarray]]:
    """Return z -> best total, and (z, s) -> mass * metric of each row, in numpy."""
    lo, hi = edges.double().tolist()
    n = hist.shape[1]
    x = lo + (np.arange(n) + 0.5) * (hi - lo) / n
    share = (hist.sum(1) / hist.sum()).double().numpy()
    grid = candidates(lo, hi, spec.bits, spec.symmetric, SMALL.steps, SMALL.floor, SMALL.shrink)
    cost = {}
    for scale, z in grid:
        x_hat = levels(x, scale, z, spec.qmin, spec.qmax)
        each = [METRIC_OF[metric](x, x_hat, row.double().numpy()) for row in hist]
        cost[z, scale] = share * np.array(each)
    best = {}
    for z in {z for z, _ in cost}:
        best[z] = float(np.min([c for (k, _), c in cost.items() if k == z], axis=0).sum())
    return best, cost


@every_metric
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_choice_is_the_argmin_of_brute_force(metric: str, symmetric: bool, bits: int) -> None:
    spec = Format(bits, symmetric=symmetric)
    for seed in range(4):
        fine, edges = _silu_rows(seed)
        if seed % 2:
            fine, edges = fine.flip(1), -edges.flip(0)
        for buckets in (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 2])):
            hist = torch.stack([fine[buckets == b].sum(0) for b in range(int(buckets.max()) + 1)])
            found = search_activation(
                fine, edges, spec, metric=metric, buckets=buckets, candidates=SMALL
            )
            best, cost = _brute_force(hist, edges, spec, metric)
            # Sums of the same numbers in another order: 1e-9 is far above their rounding and far
            # below the difference of two candidates.
            assert best[found.zero_point] == pytest.approx(min(best.values()), rel=1e-9)
            assert found.cost == pytest.approx(min(best.values()), rel=1e-9)
            for row, scale in enumerate(found.scale.tolist()):
                of_z = [c[row] for (z, _), c in cost.items() if z == found.zero_point]
                assert cost[found.zero_point, scale][row] == pytest.approx(min(of_z), rel=1e-9)


@every_metric
@given(seed=seeds, bits=st.sampled_from([2, 4, 8]), symmetric=st.booleans())
@settings(max_examples=15, deadline=None)
def test_never_worse_than_min_max(metric: str, seed: int, bits: int, symmetric: bool) -> None:
    spec = Format(bits, symmetric=symmetric)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=generator) ** 3 + torch.rand(1, generator=generator) * 4 - 2
    hist, edges = _one(x, bins=256)
    found = search_activation(hist, edges, spec, metric=metric, candidates=SMALL)
    min_max = cost_table(hist, edges, spec, metric=metric, candidates=SMALL).cost[0, 0]
    assert found.cost <= min_max
    # Min-max from its definition, through the arithmetic that layers use.
    lo, hi = min(float(edges[0]), 0.0), max(float(edges[1]), 0.0)
    zero = 2 ** (bits - 1) if symmetric else round(-lo / (hi - lo) * spec.qmax)
    scale = max(-lo, hi) / (spec.qmax - zero) if symmetric else (hi - lo) / spec.qmax
    centres = bin_centers(edges, 256)
    x_hat = on_grid(centres, torch.tensor(scale), zero, spec)
    want = METRIC_OF[metric](centres.numpy(), x_hat.numpy(), hist[0].double().numpy())
    if metric != "kl":
        # float32 against float64 arithmetic; a centre on a rounding border may go either way,
        # which kl, a sum over which bins share a level, feels more.
        assert float(min_max) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(("metric", "p"), [("l1", 1.0), ("mse", 2.0), ("lp", 2.4), ("lp", 4.0)])
@given(seed=seeds, bins=st.sampled_from([64, 512]), bits=st.sampled_from([4, 8]))
@settings(max_examples=20, deadline=None)
def test_the_histogram_stays_within_its_bound(metric, p, seed, bins, bits):
    generator = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.silu(torch.randn(400, generator=generator) * 2)
    spec = Format(bits)
    hist, edges = _one(x, bins)
    width = float(edges[1] - edges[0]) / bins
    table = cost_table(hist, edges, spec, metric=metric, p=p, candidates=SMALL)
    exact = []
    for scale, zero in zip(table.scale, table.zero_point, strict=True):
        x_hat = levels(x.double().numpy(), float(scale), int(zero), spec.qmin, spec.qmax)
        exact.append(float((np.abs(x.double().numpy() - x_hat) ** p).mean() ** (1 / p)))
    norm = table.cost[0].numpy() ** (1 / p)
    # 1e-5 of a bin: float32 rounding in the placement of a value.
    assert np.abs(norm - exact).max() <= width / 2 * (1 + 1e-5)
    found = search_activation(hist, edges, spec, metric=metric, p=p, candidates=SMALL)
    chosen = (table.scale == float(found.scale)) & (table.zero_point == found.zero_point)
    assert exact[int(chosen.nonzero()[0])] <= min(exact) + width * (1 + 1e-5)


OUTLIER = torch.cat([noise(3000), torch.tensor([1e3])])
DEGENERATE = {
    "zero": torch.zeros(10),
    "constant": torch.full((10,), 3.7),
    "negative constant": torch.full((10,), -0.02),
    "positive": torch.linspace(2, 5, 100),
    "negative": -torch.linspace(0, 5, 100),
    "two values": torch.tensor([0.0] * 99 + [1.0]),
    "outlier": OUTLIER,
    "subnormal": torch.linspace(-1e-44, 1e-44, 9),
    "smallest": torch.linspace(-1e-37, 1e-37, 9),
    "largest": torch.linspace(-1, 1, 9) * 3e38,
}


@every_metric
@pytest.mark.parametrize("name", list(DEGENERATE))
@pytest.mark.parametrize("symmetric", [False, True])
def test_degenerate_inputs(metric: str, name: str, symmetric: bool) -> None:
    spec, x = Format(symmetric=symmetric), DEGENERATE[name]
    hist, edges = _one(x)
    found = search_activation(hist, edges, spec, metric=metric, candidates=SMALL)
    scale = float(found.scale)
    assert scale >= torch.finfo(torch.float32).tiny and np.isfinite(scale)
    assert found.scale.dtype == torch.float32 and np.isfinite(found.cost)
    assert 0 <= found.zero_point <= 255 and (not symmetric or found.zero_point == 128)
    # Zero is exact, and q-parameters are such that the layers take them.
    assert float(on_grid(torch.zeros(1), found.scale, found.zero_point, spec)) == 0.0
    if not symmetric and name in ("constant", "positive", "two values"):
        assert found.zero_point == 0
    if not symmetric and name.startswith("negative"):
        assert found.zero_point == 255
    if "constant" in name or name == "zero":
        # Half a step, and the float32 rounding of values next to the end of the range.
        error = (on_grid(x, found.scale, found.zero_point, spec) - x).abs().max()
        assert float(error) <= scale * 0.5001
        assert float(error) <= 2e-6 * float(x.abs().max()) or symmetric or metric == "cosine"


@pytest.mark.parametrize("symmetric", [False, True])
def test_signed_codes_are_unsigned_ones_moved(symmetric: bool) -> None:
    hist, edges = _silu_rows(6)
    buckets = torch.arange(4)
    unsigned = search_activation(hist, edges, Format(8, symmetric=symmetric), buckets=buckets)
    spec = Format(8, signed=True, symmetric=symmetric)
    signed = search_activation(hist, edges, spec, buckets=buckets)
    assert signed.zero_point == unsigned.zero_point - 128
    assert torch.equal(signed.scale, unsigned.scale) and signed.cost == unsigned.cost


def test_an_outlier_is_clipped_when_it_pays() -> None:
    # 3000 normal values and one at 1000: l1 gives the outlier up, p = 8 does not.
    hist, edges = _one(OUTLIER, bins=1 << 16)
    fine = Candidates(steps=40, floor=1e-3)
    low = search_activation(hist, edges, metric="l1", candidates=fine)
    high = search_activation(hist, edges, metric="lp", p=8, candidates=fine)
    assert float(low.scale) < 0.1 < 3 < float(high.scale)


@every_metric
@pytest.mark.parametrize("symmetric", [False, True])
def test_one_bucket_is_the_static_search_bit_for_bit(metric: str, symmetric: bool) -> None:
    how = {"metric": metric, "candidates": SMALL}
    find = functools.partial(search_activation, spec=Format(symmetric=symmetric), **how)
    hist, edges = _silu_rows(5)
    static = find(hist.sum(0, keepdim=True), edges)
    for found in (
        find(hist, edges),
        find(hist, edges, buckets=torch.zeros(4, dtype=torch.int32)),
        find(hist, edges, buckets=torch.arange(4), min_gain=1.0),
    ):
        assert torch.equal(found.scale, static.scale) and found.scale.shape == (1,)
        assert found.zero_point == static.zero_point and found.cost == static.cost


@every_metric
def test_buckets_gain_what_their_difference_allows(metric: str) -> None:
    hist, edges = _silu_rows(1, bins=512)
    buckets, same = torch.arange(4), hist[:1].expand(4, -1)
    found = search_activation(hist, edges, Format(4), metric=metric, buckets=buckets)
    gain = [bucket_gain(cost_table(rows, edges, Format(4), metric=metric)) for rows in (hist, same)]
    assert found.scale.shape == (4,) and 0.02 < gain[0] < 1
    assert found.scale[0] < found.scale[3]
    alike = search_activation(same, edges, Format(4), metric=metric, buckets=buckets)
    assert gain[1] == pytest.approx(0, abs=1e-12) and len(set(alike.scale.tolist())) == 1
    kept = search_activation(same, edges, metric=metric, buckets=buckets, min_gain=0.02)
    assert kept.scale.shape == (1,)


@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_gain_is_between_none_and_all(seed: int) -> None:
    hist, edges = _silu_rows(seed)
    table = cost_table(hist, edges, Format(4), candidates=SMALL)
    one = search_activation(hist, edges, Format(4), candidates=SMALL)
    own = search_activation(hist, edges, Format(4), buckets=torch.arange(4), candidates=SMALL)
    assert 0 <= bucket_gain(table) <= 1
    assert bucket_gain(table) == pytest.approx(1 - own.cost / one.cost, abs=1e-9)


def test_an_empty_bucket_takes_the_nearest_scale() -> None:
    hist, edges = _silu_rows(2)
    spread = torch.zeros(8, hist.shape[1], dtype=torch.int64)
    spread[2], spread[5] = hist[0], hist[3]
    how = {"edges": edges, "spec": Format(4), "candidates": SMALL}
    found = search_activation(spread, buckets=torch.arange(8), **how)
    scale = found.scale.tolist()
    assert scale[2] != scale[5]
    assert scale == [scale[2]] * 4 + [scale[5]] * 4
    pair = search_activation(hist[[0, 3]], buckets=torch.arange(2), **how)
    assert pair.scale.tolist() == [scale[2], scale[5]] and pair.cost == pytest.approx(found.cost)


def test_smoothing_pulls_towards_the_common_scale() -> None:
    hist, edges = _silu_rows(3, bins=512)
    spread = []
    for smooth in (0.0, 0.1, 10.0):
        found = search_activation(hist, edges, Format(4), buckets=torch.arange(4), smooth=smooth)
        spread.append(float(found.scale.max() / found.scale.min()))
        assert found.cost <= float(cost_table(hist, edges, Format(4)).weighted()[:, 0].sum())
    assert spread[0] >= spread[1] >= spread[2] == 1.0 and spread[0] > 1
    one = search_activation(hist, edges, Format(4))
    assert found.scale.tolist() == one.scale.tolist() * 4 and found.zero_point == one.zero_point


@pytest.mark.parametrize("sign", [1, -1])
def test_the_common_zero_point_serves_all_rows(sign: int) -> None:
    hist, edges = _silu_rows(4)
    if sign < 0:
        hist, edges = hist.flip(1), -edges.flip(0)
    only = cost_table(hist, edges).at_best_zero_point()
    own = search_activation(hist, edges, buckets=torch.arange(4))
    assert only.zero_point.unique().tolist() == [own.zero_point]
    assert float(only.weighted().min(1).values.sum()) == pytest.approx(own.cost, rel=1e-12)


def test_the_grid_covers_the_range_and_starts_with_min_max() -> None:
    edges = torch.tensor([-0.28, 7.0])
    table = cost_table(torch.ones(1, 256), edges)
    assert float(table.scale[0]) == np.float32(float(edges[1].double() - edges[0].double()) / 255)
    assert int(table.zero_point[0]) == round(0.28 / 7.28 * 255)
    for z in table.zero_point.unique().tolist():
        top = float(table.scale[table.zero_point == z].max())
        # A zero point at an end gives its side up; every other one can cover the range.
        assert z == 0 or z * top >= 0.28 * (1 - 1e-6)
        assert (255 - z) * top >= 7.0 * (1 - 1e-6)
    codes = torch.round(edges / table.scale[0].float()) + table.zero_point[0]
    assert codes.clamp(0, 255).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("hist", "edges", "message"),
    [
        (torch.zeros(2, 8), [0.0, 1.0], "without data"),
        (-torch.ones(1, 8), [0.0, 1.0], "negative counts"),
    ],
)
def test_mistakes_are_named(hist: Tensor, edges: list[float], message: str) -> None:
    with pytest.raises(QuantempoError, match=message):
        cost_table(hist, torch.tensor(edges))
