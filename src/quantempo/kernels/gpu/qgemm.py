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


def launch(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, table: Tensor,
    bucket: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str,
    out_dtype: torch.dtype, out_scale: Tensor | None, out_zero: int, out_qmax: int,
) -> Tensor:  # fmt: skip
    """Return y (M, O); arguments and formula as `kernels.ops.qgemm`."""
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
