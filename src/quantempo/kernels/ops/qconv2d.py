"""Integer convolution: signature, checks, exact definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.layout import unpack
from quantempo.kernels.ops import checks
from quantempo.kernels.ops.epilogue import Epilogue, Terms
from quantempo.kernels.ops.operator import image, operator

__all__ = ["Convolution", "Window", "qconv2d"]


class Window(NamedTuple):
    """Where a kernel goes: its size, stride, padding above and left, and pixels repeated 2x2."""

    KERNEL: int = 1
    STRIDE: int = 1
    TOP: int = 0
    LEFT: int = 0
    UPSAMPLE: bool = False

    @property
    def ONE(self) -> Window:
        """The window of a 1x1 kernel, beside it."""
        return Window()


class Convolution(NamedTuple):
    """One call of `qconv2d`."""

    codes: Tensor
    weight: Tensor
    side_codes: Sequence[Tensor]
    side_weights: Sequence[Tensor]
    kernel: int
    stride: int
    border: Sequence[int]
    upsample: bool
    epilogue: Epilogue

    @property
    def window(self) -> Window:
        """What kernels are compiled for."""
        return Window(self.kernel, self.stride, self.border[0], self.border[2], self.upsample)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, O, H', W') of the result."""
        n, _, height, width = self.codes.shape
        repeat = 2 if self.upsample else 1
        top, bottom, left, right = self.border
        rows = (repeat * height + top + bottom - self.kernel) // self.stride + 1
        columns = (repeat * width + left + right - self.kernel) // self.stride + 1
        return n, self.weight.shape[0], rows, columns

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        codes, kernel, border = self.codes, self.kernel, self.border
        checks.expect(codes.ndim == 4, "codes", codes.shape, "(N, C, H, W)")
        checks.member("codes", codes.dtype, checks.INT8)
        checks.member("kernel", kernel, (1, 3))
        checks.member("stride", self.stride, (1, 2))
        single = self.stride == 1 or not self.upsample
        checks.expect(single, "stride", self.stride, "1 with upsample")
        pads = len(border) == 4 and all(pad in (0, 1) for pad in border)
        checks.expect(pads, "border", border, "(top, bottom, left, right), each 0 or 1")
        checks.expect(kernel == 3 or not any(border), "border", border, "zeros for a 1x1 kernel")
        channels, features = codes.shape[1], self.weight.shape[0]
        checks.sixteen(channels, features)
        checks.weighted("weight", self.weight, (features, kernel * kernel, channels))
        shape = self.shape
        fits = shape[2] >= 0 and shape[3] >= 0
        checks.expect(fits, "codes", codes.shape, "an image no smaller than the kernel")
        self.epilogue.check(shape, (16, features), codes.device, strides)
        self.epilogue.check_sides(self.side_codes, self.side_weights, shape, codes.device, strides)
        if strides:
            checks.last(codes.device, codes=codes)
            checks.dense(codes.device, weight=self.weight)

    def empty(self) -> Tensor:
        """Return room for the result."""
        return image(self.shape, self.epilogue.dtype, self.codes.device)

    def exact(self) -> Tensor:
        """Return the result by the formula of `qconv2d`."""
        parts = zip(self.side_codes, self.side_weights, strict=True)
        sides = [
            torch.einsum("nchw,oc->nohw", x.double(), unpack(w, 1, x.shape[1])[:, 0].double())
            for x, w in parts
        ]
        return self.epilogue.exact(self._sums(), sides)

    def _sums(self) -> Tensor:
        """Return sum q' w less its zero-point part in float64, (N, O, H', W')."""
        x, kernel, stride, shape = self.codes.double(), self.kernel, self.stride, self.shape
        if self.upsample:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if 0 in shape:
            return x.new_empty(shape)
        height, width = x.shape[2:]
        top, bottom, left, right = self.border
        # (O, C, k, k)
        taps = unpack(self.weight, kernel**2, self.codes.shape[1]).double()
        taps = taps.unflatten(1, (kernel, kernel)).permute(0, 3, 1, 2)
        acc = F.conv2d(F.pad(x, (left, right, top, bottom)), taps, stride=stride)
        above_below = _border_class(height, shape[2], kernel, stride, top)
        left_right = _border_class(width, shape[3], kernel, stride, left)
        # (H', W', O); row 0 holds for all windows, the others are what the border takes off it.
        row, table = 4 * above_below[:, None] + left_right, self.epilogue.terms.table.double()
        return acc - (table[0] + table[row] * (row > 0)[..., None]).permute(2, 0, 1)


def _border_class(size: int, outputs: int, kernel: int, stride: int, before: int) -> Tensor:
    """Return (first tap before the image) + 2 (last tap behind it) of each window along an axis."""
    first = torch.arange(outputs) * stride - before
    return (first < 0).long() + 2 * (first + kernel - 1 >= size).long()


@operator(Tensor, "contraction.launch")
def qconv2d(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, table: Tensor, *,
    bucket: Tensor, bias: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, side_codes: Sequence[Tensor] = (),
    side_weights: Sequence[Tensor] = (), side_scales: Tensor | None = None,
    side_weight_scale: Tensor | None = None, side_table: Tensor | None = None, kernel: int = 3,
    stride: int = 1, border: Sequence[int] | None = None, upsample: bool = False,
    out_dtype: torch.dtype = torch.bfloat16, out_scale: Tensor | None = None, out_zero: int = 0,
    out_qmax: int = 255,
) -> Convolution:  # fmt: skip
    """Convolve codes with integer weights, outside the image with the zero point, and rescale.

    y = s_a s_w[o] (sum q' w - t[o]) + sum_i s_i[b] s_side[o] (sum q'_i w_i - t_i[o])
        + bias[o] + shift[n, o] + residual         t[o]: see `layout.border_table`

    Args: what `Terms` names has the shapes given there, and
        codes: (N, C, H, W) int8, channels_last; C and O are multiples of 16.
        weight: (O, kernel^2, C) int8, contiguous: `layout.conv_weight`; or uint8 of `layout.pack`,
            as may be `side_weights`.
        table: `layout.border_table`; side_table: of `layout.row_table`.
        shift: a column slice of a larger matrix or one row expanded to N will do.
        side_codes: up to two (N, C_i, H', W') that pass through 1x1 weights (O, C_i); the last may
            be float16, as in `qgemm`.
        kernel: 1 or 3; stride: 1 or 2; border: padding (top, bottom, left, right), each 0 or 1, and
            0 for a 1x1 kernel; None: 1 for a 3x3 kernel.
        upsample: repeat every pixel 2x2 first; the larger image is never made.
        out_dtype: float16, bfloat16, float32, or int32 for the integer sums alone.
        out_scale: to get codes of y, with `out_zero` and `out_qmax`, instead.
    Returns (N, O, H', W'), channels_last; H' = (H + top + bottom - kernel) // stride + 1, with 2 H
    for H if `upsample`.
    Error: the integer sums are exact; the epilogue is float32 on a GPU and is rounded once to the
    type of the result.
    """
    terms = Terms(
        act_scale, weight_scale, table, bucket, bias, shift, residual, side_scales,
        side_weight_scale, side_table, out_scale,
    )  # fmt: skip
    border = [kernel // 2] * 4 if border is None else border
    epilogue = Epilogue(terms, "none", out_dtype, out_zero, out_qmax)
    return Convolution(
        codes, weight, side_codes, side_weights, kernel, stride, border, upsample, epilogue
    )
