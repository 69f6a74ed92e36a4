"""Paired fidelity against formulas written out here in numpy float64."""

import math

import numpy as np
import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.evaluation.fidelity import PSNR_CAP_DB, SQNR_CAP_DB, eps_sqnr, psnr_db, sqnr_db, ssim


def _images(seed: int, n: int = 3, side: int = 32, channels: int = 3) -> np.ndarray:
    """Smooth pictures with noise on them, so that means, variances and edges all occur."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    planes = rng.random((n * channels, 3)) * 6 * np.pi
    waves = [np.sin(a * x + b * y + c) for a, b, c in planes]
    stack = np.stack(waves).reshape(n, channels, side, side).transpose(0, 2, 3, 1)
    return np.clip(128 + 100 * stack + rng.normal(0, 12, stack.shape), 0, 255).astype(np.uint8)


def _noisy(images: np.ndarray, sigma: float, seed: int = 9) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def _psnr_by_hand(a: np.ndarray, b: np.ndarray) -> list[float]:
    rows = []
    for first, second in zip(a.astype(float), b.astype(float), strict=True):
        squares = [(p - q) ** 2 for p, q in zip(first.ravel(), second.ravel(), strict=True)]
        rows.append(20 * math.log10(255) - 10 * math.log10(math.fsum(squares) / len(squares)))
    return rows


def _ssim_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """Equation 13 of the paper at every pixel, by explicit 11 x 11 windows, borders mirrored."""
    radius = 5
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / 1.5) ** 2)
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for channel in range(a.shape[-1]):
        x = np.pad(a[..., channel].astype(float), radius, mode="reflect")
        y = np.pad(b[..., channel].astype(float), radius, mode="reflect")
        for i in range(a.shape[0]):
            for j in range(a.shape[1]):
                p, q = (m[i : i + 11, j : j + 11] for m in (x, y))
                mp, mq = (window * p).sum(), (window * q).sum()
                vp = (window * (p - mp) ** 2).sum()
                vq = (window * (q - mq) ** 2).sum()
                cov = (window * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
                )
    return float(np.mean(values))


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (17, 1)])
def test_psnr_equals_the_formula(side: int, channels: int) -> None:
    a = _images(0, side=side, channels=channels)
    b = _noisy(a, 4.0)
    # Both sides are one division and one logarithm in float64.
    np.testing.assert_allclose(psnr_db(a, b), _psnr_by_hand(a, b), rtol=1e-13)


def test_psnr_of_extremes() -> None:
    black = np.zeros((2, 8, 8, 3), np.uint8)
    white = np.full_like(black, 255)
    white[1] = 0
    # A difference of 255 everywhere is 0 dB by definition (and overflows 8 and 16 bits).
    assert psnr_db(black, white).tolist() == [0.0, PSNR_CAP_DB]


def test_psnr_cap_lies_above_the_smallest_difference_of_a_small_image() -> None:
    a = np.zeros((1, 32, 32, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 1
    assert psnr_db(a, b)[0] == pytest.approx(10 * math.log10(255**2 * 3072), rel=1e-13)
    assert psnr_db(a, b)[0] < PSNR_CAP_DB


@pytest.mark.parametrize("sigma", [2.0, 40.0])
def test_ssim_equals_the_formula(sigma: float) -> None:
    a = _images(1, n=2)
    b = _noisy(a, sigma)
    expected = [_ssim_by_hand(x, y) for x, y in zip(a, b, strict=True)]
    # torchmetrics takes E[x^2] - E[x]^2 in float64: 255^2 * 2^-52 against a variance floor of c2.
    np.testing.assert_allclose(ssim(a, b, batch=1), expected, rtol=1e-9)


def test_ssim_of_equal_images_is_one_and_batches_do_not_matter() -> None:
    a = _images(2, n=5)
    np.testing.assert_allclose(ssim(a, a), 1.0, rtol=1e-12)
    b = _noisy(a, 10.0)
    np.testing.assert_array_equal(ssim(a, b, batch=2), ssim(a, b, batch=64))
    np.testing.assert_allclose(ssim(a, b)[::-1], ssim(a[::-1].copy(), b[::-1].copy()), rtol=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((2, 32, 32, 3), (3, 32, 32, 3), "same seeds"),
        ((2, 32, 32), (2, 32, 32), "expected"),
        ((2, 3, 32, 32), (2, 3, 32, 32), "expected"),
        ((0, 32, 32, 3), (0, 32, 32, 3), "no images"),
    ],
)
def test_pairs_that_cannot_be_compared(first: tuple, second: tuple, words: str) -> None:
    with pytest.raises(QuantempoError, match=words):
        psnr_db(np.zeros(first, np.uint8), np.zeros(second, np.uint8))


def test_float_images_and_tiny_images_are_refused() -> None:
    with pytest.raises(QuantempoError, match="uint8"):
        psnr_db(np.zeros((1, 8, 8, 3)), np.zeros((1, 8, 8, 3)))
    with pytest.raises(QuantempoError, match="at least 6"):
        ssim(np.zeros((1, 5, 8, 3), np.uint8), np.zeros((1, 5, 8, 3), np.uint8))


class _Output:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


def _batches(steps: list[int], rows: int = 4) -> list:
    generator = torch.Generator().manual_seed(3)
    return [
        ((torch.randn(rows, 3, 8, 8, generator=generator), torch.tensor(t)), {}, torch.tensor(t))
        for t in steps
    ]


def test_sqnr_of_scaled_noise_is_exact() -> None:
    # eps_q = eps + g n with n drawn so that |n| = |eps| row by row: the SQNR is -20 log10(g).
    gains = {10: 1e-1, 500: 1e-3, 990: 1.0}

    def quantized(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        other = x.flip(-1)  # a permutation keeps the norm, in float64 exactly up to order
        return x.double() + gains[int(t)] * other.double()

    found = eps_sqnr(lambda x, t: x.double(), quantized, _batches([500, 10, 990]))
    assert found["t"] == [10, 500, 990]
    # x.double() + g * other loses at most 2^-53 relative: 1e-9 dB at 60 dB.
    np.testing.assert_allclose(found["sqnr_db"], [20.0, 60.0, 0.0], atol=1e-8)


def test_sqnr_pools_powers_not_decibels() -> None:
    # Two batches at the same t: noise powers 1 and 0.01 of equal signals give 10 log10(2 / 1.01).
    batches = _batches([7]) * 2
    gains = iter([1.0, 0.1])
    found = eps_sqnr(lambda x, t: x.double(), lambda x, t: x.double() * (1 + next(gains)), batches)
    assert found["sqnr_db"] == pytest.approx([10 * math.log10(2 / 1.01)], rel=1e-12)


def test_sqnr_keys_rows_of_mixed_batches_and_bins() -> None:
    x = torch.ones(4, 2)
    t = torch.tensor([1, 1, 600, 999])
    scale = torch.tensor([0.1, 0.1, 0.01, 0.001])[:, None]
    batches = [((x.double(),), {}, t)]
    per_step = eps_sqnr(lambda x: (x,), lambda x: _Output(x * (1 + scale.double())), batches)
    assert per_step["t"] == [1, 600, 999]
    np.testing.assert_allclose(per_step["sqnr_db"], [20, 40, 60], atol=1e-5)  # float32 gains
    binned = eps_sqnr(lambda x: x, lambda x: x * (1 + scale), batches, bins=[0, 500, 1000])
    assert binned["t"] == [250, 750]
    expected = 10 * math.log10(2 / (1e-4 + 1e-6))
    np.testing.assert_allclose(binned["sqnr_db"], [20, expected], atol=1e-5)


def test_sqnr_of_a_time_outside_the_bins_goes_to_the_nearest() -> None:
    batches = [((torch.ones(4, 2),), {}, torch.tensor([-3, 0, 1000, 1500]))]
    found = eps_sqnr(lambda x: x, lambda x: x * 1.5, batches, bins=[0, 500, 1000])
    assert found["t"] == [250, 750]


def test_sqnr_of_identical_denoisers_is_the_cap() -> None:
    found = eps_sqnr(lambda x, t: x, lambda x, t: x, _batches([5]))
    assert found["sqnr_db"] == [SQNR_CAP_DB]


def test_sqnr_reads_an_iterator_once_and_survives_a_reused_output_buffer() -> None:
    buffer = torch.empty(4, 3, 8, 8)

    def reused(gain: float):
        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            buffer.copy_(x * gain)
            return buffer

        return call

    found = eps_sqnr(reused(1.0), reused(1.5), iter(_batches([5, 6])))
    np.testing.assert_allclose(found["sqnr_db"], 20 * math.log10(2), rtol=1e-6)


def test_sqnr_errors_say_what_is_wrong() -> None:
    with pytest.raises(QuantempoError, match="no batches"):
        eps_sqnr(lambda: None, lambda: None, [])
    with pytest.raises(QuantempoError, match=r"NaN or infinity at t = 5"):
        eps_sqnr(lambda x, t: x, lambda x, t: x / 0, _batches([5]))
    with pytest.raises(QuantempoError, match="only zeros"):
        eps_sqnr(lambda x, t: x * 0, lambda x, t: x, _batches([5]))
    with pytest.raises(QuantempoError, match="two versions of one model"):
        eps_sqnr(lambda x, t: x, lambda x, t: x[:, :2], _batches([5]))
    with pytest.raises(QuantempoError, match="dict"):
        eps_sqnr(lambda x, t: {}, lambda x, t: x, _batches([5]))
    named = eps_sqnr(lambda x, t: {"predicted": x}, lambda x, t: (x,), _batches([5]))
    assert named["sqnr_db"] == [SQNR_CAP_DB]
    with pytest.raises(QuantempoError, match="one per row"):
        eps_sqnr(lambda x: x, lambda x: x, [((torch.ones(4, 1),), {}, torch.ones(3))])
    with pytest.raises(QuantempoError, match="increasing"):
        eps_sqnr(lambda x, t: x, lambda x, t: x, _batches([5]), bins=[0, 0])


def test_sqnr_of_two_tensors_is_in_decibels() -> None:
    x = torch.ones(100, dtype=torch.float16)
    assert sqnr_db(x, x) == SQNR_CAP_DB
    assert sqnr_db(x.double(), x.double() + 0.1) == pytest.approx(20, abs=1e-12)
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    with pytest.raises(QuantempoError, match="shapes"):
        sqnr_db(x, x[:3])
