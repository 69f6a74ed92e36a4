"""Measure the inputs of layers: their statistics over a calibration set, and what they act on."""

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import count, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.calibration.dataset import CalibrationData, TraceBatch
from quantempo.calibration.rows import mapped, measure
from quantempo.core import ranks
from quantempo.core.progress import Progress
from quantempo.errors import QuantempoError
from quantempo.models.fusion import attending
from quantempo.models.layers import LAYERS, hooked, input_of
from quantempo.quantized import Times, token_rows
from quantempo.quantized.attention import measured_attention
from quantempo.run_folder import Kept
from quantempo.scales import Histogram, Metric, MinMax, TokenError

__all__ = ["TIME_BINS", "attention_errors", "collect_statistics", "measure_roles", "time_bin_edges"]

# Fine time bins, of equally many places; buckets are unions of neighbours.
TIME_BINS = 16
# Rows of which roles, and times at which attentions are measured.
_ROWS, _TIMES = 4, 8
# Vectors a row up to which an input is no sequence (PixArt's height and width).
_FEW = 2


def time_bin_edges(times: Times, bins: int = TIME_BINS) -> Tensor:
    """Return (bins + 1,) float32 equal edges over all places; a bin for clean tokens alone."""
    if times.clean and bins > 1:
        return torch.cat([torch.zeros(1), torch.linspace(1, times.count, bins)])
    return torch.linspace(0, times.count, bins + 1)


def collect_statistics(
    denoiser: nn.Module, inputs: Mapping[str, tuple[int, ...]], data: CalibrationData, *,
    bins: int = TIME_BINS, tokens: Metric | None = None, kept: Kept | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the tensors of `stats.safetensors`, by two passes: ranges, histograms over these.

    `time_bin_edges` (K + 1,), K = bins; for each layer, by segment and time bin, `NAME.range` (S,
    K, 2), `NAME.hist` (S, K, N) int64, `NAME.edges` (S, 2); with `tokens`, a metric,
    `NAME.token_error` (S, 7), see `TokenError`. inputs: layer name -> input channels of its
    segments, () for one.
    Raises QuantempoError: NaN in an activation, or a layer that no row reaches.
    """
    ranges = {name: MinMax(max(1, len(parts)), bins) for name, parts in inputs.items()}
    timed, kept = _timed(denoiser, inputs, data), kept or Kept()
    _feed([ranges], denoiser, inputs, data, bins, "ranges", timed, kept)
    histograms = {name: Histogram(ends.edges(), bins) for name, ends in ranges.items()}
    errors = {
        name: TokenError(max(1, len(parts)), tokens)
        for name, parts in inputs.items()
        if tokens is not None and isinstance(denoiser.get_submodule(name), nn.Linear)
    }
    _feed([histograms, errors], denoiser, inputs, data, bins, "histograms", timed, kept)
    tensors = {"time_bin_edges": time_bin_edges(data.times, bins)}
    for name, seen in histograms.items():
        found = {"range": ranges[name].range, "hist": seen.counts, "edges": seen.edges}
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    return tensors | {f"{name}.token_error": seen.error for name, seen in errors.items()}


@torch.no_grad()
def attention_errors(denoiser: nn.Module, data: CalibrationData) -> dict[str, list[float]]:
    """Return what `measured_attention` yields, at times from first to last."""
    if not attending(denoiser) or not len(data):
        return {}
    order = data.times.noisiest(torch.as_tensor(data.timesteps)).argsort()
    index = order[torch.linspace(0, len(order) - 1, min(_TIMES, len(order))).long()]
    with measured_attention(denoiser) as errors:
        for rows in ranks.mine(data.calls(index, 1)):
            data.replay(denoiser, data.rows(rows))
    found: dict[str, list[float]] = {}
    for name, most in (item for part in ranks.everyone(errors) for item in part.items()):
        found[name] = [*map(max, found.get(name, most), most)]
    return found


@torch.no_grad()
def _feed(
    sinks: Sequence[Mapping[str, MinMax | Histogram | TokenError]], denoiser: nn.Module,
    inputs: Mapping[str, tuple[int, ...]], data: CalibrationData, bins: int, stage: str,
    timed: Collection[str], kept: Kept,
) -> None:  # fmt: skip
    """Run the denoiser on all rows and give the sinks of each layer its inputs."""
    every = {f"{i}.{name}": sinks[i][name] for i in range(len(sinks)) for name in sinks[i]}

    def state() -> dict[str, Tensor]:
        parts = ((f"{name}.{k}", v) for name, sink in every.items() for k, v in vars(sink).items())
        return {name: value for name, value in parts if isinstance(value, Tensor)}

    # On a GPU few large batches: every layer waits for the device once a batch.
    size = 32 if next(denoiser.parameters()).device.type == "cpu" else 256
    mine: Any = ranks.part(range(sum(math.ceil(rows / size) for _, rows in data.pieces)))
    file = f"{stage}-{size}-{mine.start}-{mine.stop}"
    done, found = kept.read(file)
    for key, value in found.items():
        owner, _, attribute = key.rpartition(".")
        setattr(every[owner], attribute, value)
    edges, time_bin = time_bin_edges(data.times, bins), torch.zeros(0, dtype=torch.int64)

    def see(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        x, segments = input_of(args, kwargs), inputs[name]
        bin_of: int | Tensor = 0
        if name in timed:
            x, rows = token_rows(time_bin, x)
            # Rows of a layer's input may repeat a sample (frames, heads).
            bin_of = rows.repeat_interleave(max(1, x.shape[0] // len(rows)))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        for index, part in enumerate(x.split(segments, axis) if segments else (x,)):
            try:
                for sink in (some[name] for some in sinks if name in some):
                    sink.update(part, bin_of, index)
            except QuantempoError as error:
                raise QuantempoError(f"layer '{name}': {error}") from error

    with hooked({name: denoiser.get_submodule(name) for name in inputs}, see, before=True):
        batches = islice(data.batches(size), mine.start + (done or 0), mine.stop)
        bar = Progress(batches, desc=stage, total=len(mine), initial=done or 0)
        for number, batch in enumerate(bar, 1 + (done or 0)):
            place = data.times.place(batch.t).clamp(0, float(edges[-1]) - 1e-6)
            # An edge belongs to the bin above it.
            time_bin = torch.bucketize(place, edges[1:-1].double(), right=True)
            data.replay(denoiser, batch)
            kept.write(file, number, state(), last=number == len(mine))
    parts = ranks.everyone(state())
    for key in parts[0]:
        owner, _, attribute = key.rpartition(".")
        setattr(every[owner], attribute, _JOIN[attribute]([some[key] for some in parts]))


def _widest(ranges: list[Tensor]) -> Tensor:
    lows, highs = torch.stack(ranges).unbind(-1)
    return torch.stack([lows.amin(0), highs.amax(0)], -1)


# What several ranks saw, as one of them would have.
_JOIN: dict[str, Any] = {"range": _widest, "edges": itemgetter(0), "counts": sum, "seen": torch.cat}


@torch.no_grad()
def _timed(
    denoiser: nn.Module, inputs: Mapping[str, tuple[int, ...]], data: CalibrationData
) -> Collection[str]:
    """Return the layers whose input has a sample's rows side by side; others are of no time."""
    if not inputs:
        return ()
    index = data.spread(_ROWS)

    def norms(index: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def see(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
            rows = torch.atleast_2d(input_of(args, kwargs)).flatten(1)
            seen.setdefault(name, torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))

        with hooked({name: denoiser.get_submodule(name) for name in inputs}, see, before=True):
            data.replay(denoiser, data.rows(index))
        return seen

    few, many, found = norms(index), norms(torch.cat([index, index[:1]])), set()
    for name, rows in few.items():
        with suppress(QuantempoError):
            place = measure(rows, many[name], torch.arange(len(index)), len(index) + 1)[""]
            found |= {name} if place is not None and not place.tiled else set()
    return found


@torch.no_grad()
def measure_roles(denoiser: nn.Module, data: CalibrationData) -> dict[str, str]:
    """Return "input", "output", "time" or "" for each layer that runs, in order of execution.

        A   as recorded
        B   another x_t, all else equal
        C   another x_t and other sequences (tensors of more than a vector a row), t equal

        input    the first layer whose input differs between A and B, and all that read the same
        output   the last layer that runs and, changed alone, changes the network's output
        time     its input is equal in A and B, and either equal in C too or no more than two
                 vectors a row: it acts on t, the class, pooled text, sizes

    Tokens of a text are equal in A and B as well, but differ in C, and there are more than two.
    """
    if not len(data):
        return {}
    batch = data.rows(data.spread(_ROWS))
    rows, chance = len(batch.t), Generator().manual_seed(0)

    def other(value: Any) -> Any:
        noise = torch.randn(value.shape, generator=chance).to(value)
        return value + noise if value.is_floating_point() else value

    def other_sequence(_: str, value: Any) -> Any:
        least = 3 if isinstance(value, Tensor) and value.shape[:1] == (rows,) else 2
        return pytree.tree_map_only(Tensor, lambda v: other(v) if v.ndim >= least else v, value)

    def equal(batch: TraceBatch) -> set[str]:
        seen = _inputs(denoiser, data, batch)[0]
        return {name for name in base if name in seen and base[name].marks == seen[name].marks}

    moved = batch._replace(x_t=pytree.tree_map_only(Tensor, other, batch.x_t))
    sequences = mapped(data.law, other_sequence, "[2]", batch.cond)
    base, output = _inputs(denoiser, data, batch)
    still, calm = equal(moved), equal(moved._replace(cond=sequences))
    roles = {
        name: "time" if name in still and (name in calm or seen.few) and seen.alive else ""
        for name, seen in base.items()
    }
    moving = [name for name in base if name not in still]
    for name in moving:
        if base[name].marks[0] == base[moving[0]].marks[0]:
            roles[name] = "input"
    for name in sorted(moving[1:], key=lambda name: base[name].last, reverse=True):
        layer = denoiser.get_submodule(name)
        with layer.register_forward_hook(lambda *seen: 2 * seen[2] + 1):
            if not torch.equal(data.replay(denoiser, batch), output):
                return roles | {name: "output"}
    return roles


class _Seen:
    """What a layer was called with: a mark of each input; all few vectors, any not 0, last call."""

    def __init__(self) -> None:
        self.marks: list[tuple[Any, ...]] = []
        self.few, self.alive, self.last = True, False, 0

    def add(self, layer: nn.Module, x: Tensor, rows: int, number: int) -> None:
        numbers = x.sum(dtype=torch.float64), torch.linalg.vector_norm(x, dtype=torch.float64)
        self.last = number
        self.alive |= bool(numbers[1] > 0)
        self.marks.append((x.shape, *(float(n) for n in numbers)))
        channels = x.shape[-1 if isinstance(layer, nn.Linear) else 1]
        self.few &= x.numel() <= _FEW * rows * channels


def _inputs(
    denoiser: nn.Module, data: CalibrationData, batch: TraceBatch
) -> tuple[dict[str, _Seen], Tensor]:
    """Return what each layer that runs was called with, in order of execution, and the output."""
    seen: dict[str, _Seen] = {}
    number = count()

    def see(name: str, layer: nn.Module, args: tuple[Tensor, ...], kwargs: Any) -> None:
        x = input_of(args, kwargs)
        if x.numel():
            seen.setdefault(name, _Seen()).add(layer, x, len(batch.t), next(number))

    layers = {name: m for name, m in denoiser.named_modules() if isinstance(m, LAYERS)}
    with hooked(layers, see, before=True):
        return seen, data.replay(denoiser, batch)
