"""Launch `kernels.ops.qconv2d` on a GPU."""

from __future__ import annotations

from torch import Tensor

from quantempo.kernels.gpu.contraction.launch import run
from quantempo.kernels.ops.qconv2d import Convolution

__all__ = ["launch"]


def launch(call: Convolution) -> Tensor:
    """Return y (N, O, H', W')."""
    return run(
        call.codes, call.weight, call.empty(), call.epilogue, call.codes.shape, call.shape,
        call.window, call.side_codes, call.side_weights,
    )  # fmt: skip
