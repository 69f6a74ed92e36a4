"""The contract of a metric, on everything in the registry; values against numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.scales.metrics import METRICS, lp, make_metric
from tests.scales.reference import METRIC_OF

NAMES = METRICS.names()
every_metric = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**32 - 1)


def _sample(seed: int, length: int = 40, grids: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (L,) sorted, x_hat (P, L) from fine to badly clipped, counts (L,) >= 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, generator=generator, dtype=torch.float64).sort().values
    scale = torch.tensor([0.02, 0.1, 0.3, 1.0, 0.05], dtype=torch.float64)[:grids, None]
    x_hat = (x / scale).round().clamp(-8, 7) * scale
    return x, x_hat, torch.randint(1, 5, (length,), generator=generator)


def test_the_reference_covers_the_registry() -> None:
    assert set(METRIC_OF) == set(NAMES)


@every_metric
@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_matches_numpy(name: str, seed: int) -> None:
    x, x_hat, weight = _sample(seed)
    weight[::7] = 0
    got = make_metric(name)(x, x_hat, weight)
    want = [METRIC_OF[name](x.numpy(), row.numpy(), weight.double().numpy()) for row in x_hat]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-13)


@every_metric
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_is_zero_at_equality_and_positive_beyond(name: str, seed: int) -> None:
    metric = make_metric(name)
    x, x_hat, weight = _sample(seed)
    for same in (metric(x, x[None], weight), metric(x, x[None]), metric(x[None], x[None])):
        # The KL of two equal densities is a difference of two sums of L terms below 4.
        assert same.shape == (1,) and float(same) <= 1e-14
    values = metric(x, x_hat, weight)
    assert values.shape == (len(x_hat),) and bool(values.isfinite().all())
    assert bool((values >= 0).all()) and float(values[3]) > 0


@every_metric
@given(seed=seeds)
@settings(max_examples=10, deadline=None)
def test_a_weight_is_a_repetition_and_order_means_nothing(name: str, seed: int) -> None:
    metric = make_metric(name)
    x, x_hat, weight = _sample(seed)
    values = metric(x, x_hat, weight)
    repeated = metric(x.repeat_interleave(weight), x_hat.repeat_interleave(weight, 1))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    shuffled = metric(x[order], x_hat[:, order], weight[order])
    torch.testing.assert_close(repeated, values, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(shuffled, values, rtol=1e-9, atol=1e-13)
    # 3 times every count is the same distribution.
    torch.testing.assert_close(metric(x, x_hat, 3 * weight), values, rtol=1e-9, atol=1e-13)


@every_metric
def test_leading_axes_broadcast(name: str) -> None:
    metric = make_metric(name)
    x, x_hat, weight = _sample(3)
    rows = torch.stack([weight, weight.flip(0), torch.zeros_like(weight)])
    table = metric(x, x_hat, rows[:, None])
    assert table.shape == (3, len(x_hat))
    for row, value in zip(rows, table, strict=True):
        torch.testing.assert_close(metric(x, x_hat, row), value, rtol=1e-12, atol=1e-15)
    assert not bool(table[2].any()), "no data is no error"
    own = metric(x.expand_as(x_hat), x_hat, weight.expand(x_hat.shape))
    torch.testing.assert_close(own, table[0], rtol=1e-12, atol=1e-15)
    blocks = metric(torch.stack([x, 2 * x])[:, None], torch.stack([x_hat, 2 * x_hat]))
    assert blocks.shape == (2, len(x_hat))
    torch.testing.assert_close(blocks[0], metric(x, x_hat), rtol=1e-12, atol=1e-15)


@every_metric
def test_more_bits_are_better(name: str) -> None:
    x = torch.linspace(-4, 4, 2048, dtype=torch.float64)
    counts = (torch.exp(-x * x / 2) * 1e6).round()
    scale = torch.tensor([8 / 2**b for b in range(3, 9)], dtype=torch.float64)[:, None]
    values = make_metric(name)(x, (x / scale).round() * scale, counts)
    assert bool((values[1:] < values[:-1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosine_keeps_its_digits_near_zero(dtype: torch.dtype) -> None:
    # |a - b| = d, orthogonal to a: 1 - cos = 1 - 1/sqrt(1 + d^2), about 5e-9 here, which
    # 1 - cosine in float32 would round to 0.
    d = 1e-4
    x = torch.tensor([1.0, 0.0], dtype=dtype)
    value = float(make_metric("cosine")(x, torch.tensor([[1.0, d]], dtype=dtype)))
    assert value == pytest.approx(d * d / 2, rel=1e-4)


def test_cosine_of_a_zero_vector() -> None:
    x = torch.tensor([1.0, 2.0])
    metric = make_metric("cosine")
    assert metric(x, torch.zeros(1, 2)).tolist() == [1.0]
    assert metric(0 * x, torch.zeros(1, 2)).tolist() == [0.0]


def test_kl_charges_clipped_mass() -> None:
    # A flat density has no shape to lose: the whole value is T log(T/e) + R log(R/(1-e)).
    x = (torch.arange(100, dtype=torch.float64) + 0.5) / 10
    codes = (x / 0.5).round()
    for top in (4, 10, 15):
        clipped = ((x - 0.5 * codes.clamp(max=top)).abs() > 0.25).double().mean()
        t, r, e = float(clipped), 1 - float(clipped), 1e-6
        value = float(make_metric("kl")(x, 0.5 * codes.clamp(max=top)[None], torch.ones(100)))
        assert value == pytest.approx(t * math.log(t / e) + r * math.log(r / (1 - e)), rel=1e-9)


def test_p_reaches_the_metric_that_has_one() -> None:
    x, x_hat, weight = _sample(0)
    assert torch.equal(make_metric("lp", 1.5)(x, x_hat, weight), lp(x, x_hat, weight, p=1.5))
    torch.testing.assert_close(make_metric("lp", 2.0)(x, x_hat), make_metric("mse")(x, x_hat))
    assert make_metric("mse", 3.0) is METRICS.get("mse")


@pytest.mark.parametrize("p", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_exponent_is_refused(p: float) -> None:
    with pytest.raises(QuantempoError, match="expected a positive number"):
        make_metric("lp", p)


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(QuantempoError, match="did you mean 'cosine'"):
        make_metric("cosin")
