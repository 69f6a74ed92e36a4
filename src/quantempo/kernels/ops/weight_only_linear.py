"""Linear layer of a few float rows, whose weight is int8 codes with a scale a channel."""

from typing import NamedTuple

import torch
from torch import Tensor

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.operator import operator

__all__ = ["FloatRows", "weight_only_linear"]


class FloatRows(NamedTuple):
    """Return weight_scale[o] sum_k x[m, k] weight[o, k] + bias[o], (M, O) of the type of x.

    For rows so few that the codes are most of what is read.

    x: (M, K) float16, bfloat16 or float32; weight: int8 (O, K), read 16 bytes at a time where K is
    a multiple of 16; weight_scale, bias: float32 (O,); bias may be None.

    Error: a GPU adds up in float32; of several rows each x is 22 bits, within 2^-21 |x|.
    """

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        x, weight = self.x, self.weight
        checks.expect(x.ndim == 2, "x", x.shape, "(M, K)")
        checks.member("x", x.dtype, checks.FLOATS)
        checks.expect(weight.ndim == 2, "weight", weight.shape, f"(O, K), K = {x.shape[1]}")
        checks.shaped("weight", weight, (len(weight), x.shape[1]), checks.INT8)
        for name in ("weight_scale", "bias"):
            checks.shaped(name, getattr(self, name), (len(weight),), (torch.float32,))
        if strides:
            checks.dense(x.device, **self._asdict())

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.x.new_empty(len(self.x), len(self.weight))

    def exact(self) -> Tensor:
        """Return the result by the formula of `weight_only_linear`."""
        y = (self.x.double() @ self.weight.double().t()) * self.weight_scale.double()
        return (y if self.bias is None else y + self.bias.double()).to(self.x.dtype)


weight_only_linear = operator(Tensor, "weight_only_linear")(FloatRows)
