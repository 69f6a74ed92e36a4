"""Integer matrix product with its whole epilogue, on a GPU; see `kernels.ops.qgemm`.

Rows are the pixels of one image of one row: the kernel is that of the convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.kernels.gpu.contraction.launch import run

__all__ = ["launch"]


def _line(rows: Tensor) -> Tensor:
    """(M, C) contiguous seen as (1, C, 1, M), channels_last."""
    return rows.as_strided(
        (1, rows.shape[1], 1, rows.shape[0]), (rows.numel(), 1, rows.numel(), rows.shape[1])
    )


def _is_plain_float8(
    codes: Tensor, bucket: Tensor, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype, out_scale: Tensor | None,
) -> bool:  # fmt: skip
    """Return whether torch's own float8 product computes this; it is the faster one there."""
    plain = residual is None and out_scale is None and activation == "none"
    here = codes.is_cuda and torch.cuda.get_device_capability(codes.device) >= (8, 9)
    float8 = codes.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16
    return plain and here and float8 and bucket.numel() == 1 and codes.numel() > 0


def _scaled(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, bucket: Tensor,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the product by `torch._scaled_mm`; it takes the bias in bfloat16."""
    scale = act_scale if act_scale.numel() == 1 else act_scale.index_select(0, bucket.reshape(1))
    return torch._scaled_mm(
        codes, weight.t(), scale_a=scale.expand(codes.shape[0], 1).contiguous(),
        scale_b=weight_scale.reshape(1, -1), out_dtype=torch.bfloat16,
        bias=None if bias is None else bias.to(torch.bfloat16),
    )  # fmt: skip


def launch(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, table: Tensor,
    bucket: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype, out_scale: Tensor | None, out_zero: int, out_qmax: int,
) -> Tensor:  # fmt: skip
    """Return y (M, O); arguments and formula as `kernels.ops.qgemm`."""
    if _is_plain_float8(codes, bucket, residual, activation, out_dtype, out_scale):
        return _scaled(codes, weight, act_scale, weight_scale, bucket, bias)
    dtype = out_dtype if out_scale is None else codes.dtype
    width = weight.shape[0] // 2 if activation == "geglu" else weight.shape[0]
    y = torch.empty((codes.shape[0], width), dtype=dtype, device=codes.device)
    run(
        _line(codes), weight, _line(y), act_scale=act_scale, weight_scale=weight_scale,
        table=table, bucket=bucket, bias=bias,
        residual=None if residual is None else _line(residual), activation=activation,
        out_scale=out_scale, out_zero=out_zero, out_qmax=out_qmax,
    )  # fmt: skip
    return y
