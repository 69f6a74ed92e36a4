"""Rounding to the nearest code: integers in range, half a step at most, names in a registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from quantempo.core import WEIGHT
from quantempo.errors import QuantempoError
from quantempo.rounding import ROUNDINGS, nearest


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


def test_the_registry_knows_it_and_names_what_it_does_not() -> None:
    assert ROUNDINGS.get("nearest") is nearest
    with pytest.raises(QuantempoError, match=r"nearst.*nearest"):
        ROUNDINGS.get("nearst")
