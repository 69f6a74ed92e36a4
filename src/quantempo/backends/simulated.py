"""The integers of a layer in float arithmetic, with exact sums, on any device (layer L3)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.backends.base import BACKENDS, Kernel, channel_dim, too_many_terms
from quantempo.errors import QuantempoError
from quantempo.quantizers import QConv2d, QLayer

__all__ = ["SimulatedBackend", "sum_bound"]


def sum_bound(weight_int: Tensor, zero_point: int) -> int:
    """Return max_o sum_k |q_w| * max(z, 255 - z), which no partial sum exceeds."""
    return int(weight_int.flatten(1).long().abs().sum(1).max()) * max(zero_point, 255 - zero_point)


class SimulatedBackend:
    """Run each layer as a float convolution or matmul of integers.

    The sums are exact: in float32 while no partial sum can pass 2^24, else in float64.
    """

    name = "simulated"

    def missing(self) -> str | None:
        """Return None: it runs wherever torch does."""
        return None

    def unsupported(self, layer: QLayer) -> str | None:
        """Return why it cannot take this layer, or None."""
        return too_many_terms(layer)

    def lower(self, layer: QLayer) -> Kernel:
        """Return the layer's kernel; see `Backend`."""
        reason = self.unsupported(layer)
        if reason is not None:
            raise QuantempoError(f"backend 'simulated' cannot take this layer: {reason}")
        return _SimulatedKernel(layer)


class _SimulatedKernel:
    backend = "simulated"

    def __init__(self, layer: QLayer) -> None:
        self.layer = layer
        self._weights: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        layer, axis = self.layer, channel_dim(self.layer)
        if not self._weights or self._weights[0].device != x.device:
            self._weights = self._exact_weights(x.device)
        # (O,) -> the shape that broadcasts over the output.
        rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
        y: Tensor | None = None
        parts = x.float().split(layer.segments, axis)
        for i, (part, weight) in enumerate(zip(parts, self._weights, strict=True)):
            scale, zero = layer.scale_now(i, x), layer.act_zero_point[i]
            codes = (torch.round(part / scale) + zero).clamp(0, 255) - zero
            acc = self._sum(codes.to(weight.dtype), weight)
            term = acc.float() * (scale * layer.weight_scale.reshape(rows))
            y = term if y is None else y + term
        assert y is not None
        if layer.bias is not None:
            y = y + layer.bias.reshape(rows)
        return y.to(x.dtype)

    def _exact_weights(self, device: torch.device) -> list[Tensor]:
        """Return the integer weight of each segment in the float type that sums it exactly."""
        layer = self.layer
        width = layer.segments if len(layer.segments) > 1 else (layer.weight_int.shape[1],)
        weights = []
        for part, zero in zip(
            layer.weight_int.split(width, 1), layer.act_zero_point.tolist(), strict=True
        ):
            exact = torch.float32 if sum_bound(part, zero) < 2**24 else torch.float64
            weights.append(part.to(device, exact))
        return weights

    def _sum(self, codes: Tensor, weight: Tensor) -> Tensor:
        """Return sum_k (q_a - z) q_w; the padding is 0 = z - z."""
        layer = self.layer
        with _plain_sums(codes.device):
            if not isinstance(layer, QConv2d):
                return F.linear(codes, weight)
            return F.conv2d(
                codes, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
            )


def _plain_sums(device: torch.device) -> AbstractContextManager[None]:
    """Turn off cuDNN where it could choose Winograd or FFT, which do not add integers exactly."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=False)


BACKENDS.register("simulated")(SimulatedBackend())
