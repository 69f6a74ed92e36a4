"""The laws of the time-steps: support, moments, edges, and samples against their densities."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from quantempo.calibration.timesteps import TIME_SAMPLERS, make_time_sampler
from quantempo.errors import QuantempoError

# The recipe's defaults, and shapes that stress the densities.
LAWS = [(name, {}) for name in TIME_SAMPLERS.names()] + [
    ("ndtc", {"mean": 0.9, "std": 0.1}),
    ("ndtc", {"mean": 0.0, "std": 2.0}),
    ("ndtc_paper", {"mean": 0.1}),
    ("ndtc_repo", {"mean": 0.5, "std": 0.35}),
    ("skew_normal", {"xi": 0.8, "omega": 0.3, "alpha": -6.0}),
    ("skew_normal", {"xi": 0.5, "omega": 0.05, "alpha": 40.0}),
    ("single", {"fraction": 1.0}),
]
STEPS = (1, 7, 50, 250)

law_and_steps = pytest.mark.parametrize(
    ("name", "args", "num_steps"),
    [(name, args, num_steps) for name, args in LAWS for num_steps in STEPS],
)


def draw(name: str, args: dict[str, float], n: int, num_steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return make_time_sampler(name, args).sample(n, num_steps, generator)


def moments(density: Tensor) -> tuple[float, float]:
    index = torch.arange(len(density), dtype=torch.float64)
    mean = float(index @ density)
    return mean, math.sqrt(float((index - mean) ** 2 @ density))


def survival(statistic: float, freedom: int) -> float:
    """P(chi-square with `freedom` degrees > statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@law_and_steps
def test_density_is_a_distribution(name: str, args: dict, num_steps: int) -> None:
    density = make_time_sampler(name, args).density(num_steps)
    assert density.shape == (num_steps,)
    assert density.dtype == torch.float64
    assert float(density.min()) >= 0
    # num_steps additions of float64 numbers below one
    assert abs(float(density.sum()) - 1) <= num_steps * torch.finfo(torch.float64).eps


@law_and_steps
def test_samples_are_indices_fixed_by_the_seed(name: str, args: dict, num_steps: int) -> None:
    sample = draw(name, args, 300, num_steps)
    assert sample.shape == (300,)
    assert sample.dtype == torch.int64
    assert 0 <= int(sample.min()) <= int(sample.max()) < num_steps
    assert torch.equal(sample, draw(name, args, 300, num_steps))
    if num_steps == 250 and name not in ("linspace", "single"):
        assert not torch.equal(sample, draw(name, args, 300, num_steps, seed=1))


def chi_square(sample: Tensor, density: Tensor) -> tuple[float, int]:
    """Pearson's statistic with neighbouring cells merged until each expects at least 10."""
    counts = torch.bincount(sample, minlength=len(density)).double()
    expected = density * len(sample)
    statistic, cells, seen, mass = 0.0, 0, 0.0, 0.0
    for count, hope in zip(counts.tolist(), expected.tolist(), strict=True):
        seen, mass = seen + count, mass + hope
        if mass >= 10:
            statistic, cells = statistic + (seen - mass) ** 2 / mass, cells + 1
            seen, mass = 0.0, 0.0
    if mass > 0 or seen > 0:
        statistic, cells = statistic + (seen - mass) ** 2 / max(mass, 1e-9), cells + 1
    return statistic, max(cells - 1, 1)


@law_and_steps
def test_samples_follow_the_density(name: str, args: dict, num_steps: int) -> None:
    """False-alarm rate 1e-6 a case, below 1e-4 for the file, at another seed; none at this one."""
    # A multiple of every step count, so that linspace is exact; 16.6 a cell and better on average.
    sample = draw(name, args, 24_500, num_steps)
    statistic, freedom = chi_square(sample, make_time_sampler(name, args).density(num_steps))
    assert survival(statistic, freedom) > 1e-6


@pytest.mark.parametrize("wrong", [{"mean": 0.42}, {"std": 0.43}])
def test_chi_square_sees_a_slightly_wrong_law(wrong: dict) -> None:
    """5 % off in one parameter is rejected at the rate that passes the right law."""
    sample = draw("ndtc", {}, 245_000, 50)
    assert survival(*chi_square(sample, make_time_sampler("ndtc").density(50))) > 1e-6
    assert survival(*chi_square(sample, make_time_sampler("ndtc", wrong).density(50))) < 1e-6


def test_released_law_piles_up_at_the_ends() -> None:
    """16.1 % and 6.8 %: measured on the released program with 10^6 draws at 250 steps."""
    density = make_time_sampler("ndtc_repo").density(250)
    assert round(float(density[0]), 3) == 0.161
    assert round(float(density[-1]), 3) == 0.068
    # mean 0.419 T and std 0.320 T by the same measurement
    mean, std = moments(density)
    assert round(mean / 250, 2) == 0.42
    assert round(std / 250, 2) == 0.32


@pytest.mark.parametrize("num_steps", [50, 250])
def test_draws_have_the_moments_of_each_law(num_steps: int) -> None:
    """Means within 5 standard errors; variances likewise, by the law's fourth moment."""
    n = 100_000
    index = torch.arange(num_steps, dtype=torch.float64)
    for name in TIME_SAMPLERS.names():
        density = make_time_sampler(name).density(num_steps)
        mean, std = moments(density)
        sample = draw(name, {}, n, num_steps, seed=2).double()
        assert abs(float(sample.mean()) - mean) <= 5 * std / math.sqrt(n), name
        fourth = float((index - mean) ** 4 @ density)
        error = math.sqrt(max(fourth - std**4, 0) / n)
        variance = float((sample - mean).square().mean())
        assert abs(variance - std**2) <= 5 * error + 1e-9 * std**2, name


def test_uniform_and_truncated_normal_have_their_closed_moments() -> None:
    mean, std = moments(make_time_sampler("uniform").density(250))
    assert mean == pytest.approx(124.5, abs=1e-9)
    assert std == pytest.approx(math.sqrt((250**2 - 1) / 12), rel=1e-9)
    num_steps = 4000
    law = make_time_sampler("ndtc", {"mean": 0.4, "std": 0.4})
    mean, std = moments(law.density(num_steps))
    # N(m, s^2) cut at [0, 1] (Johnson, Kotz and Balakrishnan 1994, section 13.10.1)
    low, high = -1.0, 1.5
    weight = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    height = [math.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (low, high)]
    shift = (height[0] - height[1]) / weight
    spread = math.sqrt(1 + (low * height[0] - high * height[1]) / weight - shift**2)
    assert mean == pytest.approx((0.4 + 0.4 * shift) * num_steps - 0.5, abs=0.01)
    assert std == pytest.approx(0.4 * spread * num_steps, rel=1e-5)


def test_our_law_does_not_pile_up() -> None:
    density = make_time_sampler("ndtc").density(250)
    assert float(density[0]) < float(density[1]) < 1.01 * float(density[0])
    assert float(density[-1]) < float(density[-2])


@pytest.mark.parametrize("num_steps", [50, 250, 4000])
def test_printed_law_has_variance_half_the_steps(num_steps: int) -> None:
    mean, std = moments(make_time_sampler("ndtc_paper").density(num_steps))
    # floor() lowers the mean by 1/2 and adds 1/12 to the variance; the clamp is 4 std or more away
    assert mean == pytest.approx(0.4 * num_steps - 0.5, abs=1e-3)
    assert std == pytest.approx(math.sqrt(num_steps / 2 + 1 / 12), rel=1e-3)


def test_skew_normal_density_matches_its_closed_moments() -> None:
    """Narrow enough that nothing is truncated: mean xi + omega delta sqrt(2 / pi)."""
    xi, omega, alpha, num_steps = 0.4, 0.05, 4.0, 4000
    law = make_time_sampler("skew_normal", {"xi": xi, "omega": omega, "alpha": alpha})
    mean, std = moments(law.density(num_steps))
    delta = alpha / math.sqrt(1 + alpha**2)
    spread = omega * math.sqrt(1 - 2 * delta**2 / math.pi)
    assert mean == pytest.approx((xi + omega * delta * math.sqrt(2 / math.pi)) * num_steps - 0.5)
    assert std == pytest.approx(math.hypot(spread * num_steps, math.sqrt(1 / 12)), rel=1e-6)


def test_skew_normal_without_skew_is_the_truncated_normal() -> None:
    """Quadrature against erf: the bound its docstring promises."""
    skew = make_time_sampler("skew_normal", {"xi": 0.3, "omega": 0.2, "alpha": 0.0})
    normal = make_time_sampler("ndtc", {"mean": 0.3, "std": 0.2})
    for num_steps in STEPS:
        difference = skew.density(num_steps) - normal.density(num_steps)
        assert float(difference.abs().max()) < 1e-9


def test_defaults_are_those_the_study_ran_with() -> None:
    """Cells of the study name one without its parameters: new defaults would reuse old cells."""
    normal = {"mean": 0.4, "std": 0.4}
    expected: dict[str, dict[str, float]] = {
        "ndtc": normal, "ndtc_paper": {"mean": 0.4}, "ndtc_repo": normal, "uniform": {},
        "linspace": {}, "single": {"fraction": 0.4},
        "skew_normal": {"xi": 0.1, "omega": 0.4, "alpha": 4.0},
    }  # fmt: skip
    assert {name: asdict(make_time_sampler(name)) for name in expected} == expected


def test_linspace_and_single_are_exact() -> None:
    counts = torch.bincount(draw("linspace", {}, 100, 50), minlength=50)
    assert counts.tolist() == [2] * 50
    assert draw("linspace", {}, 4, 100).tolist() == [12, 37, 62, 87]
    assert draw("single", {"fraction": 0.29}, 2, 100).tolist() == [29, 29]
    assert draw("single", {"fraction": 1.0}, 1, 100).tolist() == [99]
    assert draw("single", {"fraction": 0.0}, 1, 100).tolist() == [0]


@pytest.mark.parametrize(
    ("name", "args", "words"),
    [
        ("ntdc", {}, ("ntdc", "did you mean 'ndtc'")),
        ("ndtc", {"sdt": 0.4}, ("sdt", "did you mean 'std'")),
        ("uniform", {"mean": 0.4}, ("'mean'", "none")),
        ("ndtc", {"mean": 1.5}, ("mean = 1.5", "0 to 1")),
        ("ndtc", {"std": 0.0}, ("std = 0.0", "expected")),
        ("ndtc", {"std": math.nan}, ("std = nan", "expected")),
        ("ndtc_repo", {"mean": 1.5}, ("mean = 1.5", "0 to 1")),
        ("ndtc_paper", {"mean": 0.6}, ("mean = 0.6", "0 to 0.5")),
        ("ndtc", {"mean": "0.4"}, ("'0.4'", "0 to 1")),
        ("single", {"fraction": True}, ("True", "0 to 1")),
    ],
)
def test_mistakes_are_explained(name: str, args: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(QuantempoError) as error:
        make_time_sampler(name, args)
    assert all(word in str(error.value) for word in words)
