"""How far a quantized tensor is from the float one: the `METRICS` registry.

A metric reduces the last axis and knows nothing about scales, grids or layers. Elements may carry
weights, so the same function serves exact data (weight None) and histograms (x the bin centres,
weight the counts). E[v] below is the weighted mean sum_i w_i v_i / sum_i w_i over the last axis.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature

import torch
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.registry import Registry

__all__ = [
    "DENSITY_METRICS", "MEAN_METRICS", "METRICS", "Metric", "check_weight", "cosine", "kl", "l1",
    "linf", "lp", "make_metric", "mse",
]  # fmt: skip

# Contract: metric(x (..., L), x_hat (..., L), weight (..., L) | None) -> (...). Leading axes
# broadcast: weight (R, 1, L) with x (L,) and x_hat (P, L) gives (R, P). Values are >= 0 and
# finite, 0 where x_hat equals x on all elements of weight > 0 or there are none; lower is better.
# Weights 1, 2, ... mean what repeating the element means. No state. An exponent is taken as a
# keyword `p`; no other options.
Metric = Callable[..., Tensor]

METRICS: Registry[Metric] = Registry("metric")

# Metrics of the distribution, not of the elements: they need a histogram even for exact data.
DENSITY_METRICS = frozenset({"kl"})
# Means over elements: those of parts of the data add up to that of the whole.
MEAN_METRICS = frozenset({"mse", "l1", "lp"})

# Mass that the simulated density of `kl` grants to everything outside its range.
KL_OUTSIDE = 1e-6


def make_metric(name: str, p: float = 2.4) -> Metric:
    """Return the registered metric, its exponent, if any, bound to p > 0; else QuantempoError."""
    function = METRICS.get(name)
    if not 0 < p < float("inf"):
        raise QuantempoError(f"got p = {p} for metric '{name}'; expected a positive number")
    return partial(function, p=p) if "p" in signature(function).parameters else function


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """Return E[values] over the last axis; 0 where all weights are 0."""
    if weight is None:
        return values.mean(-1)
    weight = weight.to(values.dtype)
    if weight.ndim == 3 and weight.shape[1] == 1 and values.ndim == 2:
        # Without this product every row of weights would make its own copy of the values.
        total = weight[:, 0] @ values.T
    else:
        total = (values * weight).sum(-1)
    mass = weight.sum(-1)
    return total / torch.where(mass > 0, mass, 1)


@METRICS.register("mse")
def mse(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return E[(x - x_hat)^2]."""
    return _mean((x - x_hat).square_(), weight)


@METRICS.register("l1")
def l1(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return E[|x - x_hat|]."""
    return _mean((x - x_hat).abs_(), weight)


@METRICS.register("lp")
def lp(x: Tensor, x_hat: Tensor, weight: Tensor | None = None, *, p: float = 2.4) -> Tensor:
    """Return E[|x - x_hat|^p].

    Source: Shang et al., CVPR 2023, Table 4, where p = 2.4 goes by the name "MSE".
    """
    return _mean((x - x_hat).abs_().pow_(p), weight)


@METRICS.register("linf")
def linf(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return max |x - x_hat| over elements of weight > 0.

    From about 6 bits on its best range is that of the values: calibration by minimum and maximum.
    """
    error = (x - x_hat).abs_()
    return error.amax(-1) if weight is None else error.mul(weight > 0).amax(-1)


@METRICS.register("cosine")
def cosine(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return 1 - E[x x_hat] / sqrt(E[x^2] E[x_hat^2]); 1 if exactly one of the two is zero.

    With a, b the root mean squares and d = x - x_hat: (E[d^2] - (a - b)^2) / (2 a b), a - b = E[d
    (x + x_hat)] / (a + b).
    Error: no cancellation against 1: values near 1e-5 keep their digits in float32. A common factor
    of x_hat costs nothing: no scale is fixed for tensors that few levels can hold exactly.
    """
    difference = x - x_hat
    a, b = (_mean(v * v, weight).sqrt() for v in (x, x_hat))
    gap = _mean(difference * (x + x_hat), weight) / torch.where(a + b > 0, a + b, 1)
    product = 2 * a * b
    ratio = (_mean(difference.square_(), weight) - gap * gap) / torch.where(product > 0, product, 1)
    return torch.where(product > 0, ratio.clamp_min(0), (a != b).to(ratio.dtype))


@METRICS.register("kl")
def kl(x: Tensor, x_hat: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return KL(P || Q) of the float density P against the density Q that the levels can tell.

    Equal x make one bin, i; P_i is its share of the weight, bins without weight are left out. A
    level is a run of equal x_hat in sorted x; the step is the smallest distance between
    neighbouring levels. A bin is *outside* if |x - x_hat| > step / 2: it was clipped. Let R be the
    mass inside, M_l the mass and c_l the number of bins of level l that are inside, n the number of
    bins outside. Then

        Q_i = (1 - e) (M_l / c_l) / R  inside,  Q_i = e / n  outside,  e = 1e-6 (0 if n = 0),

    that is, every level spreads its mass evenly over its bins, and T = 1 - R of clipped mass costs
    T log(T/e) + R log(R/(1 - e)) on top of what the shapes differ. P sums to one and Q to one (or
    to e, if nothing is inside), so KL >= 0, and it is finite for every clip.

    x, x_hat, weight: broadcastable, of a histogram with all its bins, which show the levels; on raw
    samples (all x distinct) nothing but the clipping is seen.
    Source: the entropy calibration of TensorRT (Migacz, GTC 2017), which moves the clipped mass
    into P's last bin instead; then P depends on the clip, and a range of one bin can score 0.
    """
    if weight is None:
        weight = torch.ones_like(x)
    shape = torch.broadcast_shapes(x.shape[:-1], x_hat.shape[:-1], weight.shape[:-1])
    if x.ndim == 1 and x_hat.ndim == 2 and weight.ndim == 3 and weight.shape[1] == 1:
        # All grids at once; below, one after the other.
        return _kl_rows(x, x_hat, weight[:, 0])
    rows = [v.expand(*shape, v.shape[-1]).reshape(-1, v.shape[-1]) for v in (x, x_hat, weight)]
    each = [_kl_rows(a, b[None], w[None])[0, 0] for a, b, w in zip(*rows, strict=True)]
    return torch.stack(each).reshape(shape)


def _kl_rows(x: Tensor, x_hat: Tensor, weight: Tensor) -> Tensor:
    """Return `kl` of x (L,) and x_hat (P, L) under every row of weight (R, L): (R, P)."""
    x, x_hat, weight = _merge_equal(x, x_hat, weight.to(torch.float64))
    clipped = (x - x_hat).abs() > _half_step(x, x_hat)
    length, starts = x_hat.shape[1], torch.ones_like(clipped)
    starts[:, 1:] = x_hat[:, 1:] != x_hat[:, :-1]
    starts[:, 1:] |= clipped[:, 1:] != clipped[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    last = torch.cat([first[1:], first.new_tensor([starts.numel()])])
    grid = first // length
    begin, end = first - grid * length, last - grid * length

    def totals(values: Tensor) -> Tensor:  # (R, L) -> (R, number of runs)
        sums = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
        return sums[:, end] - sums[:, begin]

    # Counts are divided last, so that differences of their sums are exact.
    filled = (weight > 0).to(weight.dtype)
    every = weight.sum(-1, keepdim=True)
    every = torch.where(every > 0, every, 1)
    mass = torch.where(clipped.flatten()[first], 0, totals(weight) / every)
    each = torch.xlogy(mass, mass / totals(filled).clamp_min(1))
    # scatter_add_, since index_add_ along the last axis is ten times slower.
    levels = each.new_zeros(len(each), len(x_hat)).scatter_add_(1, grid.expand_as(each), each)
    outside = clipped.to(weight.dtype).T
    inside, out = weight @ (1 - outside) / every, weight @ outside / every
    granted = torch.where(out > 0, KL_OUTSIDE, 0.0).to(weight.dtype)
    share = weight / every
    value = torch.xlogy(share, share).sum(-1, keepdim=True) - levels
    value += torch.xlogy(inside, inside) - inside * torch.log1p(-granted)
    value += torch.xlogy(out, (filled @ outside).clamp_min(1) / KL_OUTSIDE)
    return value.clamp_min(0)


def _merge_equal(x: Tensor, x_hat: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort by x and add up the weights of equal x, so that one x is one bin."""
    if bool((x[1:] > x[:-1]).all()):
        return x, x_hat, weight
    x, order = x.sort(stable=True)
    x_hat, weight = x_hat[:, order], weight[:, order]
    new = torch.ones_like(x, dtype=torch.bool)
    new[1:] = x[1:] != x[:-1]
    bins = weight.new_zeros(len(weight), int(new.sum()))
    return x[new], x_hat[:, new], bins.index_add_(1, new.cumsum(0) - 1, weight)


def _half_step(x: Tensor, x_hat: Tensor) -> Tensor:
    """Return (P, 1): half the smallest distance of neighbouring levels, plus float rounding."""
    # A single level has no step; then only what the number format rounds away counts as inside.
    rounding = 1e-6 * x.abs().amax()
    gap = (x_hat[:, 1:] - x_hat[:, :-1]).abs()
    gap = torch.cat([gap, torch.zeros_like(x_hat[:, :1])], 1)
    step = torch.where(gap > 0, gap, torch.inf).amin(1, keepdim=True)
    return torch.where(step.isinf(), 0, step * (0.5 + 1e-6)) + rounding


def check_weight(weight: Tensor) -> None:
    """Raise QuantempoError unless a weight is (O, I, ...), floating and finite."""
    if weight.ndim < 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        text = f"got a weight {tuple(weight.shape)} {weight.dtype}; expected a finite floating"
        raise QuantempoError(f"{text} tensor (O, ...); check the checkpoint")
