"""Formats: ranges, storage as an exact inverse, sums that fit an int32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantempo import core
from quantempo.errors import QuantempoError

EACH = pytest.mark.parametrize("name", core.FORMATS.names())
shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@EACH
@given(shape=shapes, seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_stored_codes_come_back(name, shape, seed):
    found, make = core.FORMATS.get(name), torch.Generator().manual_seed(seed)
    codes = torch.randint(found.qmin, found.qmax + 1, shape, generator=make)
    stored = found.encode(codes)
    assert (stored.dtype, tuple(stored.shape)) == (found.storage, found.stored_shape(shape))
    assert torch.equal(found.decode(stored, shape).long(), codes)


@EACH
def test_every_code_is_kept_and_the_next_ones_are_refused(name):
    found = core.FORMATS.get(name)
    codes = torch.arange(found.qmin, found.qmax + 1)[None]
    assert torch.equal(found.decode(found.encode(codes), codes.shape).long(), codes)
    assert found.stored_shape((3, 5)) == ((3, 3) if found.bits <= 4 else (3, 5))
    for wrong in (found.qmin - 1, found.qmax + 1):
        # One bad code among good ones.
        with pytest.raises(QuantempoError, match=rf"outside \[{found.qmin}, {found.qmax}\]"):
            found.encode(torch.tensor([[0, wrong, 1]]))
    with pytest.raises(QuantempoError, match="expected integers"):
        found.encode(torch.zeros(1, 2))


def test_the_even_code_is_in_the_low_half_of_a_byte():
    assert core.weight_format(4).encode(torch.tensor([[1, -1]])).tolist() == [[0xF1]]


def test_every_int12_code_is_unpacked():
    codes = torch.arange(-2048, 2048)
    low = (codes & 15).to(torch.uint8)
    high, packed = (codes >> 4).to(torch.int8), low[0::2] | (low[1::2] << 4)
    assert torch.equal(core.unpack_int12(high, packed).long(), codes)


def test_ranges_are_those_of_the_kernels():
    assert (core.ACTIVATION.name, core.ACTIVATION.qmin, core.ACTIVATION.qmax) == ("uint8", 0, 255)
    assert (core.WEIGHT.name, core.WEIGHT.qmin, core.WEIGHT.qmax) == ("int8", -127, 127)
    assert core.WEIGHT.symmetric and core.WEIGHT.symmetric_zero_point == 0
    six = core.activation_format(6)
    assert six.qmax == 63 and six.symmetric_zero_point == 32
    with pytest.raises(QuantempoError, match="unknown format 'int9'"):
        core.weight_format(9)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (2, 2)])
def test_the_longest_exact_sum_is_the_longest(bits):
    weight, act = core.weight_format(bits[0]), core.activation_format(bits[1])
    terms, largest = act.exact_terms(weight), act.qmax * weight.qmax
    assert terms * largest <= 2**31 - 1 < (terms + 1) * largest
    # Of a signed range without `narrow` the most negative code is the largest.
    full = act.exact_terms(core.Format(bits[0], signed=True))
    assert full * act.qmax * 2 ** (bits[0] - 1) <= 2**31 - 1 and full < terms


def test_ranges():
    assert (core.Format(8).qmin, core.Format(8).qmax) == (0, 255)
    narrow = core.Format(8, signed=True, narrow=True)
    assert (narrow.qmin, narrow.qmax, narrow.symmetric_zero_point) == (-127, 127, 0)
    assert core.Format(4, signed=True).qmin == -8
