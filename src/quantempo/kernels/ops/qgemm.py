"""Integer matrix product: signature, checks, exact definition."""

from typing import NamedTuple

import torch
from torch import Tensor

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.epilogue import Epilogue, Terms
from quantempo.kernels.ops.operator import operator

__all__ = ["Product", "qgemm"]

_ACTIVATIONS = ("none", "gelu", "silu", "geglu")


class Product(NamedTuple):
    """One call of `qgemm`."""

    codes: Tensor
    weight: Tensor
    epilogue: Epilogue

    @property
    def shape(self) -> tuple[int, int]:
        """(M, O), or (M, O / 2) of "geglu"."""
        features = self.weight.shape[0]
        gated = self.epilogue.activation == "geglu"
        return self.codes.shape[0], features // 2 if gated else features

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        codes, weight, epilogue = self.codes, self.weight, self.epilogue
        checks.expect(codes.ndim == 2, "codes", codes.shape, "(M, K)")
        checks.member("codes", codes.dtype, checks.INT8)
        checks.member("activation", epilogue.activation, _ACTIVATIONS)
        width, features = codes.shape[1], weight.shape[0]
        checks.sixteen(width, features)
        checks.shaped("weight", weight, (features, width), checks.INT8)
        if epilogue.activation == "geglu":
            fits, dtype = features % 32 == 0, epilogue.out_dtype
            checks.expect(fits, "weight", weight.shape, "a multiple of 32 rows for geglu")
            alone = epilogue.terms.residual is None
            checks.expect(alone, "residual", "one", "none with geglu")
            checks.expect(dtype != torch.int32, "out_dtype", dtype, "a float type with geglu")
        epilogue.check(self.shape, (features,), codes.device, strides)
        if strides:
            checks.dense(codes.device, codes=codes, weight=weight)

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.codes.new_empty(self.shape, dtype=self.epilogue.dtype)

    def exact(self) -> Tensor:
        """Return the result by the formula of `qgemm`."""
        sums = self.codes.double() @ self.weight.double().T
        return self.epilogue.exact(sums - self.epilogue.terms.table.double())


@operator(Tensor, "contraction.launch")
def qgemm(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    *,
    bucket: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    out_scale: Tensor | None = None,
    out_zero: int = 0,
    out_qmax: int = 255,
) -> Product:
    """Multiply rows of codes by an integer weight and rescale.

    y = act(s_a s_w[o] (sum_k q' w - table[o]) + bias[o]) + residual

    Args:
        codes: (M, K) int8, contiguous; K and O are multiples of 16.
        weight: (O, K) int8, contiguous.
        act_scale, weight_scale: (G,) and (O,) float32.
        table: int32 (O,): `layout.row_table`.
        bucket: see `kernels.ops`; row m uses entry m // (M / B).
        bias: (O,) float32; `residual`: (M, O) any float, contiguous.
        activation: "none", "gelu" (by erf), "silu", or "geglu": columns j of the first half times
            gelu of columns O / 2 + j, no residual, O a multiple of 32.
        out_dtype, out_scale, out_zero, out_qmax: as in `qconv2d`.

    Returns:
        (M, O), (M, O / 2) of "geglu".

    Raises:
        ValueError: on shapes, types or strides other than these.

    Error: as `qconv2d`.
    """
    terms = Terms(act_scale, weight_scale, table, bucket, bias, None, residual, out_scale=out_scale)
    return Product(codes, weight, Epilogue(terms, activation, out_dtype, out_zero, out_qmax))
