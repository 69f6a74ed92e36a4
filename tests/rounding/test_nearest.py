"""Rounding to the nearest code: integers in range, half a step at most, names in a registry."""

from dataclasses import replace

import pytest
import torch

from quantempo.core import WEIGHT
from quantempo.errors import QuantempoError
from quantempo.rounding import ROUNDINGS, nearest, round_by_weights


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 3, 2)])
def test_codes_are_the_nearest_in_range(bits: int, shape: tuple[int, ...]) -> None:
    spec = replace(WEIGHT, bits=bits)
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=g)
    top = 2 ** (bits - 1) - 1
    # Smaller than min-max in some channels, so that codes clip.
    scale = weight.flatten(1).abs().amax(1) / top * torch.linspace(0.3, 1.0, 5)
    codes = nearest(weight, scale, spec)
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    assert int(codes.min()) == -top and int(codes.max()) == top
    wide = scale.double().reshape(-1, *[1] * (len(shape) - 1))
    # Brute force over all codes.
    grid = torch.arange(-top, top + 1).double()
    best = (weight.double()[..., None] - wide[..., None] * grid).abs().amin(-1)
    error = (weight.double() - wide * codes.double()).abs()
    # float32 division may send a tie the other way: 2^-23 of the weight.
    assert bool((error <= best + weight.abs().double() * 2**-22).all())


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5]])
    assert nearest(weight, torch.ones(1), WEIGHT).tolist() == [[0, 2, 2, 0, -2]]


def test_weights_on_the_grid_come_back_exactly() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(3, 1)
    scale = torch.tensor([2.0**-9, 0.3, 1e-6])
    weight = codes.float() * scale[:, None]
    assert torch.equal(nearest(weight, scale, WEIGHT), codes)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_one_bad_scale_or_weight_among_good_ones_is_refused(bad: float) -> None:
    with pytest.raises(QuantempoError, match="positive"):
        nearest(torch.ones(3, 2), torch.tensor([1.0, bad, 2.0]), WEIGHT)
    with pytest.raises(QuantempoError, match="NaN"):
        nearest(torch.tensor([[1.0, float("nan")]]), torch.ones(1), WEIGHT)


def test_the_registry_knows_it_and_names_what_it_does_not() -> None:
    assert ROUNDINGS.names() == ["nearest", "gptq", "adaround"]
    assert [ROUNDINGS.get(name).needs for name in ROUNDINGS.names()] == [
        "weights",
        "hessian",
        "block",
    ]
    with pytest.raises(QuantempoError, match=r"nearst.*nearest"):
        ROUNDINGS.get("nearst")


def test_by_weights_is_the_plain_function_and_refuses_what_needs_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(4, 3, generator=g), "b": torch.randn(2, 3, 1, 1, generator=g)}
    scales = {"a": torch.full((4,), 0.1), "b": torch.full((2,), 0.7)}
    specs = {"a": WEIGHT, "b": replace(WEIGHT, bits=2)}
    codes = round_by_weights("nearest", weights, scales, specs)
    for name, weight in weights.items():
        assert torch.equal(codes[name], nearest(weight, scales[name], specs[name]))
    assert int(codes["b"].abs().max()) == 1
    with pytest.raises(QuantempoError, match=r"gptq.*expected one of: nearest"):
        round_by_weights("gptq", weights, scales, specs)
