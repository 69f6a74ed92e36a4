"""Linear layer of a few float rows, whose weight is int8 or packed codes with a scale a channel."""

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
    a multiple of 16, or with groups q, uint8 (O, 1, ceil(K / 2)), two a byte, the even one low, of
    codes (q - z) s; groups: (s - 1) << 4 | z, uint8 (O, 1, ceil(K / G)), G = 16, 32 or 64;
    weight_scale, bias: float32 (O,); bias and groups may be None.
    Error: a GPU adds up in float32; of several rows each x is 22 bits, within 2^-21 |x|.
    """

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    groups: Tensor | None = None

    @property
    def group(self) -> int:
        """Inputs that share s and z, 0 without groups."""
        count = 0 if self.groups is None else self.groups.shape[-1]
        return next((g for g in (16, 32, 64) if -(-self.x.shape[1] // g) == count), 0)

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        x, weight, groups = self.x, self.weight, self.groups
        checks.expect(x.ndim == 2, "x", x.shape, "(M, K)")
        checks.member("x", x.dtype, checks.FLOATS)
        outs, width = len(weight), x.shape[1]
        if groups is None:
            checks.expect(weight.ndim == 2, "weight", weight.shape, f"(O, K), K = {width}")
            checks.shaped("weight", weight, (outs, width), checks.INT8)
        else:
            checks.shaped("weight", weight, (outs, 1, (width + 1) // 2), (torch.uint8,))
            checks.expect(self.group > 0, "groups", groups.shape, f"(O, 1, ceil({width} / G))")
            checks.shaped("groups", groups, (outs, 1, groups.shape[-1]), (torch.uint8,))
        for name in ("weight_scale", "bias"):
            checks.shaped(name, getattr(self, name), (outs,), (torch.float32,))
        if strides:
            checks.dense(x.device, **self._asdict())

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.x.new_empty(len(self.x), len(self.weight))

    def exact(self) -> Tensor:
        """Return the result by the formula of `weight_only_linear`."""
        codes = self.weight
        if self.groups is not None:
            q = torch.stack((codes & 15, codes >> 4), -1).flatten(1)[:, : self.x.shape[1]]
            each = self.groups[:, 0].repeat_interleave(self.group, 1)[:, : q.shape[1]]
            codes = (q.to(torch.int16) - (each & 15)) * ((each >> 4) + 1)
        y = (self.x.double() @ codes.double().t()) * self.weight_scale.double()
        return (y if self.bias is None else y + self.bias.double()).to(self.x.dtype)


weight_only_linear = operator(Tensor, "weight_only_linear")(FloatRows)
