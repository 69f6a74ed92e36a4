"""Packing and unpacking are exact inverses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantempo.core import (
    generators,
    pack_int4,
    unpack_int4,
    unpack_int12,
)
from quantempo.errors import QuantempoError

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_int4_round_trip(shape, seed):
    make = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(-8, 8, shape, generator=make)
    packed = pack_int4(nibbles)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == (shape[-1] + 1) // 2
    assert torch.equal(unpack_int4(packed, shape[-1]).long(), nibbles)


def test_every_int12_code_is_unpacked():
    codes = torch.arange(-2048, 2048)
    # Low nibbles as the signed codes that `pack_int4` takes.
    high, low = codes >> 4, ((codes & 15) ^ 8) - 8
    assert torch.equal(unpack_int12(high.to(torch.int8), pack_int4(low)).long(), codes)


def test_every_int4_code_and_the_byte_order():
    codes = torch.arange(-8, 8)
    assert torch.equal(unpack_int4(pack_int4(codes), 16).long(), codes)
    assert pack_int4(torch.tensor([1, -1])).item() == 0xF1


def test_out_of_range_codes_are_refused():
    for pack, bad in ((pack_int4, 8), (pack_int4, -9)):
        with pytest.raises(QuantempoError, match="outside"):
            pack(torch.tensor([bad, 0]))


def test_one_generator_an_image():
    both = [torch.randn(3, generator=g) for g in generators([5, 9])]
    assert torch.equal(both[1], torch.randn(3, generator=generators([9])[0]))
    assert not torch.equal(both[0], both[1])
