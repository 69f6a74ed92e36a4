"""A differentiable stand-in for the kernel of a quantized layer.

y = conv(x_hat, w_hat) + bias        x_hat: `dequantized_input`
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import Format, Grid
from quantempo.quantized import QConv2d, QLayer
from quantempo.rounding.base import dequantized_input

__all__ = ["SoftKernel"]

# Of the rectified sigmoid: h reaches 0 and 1 at finite v. Louizos et al. 2018.
_STRETCH, _SHIFT = 1.2, -0.1


class SoftKernel:
    """A layer whose codes are floor + h(v), between two neighbours each; v is learned.

    It starts from given codes c: floor is c or c - 1, so that the float weight lies between or, if
    c is further away, c is one of the two; h is the fraction of the float weight, kept on the side
    of c, so that rounding h gives c back. spread: distance of h at the start from c, 1 for the one
    described, towards 0 for a start near c itself.
    """

    def __init__(
        self, layer: QLayer, weight: Tensor, codes: Tensor, spec: Format | Grid, spread: float = 1.0
    ) -> None:
        self.layer, self.grid = layer, Grid.of(spec)
        # Of one step: s scale in groups.
        self.rows = layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1)) * self.grid.step
        ratio, start = weight.detach().float() / self.rows, codes.float() / self.grid.step
        upper = start > ratio
        self.floor = start - upper.float()
        h = (ratio - self.floor).clamp(0, 1)
        h = torch.where(upper, h.clamp_min(0.51), h.clamp_max(0.49))
        h = upper.float() + spread * (h - upper.float())
        # Off the ends, where the gradient of the clamp is zero.
        h = h.clamp(0.01, 0.99)
        self.v = torch.logit((h - _SHIFT) / _STRETCH).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output on fake-quantized input, in float arithmetic."""
        layer, weight, quantized = self.layer, self.weight(), dequantized_input(self.layer, x)
        if isinstance(layer, QConv2d):
            how = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return F.conv2d(quantized, weight, layer.bias, *how).to(x.dtype)
        return F.linear(quantized, weight, layer.bias).to(x.dtype)

    def h(self) -> Tensor:
        """Return the soft part of the codes, clamp(1.2 sigmoid(v) - 0.1, 0, 1)."""
        return (torch.sigmoid(self.v) * _STRETCH + _SHIFT).clamp(0, 1)

    def weight(self) -> Tensor:
        """Return the soft weight, float32."""
        return self.rows * (self.floor + self.h()).clamp(self.grid.low, self.grid.high)  # type: ignore[arg-type]

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes with h rounded, int8."""
        hard = self.floor + (self.h() >= 0.5).float()
        return (hard.clamp(self.grid.low, self.grid.high) * self.grid.step).to(torch.int8)  # type: ignore[arg-type]
