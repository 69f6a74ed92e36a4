"""Affine grids: exact codes, round trips and error bounds against float64 arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantempo.core import Format, Grid, dequantize, fake_quantize, quantize
from quantempo.errors import QuantempoError

specs = st.builds(
    lambda bits, kind: Format(bits, signed=kind > 0, narrow=kind == 2),
    st.integers(2, 8),
    st.integers(0, 2),
)


def grid(scale: float, zero: int) -> Grid:
    return Grid(torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32))


@given(spec=specs, exponent=st.integers(-20, 20), seed=st.integers(0, 2**31), shift=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_codes_survive_the_round_trip_exactly(spec, exponent, seed, shift):
    # A power-of-two scale makes every product exact, so the identity has no tolerance.
    zero = spec.qmin + round(shift * (spec.qmax - spec.qmin))
    q = torch.randint(
        spec.qmin, spec.qmax + 1, (64,), generator=torch.Generator().manual_seed(seed)
    )
    params = grid(2.0**exponent, zero)
    assert torch.equal(quantize(dequantize(q, params), params, spec), q.to(torch.int32))


@given(spec=specs, seed=st.integers(0, 2**31), scale=st.floats(1e-3, 10))
@settings(max_examples=200, deadline=None)
def test_error_is_at_most_half_a_step_inside_and_clips_outside(spec, seed, scale):
    zero = (spec.qmin + spec.qmax) // 2
    params = grid(scale, zero)
    step = float(params.scale)
    low, high = step * (spec.qmin - zero), step * (spec.qmax - zero)
    x = torch.empty(256).uniform_(
        1.5 * low - 1e-3, 1.5 * high + 1e-3, generator=torch.Generator().manual_seed(seed)
    )
    x_hat = fake_quantize(x, params, spec).double().numpy()
    inside = (x.numpy() >= low) & (x.numpy() <= high)
    # float32 rounding of x / scale and of the product: 2^-23 of the largest magnitude each.
    slack = 4 * 2.0**-23 * max(abs(low), abs(high), step)
    error = np.abs(x.double().numpy() - x_hat)
    assert (error[inside] <= step / 2 + slack).all()
    assert (x_hat >= low - slack).all() and (x_hat <= high + slack).all()
    outside = np.clip(x.double().numpy(), low, high)
    assert (np.abs(outside - x_hat) <= step / 2 + slack).all()


def test_rounds_ties_to_even_and_represents_zero_exactly():
    params, spec = grid(1.0, 3), Format(8)
    x = torch.tensor([-1.5, -0.5, 0.0, 0.5, 1.5, 2.5])
    assert quantize(x, params, spec).tolist() == [1, 3, 3, 3, 5, 5]
    assert fake_quantize(torch.zeros(1), params, spec).item() == 0.0


def test_saturates_at_both_ends_even_beyond_int32():
    params, spec = grid(1e-6, 128), Format(8)
    assert quantize(torch.tensor([-1e9, 1e9, float("inf")]), params, spec).tolist() == [0, 255, 255]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_rows_run_along_their_axis(axis):
    x = torch.randn(4, 4, 5, 4, generator=torch.Generator().manual_seed(0))
    spec = Format(8, signed=True, narrow=True)
    scale = torch.tensor([0.01, 0.1, 1.0, 10.0])
    params = Grid(scale, torch.zeros(4, dtype=torch.int32))
    whole = quantize(x, params, spec, axis=axis)
    for i in range(4):
        alone = Grid(scale[i : i + 1], params.zero_point[i : i + 1])
        assert torch.equal(whole.select(axis, i), quantize(x.select(axis, i), alone, spec))


def test_grids_and_their_mistakes():
    assert (Format(8).qmin, Format(8).qmax) == (0, 255)
    narrow = Format(8, signed=True, narrow=True)
    assert (narrow.qmin, narrow.qmax, narrow.symmetric_zero_point) == (-127, 127, 0)
    assert Format(4, signed=True).qmin == -8
    with pytest.raises(QuantempoError, match="narrow"):
        Format(8, narrow=True)
    with pytest.raises(QuantempoError, match="bits=1"):
        Format(1)
    # One bad value among good ones.
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(QuantempoError, match="positive"):
            Grid(torch.tensor([1.0, bad, 2.0]), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(QuantempoError, match="NaN"):
        quantize(torch.tensor([1.0, float("nan"), 2.0]), grid(1.0, 0), Format(8))
    with pytest.raises(QuantempoError, match="3 channels"):
        two = Grid(torch.ones(2), torch.zeros(2, dtype=torch.int32))
        quantize(torch.zeros(3), two, Format(8), axis=0)
