"""The reference against sums written out by hand and against float64 convolution."""

import pytest
import torch
from torch.nn import functional as F

from tests.kernels import reference

GEOMETRIES = [
    # channels, out, kernel, stride, padding, dilation, groups
    (3, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (4, 6, (3, 1), (2, 1), (1, 0), (1, 1), 2),
    (5, 5, (2, 2), (1, 2), (0, 1), (2, 1), 5),
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def weights(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("zero_point", [0, 117, 255])
def test_convolution_is_the_float64_one_of_shifted_codes(geometry, zero_point):
    channels, out, kernel, *how = geometry
    x, w = codes(2, channels, 5, 7), weights(out, channels // how[-1], *kernel)
    # Zero padding of q - z is padding of q with z.
    expected = F.conv2d(x.double() - zero_point, w.double(), None, *how)
    got = reference.conv2d_accumulator(x, w, zero_point, *how)
    assert got.dtype == torch.int64
    assert torch.equal(got, expected.long())


def test_convolution_of_one_pixel_by_hand():
    x = torch.tensor([[[[10]]]], dtype=torch.uint8)
    w = torch.arange(-4, 5, dtype=torch.int8).reshape(1, 1, 3, 3)
    # Only the centre tap (0) sees the pixel; the others see z - z.
    assert reference.conv2d_accumulator(x, w, 7, padding=(1, 1)).tolist() == [[[[0]]]]
    assert reference.conv2d_accumulator(x, w + 1, 7, padding=(1, 1)).tolist() == [[[[3]]]]


def test_linear_by_hand_and_beyond_int32():
    x = torch.tensor([[1, 2, 255]], dtype=torch.uint8)
    w = torch.tensor([[1, -2, 3]], dtype=torch.int8)
    assert reference.linear_accumulator(x, w, 5).tolist() == [[1 * -4 + -2 * -3 + 3 * 250]]
    long = 70_000
    x = torch.full((1, long), 255, dtype=torch.uint8)
    w = torch.full((1, long), 127, dtype=torch.int8)
    assert reference.linear_accumulator(x, w, 0).item() == long * 255 * 127 > 2**31


def test_quantize_rounds_ties_to_even_and_clamps():
    x = torch.tensor([-0.5, 0.5, 1.5, 2.5, -1.5, 300.0, -300.0])
    assert reference.quantize(x, 1.0, 10).tolist() == [10, 10, 12, 12, 8, 255, 0]


def test_quantize_divides_in_float32():
    # In float64 the quotients of float32 values are not ties, in float32 some are.
    scale = torch.tensor(0.1)
    for k in range(-40, 40):
        x = torch.tensor(k + 0.5) * scale
        quotient = (x / scale).item()
        expected = min(max(round(quotient) + 100, 0), 255)
        assert reference.quantize(x, 0.1, 100).item() == expected


def test_epilogue():
    acc = torch.tensor([[2, -3]])
    y = reference.epilogue(acc, 0.5, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]), 1)
    assert y.dtype == torch.float64
    assert y.tolist() == [[2.0, -3.0]]
