"""Timestep distributions: how calibration inputs are spread over the sampling steps.

Each is over step indices i in [0, num_steps): 0 is the last call of a sampler, nearest to the
image, num_steps - 1 the first, nearest to noise. Parameters are fractions of num_steps, so one
recipe serves every step count; `trace` turns an index into a training time-step. Three go by the
name of the paper's NDTC: what it prints, what its released program does, and a properly truncated
normal distribution, our default.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Generator, Tensor

from quantempo.recipe import check_numbers, number
from quantempo.registry import Registry, check_known

__all__ = ["TIME_SAMPLERS", "TimeSampler", "make_time_sampler"]


class TimeSampler(Protocol):
    """A distribution of step indices, with its parameters as fractions of the number of steps."""

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        """Draw (n,) int64 step indices in [0, num_steps)."""

    def density(self, num_steps: int) -> Tensor:
        """Return the (num_steps,) float64 probability of each index; it sums to one."""


TIME_SAMPLERS: Registry[type] = Registry("time sampler")


def make_time_sampler(name: str, args: Mapping[str, float] | None = None) -> TimeSampler:
    """Make the timestep distribution a recipe names, its parameters (others: default) by `args`.

    Raises QuantempoError: unknown name or parameter, one that is no number or out of its range.
    """
    kind = TIME_SAMPLERS.get(name)
    known = [parameter.name for parameter in fields(kind)]
    check_known(args or {}, known, f"time sampler '{name}' has no parameter")
    return kind(**dict(args or {}))


class _Law:
    """Refuse parameters of a distribution that are out of their limits."""

    def __post_init__(self) -> None:
        name = next(n for n in TIME_SAMPLERS.names() if TIME_SAMPLERS.get(n) is type(self))
        check_numbers(self, f"time sampler '{name}': got ")


@TIME_SAMPLERS.register("ndtc")
@dataclass(frozen=True)
class TruncatedNormal(_Law):
    """Draw a normal time conditioned on lying inside the trajectory, then floor it.

    t ~ N(mean T, (std T)^2) given 0 <= t < T, i = floor(t), by rejection.
    Source: NDTC of PTQ4DM, CVPR 2023, eq. 15, by truncation in place of the clamp.
    """

    mean: float = number(0.4, 0, 1)
    std: float = number(0.4, 1e-3, 10)

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        def propose(count: int) -> Tensor:
            return self.mean + self.std * _normal(count, generator)

        return _reject(propose, n, num_steps)

    def density(self, num_steps: int) -> Tensor:
        mass = _normal_cells(self.mean * num_steps, self.std * num_steps, num_steps)
        return mass / mass.sum()


@TIME_SAMPLERS.register("ndtc_paper")
@dataclass(frozen=True)
class PaperNormal(_Law):
    """Draw as printed: i = clamp(floor(N(mean T, T / 2)), 0, T - 1), std sqrt(T / 2).

    The printed clamp is at T, which is no index. The paper asks for mean <= 1/2 and prints no
    value; 0.4 is that of its program.
    Source: Shang et al., CVPR 2023, eq. 15 and Algorithm 1.
    """

    mean: float = number(0.4, 0, 0.5)

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        t = self.mean * num_steps + math.sqrt(num_steps / 2) * _normal(n, generator)
        return t.floor().clamp(0, num_steps - 1).long()

    def density(self, num_steps: int) -> Tensor:
        return _clamped_cells(self.mean * num_steps, math.sqrt(num_steps / 2), num_steps)


@TIME_SAMPLERS.register("ndtc_repo")
@dataclass(frozen=True)
class RepoNormal(_Law):
    """Draw as the released program does: i = clamp(floor(N(mean T, (std T)^2)), 0, T - 1).

    At 250 steps the clamp puts 16.1 % of the draws on index 0 and 6.8 % on T - 1.
    Source: the released code of Shang et al. at its last commit (2023-03-31), as observed.
    """

    mean: float = number(0.4, 0, 1)
    std: float = number(0.4, 1e-3, 10)

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        t = num_steps * (self.mean + self.std * _normal(n, generator))
        return t.floor().clamp(0, num_steps - 1).long()

    def density(self, num_steps: int) -> Tensor:
        return _clamped_cells(self.mean * num_steps, self.std * num_steps, num_steps)


@TIME_SAMPLERS.register("skew_normal")
@dataclass(frozen=True)
class SkewNormal(_Law):
    """Draw a skew normal time conditioned on lying inside the trajectory, then floor it.

    t / T has density (2 / omega) phi(z) Phi(alpha z), z = (t / T - xi) / omega. Drawn as
    xi + omega (delta |u| + sqrt(1 - delta^2) v), delta = alpha / sqrt(1 + alpha^2), u, v ~ N(0, 1),
    outside draws rejected. alpha > 0 leans towards the image (small indices) with a tail to noise.
    Source: Azzalini, "A class of distributions which includes the normal ones", 1985.
    """

    xi: float = number(0.1, 0, 1)
    omega: float = number(0.4, 1e-3, 10)
    # A distribution wholly outside [0, 1) could not be drawn by rejection.
    alpha: float = number(4.0, -100, 100)

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        delta = self.alpha / math.sqrt(1 + self.alpha**2)

        def propose(count: int) -> Tensor:
            u, v = _normal(2 * count, generator).view(2, count)
            return self.xi + self.omega * (delta * u.abs() + math.sqrt(1 - delta**2) * v)

        return _reject(propose, n, num_steps)

    def density(self, num_steps: int) -> Tensor:
        # Error: each cell is integrated by 4-point Gauss-Legendre panels no wider than an eighth
        # of the sharpest scale of the density; below 1e-9 of the total in the tested range.
        panels = math.ceil(8 * max(1.0, abs(self.alpha)) / (self.omega * num_steps))
        width = 1 / (num_steps * panels)
        left = torch.arange(num_steps * panels, dtype=torch.float64)[:, None] * width
        z = (left + width * _GAUSS_NODES - self.xi) / self.omega
        # (cells, panels * nodes); constant factors cancel in the normalisation
        values = (torch.exp(-(z**2) / 2) * torch.erfc(-self.alpha * z / math.sqrt(2))) @ _GAUSS
        mass = values.view(num_steps, panels).sum(1)
        return mass / mass.sum()


@TIME_SAMPLERS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """Draw every index with the same probability 1 / T (the paper's Observation 3, eq. 14)."""

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        return torch.randint(num_steps, (n,), generator=generator)

    def density(self, num_steps: int) -> Tensor:
        return torch.full((num_steps,), 1 / num_steps, dtype=torch.float64)


@TIME_SAMPLERS.register("linspace")
@dataclass(frozen=True)
class Linspace(Uniform):
    """Space n indices evenly, without chance: i_k = floor((k + 1/2) T / n), k < n."""

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        return (2 * torch.arange(n) + 1) * num_steps // (2 * n)


@TIME_SAMPLERS.register("single")
@dataclass(frozen=True)
class Single(_Law):
    """Take one index for all: i = min(floor(fraction T), T - 1) (the paper's Observation 2)."""

    fraction: float = number(0.4, 0, 1)

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        return torch.full((n,), self._index(num_steps))

    def density(self, num_steps: int) -> Tensor:
        mass = torch.zeros(num_steps, dtype=torch.float64)
        mass[self._index(num_steps)] = 1
        return mass

    def _index(self, num_steps: int) -> int:
        # Decimal fractions of a step count are meant exactly: 0.29 * 100 is 28.999999999999996.
        return min(math.floor(round(self.fraction * num_steps, 9)), num_steps - 1)


# Four-point Gauss-Legendre rule on [0, 1], weights up to a factor.
_POINTS, _GAUSS = map(torch.from_numpy, np.polynomial.legendre.leggauss(4))
_GAUSS_NODES = (_POINTS + 1) / 2


def _normal(n: int, generator: Generator) -> Tensor:
    # float64, so that flooring never meets a float32 draw rounded across an integer.
    return torch.randn(n, generator=generator, dtype=torch.float64)


def _reject(propose: Callable[[int], Tensor], n: int, num_steps: int) -> Tensor:
    """Draw fractions until n of them lie in [0, 1); return their indices (n,) int64."""
    kept = torch.empty(0, dtype=torch.float64)
    while len(kept) < n:
        t = propose(2 * n)
        kept = torch.cat([kept, t[(t >= 0) & (t < 1)]])
    return (kept[:n] * num_steps).floor().long().clamp(max=num_steps - 1)


def _normal_cells(mean: float, std: float, num_steps: int) -> Tensor:
    """Return P(i <= t < i + 1), t ~ N(mean, std^2), for i < num_steps: (num_steps,) float64."""
    z = (torch.arange(num_steps + 1, dtype=torch.float64) - mean) / (std * math.sqrt(2))
    # Differences of the smaller tail keep their digits far from the mean.
    upper = (torch.erfc(z[:-1]) - torch.erfc(z[1:])) / 2
    lower = (torch.erfc(-z[1:]) - torch.erfc(-z[:-1])) / 2
    return torch.where(z[:-1] > 0, upper, lower)


def _clamped_cells(mean: float, std: float, num_steps: int) -> Tensor:
    """Return the cells of a normal distribution with both tails added to the end cells."""
    mass = _normal_cells(mean, std, num_steps)
    root = std * math.sqrt(2)
    mass[0] += math.erfc(mean / root) / 2
    mass[-1] += math.erfc((num_steps - mean) / root) / 2
    return mass
