"""Backends: lower one quantized layer to a kernel on tensors.

    y = s_a[t] * s_w[o] * (sum_k q_a q_w - z * sum_k q_w) + bias[o]
    q_a = clamp(round(x / s_a) + z, 0, qmax)        qmax = 255, or less below 8 bits

The integer sums of all backends are equal; only the float epilogue has a tolerance.
"""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from quantempo.core import ACTIVATION, WEIGHT
from quantempo.errors import QuantempoError, log
from quantempo.quantized import QConv2d, QLayer, StepClock
from quantempo.registry import Registry

__all__ = [
    "BACKENDS", "TARGET", "ActivationGrids", "Backend", "Kernel", "Prepared", "channel_dim",
    "last", "out_shape", "rows_of", "run_per_bucket", "warn_once",
]  # fmt: skip

# Where constants that are made on a CPU will be used, if not there.
TARGET: ContextVar[torch.device | None] = ContextVar("TARGET", default=None)
# Terms (q_a - z) q_w that an int32 holds whatever they are.
MAX_TERMS = ACTIVATION.exact_terms(WEIGHT)


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning that was not logged before."""
    log.warning(text)


class Prepared:
    """Constants of one device; traceable: whether a compiler may be the first to make them."""

    device: torch.device | None = None
    traceable = False

    def prepare(self, device: torch.device) -> None:
        """Make the constants (again), after those of the parts that are attributes."""
        with torch.inference_mode(False), torch.no_grad():
            for value in vars(self).values():
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, Prepared):
                        part.here(device)
            self._prepare(device)
        self.device = device

    def _prepare(self, device: torch.device) -> None:
        """Make those of this one alone."""

    def here(self, device: torch.device) -> None:
        """Make the constants if they are not on this device."""
        if self.device != device:
            if torch.compiler.is_compiling() and not self.traceable:
                raise QuantempoError("the model was moved; attach the engine, then compile")
            self.prepare(device)


class Kernel(Prepared):
    """One lowered layer; `prepare` it again after changing the layer's integers or scales."""

    backend: str

    def __init__(self, layer: QLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of x."""
        raise NotImplementedError


@dataclass
class Backend:
    """Lower layers to kernels of one class.

    missing: returns why it cannot run here, or None; refuses: why it cannot take a layer.
    """

    name: str
    kernel: Callable[[QLayer], Kernel]
    missing: Callable[[], str | None] = lambda: None
    refuses: Callable[[QLayer], str | None] = lambda layer: None

    def unsupported(self, layer: QLayer) -> str | None:
        """Return why it cannot take this layer (one clause), or None."""
        return self.refuses(layer) or too_many_terms(layer)

    def lower(self, layer: QLayer) -> Kernel:
        """Return the layer's kernel; QuantempoError if `missing` or `unsupported` has a reason."""
        reason = self.missing() or self.unsupported(layer)
        if reason is not None:
            raise QuantempoError(f"backend '{self.name}' cannot take this layer: {reason}")
        return self.kernel(layer)


BACKENDS: Registry[Backend] = Registry("backend")


def too_many_terms(layer: QLayer) -> str | None:
    """Return a reason if the sums of a layer could leave int32: more than 66,311 terms."""
    terms = math.prod(layer.weight_shape[1:])
    if terms > MAX_TERMS:
        return f"{terms} products in a sum may overflow int32; at most {MAX_TERMS} are safe"
    return None


def channel_dim(layer: QLayer) -> int:
    """Return the dimension of a layer's input that holds the channels."""
    return 1 if isinstance(layer, QConv2d) else -1


def out_shape(layer: QLayer, x: Tensor) -> list[int]:
    """Return the shape of a layer's output for an input."""
    out = layer.weight_shape[0]
    if not isinstance(layer, QConv2d):
        return [*map(int, x.shape[:-1]), out]
    sizes = (
        (int(size) + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    return [int(x.shape[0]), out, *sizes]


def last(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """Return (B H W, C) of x (B, C, H, W) channels_last, a view."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class ActivationGrids:
    """The activation grids of a layer as Python numbers, because oneDNN takes them as such."""

    def __init__(self, layer: QLayer) -> None:
        self.segments = layer.segments
        self.scales: list[list[float]] = layer.act_scale.tolist()
        self.zero_points: list[int] = layer.act_zero_point.tolist()
        self.buckets = layer.act_scale.shape[1]
        self.qmax = layer.act_qmax

    def column(self, bucket: int) -> int:
        """Return the column of the scale table for a time bucket."""
        return bucket if self.buckets > 1 else 0

    def of(self, bucket: int, segment: int) -> tuple[float, int, int]:
        """Return (scale, zero_point, qmax) of a segment in a time bucket."""
        return self.scales[segment][self.column(bucket)], self.zero_points[segment], self.qmax


def bucket_rows(clock: StepClock) -> int | dict[int, Tensor]:
    """Return the current time bucket, or bucket -> (n,) rows of it when the batch mixes several."""
    if clock.call.rows is None:
        bucket = clock.bucket.reshape(-1)
        values = sorted(set(bucket.tolist()))
        mixed = {v: (bucket == v).nonzero()[:, 0] for v in values}
        clock.call.rows = values[0] if len(values) == 1 else mixed
    return clock.call.rows  # type: ignore[no-any-return]


def run_per_bucket(clock: StepClock, run: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return run(bucket, *inputs), called once a bucket; rows are a multiple of the clock's."""
    buckets = bucket_rows(clock)
    if isinstance(buckets, int):
        return run(buckets, *inputs)
    first = next(x for x in inputs if x is not None)
    repeat = clock.repeats(len(first))
    output: Tensor | None = None
    for bucket, rows in buckets.items():
        # Row i of the clock stands for rows i * repeat ... of the layer's input.
        index = (rows[:, None] * repeat + torch.arange(repeat)).reshape(-1)
        part = run(bucket, *(None if x is None else _take(x, index) for x in inputs))
        if output is None:
            output = part.new_empty((first.shape[0], *part.shape[1:]))
            if part.ndim == 4:
                output = output.contiguous(memory_format=torch.channels_last)
        output[index] = part
    assert output is not None
    return output


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows] in the layout of x."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)
