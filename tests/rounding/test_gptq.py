"""GPTQ: identities, a slow float64 reference, and an error below that of the nearest codes."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import WEIGHT, GroupFormat, weight_format
from quantempo.errors import QuantempoError
from quantempo.quantized import QLayer
from quantempo.recipe import RoundingSettings
from quantempo.rounding import ROUNDINGS, gptq, nearest
from quantempo.rounding.base import Unit, dequantized_input
from quantempo.rounding.gptq import input_moments, moments
from quantempo.scales import search_groups
from tests.engines.quantized import make_clock, make_conv, make_linear

BITS = (2, 4, 8)


def _case(bits: int, out: int = 6, width: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight, the moments of correlated inputs and scales that clip a little."""
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(out, width, generator=g)
    mixing = torch.randn(8, width, generator=g) + 0.3 * torch.randn(1, width, generator=g)
    x = torch.randn(500, 8, generator=g) @ mixing + 0.2 * torch.randn(500, width, generator=g)
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - 1) * 0.8
    return weight, x.t() @ x, scale


def _reference(
    weight: Tensor, hessian: Tensor, scale: Tensor, top: int, damping: float = 0.01
) -> Tensor:
    """Return the codes by eliminating one row of the inverse at a time, float64, no blocks."""
    w, h, s = weight.double().clone(), hessian.double().clone(), scale.double()
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    dead = [j for j in order if h[j, j] <= 0]
    for j in dead:
        h[j, j] = h.diagonal().mean()
    h += damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(w)
    for j in order:
        codes[:, j] = (w[:, j] / s).round().clamp(-top, top)
        error = (w[:, j] - s * codes[:, j]) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("bits", BITS)
def test_a_diagonal_hessian_gives_the_nearest_codes(bits: int) -> None:
    weight, hessian, scale = _case(bits)
    spec = replace(WEIGHT, bits=bits)
    expected = nearest(weight, scale, spec)
    for diagonal in (torch.eye(40), torch.diag(hessian.diagonal())):
        codes = gptq(weight, diagonal, scale, spec)
        assert codes.dtype == torch.int8
        assert torch.equal(codes, expected)


def test_in_groups_every_column_is_rounded_on_its_own_grid() -> None:
    weight, hessian, _ = _case(4)
    spec = weight_format(4, 16)
    assert isinstance(spec, GroupFormat)
    scale, groups = search_groups(weight, spec)
    grid = spec.grid(weight.shape, groups)
    plain = nearest(weight, scale, grid)
    assert torch.equal(gptq(weight, torch.diag(hessian.diagonal()), scale, grid), plain)
    codes = gptq(weight, hessian, scale, grid)
    spec.encode(codes, groups)
    assert _loss(weight, codes, hessian, scale) < 0.7 * _loss(weight, plain, hessian, scale)
    # Some rows of it alone.
    assert torch.equal(gptq(weight[2:4], hessian, scale[2:4], grid[2:4]), codes[2:4])


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_textbook_elimination(bits: int, block: int) -> None:
    weight, hessian, scale = _case(bits)
    top = 2 ** (bits - 1) - 1
    codes = gptq(weight, hessian, scale, replace(WEIGHT, bits=bits), block=block)
    expected = _reference(weight, hessian, scale, top)
    assert codes.abs().max() <= top
    # Float32 against float64: a value on a rounding border may go the other way, at 8 bits more
    # often, and from there on the columns after it differ. The loss is then the same to 1 %.
    assert float((codes.double() != expected).double().mean()) < (0.2 if bits == 8 else 0.02)
    got, wanted = (_loss(weight, c, hessian, scale) for c in (codes, expected))
    assert got == pytest.approx(wanted, rel=0.02)


def _loss(weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor) -> float:
    error = weight.double() - scale.double()[:, None] * codes.double()
    return float(((error @ hessian.double()) * error).sum())


@pytest.mark.parametrize("bits", BITS)
def test_the_output_error_is_below_that_of_the_nearest_codes(bits: int) -> None:
    weight, hessian, scale = _case(bits)
    # No clipping: what clips cannot be made up for, by either.
    scale = scale / 0.8
    spec = replace(WEIGHT, bits=bits)
    plain = _loss(weight, nearest(weight, scale, spec), hessian, scale)
    assert _loss(weight, gptq(weight, hessian, scale, spec), hessian, scale) < 0.6 * plain


def test_columns_that_no_input_reaches_are_nearest_and_change_nothing_else() -> None:
    weight, hessian, scale = _case(4)
    dead = [3, 17, 39]
    hessian[dead] = 0
    hessian[:, dead] = 0
    spec = replace(WEIGHT, bits=4)
    codes = gptq(weight, hessian, scale, spec)
    assert torch.equal(codes[:, dead], nearest(weight, scale, spec)[:, dead])
    alive = [j for j in range(40) if j not in dead]
    others = weight.clone()
    others[:, dead] = 0
    assert torch.equal(gptq(others, hessian, scale, spec)[:, alive], codes[:, alive])
    none = gptq(weight, torch.zeros(40, 40), scale, spec)
    assert torch.equal(none, nearest(weight, scale, spec))


def test_a_near_singular_hessian_is_damped_harder_and_said(caplog) -> None:
    weight, hessian, scale = _case(4)
    # An eigenvalue a little below zero, as float32 sums can have.
    vector = torch.linalg.eigh(hessian.double())[1][:, 0]
    top = float(hessian.diagonal().mean())
    broken = hessian - (0.05 * top * torch.outer(vector, vector)).float()
    with caplog.at_level(logging.WARNING, logger="quantempo"):
        codes = gptq(weight, broken, scale, replace(WEIGHT, bits=4))
    # Ten times the damping is the first that makes it positive.
    assert "near singular" in caplog.text and "damping 0.1 instead" in caplog.text
    expected = _reference(weight, broken, scale, 7, damping=0.1)
    assert float((codes.double() != expected).double().mean()) < 0.02
    assert _loss(weight, codes, hessian, scale) < _loss(
        weight, nearest(weight, scale, replace(WEIGHT, bits=4)), hessian, scale
    )
    with pytest.raises(QuantempoError, match="no Cholesky factor"):
        gptq(weight, -hessian, scale, WEIGHT)
    with pytest.raises(QuantempoError, match="not finite"):
        gptq(weight, hessian * torch.nan, scale, WEIGHT)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [((1, 1), (1, 1), (1, 1), 1), ((2, 1), (0, 2), (2, 1), 1), ((1, 1), (1, 1), (1, 1), 2)],
)
def test_moments_of_a_convolution_give_its_output_power(stride, padding, dilation, groups):
    layer = make_conv(
        6, 4, stride=stride, padding=padding, dilation=dilation, groups=groups, clock=make_clock()
    )
    x = torch.randn(3, 6, 9, 8, generator=torch.Generator().manual_seed(0))
    hessian = moments(layer, x).double()
    weight = layer.weight_codes.double()
    y = F.conv2d(x.double(), weight, None, stride, padding, dilation, groups)
    rows = weight.flatten(1).unflatten(0, (groups, -1))
    # sum of y^2 over images and positions is w H w^T, for each output channel; float32 sums.
    power = torch.einsum("gok,gkl,gol->go", rows, hessian, rows).flatten()
    assert torch.allclose(power, y.square().sum((0, 2, 3)), rtol=1e-5)


def test_the_dequantized_input_is_what_the_kernel_multiplies() -> None:
    clock = make_clock(3)
    layer = make_linear(12, 5, segments=(4, 8), clock=clock)
    clock.set(torch.tensor([10, 500, 990, 500]))
    x = torch.randn(4, 7, 12, generator=torch.Generator().manual_seed(0))
    x_hat = dequantized_input(layer, x)
    for row, bucket in enumerate((0, 1, 2, 1)):
        for part, (first, last) in enumerate(((0, 4), (4, 12))):
            scale, zero = layer.act_scale[part, bucket], layer.act_zero_point[part]
            codes = (x[row, :, first:last] / scale).round() + zero
            expected = (codes.clamp(0, 255) - zero) * scale
            assert torch.equal(x_hat[row, :, first:last], expected)
    hessian = moments(layer, x_hat)
    flat = x_hat.reshape(-1, 12)
    assert torch.allclose(hessian[0], flat.t() @ flat, rtol=1e-6)


class _Block:
    """Layers and what each receives."""

    def __init__(self, copies: dict[str, QLayer], inputs: dict[str, Tensor]) -> None:
        self.copies, self.inputs, self.steps = copies, inputs, [list(copies)]

    def layer_inputs(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        yield {name: self.inputs[name] for name in names}

    def assign(self, name: str, codes: Tensor) -> None:
        self.copies[name].set_codes(codes)


def test_every_layer_and_group_is_rounded_on_its_own_inputs() -> None:
    """Two layers of equal width in a block, and a convolution of two groups."""
    g, clock = torch.Generator().manual_seed(0), make_clock()
    copies: dict[str, QLayer] = {"first": make_linear(12, 5, clock=clock)}
    copies |= {"second": make_linear(12, 5, clock=clock)}
    copies |= {"conv": make_conv(6, 4, groups=2, clock=clock)}
    tokens = [torch.randn(80, 12, generator=g) @ torch.randn(12, 12, generator=g) for _ in "ab"]
    image = torch.randn(8, 6, 5, 5, generator=g).cumsum(2).cumsum(1)
    inputs = dict(zip(copies, (*tokens, image), strict=True))
    spec = replace(WEIGHT, bits=3)
    weights, scales = {}, {}
    for name, layer in copies.items():
        weights[name] = torch.randn(layer.weight_shape, generator=g)
        scales[name] = weights[name].flatten(1).abs().amax(1) / 3
    unit = Unit(
        weights, scales, dict.fromkeys(copies, spec), RoundingSettings(), _Block(copies, inputs)
    )
    codes = ROUNDINGS.get("gptq").codes(unit)
    own = {n: moments(layer, dequantized_input(layer, inputs[n])) for n, layer in copies.items()}

    def rounded(name: str, hessian: Tensor) -> Tensor:
        rows = len(weights[name]) // len(hessian)
        parts = zip(
            weights[name].flatten(1).split(rows), hessian, scales[name].split(rows), strict=True
        )
        whole = torch.cat([gptq(w, h / len(inputs[name]), s, spec) for w, h, s in parts])
        return whole.reshape(codes[name].shape)

    for name, hessian in own.items():
        assert torch.equal(codes[name], rounded(name, hessian)), name
    # What another layer, or the other group, receives gives others.
    assert not torch.equal(codes["second"], rounded("second", own["first"]))
    assert not torch.equal(codes["conv"], rounded("conv", own["conv"].flip(0)))


def test_layers_of_equal_inputs_share_their_moments() -> None:
    """Until they differ: another grid, another window, another input in a later batch."""
    g, clock = torch.Generator().manual_seed(0), make_clock()
    copies: dict[str, QLayer] = {n: make_linear(12, 5, clock=clock) for n in ("q", "k", "v", "out")}
    copies["v"].act_scale.mul_(2)
    wide, point = (make_conv(4, 3, (k, k), padding=(k // 2, k // 2), clock=clock) for k in (3, 1))
    copies |= {"conv": wide, "shortcut": point}
    tokens = [torch.randn(8, 12, generator=g) for _ in range(3)]
    image = torch.randn(8, 4, 5, 5, generator=g)
    first = dict.fromkeys(("q", "k", "v", "out"), tokens[0])
    batches = [first, {**first, "q": tokens[1], "k": tokens[1], "v": tokens[1], "out": tokens[2]}]
    rows = [batch | {"conv": image, "shortcut": image} for batch in batches]

    class Batches(_Block):
        def layer_inputs(self, names: Sequence[str], exact: bool = False) -> Iterator[Any]:
            shift = 0.5 if exact else 0.0
            yield from ({n: row[n] + shift for n in names} for row in rows)

    found = input_moments(Batches(copies, {}), [*copies], cross=True)
    assert [names for names, *_ in found] == [["q", "k"], ["out"], ["v"], ["conv"], ["shortcut"]]
    for names, hessian, cross in found:
        for name in names:
            layer, seen = copies[name], [row[name] for row in rows]
            hats = [dequantized_input(layer, x) for x in seen]
            own = sum(moments(layer, x) for x in hats) / 16
            assert torch.allclose(hessian, own, rtol=1e-6, atol=1e-6)
            pairs = zip(hats, seen, strict=True)
            more = sum(moments(layer, x, y + 0.5 - x) for x, y in pairs) / 16
            assert torch.allclose(cross, more, rtol=1e-5, atol=1e-5)
