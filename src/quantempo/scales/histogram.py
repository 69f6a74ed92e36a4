"""Streaming statistics of one activation: `MinMax`, then `Histogram` over its range, `TokenError`.

The first two hold a row for each of S input-channel segments and K fine time bins (which time-step
is in which is the caller's business), sums or extremes of integers or single values: the order of
batches and their size do not change a bit. Nothing here chooses a scale.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from quantempo.core import activation_format, token_scale
from quantempo.errors import QuantempoError
from quantempo.scales.metrics import Metric

__all__ = ["ACT_BITS", "Histogram", "MinMax", "TokenError", "bin_centers"]

# Widths of activations.
ACT_BITS = range(2, 9)

# Small enough for the temporaries of a piece to stay in cache (3 times faster), and for torch not
# to spread a piece over threads.
CPU_PIECE = 1 << 14
DEVICE_PIECE = 1 << 24


def bin_centers(edges: Tensor, bins: int) -> Tensor:
    """Return the (..., bins) float64 centres of equal bins over edges (..., 2) = [lo, hi]."""
    lo, hi = edges.to(torch.float64).split(1, -1)
    steps = (torch.arange(bins, dtype=torch.float64, device=edges.device) + 0.5) / bins
    return lo + (hi - lo) * steps


def _rows(x: Tensor, each: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield (k, samples in time bin k), sample by sample where a batch mixes time bins."""
    if x.numel():
        yield from zip(each, x if len(set(each)) > 1 else [x], strict=False)


def _numbers(x: Tensor, time_bin: int | Tensor, time_bins: int) -> list[int]:
    """Return the time bin of every sample, or one for all."""
    if isinstance(time_bin, Tensor) and time_bin.ndim == 1 and len(time_bin) > 1:
        if len(time_bin) != len(x):
            text = f"got {len(time_bin)} time bins for a batch of {len(x)}"
            raise QuantempoError(f"{text}; expected one a sample")
        each = [int(k) for k in time_bin]
    else:
        each = [int(time_bin)]
    if not all(0 <= k < time_bins for k in each):
        raise QuantempoError(f"got time bins {sorted(set(each))}; expected 0 to {time_bins - 1}")
    return each


class MinMax:
    """Keep the smallest and largest value of every segment and time bin in `range` (S, K, 2)."""

    def __init__(self, segments: int = 1, time_bins: int = 1) -> None:
        self.range = torch.tensor([torch.inf, -torch.inf]).repeat(segments, time_bins, 1)

    @torch.no_grad()
    def update(self, x: Tensor, time_bin: int | Tensor = 0, segment: int = 0) -> None:
        """Take in a batch (B, ...) of segment `segment`, at one time bin or (B,) int64 of them.

        Raises QuantempoError: NaN or infinity in x, a time bin out of range, or a wrong number.
        """
        each = _numbers(x, time_bin, self.range.shape[1])
        if not _on_host(x) and x.numel():
            # One wait for the device, not one a sample.
            found = torch.stack(x.flatten(1).aminmax(dim=1), 1).float().cpu()
            for k in set(each):
                mine = found if len(each) == 1 else found[[i for i, j in enumerate(each) if j == k]]
                self._widen(segment, k, torch.stack([mine[:, 0].min(), mine[:, 1].max()]))
            return
        for k, values in _rows(x, each):
            ends = torch.stack([torch.stack(piece.aminmax()) for piece in _pieces(values)])
            self._widen(segment, k, torch.stack([ends[:, 0].min(), ends[:, 1].max()]).float())

    def _widen(self, segment: int, k: int, seen: Tensor) -> None:
        """Take the smallest and largest value (2,) of some samples into a row."""
        if not bool(seen.isfinite().all()):
            raise QuantempoError("got NaN or infinity in an activation; check the float model")
        row = self.range[segment, k]
        row[0], row[1] = torch.minimum(row[0], seen[0]), torch.maximum(row[1], seen[1])

    def edges(self) -> Tensor:
        """Return (S, 2) float32 [lo, hi] of each segment over all time, else QuantempoError."""
        edges = torch.stack([self.range[..., 0].amin(1), self.range[..., 1].amax(1)], -1)
        if not bool(edges.isfinite().all()):
            raise QuantempoError("got no data for an activation; calibrate with at least one input")
        return edges


class Histogram:
    """Count the values of every segment and time bin in equal bins over a fixed range.

    All time bins of a segment share the range, so their rows add up to the histogram of the set.
    The centre of its bin is at most w/2, w = (hi-lo)/bins, from a value, and the distance to the
    nearest level 1-Lipschitz: the L_p norm of the quantization error is off by at most w/2 for
    every scale, and the best scale of the histogram within w of the best of the data.

    edges: (S, 2) float32 [lo, hi], `MinMax.edges` of the same data; counts: (S, K, N) int64.
    """

    def __init__(self, edges: Tensor, time_bins: int = 1, bins: int = 2048) -> None:
        self.edges = edges.to(torch.float32, copy=True)
        self.counts = torch.zeros(len(edges), time_bins, bins, dtype=torch.int64)

    @torch.no_grad()
    def update(self, x: Tensor, time_bin: int | Tensor = 0, segment: int = 0) -> None:
        """Count a batch, see `MinMax.update`; values less than a bin outside count in the end bin.

        Raises QuantempoError: NaN, values further outside, a time bin out of range.
        """
        time_bins, bins = self.counts.shape[1:]
        lo, hi = self.edges[segment].tolist()
        each = _numbers(x, time_bin, time_bins)
        if not _on_host(x) and len(set(each)) > 1:
            # One wait for the device, not one a sample: every time bin gets bins of its own.
            first = torch.tensor(each, dtype=torch.int32, device=x.device)[:, None] * bins
            counts = _count(x.flatten(1), lo, hi, bins, first, time_bins)
            self.counts[segment] += counts.reshape(time_bins, bins)
            return
        for k, values in _rows(x, each):
            self.counts[segment, k] += _count(values, lo, hi, bins)


class TokenError:
    """Average a metric of `MEAN_METRICS` over inputs whose tokens have a scale each, at all widths.

    error: (S, 7) float64, of codes of 2 to 8 bits; 0 where nothing was seen.
    """

    def __init__(self, segments: int, metric: Metric) -> None:
        self.metric, self.segments = metric, segments
        # Of each batch: its segment, how many tokens, the sums over them.
        self.seen = torch.zeros(0, 2 + len(ACT_BITS), dtype=torch.float64)

    @property
    def error(self) -> Tensor:
        """The means, of sums in the order of batches."""
        sums = self.seen.new_zeros(self.segments, 1 + len(ACT_BITS))
        sums.index_add_(0, self.seen[:, 0].long(), self.seen[:, 1:])
        return sums[:, 1:] / sums[:, :1].clamp_min(1)

    @torch.no_grad()
    def update(self, x: Tensor, time_bin: int | Tensor = 0, segment: int = 0) -> None:
        """Take in a batch (..., K) of floats, whatever its time."""
        rows = x.reshape(-1, x.shape[-1])
        if not len(rows):
            return
        pieces = rows.split(max(1, DEVICE_PIECE // rows.shape[1]))
        total = torch.stack([self._sums(piece.float()) for piece in pieces]).sum(0).cpu()
        row = torch.cat([total.new_tensor([segment, len(rows)]), total])
        self.seen = torch.cat([self.seen, row[None]])

    def _sums(self, rows: Tensor) -> Tensor:
        """Return the metric of all rows (M, K) together at each width, (7,)."""
        sums = []
        for bits in ACT_BITS:
            scale = token_scale(rows, activation_format(bits))
            codes = (rows / scale).round_()
            sums.append(self.metric(rows, codes.mul_(scale)).double().sum())
        return torch.stack(sums)


def _on_host(values: Tensor) -> bool:
    return values.device.type == "cpu"


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Yield all elements in flat pieces, in an order that costs no copy of the whole."""
    if not _on_host(values):
        yield from values.flatten().split(DEVICE_PIECE)
        return
    # The order does not matter, so walk along memory (channels_last, transposed inputs).
    values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))
    if values.is_contiguous() or values.ndim < 2:
        yield from values.flatten().split(CPU_PIECE)
        return
    for part in values.split(max(1, CPU_PIECE * len(values) // values.numel())):
        yield from part.flatten().split(CPU_PIECE)


def _count(
    values: Tensor, lo: float, hi: float, bins: int, first: Tensor | None = None, tables: int = 1
) -> Tensor:
    """Return (tables * bins,) int64 counts: bin floor((v - lo) * bins / (hi - lo)), plus `first`.

    values: any shape; (B, n) with `first`, (B, 1) int32 first bin of each row's own table.
    """
    counts = torch.zeros(tables * bins, dtype=torch.int64, device=values.device)
    slack = (hi - lo) / bins + 1e-6 * max(abs(lo), abs(hi))
    # In float32 the factor or the difference would overflow for the extreme ranges.
    dtype = torch.float32 if 1e-30 < hi - lo < 1e38 else torch.float64
    factor = bins / (hi - lo) if hi > lo else 0.0
    pairs: Iterator[tuple[Tensor, Tensor | None]]
    if first is None:
        pairs = ((piece, None) for piece in _pieces(values))
    else:
        rows = max(1, DEVICE_PIECE * len(values) // max(1, values.numel()))
        pairs = zip(values.split(rows), first.split(rows), strict=True)
    for piece, start in pairs:
        least, most = (float(v) for v in piece.aminmax())
        # Written so that NaN is refused as well.
        if not (least >= lo - slack and most <= hi + slack):
            text = f"got values in [{least:g}, {most:g}] for a histogram over [{lo:g}, {hi:g}]"
            raise QuantempoError(f"{text}; run the min-max pass over the same data first")
        place = piece.to(dtype).sub(lo).mul_(factor).clamp_(0, bins - 1)
        # int32: the narrowest type that holds any number of bins; int64 is slower to count.
        index = place.to(torch.int32)
        if start is not None:
            index = index.add_(start).flatten()
        counts += torch.bincount(index, minlength=len(counts))
    return counts.cpu()
