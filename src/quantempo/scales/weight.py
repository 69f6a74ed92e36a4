"""Choose the scales of weights from the weights themselves.

Per output channel, symmetric. Which integer a weight is rounded to is `rounding`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantempo.core import WEIGHT, Format
from quantempo.errors import QuantempoError
from quantempo.scales.activation import CHUNK, EMPTY_SCALE, TINY
from quantempo.scales.histogram import bin_centers
from quantempo.scales.metrics import DENSITY_METRICS, Metric, make_metric

__all__ = ["search_weight"]

BINS = 2048


def search_weight(
    weight: Tensor,
    spec: Format = WEIGHT,
    *,
    metric: str = "lp",
    p: float = 2.4,
    steps: int = 80,
) -> Tensor:
    """Choose the scale of every output channel: argmin over clip ratios r of metric(w, Q(w; s_r)).

    s_r = r max|w| / qmax for `steps` ratios from 1 to 0.2 in equal distances; 1 is min-max, is
    first, and wins ties. The metric sees w / max|w|, so tiny weights do not underflow. A metric of
    densities (kl) sees a histogram of 2048 bins over [-max|w|, max|w|] of the channel.

    Args:
        weight: (O, ...) floating.
        spec: a signed symmetric grid.
        metric, p: a name in `METRICS`, and the exponent if it has one.
        steps: number of ratios.

    Returns:
        (O,) float32, > 0, on the device of the weight; 2^-30 for a channel of zeros.

    Raises:
        QuantempoError: fewer than two axes, NaN or infinity, a grid that is not symmetric.

    Error: float32; of candidates whose metrics agree to about 1e-6 either may win.
    """
    if weight.ndim < 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise QuantempoError(
            f"got a weight {tuple(weight.shape)} {weight.dtype}; "
            "expected a finite floating tensor (O, ...); check the checkpoint"
        )
    if not (spec.signed and spec.symmetric) or steps < 1:
        raise QuantempoError(
            f"got {spec} and steps={steps}; expected signed, symmetric, steps >= 1"
        )
    rows = weight.detach().flatten(1).float()
    peak = rows.abs().amax(1)
    safe = torch.where(peak > 0, peak, 1)
    ratios = torch.linspace(1.0, 0.2, steps, dtype=torch.float64, device=rows.device)
    scale = (peak.double()[:, None] * ratios / spec.qmax).float().clamp_min(TINY)
    function = make_metric(metric, p)
    if metric in DENSITY_METRICS:
        cost = _density_costs(rows / safe[:, None], ratios, function, spec)
    else:
        cost = _exact_costs(rows, safe, scale, function, spec)
    best = scale.gather(1, cost.argmin(1, keepdim=True))[:, 0]
    return torch.where(peak > 0, best, EMPTY_SCALE)


def _exact_costs(rows: Tensor, peak: Tensor, scale: Tensor, metric: Metric, spec: Format) -> Tensor:
    """Return the (O, steps) metric of every scale on the rows (O, L) themselves."""
    cost = torch.empty_like(scale)
    for some, few in _blocks(len(rows), scale.shape[1], rows.shape[1]):
        x, s, top = rows[some, None], scale[some, few, None], peak[some, None, None]
        codes = (x / s).round_().clamp_(spec.qmin, spec.qmax)
        cost[some, few] = metric(x / top, codes.mul_(s / top))
    return cost


def _blocks(rows: int, steps: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of (channels, ratios) of about CHUNK elements."""
    few = min(steps, max(1, CHUNK // length))
    some = max(1, CHUNK // (few * length))
    for i in range(0, rows, some):
        for j in range(0, steps, few):
            yield slice(i, i + some), slice(j, j + few)


def _density_costs(unit: Tensor, ratios: Tensor, metric: Metric, spec: Format) -> Tensor:
    """Return the (O, steps) metric on the histograms of rows (O, L) scaled to a peak of 1."""
    x = bin_centers(torch.tensor([-1.0, 1.0]), BINS).to(unit.device)
    step = (ratios / spec.qmax)[:, None]
    x_hat = (x / step).round_().clamp_(spec.qmin, spec.qmax).mul_(step)
    place = ((unit + 1) * (BINS / 2)).long().clamp_(0, BINS - 1)
    cost = []
    for part in place.split(64):
        counts = part.new_zeros(len(part), BINS).scatter_add_(1, part, torch.ones_like(part))
        cost.append(metric(x, x_hat, counts[:, None]))
    return torch.cat(cost)
