"""Integer matrix product: signature, checks, exact definition."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from quantempo.kernels.layout import unpack
from quantempo.kernels.ops import checks
from quantempo.kernels.ops.epilogue import ACTIVATIONS, GATED, Epilogue, Terms
from quantempo.kernels.ops.operator import operator

__all__ = ["Product", "qgemm"]


class Product(NamedTuple):
    """One call of `qgemm`."""

    codes: Tensor
    weight: Tensor
    side_codes: Sequence[Tensor]
    side_weights: Sequence[Tensor]
    epilogue: Epilogue

    @property
    def shape(self) -> tuple[int, int]:
        """(M, O), or (M, O / 2) of a gated activation."""
        features = self.weight.shape[0]
        return self.codes.shape[0], features // 2 if self.epilogue.gated else features

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        codes, weight, epilogue = self.codes, self.weight, self.epilogue
        checks.expect(codes.ndim == 2, "codes", codes.shape, "(M, K)")
        checks.member("codes", codes.dtype, checks.INT8)
        checks.member("activation", epilogue.activation, (*ACTIVATIONS, *GATED))
        width, features = codes.shape[1], weight.shape[0]
        checks.sixteen(width, features)
        checks.weighted("weight", weight, (features, width))
        if epilogue.gated:
            terms, name = epilogue.terms, epilogue.activation
            fits, dtype = features % 32 == 0, epilogue.out_dtype
            checks.expect(fits, "weight", weight.shape, f"a multiple of 32 rows for {name}")
            for term in ("residual", "gate", "side_scales"):
                alone = getattr(terms, term) is None
                checks.expect(alone, term, "one", f"none with {name}")
            checks.expect(dtype != torch.int32, "out_dtype", dtype, f"a float type with {name}")
        epilogue.check(self.shape, (features,), codes.device, strides)
        sides, sums = (self.side_codes, self.side_weights), (codes.shape[0], features)
        epilogue.check_sides(*sides, sums, codes.device, strides)
        if strides:
            checks.dense(codes.device, codes=codes)
            checks.apart(codes.device, "weight", weight)

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.codes.new_empty(self.shape, dtype=self.epilogue.dtype)

    def exact(self) -> Tensor:
        """Return the result by the formula of `qgemm`."""
        parts = zip((self.codes, *self.side_codes), (self.weight, *self.side_weights), strict=True)
        sums, *sides = [x.double() @ unpack(w, 1, x.shape[1])[:, 0].double().T for x, w in parts]
        return self.epilogue.exact(sums - self.epilogue.terms.table.double(), sides)


@operator(Tensor, "contraction.launch")
def qgemm(
    codes: Tensor, weight: Tensor, act_scale: Tensor, weight_scale: Tensor, table: Tensor, *,
    bucket: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    gate: Tensor | None = None, side_codes: Sequence[Tensor] = (),
    side_weights: Sequence[Tensor] = (), side_scales: Tensor | None = None,
    side_weight_scale: Tensor | None = None, side_table: Tensor | None = None, rows: bool = False,
    activation: str = "none", out_dtype: torch.dtype = torch.bfloat16,
    out_scale: Tensor | None = None, out_zero: int = 0, out_qmax: int = 255,
) -> Product:  # fmt: skip
    """Multiply rows of codes by an integer weight and rescale.

    y = act(s_a s_w[o] (sum_k q' w - table[o]) + sum_i s_i s_side[o] (sum q'_i w_i - t_i[o])
        + bias[o]) gate[n, o] + residual

    A weight may be those of several layers that read the same rows, one below the other, and y then
    has their results as slices of its columns.

    Args: what `Terms` names has the shapes given there, and
        codes: (M, K) int8, contiguous; K and O are multiples of 16.
        weight: (O, K) int8, whose rows may lie apart, as in `side_weights`: parts of one matrix; or
            uint8 of `layout.pack`, contiguous, as may be `side_weights`.
        table: `layout.row_table`; gate: rows may lie apart; row m is one of image m // (M / N).
        side_codes: up to two (M, K_i) that pass through `side_weights` (O, K_i): segments of one
            sum, each with its own scale. The last may be float16, as its weight is then: without
            scale or table, but with any activation.
        rows: act_scale and side_scales have an entry for each row, as `norm_modulate_quant` writes
            them; out_scale is by bucket as ever.
        activation: "none", "gelu" (by erf), "gelu_tanh", "silu", or "geglu" and "swiglu": columns j
            of the first half times gelu or silu of columns O / 2 + j, no residual, gate or sides, O
            a multiple of 32.
        out_dtype, out_scale, out_zero, out_qmax: as in `qconv2d`.
    Returns (M, O), (M, O / 2) of "geglu" and "swiglu". Error: as `qconv2d`.
    """
    terms = Terms(
        act_scale, weight_scale, table, bucket, bias, None, residual, side_scales,
        side_weight_scale, side_table, out_scale, gate,
    )  # fmt: skip
    epilogue = Epilogue(terms, activation, out_dtype, out_zero, out_qmax, rows)
    return Product(codes, weight, side_codes, side_weights, epilogue)
