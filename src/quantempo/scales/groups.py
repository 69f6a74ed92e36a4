"""Choose the two levels of scales of weights in groups, see `core.GroupFormat`.

    minimise sum c (w - scale[o] w8)^2,   w8 = (q - z) s,   |w8| <= 127

by candidates, each level where the other one stands: a step for each group as if it were free; of
some scales of a channel the one whose multiples suit the steps of its groups best; neighbours of
each s and z; the scale once more, by least squares.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import GroupFormat, channels_last
from quantempo.scales.activation import CHUNK, CHUNK_GPU, EMPTY_SCALE, TINY
from quantempo.scales.metrics import check_weight

__all__ = ["GroupScales", "search_groups"]

# Shares of the range of a group that 2^bits codes are spread over.
_SHARES = (1.0, 0.93, 0.86, 0.8, 0.7, 0.6, 0.5)
# The largest step of a channel in multiples of its scale; s is at most 16, beyond that it is cut.
_MULTIPLES = (8.0, 10.0, 11.5, 12.5, 13.5, 14.5, 16.0, 19.0, 24.0)
_NEIGHBOURS = [(s, z) for s in (0, -1, 1) for z in (0, -1, 1)]


class GroupScales(NamedTuple):
    """Hold scale, float32 (O,), and groups, uint8 as `GroupFormat` stores them.

    The nearest codes w8 are `spec.grid(shape, groups).round(weight / scale[o])`; a rounding that
    goes column by column takes `grid[:, j].round(weight.flatten(1)[:, j] / scale)`.
    """

    scale: Tensor
    groups: Tensor


@torch.no_grad()
def search_groups(
    weight: Tensor, spec: GroupFormat, importance: Tensor | None = None
) -> GroupScales:
    """Return the scales of a weight (O, I, ...), on its device; 2^-30 for a channel of zeros.

    importance: c >= 0, how often the error of a weight counts; broadcasts over the weight (diag(H)
    of the layer's inputs, say); None: 1.
    Error: float32. The search is no exhaustive one; each candidate is compared on the weights.
    """
    shape, flat = weight.shape, channels_last(weight.detach())
    check_weight(weight)
    counts = None if importance is None else channels_last(importance.expand(shape))
    most = CHUNK if weight.device.type == "cpu" else CHUNK_GPU
    rows = max(1, most // max(1, flat[0].numel()))
    parts = []
    for first in range(0, len(flat), rows):
        some = slice(first, first + rows)
        cut = _cut(flat[some], spec.group)
        parts.append(_search(cut, spec, None if counts is None else _cut(counts[some], spec.group)))
    scale, groups = (torch.cat(column) for column in zip(*parts, strict=True))
    return GroupScales(scale, groups.reshape(spec.group_shape(shape)))


def _cut(flat: Tensor, group: int) -> Tensor:
    """Return (R, P, I) as float32 (R, P N, group), the last group filled with zeros, exact."""
    padded = F.pad(flat.float(), (0, -flat.shape[-1] % group))
    return padded.unflatten(-1, (-1, group)).flatten(1, 2)


class _Best:
    """The best s and z of each group so far, by the error on x (R, M, group), c alike or None."""

    def __init__(self, x: Tensor, c: Tensor | None, spec: GroupFormat) -> None:
        self.x, self.c, self.top, self.reach = x, c, 2**spec.bits - 1, spec.qmax
        self.ends = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)

    def zero(self, step: Tensor) -> Tensor:
        """Return the z that leaves as much beyond both ends of the codes."""
        return ((self.top - sum(self.ends) / step) / 2).round_().clamp_(0, self.top)

    def units(self, step: Tensor, s: Tensor | float, z: Tensor) -> Tensor:
        """Return q - z of codes whose step is `step` = scale s, |w8| <= 127."""
        reach = torch.floor(self.reach / torch.as_tensor(s, device=step.device))
        low, high = -torch.minimum(z, reach), torch.minimum(self.top - z, reach)
        return (self.x / step[..., None]).round_().clamp_(low[..., None], high[..., None])

    def error(self, step: Tensor, s: Tensor | float, z: Tensor) -> Tensor:
        """Return (R, M) sums of c (w - scale w8)^2."""
        off = self.units(step, s, z).mul_(step[..., None]).sub_(self.x).square_()
        return (off if self.c is None else off.mul_(self.c)).sum(-1)


def _search(x: Tensor, spec: GroupFormat, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale (R,) and groups uint8 (R, M) of x (R, M, group)."""
    best = _Best(x, c, spec)
    low, high = best.ends
    width = ((high - low) / best.top).clamp_min(TINY)
    steps = torch.stack([width * share for share in _SHARES])
    errors = torch.stack([best.error(step, 1.0, best.zero(step)) for step in steps])
    step = steps.gather(0, errors.argmin(0, keepdim=True))[0]
    scales = (step.amax(1)[:, None] / x.new_tensor(_MULTIPLES)).clamp_min(TINY)

    def fitted(scale: Tensor) -> tuple[Tensor, Tensor]:
        s = (step / scale[:, None]).round_().clamp_(1, 16)
        return s, best.zero(s * scale[:, None])

    totals = []
    for scale in scales.unbind(1):
        s, z = fitted(scale)
        totals.append(best.error(s * scale[:, None], s, z).sum(1))
    scale = scales.gather(1, torch.stack(totals, 1).argmin(1, keepdim=True))[:, 0]
    s, z = fitted(scale)
    tried = [((s + i).clamp_(1, 16), (z + j).clamp_(0, best.top)) for i, j in _NEIGHBOURS]
    errors = torch.stack([best.error(s * scale[:, None], s, z) for s, z in tried])
    chosen = errors.argmin(0, keepdim=True)
    s, z = (torch.stack(parts).gather(0, chosen)[0] for parts in zip(*tried, strict=True))
    codes = best.units(s * scale[:, None], s, z).mul_(s[..., None])
    weighted = codes if c is None else codes * c
    refit = (weighted * x).sum((1, 2)) / (weighted * codes).sum((1, 2)).clamp_min(TINY)
    refit = torch.where(refit > TINY, refit, scale)
    before, after = (best.error(s * v[:, None], s, z).sum(1) for v in (scale, refit))
    scale = torch.where(after < before, refit, scale)
    scale = torch.where((low < high).any(1), scale, EMPTY_SCALE)
    return scale, ((s - 1) * 16 + z).to(torch.uint8)
