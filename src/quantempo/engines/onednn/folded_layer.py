"""Int8 layers on codes whose zero points are folded into the bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantempo.engines.base import ActivationGrids
from quantempo.kernels.cpu import onednn
from quantempo.quantized import QConv2d, QLayer

__all__ = ["FoldedLayer"]


class FoldedLayer:
    """An int8 layer on codes, its zero points folded into the bias of each time bucket.

        y = s s_w[o] sum_k q_a q_w + (bias[o] - s s_w[o] z sum_k q_w)

    oneDNN's own zero points are worked out again at every call, up to half of the time of a small
    convolution. It then pads zeros instead of zero points: `edge` is what that leaves out.

    Args:
        factor: multiplies the result.
        widths: input channels of each operand; the layer's segments if None.
        bordered: the codes bring their border of zero points with them, nothing is padded.
    """

    def __init__(
        self,
        layer: QLayer,
        factor: float = 1.0,
        widths: tuple[int, ...] | None = None,
        bordered: bool = False,
    ) -> None:
        self.layer, self.factor = layer, factor
        self.widths, self.bordered = widths or layer.segments, bordered
        self.grids = ActivationGrids(layer)
        self._parts: list[Any] = []
        self._biases: dict[int, list[Tensor]] = {}
        self._edges: dict[int, Tensor] = {}

    def grid(self, bucket: int, part: int = 0) -> tuple[float, int, int]:
        """Return (scale, zero_point, qmax) of an operand."""
        return self.grids.of(bucket, part if len(self.grids.segments) > 1 else 0)

    def __call__(self, codes: Tensor, bucket: int, dtype: torch.dtype, **kwargs: Any) -> Tensor:
        """Return the layer's output for one operand; see Int8Conv2d and Int8Linear."""
        return self.part(0, codes, bucket, dtype, **kwargs)

    def part(
        self, part: int, codes: Tensor, bucket: int, dtype: torch.dtype, **kwargs: Any
    ) -> Tensor:
        """Return what operand `part` adds to the output; the bias goes with the first."""
        if not self._parts:
            self._parts = [self._pack(weight) for weight in self._split()]
        column = self.grids.column(bucket)
        if column not in self._biases:
            self._biases[column] = self._fold(bucket)
        scale, *_ = self.grid(bucket, part)
        bias = self._biases[column][part]
        return self._parts[part](codes, scale, 0, bias, dtype, **kwargs)

    def edge(self, bucket: int) -> Tensor:
        """Return s s_w[o] z sum_k q_w over the taps outside the image, (16, O) as `Library.add`.

        Of a 3x3 convolution with stride 1 and padding 1.
        """
        column = self.grids.column(bucket)
        if column not in self._edges:
            scale, zero, _ = self.grid(bucket)
            # (O, 3, 3), then (16, O)
            taps = self.layer.weight_codes.sum(1, dtype=torch.float64)
            outside = torch.zeros((16, 3, 3), dtype=torch.bool)
            for mask in range(16):
                outside[mask, 0] |= bool(mask & 1)
                outside[mask, 2] |= bool(mask & 2)
                outside[mask, :, 0] |= bool(mask & 4)
                outside[mask, :, 2] |= bool(mask & 8)
            sums = torch.einsum("mij,oij->mo", outside.double(), taps)
            self._edges[column] = (sums * self.layer.weight_scale * scale * zero).float()
        return self._edges[column]

    def _split(self) -> list[Tensor]:
        weight = self.layer.weight_codes
        if len(self.widths) == 1:
            return [weight]
        return [part.contiguous() for part in weight.split(self.widths, 1)]

    def _pack(self, weight: Tensor) -> onednn.Int8Conv2d | onednn.Int8Linear:
        layer, weight_scale = self.layer, self.layer.weight_scale * self.factor
        if isinstance(layer, QConv2d) and layer.kernel_size != (1, 1):
            padding = (0, 0) if self.bordered else layer.padding
            return onednn.Int8Conv2d(weight, weight_scale, layer.stride, padding)
        return onednn.Int8Linear(weight.flatten(1), weight_scale)

    def _fold(self, bucket: int) -> list[Tensor]:
        layer, biases = self.layer, []
        for i, weight in enumerate(self._split()):
            scale, zero, _ = self.grid(bucket, i)
            bias = weight.flatten(1).sum(1, dtype=torch.float64) * -scale * zero
            bias *= layer.weight_scale
            if i == 0 and layer.bias is not None:
                bias += layer.bias
            biases.append((bias * self.factor).float())
        return biases
