"""Integer convolution with its whole epilogue, on a GPU; see `kernels.ops.qconv2d`."""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.kernels.gpu.contraction.launch import run
from quantempo.kernels.layout import output_size

__all__ = ["launch"]


def launch(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, table: Tensor,
    bucket: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    side_codes: list[Tensor], side_weights: list[Tensor], side_scales: Tensor | None,
    side_weight_scale: Tensor | None, side_table: Tensor | None, kernel: int, stride: int,
    border: list[int], upsample: bool, out_dtype: torch.dtype, out_scale: Tensor | None,
    out_zero: int, out_qmax: int,
) -> Tensor:  # fmt: skip
    """Return y (N, O, H', W'); arguments and formula as `kernels.ops.qconv2d`."""
    images, _, height, width = codes.shape
    shape = (
        images, weight.shape[0],
        *output_size(height, width, kernel, stride, list(border), upsample),
    )  # fmt: skip
    dtype = out_dtype if out_scale is None else codes.dtype
    y = torch.empty(shape, dtype=dtype, device=codes.device, memory_format=torch.channels_last)
    return run(
        codes, weight, y, act_scale=act_scale, weight_scale=weight_scale, table=table,
        bucket=bucket, bias=bias, shift=shift, residual=residual, side_codes=side_codes,
        side_weights=side_weights, side_scales=side_scales, side_weight_scale=side_weight_scale,
        side_table=side_table, kernel=kernel, stride=stride, border=(border[0], border[2]),
        upsample=upsample, out_scale=out_scale, out_zero=out_zero, out_qmax=out_qmax,
    )  # fmt: skip
