"""Launch `kernels.ops.qgemm` on a GPU: rows are the pixels of one image of one row."""

from __future__ import annotations

from torch import Tensor

from quantempo.kernels.gpu.contraction.launch import run
from quantempo.kernels.ops.qgemm import Product

__all__ = ["launch"]


def launch(call: Product) -> Tensor:
    """Return y (M, O)."""
    (count, width), (_, features) = call.codes.shape, call.shape
    return run(
        call.codes, call.weight, call.empty(), call.epilogue, (1, width, 1, count),
        (1, features, 1, count),
    )  # fmt: skip
