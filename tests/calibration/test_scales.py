"""The scales of a whole model from synthetic statistics whose best scales are known."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantempo.core import WEIGHT
from quantempo.recipe import Recipe
from quantempo.scales import LayerScales, search_scales, search_weight

T, K = 1000, 16
BASE = Recipe.load("w8a8").override("activations", buckets=4)


def statistics(spread: Tensor, n: int = 2048) -> dict[str, Tensor]:
    """Histograms (1, K, n) over [-8, 8], uniform over +-spread[k] in fine bin k."""
    centers = -8 + (torch.arange(n) + 0.5) * 16 / n
    hist = (centers.abs() <= spread[:, None]).long() * 10
    return {
        "a.hist": hist[None],
        "a.edges": torch.tensor([[-8.0, 8.0]]),
        "time_bin_edges": torch.linspace(0, T, K + 1),
    }


STEPS = torch.tensor([1.0] * 4 + [2.0] * 4 + [4.0] * 4 + [8.0] * 4)
WEIGHTS = {"a": torch.randn(3, 5, generator=torch.Generator().manual_seed(0))}


def test_buckets_are_cut_where_the_data_changes() -> None:
    found = search_scales(statistics(STEPS), WEIGHTS, BASE)
    # Fine bins are 62.5 time-steps wide: t = 249 is in bin 3, t = 250 in bin 4.
    wanted = torch.tensor([int(t // 250) for t in range(T)])
    assert torch.equal(found["bucket_of"], wanted) and found["bucket_of"].dtype == torch.int64
    scale = found["a.act_scale"]
    assert scale.shape == (1, 4) and scale.dtype == torch.float32
    # A uniform law on +-r over 255 steps wants 2 r / 255, up to the grid of candidates (5 %).
    torch.testing.assert_close(scale[0] * 255 / 2, STEPS[::4], rtol=0.06, atol=0)
    assert abs(int(found["a.act_zero_point"]) - 127.5) <= 2
    assert found["a.act_zero_point"].dtype == torch.int32


def test_data_that_does_not_change_keeps_one_scale() -> None:
    found = search_scales(statistics(torch.full((K,), 3.0)), WEIGHTS, BASE)
    assert found["a.act_scale"].shape == (1, 1)


def test_one_bucket_is_a_clock_that_stands_still() -> None:
    found = search_scales(statistics(STEPS), WEIGHTS, BASE.override("activations", buckets=1))
    assert found["a.act_scale"].shape == (1, 1)
    assert not found["bucket_of"].any() and found["bucket_of"].shape == (T,)


def test_min_gain_decides_by_layer_and_the_clock_is_shared() -> None:
    calm = statistics(torch.full((K,), 3.0))
    stats = statistics(STEPS) | {"b.hist": calm["a.hist"], "b.edges": calm["a.edges"]}
    found = search_scales(stats, {**WEIGHTS, "b": WEIGHTS["a"]}, BASE)
    assert found["a.act_scale"].shape == (1, 4) and found["b.act_scale"].shape == (1, 1)
    assert [key for key in found if "bucket" in key] == ["bucket_of"]


def test_segments_share_columns_and_keep_their_own_scales() -> None:
    one, two = statistics(STEPS), statistics(torch.full((K,), 0.5))
    stats = one | {
        "a.hist": torch.cat([one["a.hist"], two["a.hist"]]),
        "a.edges": torch.cat([one["a.edges"], two["a.edges"]]),
    }
    found = search_scales(stats, WEIGHTS, BASE)
    scale = found["a.act_scale"]
    assert scale.shape == (2, 4) and found["a.act_zero_point"].shape == (2,)
    assert len(scale[1].unique()) == 1
    assert float(scale[1, 0]) == pytest.approx(2 * 0.5 / 255, rel=0.06)


def test_symmetric_scales_have_their_zero_in_the_middle() -> None:
    n = 2048
    stats = statistics(torch.full((K,), 8.0), n)
    stats["a.hist"] *= torch.linspace(0, 1, n) > 0.25
    found = {
        symmetric: search_scales(stats, WEIGHTS, BASE.override("activations", symmetric=symmetric))
        for symmetric in (True, False)
    }
    # Uniform on [-4, 8]: 255 steps of 12 / 255 with zero at 85, or of 16 / 255 with it at 128.
    assert int(found[True]["a.act_zero_point"]) == 128
    assert abs(int(found[False]["a.act_zero_point"]) - 85) <= 3
    assert float(found[True]["a.act_scale"]) == pytest.approx(16 / 255, rel=0.06)
    assert float(found[False]["a.act_scale"]) == pytest.approx(12 / 255, rel=0.06)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_follow_their_own_settings(bits: int) -> None:
    recipe = BASE.override("weights", bits=bits, metric="mse")
    found = search_scales(statistics(STEPS), WEIGHTS, recipe)
    wanted = search_weight(WEIGHTS["a"], replace(WEIGHT, bits=bits), metric="mse")
    assert torch.equal(found["a.weight_scale"], wanted)


def test_the_metric_of_weights_is_that_of_the_recipe() -> None:
    weights = {"a": torch.randn(3, 200, generator=torch.Generator().manual_seed(0))}
    scales = [
        search_scales(statistics(STEPS), weights, BASE.override("weights", bits=4, metric=metric))
        for metric in ("l1", "mse")
    ]
    assert not torch.equal(scales[0]["a.weight_scale"], scales[1]["a.weight_scale"])


def test_scales_are_read_back() -> None:
    found = search_scales(statistics(STEPS), WEIGHTS, BASE)
    layers = LayerScales.read(found)
    assert list(layers) == ["a"]
    assert torch.equal(layers["a"].act_scale, found["a.act_scale"])
    assert torch.equal(layers["a"].weight_scale, found["a.weight_scale"])
    assert torch.equal(layers["a"].act_zero_point, found["a.act_zero_point"])
