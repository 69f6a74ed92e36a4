"""Packed weights in two levels: decoded as an int64 definition says, on any grid, in few bytes."""

import itertools

import pytest
import torch
from torch import Tensor

from quantempo.core import Grid, GroupFormat, weight_format
from quantempo.errors import QuantempoError
from quantempo.recipe import GROUPS, Recipe
from quantempo.scales import search_groups

# Inputs: odd, fewer than a group, a last group in part, whole groups.
SHAPES = [(3, 5), (4, 16), (2, 33), (5, 64), (3, 7, 3, 3), (2, 40, 1, 1), (4, 32, 3, 1), (2, 1, 2)]
EACH = pytest.mark.parametrize("shape", SHAPES, ids=str)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def definition(stored: Tensor, groups: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
    """Return w8, int64, one weight after the other."""
    out, inputs, *kernel = shape
    places = list(itertools.product(*map(range, kernel)))
    result = torch.zeros(shape, dtype=torch.int64)
    for o, (p, place), i in itertools.product(range(out), enumerate(places), range(inputs)):
        byte, both = int(stored[o, p, i // 2]), int(groups[o, p, i // group])
        q = byte >> 4 if i % 2 else byte & 15
        result[(o, i, *place)] = (q - (both & 15)) * ((both >> 4) + 1)
    return result


def random_groups(spec: GroupFormat, shape: tuple[int, ...], seed: int) -> Tensor:
    size = spec.group_shape(shape)
    return torch.randint(0, 256, size, generator=generator(seed), dtype=torch.uint8)


@EACH
@pytest.mark.parametrize("group", GROUPS[1:])
def test_codes_are_the_definition_and_come_back(shape: tuple[int, ...], group: int) -> None:
    spec = weight_format(4, group)
    assert isinstance(spec, GroupFormat)
    # Any z and s, those that reach beyond a byte too.
    groups = random_groups(spec, shape, seed=group)
    ratio = torch.randn(shape, generator=generator(1)) * 60
    codes = spec.grid(shape, groups).round(ratio)
    assert float(codes.abs().max()) <= 127
    stored = spec.encode(codes.to(torch.int8), groups)
    assert (stored.dtype, tuple(stored.shape)) == (torch.uint8, spec.stored_shape(shape))
    assert stored.nbytes + groups.nbytes + 4 * shape[0] == spec.nbytes(shape)
    found, wanted = spec.decode(stored, shape, groups), definition(stored, groups, shape, group)
    assert found.dtype == torch.int8 and found.is_contiguous()
    assert torch.equal(found.long(), wanted) and torch.equal(wanted, codes.long())
    # Of any bytes whatever, in int16.
    noise = torch.randint(0, 256, stored.shape, generator=generator(2), dtype=torch.uint8)
    found = spec.decode(noise, shape, groups, torch.int16)
    assert torch.equal(found.long(), definition(noise, groups, shape, group))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("byte", [0x00, 0xF8, 0x0F, 0x73, 0xF0, 0x9F])
def test_a_grid_is_every_code_that_q_reaches_within_a_byte(bits: int, byte: int) -> None:
    spec, groups = weight_format(bits, 16), torch.tensor([[[byte]]], dtype=torch.uint8)
    if bits < 4 and (byte & 15) >= 2**bits:
        return
    values = torch.linspace(-260, 260, 16 * 500).reshape(-1, 16)
    grid = spec.grid((500, 16), groups.expand(500, 1, 1))
    s, z = (byte >> 4) + 1, byte & 15
    reached = {(q - z) * s for q in range(2**bits) if abs((q - z) * s) <= 127}
    assert set(grid.round(values).long().flatten().tolist()) == reached
    nearest = torch.tensor(sorted(reached)).double()
    distance = (grid.round(values).double() - values).abs()
    assert torch.equal(distance, (values[..., None].double() - nearest).abs().amin(-1))
    column = grid[:, 3]
    assert torch.equal(column.round(values[:, 3]), grid.round(values)[:, 3])


def test_what_no_q_reaches_is_refused() -> None:
    spec, groups = weight_format(4, 16), torch.full((1, 1, 1), (3 - 1) << 4 | 8, dtype=torch.uint8)
    assert spec.encode(torch.tensor([[-24, 21]]), groups).tolist() == [[[0xF0]]]
    for wrong in ([-27, 0], [24, 0], [1, 0], [-25, 0]):
        with pytest.raises(QuantempoError, match=r"off the grids of their groups; expected"):
            spec.encode(torch.tensor([wrong]), groups)
    wide = torch.full((1, 1, 1), 0xF0, dtype=torch.uint8)
    with pytest.raises(QuantempoError, match=r"outside \[-127, 127\]"):
        spec.encode(torch.tensor([[128, 0]]), wide)
    with pytest.raises(QuantempoError, match="expected 2 to 4 bits in groups of 16, 32, 64"):
        weight_format(4, 24)
    with pytest.raises(QuantempoError, match=r"got weights\.group '24'.*expected one of: 0, 16"):
        Recipe.from_dict({"weights": {"group": 24}})
    assert weight_format(8, 16) == weight_format(8) and Grid.of(weight_format(4)).high == 7


def error(weight: Tensor, spec: GroupFormat, scale: Tensor, groups: Tensor) -> float:
    rows = scale.reshape(-1, *[1] * (weight.ndim - 1))
    codes = spec.grid(weight.shape, groups).round(weight / rows)
    assert float(codes.abs().max()) <= 127
    return float((weight - codes * rows).norm() / weight.norm())


@pytest.mark.parametrize(("group", "bound"), [(16, 0.071), (32, 0.082), (64, 0.091)])
def test_the_search_is_near_free_scales_of_groups(group: int, bound: float) -> None:
    # Of normal weights; a float scale and zero for each group of 16, min-max: 0.077.
    weight = torch.randn(48, 128, 3, 3, generator=generator(0))
    weight *= torch.logspace(-6, 6, 48)[:, None, None, None]
    spec = weight_format(4, group)
    assert isinstance(spec, GroupFormat)
    found = search_groups(weight, spec)
    rows = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
    assert error(weight, spec, *found) < bound
    scale = found.scale / weight.flatten(1).norm(dim=1)
    assert error(rows, spec, scale, found.groups) < bound


@EACH
def test_the_search_takes_any_weight(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=generator(3))
    weight[0], weight[-1, 0] = 0, 1e4
    for bits, group in itertools.product((2, 3, 4), GROUPS[1:]):
        spec = weight_format(bits, group)
        assert isinstance(spec, GroupFormat)
        for given in (weight, weight.abs(), -weight.abs(), weight.bfloat16(), weight * 1e-40):
            scale, groups = search_groups(given, spec)
            assert scale.shape == (shape[0],) and tuple(groups.shape) == spec.group_shape(shape)
            assert bool(((scale > 0) & scale.isfinite()).all()) and float(scale[0]) == 2.0**-30
            assert int((groups & 15).max()) < 2**bits
            error(given.float(), spec, scale, groups)


def test_importance_moves_the_error_to_inputs_that_count_less() -> None:
    weight, spec = torch.randn(8, 64, generator=generator(4)), weight_format(4, 16)
    assert isinstance(spec, GroupFormat)
    counts = torch.where(torch.arange(64) % 16 < 3, 100.0, 1.0)
    plain, weighted = (search_groups(weight, spec, c) for c in (None, counts[None]))
    lost = []
    for scale, groups in (plain, weighted):
        codes = spec.grid(weight.shape, groups).round(weight / scale[:, None])
        lost.append(float(((weight - codes * scale[:, None]).square() * counts).sum()))
    assert lost[1] < 0.8 * lost[0]
    for bad in (weight.long(), weight.clone().fill_(torch.nan)):
        with pytest.raises(QuantempoError, match="expected a finite floating tensor"):
            search_groups(bad, spec)
