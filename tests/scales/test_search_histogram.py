"""Accumulators: exact counts, whatever the order, split, layout and dtype."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.scales import histogram
from quantempo.scales.histogram import Histogram, MinMax, bin_centers


def centers(histogram: Histogram) -> torch.Tensor:
    return bin_centers(histogram.edges, histogram.counts.shape[-1])[0]


def _filled(batches: list[tuple[Tensor, Tensor]], time_bins: int) -> tuple[MinMax, Histogram]:
    ranges = MinMax(1, time_bins)
    for x, time_bin in batches:
        ranges.update(x, time_bin)
    histogram = Histogram(ranges.edges(), time_bins, bins=64)
    for x, time_bin in batches:
        histogram.update(x, time_bin)
    return ranges, histogram


@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.integers(0, 12), max_size=4))
@settings(max_examples=40, deadline=None)
def test_batches_may_be_split_and_ordered_in_any_way(seed: int, cuts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 3, 5, generator=generator)
    time_bin = torch.randint(0, 4, (12,), generator=generator)
    ranges, whole = _filled([(x, time_bin)], 4)
    order = torch.randperm(12, generator=generator)
    x, time_bin = x[order], time_bin[order]
    borders = sorted({0, 12, *cuts})
    parts = [slice(a, b) for a, b in itertools.pairwise(borders)]
    again, split = _filled([(x[part], time_bin[part]) for part in parts], 4)
    assert torch.equal(ranges.range, again.range)
    assert torch.equal(whole.counts, split.counts) and whole.counts.dtype == torch.int64
    # Each row holds its own samples and nothing else.
    for k in range(4):
        assert int(whole.counts[0, k].sum()) == x[time_bin == k].numel()
        if bool((time_bin == k).any()):
            assert ranges.range[0, k, 0] == x[time_bin == k].min()
            assert ranges.range[0, k, 1] == x[time_bin == k].max()


@given(st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32), st.sampled_from([1, 7, 2048]))
@settings(max_examples=100, deadline=None)
def test_a_value_is_within_half_a_bin_of_its_centre(lo: float, span: float, bins: int) -> None:
    edges = torch.tensor([[lo, lo + span]])
    width = float(edges[0, 1].double() - edges[0, 0].double()) / bins
    x = edges[0, 0] + (edges[0, 1] - edges[0, 0]) * torch.linspace(0, 1, 33)
    x = x.clamp(*edges[0])
    histogram = Histogram(edges, 33, bins)
    for k, value in enumerate(x):
        histogram.update(value[None], k)
    assert histogram.counts.sum(-1).tolist() == [[1] * 33]
    centre = centers(histogram)[histogram.counts[0].argmax(-1)]
    # Two float32 operations place a value: (v - lo) and the product.
    rounding = 2**-22 * max(abs(lo), abs(lo + span))
    assert float((centre - x.double()).abs().max()) <= width / 2 + rounding


def test_agrees_with_numpy() -> None:
    # Multiples of 1/256 are exact in float32, so both must agree on every single bin.
    x = torch.randint(-1024, 1025, (50_000,), generator=torch.Generator().manual_seed(0)) / 256
    histogram = Histogram(torch.tensor([[-4.0, 4.0]]), bins=512)
    histogram.update(x)
    want, edges = np.histogram(x.numpy(), 512, (-4.0, 4.0))
    assert histogram.counts[0, 0].tolist() == want.tolist()
    np.testing.assert_allclose(centers(histogram), (edges[1:] + edges[:-1]) / 2)


def test_layout_and_dtype_do_not_matter() -> None:
    x = torch.randn(4, 6, 33, 65, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    edges = torch.stack([x.min(), x.max()])[None]

    def counts(y: Tensor) -> list[int]:
        ranges = MinMax()
        ranges.update(y)
        assert torch.equal(ranges.edges(), torch.stack([y.min(), y.max()])[None].float())
        histogram = Histogram(edges)
        histogram.update(y)
        return histogram.counts.flatten().tolist()

    want, last, wide = counts(x), torch.channels_last, torch.cat([x, x + 1], 1)
    forms = (x.to(memory_format=last), x.transpose(0, 3), x.bfloat16(), x.double())
    for y in (*forms, wide[:, :6], wide.to(memory_format=last)[:, :6]):
        assert counts(y) == want


def test_counts_beyond_float32_are_exact() -> None:
    n = 2**24 + 3
    histogram = Histogram(torch.tensor([[-1.0, 1.0]]), bins=4)
    histogram.update(torch.zeros(n, dtype=torch.bfloat16))
    assert histogram.counts.flatten().tolist() == [0, 0, n, 0]


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-45, 3e38])
def test_a_constant(value: float) -> None:
    _, histogram = _filled([(torch.full((2, 3), value), torch.tensor(0))], 1)
    assert int(histogram.counts.sum()) == 6
    assert float(centers(histogram)[histogram.counts[0, 0].argmax()]) == np.float32(value)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 3e38])
def test_extreme_ranges(scale: float) -> None:
    x = torch.linspace(-1, 1, 9) * scale
    _, histogram = _filled([(x, torch.tensor(0))], 1)
    assert int(histogram.counts.sum()) == 9
    filled = histogram.counts[0, 0].nonzero()[:, 0]
    assert int(filled[0]) == 0 and int(filled[-1]) == 63


def test_segments_are_apart() -> None:
    ranges = MinMax(2)
    ranges.update(torch.tensor([1.0, 2.0]), 0, 0)
    ranges.update(torch.tensor([-5.0]), 0, 1)
    assert ranges.edges().tolist() == [[1.0, 2.0], [-5.0, -5.0]]
    histogram = Histogram(ranges.edges(), bins=2)
    histogram.update(torch.tensor([1.0, 2.0, 2.0]), 0, 0)
    assert histogram.counts.tolist() == [[[1, 2]], [[0, 0]]]
    histogram.update(torch.tensor([-5.0]), 0, 1)
    assert histogram.counts.tolist() == [[[1, 2]], [[1, 0]]]


def test_values_a_little_outside_count_in_the_end_bins() -> None:
    histogram = Histogram(torch.tensor([[0.0, 1.0]]), bins=4)
    histogram.update(torch.tensor([-0.1, 1.1]))
    assert histogram.counts.flatten().tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1.5])
def test_values_that_cannot_be_counted_are_refused(bad: float) -> None:
    histogram = Histogram(torch.tensor([[0.0, 1.0]]), bins=4)
    with pytest.raises(QuantempoError, match="run the min-max pass"):
        histogram.update(torch.tensor([0.5, bad]))
    assert not bool(histogram.counts.any())
    if bad != 1.5:
        with pytest.raises(QuantempoError, match="NaN or infinity"):
            MinMax().update(torch.tensor([[0.5], [bad]]))


def test_mistakes_are_named() -> None:
    with pytest.raises(QuantempoError, match="no data"):
        MinMax().edges()
    with pytest.raises(QuantempoError, match="expected 0 to 1"):
        MinMax(1, 2).update(torch.ones(3), 2)
    with pytest.raises(QuantempoError, match="expected one a sample"):
        MinMax(1, 2).update(torch.ones(3, 1), torch.tensor([0, 1]))


def test_no_data_is_no_change() -> None:
    ranges = MinMax()
    ranges.update(torch.empty(0, 4))
    assert ranges.range.isinf().all()


def test_away_from_the_host_the_statistics_are_the_same(monkeypatch):
    x = torch.randn(12, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    bins = torch.tensor([0, 3, 1, 1, 0, 2, 3, 3, 3, 0, 1, 2])
    tables = []
    for host in (True, False):
        monkeypatch.setattr(histogram, "_on_host", lambda values, host=host: host)
        monkeypatch.setattr(histogram, "DEVICE_PIECE", 300)
        ranges = MinMax(1, 4)
        ranges.update(x, bins)
        counts = Histogram(ranges.edges(), 4, bins=64)
        counts.update(x, bins)
        counts.update(x[:2], torch.tensor([2, 2]))
        tables.append((ranges.range, counts.counts))
    assert torch.equal(tables[0][0], tables[1][0])
    assert torch.equal(tables[0][1], tables[1][1])
    assert int(tables[1][1].sum()) == 14 * 105
    with pytest.raises(QuantempoError, match="NaN"):
        MinMax(1, 4).update(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))
