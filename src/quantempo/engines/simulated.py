"""The integers of a layer in float arithmetic, with exact sums, on any device."""

import copy
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.core import ACTIVATION
from quantempo.engines.base import BACKENDS, Backend, Kernel, channel_dim
from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.select import ENGINES
from quantempo.quantized import CLOCK_NAME, QConv2d, QLayer, quantized_layers

__all__ = ["exact_parts", "float32_copy", "once", "reference", "sum_bound", "too_far"]

# An engine may move codes: at most that draws the error of rounding anew, which doubles its square.
# Engines that are right have 0.7 to 1.1 times that error, and in half precision no less than
# AGREE_DB or what that costs by itself; a block alone, whose inputs are equal, PART_DB.
MOVED, AGREE_DB, PART_DB = 2.5, 40.0, 16.0
# Integers up to here, and sums of them, are exact in float32.
EXACT = 2**24


def sum_bound(weight_int: Tensor) -> int:
    """Return max_o sum_k |q_w| * 255, which no partial sum of (q_a - z) q_w exceeds."""
    return int(weight_int.flatten(1).long().abs().sum(1).max()) * ACTIVATION.qmax


def exact_parts(weight_int: Tensor, groups: int = 1) -> Iterator[tuple[slice, torch.dtype]]:
    """Yield runs of input channels of (O, C / groups, ...) with the float type of exact sums.

    Float32 where `sum_bound` is below 2^24, by halving; float64 where a run cannot be halved.
    """

    def cut(first: int, last: int) -> Iterator[tuple[slice, torch.dtype]]:
        if sum_bound(weight_int[:, first:last]) < EXACT:
            yield slice(first, last), torch.float32
        elif last - first == 1 or groups > 1:
            yield slice(first, last), torch.float64
        else:
            middle = (first + last) // 2
            yield from cut(first, middle)
            yield from cut(middle, last)

    yield from cut(0, weight_int.shape[1])


class _Kernel(Kernel):
    """Float convolutions or matmuls of integers, whose sums are exact."""

    backend, traceable = "simulated", True

    def __init__(self, layer: QLayer, rounded: bool = True) -> None:
        super().__init__(layer)
        self.rounded = rounded
        # (segment, channels of it, weight) of each part.
        self.parts: list[tuple[int, slice, Tensor]] = []
        self.qmax = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        layer, axis = self.layer, channel_dim(self.layer)
        self.here(x.device)
        rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
        y: Tensor | None = None
        for i, segment in enumerate(x.float().split(layer.segments, axis)):
            scale = layer.scale_now(i, segment)
            codes = segment / scale
            if self.rounded:
                zero = layer.act_zero_point[i]
                codes = (torch.round(codes) + zero).clamp_min(0).minimum(self.qmax) - zero
            term = self.sums(i, codes) * (scale * layer.weight_scale.reshape(rows))
            y = term if y is None else y + term
        assert y is not None
        if layer.bias is not None:
            y = y + layer.bias.reshape(rows)
        return y.to(x.dtype)

    def _prepare(self, device: torch.device) -> None:
        layer = self.layer
        # Cuts that still hold are kept: a compiled network is compiled for its parts.
        # A tensor: layers that differ in bits alone are one compiled network.
        self.qmax = torch.tensor(float(layer.act_qmax), device=device)
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_shape[1],)
        groups = layer.groups if isinstance(layer, QConv2d) else 1
        parts = []
        for i, segment in enumerate(layer.weight_codes.split(width, 1)):
            cuts = [(cut, part.dtype) for j, cut, part in self.parts if i == j]
            if not cuts or not all(
                dtype == torch.float64 or sum_bound(segment[:, cut]) < EXACT for cut, dtype in cuts
            ):
                cuts = list(exact_parts(segment, groups))
            for channels, dtype in cuts:
                weight = segment[:, channels].to(device, dtype)
                if weight.ndim == 4 and device.type == "cuda":
                    weight = weight.contiguous(memory_format=torch.channels_last)
                parts.append((i, channels, weight))
        self.parts = parts

    def sums(self, segment: int, codes: Tensor) -> Tensor:
        """Return sum_k q q_w rounded once to float32; codes: float32 q = q_a - z of a segment."""
        layer = self.layer
        sums: list[Tensor] = []
        mine = [(channels, weight) for i, channels, weight in self.parts if i == segment]
        for channels, weight in mine:
            part = codes if len(mine) == 1 else codes.narrow(
                channel_dim(layer), channels.start, channels.stop - channels.start
            )  # fmt: skip
            part = part.to(weight.dtype)
            if isinstance(layer, QConv2d):
                how = (layer.stride, layer.padding, layer.dilation)
                sums.append(exact_conv2d(part, weight, *map(list, how), layer.groups))
            else:
                sums.append(F.linear(part, weight))
        return sums[0].float() if len(sums) == 1 else sum(s.double() for s in sums).float()


def float32_copy(denoiser: nn.Module, dtype: torch.dtype | None = torch.float32) -> Any:
    """Return a copy in float32 (None: as it is) without engines, sharing tensors that fit."""

    def plain(t: Tensor) -> Tensor:
        return t.detach().to(dtype or t.dtype) if t.is_floating_point() else t.detach()

    known: dict[int, Any] = {id(t): plain(t) for t in denoiser.buffers()}
    known |= {id(t): nn.Parameter(plain(t), False) for t in denoiser.parameters()}
    return copy.deepcopy(denoiser, known)


def reference(
    denoiser: nn.Module, bucket: Tensor, arguments: dict[str, Any], rounded: bool = True
) -> tuple[Any, list[Tensor]]:
    """Return the output of a denoiser in float32, and those of its integer layers, in their order.

    One layer at a time has float weights; `rounded` false: inputs of layers stay as they are.
    """
    exact, seen = float32_copy(denoiser), list[Tensor]()

    def run(layer: QLayer, x: Tensor) -> Tensor:
        seen.append(once(layer, rounded, x))
        return seen[-1]

    exact.get_submodule(CLOCK_NAME).call.bucket = bucket.squeeze()
    for _, layer in quantized_layers(exact):
        layer.kernel = functools.partial(run, layer)
    with torch.no_grad(), torch.autocast(bucket.device.type, enabled=False):
        return type(exact).forward(exact, **arguments), seen


def once(layer: QLayer, rounded: bool, x: Tensor) -> Tensor:
    """Return the output of a layer, its float weights made for this call only."""
    return _Kernel(layer, rounded)(x)


def too_far(found: list[Tensor], expected: list[Tensor], free: list[Tensor] | None = None) -> bool:
    """Return whether outputs are further from the expected ones than moved codes make them.

    free: those without rounding of activations, maybe in half precision; None: of one block.
    """
    signal = noise = rounding = 0.0
    for a, b, c in zip(found, expected, free or expected, strict=True):
        # Inputs that hold NaN say nothing.
        known = b.isfinite()
        exact = b[known].double()
        signal += float(exact.square().sum())
        noise += float((a[known] - exact).square().sum())
        rounding += float((c[known] - exact).square().sum())
    least = signal / 10 ** ((PART_DB if free is None else AGREE_DB) / 10)
    return not noise <= max(MOVED * rounding, least)


@torch.library.custom_op("quantempo::exact_conv2d", mutates_args=())
def exact_conv2d(
    codes: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """Convolve integers held in floats, with sums exact below 2^24 (float32) on any device."""
    # An operator of its own, so that a compiled network keeps the choice of algorithm made here.
    with _plain_sums(codes):
        return F.conv2d(codes, weight, None, stride, padding, dilation, groups)


# What a compiler is told of the result: that of a plain convolution.
exact_conv2d.register_fake(lambda codes, weight, *how: F.conv2d(codes, weight, None, *how))


def _plain_sums(codes: Tensor) -> AbstractContextManager[None]:
    """Keep cuDNN from Winograd and FFT, which do not add integers exactly."""
    # Tensor cores do: |q| <= 255 is exact in TF32, sums are float32. Without TF32 it is turned off.
    if codes.device.type != "cuda":
        return nullcontext()
    tensor_cores = torch.cuda.get_device_capability(codes.device) >= (8, 0)
    usable = tensor_cores and codes.dtype == torch.float32
    return torch.backends.cudnn.flags(enabled=usable, deterministic=True, allow_tf32=usable)


_SLOW = "it computes the integers in float arithmetic"
BACKENDS.register("simulated")(Backend("simulated", _Kernel))
ENGINES.register("simulated")(
    LayerwiseEngine("simulated", ("any",), slow=_SLOW, holds=lambda layer: "as floats", copies=0)
)
