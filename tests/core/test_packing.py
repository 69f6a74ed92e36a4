"""Packing and grouping are exact inverses; weight sums equal int64 sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantempo.core import (
    from_groups,
    generators,
    pack_int4,
    pack_int12,
    to_groups,
    unpack_int4,
    unpack_int12,
    weight_sums,
)
from quantempo.errors import QuantempoError

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, seed=st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_int4_and_int12_round_trip(shape, seed):
    make = torch.Generator().manual_seed(seed)
    nibbles = torch.randint(-8, 8, shape, generator=make)
    packed = pack_int4(nibbles)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == (shape[-1] + 1) // 2
    assert torch.equal(unpack_int4(packed, shape[-1]).long(), nibbles)
    codes = torch.randint(-2048, 2048, shape, generator=make)
    high, low = pack_int12(codes)
    assert torch.equal(unpack_int12(high, low).long(), codes)


def test_every_int4_code_and_the_byte_order():
    codes = torch.arange(-8, 8)
    assert torch.equal(unpack_int4(pack_int4(codes), 16).long(), codes)
    assert pack_int4(torch.tensor([1, -1])).item() == 0xF1


def test_out_of_range_codes_are_refused():
    for pack, bad in ((pack_int4, 8), (pack_int4, -9), (pack_int12, 2048)):
        with pytest.raises(QuantempoError, match="outside"):
            pack(torch.tensor([bad, 0]))


@given(shape=shapes, seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=100, deadline=None)
def test_groups_round_trip_and_keep_channels_together(shape, seed, data):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
    rows = to_groups(x, axis)
    assert torch.equal(from_groups(rows, shape, axis), x)
    if axis is None:
        assert rows.shape == (1, x.numel())
    else:
        assert torch.equal(rows[-1].sort().values, x.select(axis, -1).flatten().sort().values)


def test_group_size_cuts_rows_and_must_divide_them():
    x = torch.arange(24.0).reshape(2, 12)
    assert torch.equal(to_groups(x, 0, 4), x.reshape(6, 4))
    assert torch.equal(from_groups(to_groups(x, 0, 4), (2, 12), 0), x)
    with pytest.raises(QuantempoError, match="divisor"):
        to_groups(x, 0, 5)


def test_weight_sums_fold_the_zero_point_away_exactly():
    make = torch.Generator().manual_seed(0)
    q_w = torch.randint(-127, 128, (5, 3, 3, 3), generator=make, dtype=torch.int8)
    q_a = torch.randint(0, 256, (27,), generator=make)
    z = 77
    direct = ((q_a - z) * q_w.flatten(1).long()).sum(1)
    folded = (q_a * q_w.flatten(1).long()).sum(1) - z * weight_sums(q_w).long()
    assert torch.equal(direct, folded)


def test_one_generator_an_image():
    both = [torch.randn(3, generator=g) for g in generators([5, 9])]
    assert torch.equal(both[1], torch.randn(3, generator=generators([9])[0]))
    assert not torch.equal(both[0], both[1])
