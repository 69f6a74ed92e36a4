"""Weight search against brute force in float64, and what must not change it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from quantempo.core import Format
from quantempo.errors import QuantempoError
from quantempo.rounding import nearest
from quantempo.scales import METRICS, activation, search_weight
from quantempo.scales.metrics import DENSITY_METRICS
from tests.scales.reference import METRIC_OF, levels

every_metric = pytest.mark.parametrize("metric", METRICS.names())


def _spec(bits: int) -> Format:
    return Format(bits, signed=True, symmetric=True, narrow=True)


def _weight(seed: int = 0, channels: int = 6, inputs: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(channels, inputs, 3, 3, generator=generator) ** 3
    return w * torch.logspace(-4, 1, channels)[:, None, None, None]


def _costs(row: np.ndarray, metric: str, bits: int, steps: int) -> dict[float, float]:
    """Return scale -> metric for one channel; ratios from 1 down to 0.2."""
    qmax, peak = 2 ** (bits - 1) - 1, np.abs(row).max()
    if metric in DENSITY_METRICS:
        count, edges = np.histogram(row / peak, 2048, (-1, 1))
        x, count = (edges[1:] + edges[:-1]) / 2, count.astype(float)
    else:
        x, count = row / peak, np.ones_like(row)
    cost = {}
    for ratio in np.linspace(1, 0.2, steps):
        x_hat = levels(x, ratio / qmax, 0, -qmax, qmax)
        cost[float(np.float32(peak * ratio / qmax))] = METRIC_OF[metric](x, x_hat, count)
    return cost


@every_metric
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_choice_is_the_argmin_of_brute_force(metric: str, bits: int) -> None:
    w = _weight(bits)
    scale = search_weight(w, _spec(bits), metric=metric, steps=17)
    assert scale.shape == (len(w),) and scale.dtype == torch.float32
    for row, chosen in zip(w.flatten(1).double().numpy(), scale.tolist(), strict=True):
        cost = _costs(row, metric, bits, 17)
        nearest = min(cost, key=lambda s: abs(s - chosen))
        assert chosen == pytest.approx(nearest, rel=2e-7)
        # The search runs in float32, the reference in float64.
        assert cost[nearest] <= min(cost.values()) * (1 + 2e-5)


@every_metric
def test_never_worse_than_min_max(metric: str) -> None:
    w = _weight(7)
    scale = search_weight(w, _spec(4), metric=metric)
    for row, chosen in zip(w.flatten(1).double().numpy(), scale.tolist(), strict=True):
        cost = _costs(row, metric, 4, 80)
        nearest = min(cost, key=lambda s: abs(s - chosen))
        assert cost[nearest] <= cost[max(cost)] * (1 + 2e-5)


def test_clipping_pays_at_four_bits_and_not_for_the_maximum_norm() -> None:
    w = torch.randn(4, 4608, generator=torch.Generator().manual_seed(0))
    full = w.abs().amax(1) / 7
    assert bool((search_weight(w, _spec(4), metric="mse") < 0.9 * full).all())
    # p -> infinity counts only the largest error: half a step with no clipping.
    assert bool((search_weight(w, _spec(4), metric="lp", p=60) > 0.9 * full).all())


@every_metric
def test_channels_do_not_see_each_other(metric: str) -> None:
    w = _weight(1, channels=70, inputs=3)
    scale = search_weight(w, metric=metric)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(search_weight(w[order], metric=metric), scale[order])
    assert torch.equal(search_weight(w[11:12], metric=metric), scale[11:12])


@every_metric
@pytest.mark.parametrize("power", [-100, -40, 90])
def test_a_power_of_two_passes_through(metric: str, power: int) -> None:
    w = _weight(2)
    scaled = search_weight(w * 2.0**power, _spec(4), metric=metric)
    assert torch.equal(scaled, search_weight(w, _spec(4), metric=metric) * 2.0**power)


@every_metric
def test_a_channel_of_zeros(metric: str) -> None:
    w = _weight(3)
    w[2] = 0
    scale = search_weight(w, metric=metric)
    assert float(scale[2]) == 2.0**-30 and bool((scale > 0).all())
    codes = nearest(w, scale, _spec(8))
    assert not bool(codes[2].any()) and int(codes.abs().max()) == 127
    others = [0, 1, 3, 4, 5]
    assert torch.equal(scale[others], search_weight(w[others], metric=metric))


@every_metric
def test_odd_weights_give_usable_scales(metric: str) -> None:
    tiny = torch.finfo(torch.float32).tiny
    for w in (
        torch.full((2, 5), -0.3),
        torch.tensor([[1e-45, 0.0], [1e-38, -1e-39]]),
        torch.tensor([[3e38, -3e38], [1.0, 0.0]]),
        torch.randn(3, 1),
        _weight(4).half(),
        _weight(4).bfloat16(),
    ):
        scale = search_weight(w, metric=metric)
        assert bool(((scale >= tiny) & scale.isfinite()).all()) and scale.dtype == torch.float32


def test_half_weights_are_searched_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        w = _weight(5, channels=64).to(dtype)
        assert torch.equal(search_weight(w, _spec(4)), search_weight(w.float(), _spec(4)))


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.ones(3), {}, r"\(O, ...\)"),
        (torch.ones(3, 2).int(), {}, "floating"),
        (torch.tensor([[1.0, float("nan")]]), {}, "check the checkpoint"),
    ],
)
def test_mistakes_are_named(weight: Tensor, options: dict[str, int], message: str) -> None:
    with pytest.raises(QuantempoError, match=message):
        search_weight(weight, **options)


def test_a_chunk_for_a_gpu_gives_the_same_scales(monkeypatch):
    weight = _weight(channels=9, inputs=700)
    wanted = search_weight(weight)
    monkeypatch.setattr(activation, "CHUNK", activation.CHUNK_GPU)
    assert torch.equal(search_weight(weight), wanted)
