"""What follows the integer sums of a contraction: record, checks, exact definition.

    y = act(s_a[b] s_w[o] acc + sum_i s_i[b] s_side[o] acc_i + bias[o] + shift[n, o]) + residual

Kernels get `terms` as one argument and `form` as one constant: a term more is a field of `Terms`,
its lines in `check` and `exact`, and its use in the epilogues of `gpu.contraction`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.exact import channels_last, entries, quantize

__all__ = ["Epilogue", "Form", "Terms"]


class Terms(NamedTuple):
    """The tensors of an epilogue; G buckets, O channels, up to S = 2 sides, N images or rows.

    Attributes:
        act_scale: (G,); side_scales: (S, G); out_scale: (G,), of the codes of y.
        weight_scale, side_weight_scale, bias: float32 (O,).
        table: int32 (16, O) or (O,), zero-point part of the sums; side_table: (S, O).
        bucket: int64 () or (B,).
        shift: (N, O); residual: as y; any float.
    """

    act_scale: Tensor
    weight_scale: Tensor
    table: Tensor
    bucket: Tensor
    bias: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    side_scales: Tensor | None = None
    side_weight_scale: Tensor | None = None
    side_table: Tensor | None = None
    out_scale: Tensor | None = None


class Form(NamedTuple):
    """What kernels are compiled for: which terms there are, and lengths of tables.

    BUCKETS, OUT_BUCKETS: 1, or 2 for any more: there are as many as rows where each has a scale.
    """

    SIDES: int
    BUCKETS: int
    SIDE_BUCKETS: int
    OUT_BUCKETS: int
    MIXED: bool
    ACTIVATION: str


class Epilogue(NamedTuple):
    """Terms, activation, and the type of y: `out_dtype`, or codes if there is an out_scale."""

    terms: Terms
    activation: str = "none"
    out_dtype: torch.dtype = torch.bfloat16
    out_zero: int = 0
    out_qmax: int = 255

    @property
    def dtype(self) -> torch.dtype:
        """The type of y."""
        return self.out_dtype if self.terms.out_scale is None else torch.int8

    @property
    def form(self) -> Form:
        """What kernels are compiled for."""
        t = self.terms
        sides = (0, 1) if t.side_scales is None else t.side_scales.shape
        outs = 1 if t.out_scale is None else min(t.out_scale.shape[0], 2)
        ins, mixed = min(t.act_scale.shape[0], 2), t.bucket.numel() > 1
        return Form(sides[0], ins, sides[1], outs, mixed, self.activation)

    def check(
        self, shape: tuple[int, ...], table: tuple[int, ...], device: torch.device, strides: bool
    ) -> None:
        """Check all but the sides.

        Args:
            shape: of y, (N, O, H', W') or (M, O).
            table: of the zero-point table, ending with the channels of the sums.
            device, strides: where everything has to be, and whether that and strides are checked.
        """
        t, features = self.terms, table[-1]
        checks.bucket(t.bucket, shape[0])
        checks.table("act_scale", t.act_scale)
        checks.shaped("weight_scale", t.weight_scale, (features,), (torch.float32,))
        checks.shaped("bias", t.bias, (features,), (torch.float32,))
        checks.shaped("table", t.table, table, (torch.int32,))
        checks.shaped("shift", t.shift, (shape[0], features), checks.FLOATS)
        checks.shaped("residual", t.residual, shape, checks.FLOATS)
        checks.member("out_dtype", self.out_dtype, (*checks.FLOATS, torch.int32))
        fine = self.out_dtype != torch.int32 or t.out_scale is None
        checks.expect(fine, "out_dtype", self.out_dtype, "a float type with out_scale")
        checks.table("out_scale", t.out_scale)
        lengths = [len(x) for x in (t.act_scale, t.out_scale) if x is not None and len(x) > 1]
        # One bucket finds the entry of both.
        checks.expect(len(set(lengths)) < 2, "act_scale, out_scale", lengths, "1 or equal lengths")
        checks.grid("out_zero", self.out_zero, self.out_qmax)
        if strides:
            checks.dense(
                device, act_scale=t.act_scale, weight_scale=t.weight_scale, table=t.table,
                bucket=t.bucket, bias=t.bias, out_scale=t.out_scale,
                # Rows may lie apart.
                shift=None if t.shift is None else t.shift[:1],
            )  # fmt: skip
            (checks.last if len(shape) == 4 else checks.dense)(device, residual=t.residual)

    def exact(self, acc: Tensor, side_sums: Sequence[Tensor] = ()) -> Tensor:
        """Return y of float64 sums (N, O, H', W') or (M, O); of out_dtype int32 the sums alone."""
        if self.dtype == torch.int32:
            return _packed(acc.to(torch.int32))
        t, count, rest = self.terms, acc.shape[0], (1,) * (acc.ndim - 2)

        def each(table: Tensor) -> Tensor:
            return entries(table, t.bucket, count).double().reshape(-1, 1, *rest)

        def channel(values: Tensor | None) -> Tensor:
            assert values is not None
            return values.double().reshape(1, -1, *rest)

        y = acc * each(t.act_scale) * channel(t.weight_scale)
        if t.side_scales is not None and t.side_table is not None:
            for part, scales, table in zip(side_sums, t.side_scales, t.side_table, strict=True):
                y += (part - channel(table)) * each(scales) * channel(t.side_weight_scale)
        if t.bias is not None:
            y += channel(t.bias)
        if t.shift is not None:
            y += t.shift.double().reshape(*t.shift.shape, *rest)
        if self.activation == "gelu":
            y = F.gelu(y)
        elif self.activation == "silu":
            y = y / (1 + torch.exp(-y))
        elif self.activation == "geglu":
            value, gate = y.chunk(2, 1)
            y = value * F.gelu(gate)
        if t.residual is not None:
            y += t.residual.double()
        if t.out_scale is None:
            return _packed(y.to(self.out_dtype))
        scale = entries(t.out_scale, t.bucket, count).reshape(-1, 1, *rest)
        return _packed(quantize(y, scale, self.out_zero, self.out_qmax))


def _packed(y: Tensor) -> Tensor:
    return channels_last(y) if y.ndim == 4 else y
