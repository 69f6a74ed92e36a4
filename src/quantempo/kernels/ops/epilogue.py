"""What follows the integer sums of a contraction: record, checks, exact definition.

    v = act(s_a[b] s_w[o] acc + sum_i s_i[b] s_side[o] acc_i + half + bias[o] + shift[n, o])
    y = v gate[n, o] + residual

Kernels get `terms` as one argument and `form` as one constant: a term more is a field of `Terms`,
its lines in `check` and `exact`, and its use in the epilogues of `gpu.contraction`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.operator import channels_last, entries, to_codes

__all__ = ["ACTIVATIONS", "GATED", "Epilogue", "Form", "Terms", "is_half"]

ACTIVATIONS = {
    "none": lambda v: v,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": lambda v: v / (1 + torch.exp(-v)),
}
# Of two halves of the channels: the first times one of these of the second.
GATED = {"geglu": "gelu", "swiglu": "silu"}


class Terms(NamedTuple):
    """The tensors of an epilogue; G buckets, O channels, up to S = 2 sides, N images or rows.

    Attributes:
        act_scale: (G,); side_scales: (S, G); out_scale: (G,), of the codes of y. With `rows` of
            `Epilogue` the first two have an entry for each row instead, (M,) and (S, M).
        weight_scale, side_weight_scale, bias: float32 (O,).
        table: int32 (16, O) or (O,), zero-point part of the sums; side_table: (S, O).
        bucket: int64 () or (B,).
        shift, gate: (N, O); residual: as y; any float. N of `gate` is a divisor of the rows.
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
    gate: Tensor | None = None


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
    ROWS: bool = False
    # Whether 32 rows that begin at a multiple of 32 have one row of `gate`.
    RUNS: bool = False
    # Whether the second half of the channels are gates.
    GATED: bool = False
    # Whether the last side is of float16.
    HALF: bool = False


class Epilogue(NamedTuple):
    """Terms, activation, and the type of y: `out_dtype`, or codes if there is an out_scale."""

    terms: Terms
    activation: str = "none"
    out_dtype: torch.dtype = torch.bfloat16
    out_zero: int = 0
    out_qmax: int = 255
    rows: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The type of y."""
        return self.out_dtype if self.terms.out_scale is None else torch.int8

    @property
    def gated(self) -> bool:
        """Whether y has half as many channels as the sums."""
        return self.activation in GATED

    def form(self, count: int, half: bool = False) -> Form:
        """Return what kernels are compiled for, of `count` rows or pixels; half: see `Form`."""
        t = self.terms
        sides = (0, 1) if t.side_scales is None else t.side_scales.shape
        outs = 1 if t.out_scale is None else min(t.out_scale.shape[0], 2)
        ins, mixed = min(t.act_scale.shape[0], 2), t.bucket.numel() > 1
        images = 0 if t.gate is None else t.gate.shape[0]
        runs = images == 1 or (images > 1 and count // images % 32 == 0)
        side = 1 if self.rows else sides[1]
        known = ins, side, outs, mixed, self.activation, self.rows, runs, self.gated, half
        return Form(sides[0] + half, *known)

    def check(
        self, shape: tuple[int, ...], table: tuple[int, ...], device: torch.device, strides: bool
    ) -> None:
        """Check all but the sides, with `strides` memory and devices too.

        shape: of y, (N, O, H', W') or (M, O); table: its shape, which ends with channels of the
        sums.
        """
        t, features = self.terms, table[-1]
        checks.bucket(t.bucket, shape[0])
        checks.table("act_scale", t.act_scale)
        if self.rows:
            checks.shaped("act_scale", t.act_scale, (shape[0],), (torch.float32,))
        checks.shaped("weight_scale", t.weight_scale, (features,), (torch.float32,))
        checks.shaped("bias", t.bias, (features,), (torch.float32,))
        checks.shaped("table", t.table, table, (torch.int32,))
        checks.shaped("shift", t.shift, (shape[0], features), checks.FLOATS)
        checks.shaped("residual", t.residual, shape, checks.FLOATS)
        if t.gate is not None:
            images = t.gate.shape[0] if t.gate.ndim else 0
            divides = images > 0 and shape[0] % images == 0
            checks.expect(divides, "gate", checks.kind(t.gate), f"rows that divide {shape[0]}")
            checks.shaped("gate", t.gate, (images, features), checks.FLOATS)
        checks.member("out_dtype", self.out_dtype, (*checks.FLOATS, torch.int32))
        fine = self.out_dtype != torch.int32 or t.out_scale is None
        checks.expect(fine, "out_dtype", self.out_dtype, "a float type with out_scale")
        checks.table("out_scale", t.out_scale)
        tables = (None if self.rows else t.act_scale, t.out_scale)
        lengths = [len(x) for x in tables if x is not None and len(x) > 1]
        # One bucket finds the entry of both.
        checks.expect(len(set(lengths)) < 2, "act_scale, out_scale", lengths, "1 or equal lengths")
        checks.grid("out_zero", self.out_zero, self.out_qmax)
        if strides:
            checks.dense(
                device, act_scale=t.act_scale, weight_scale=t.weight_scale, table=t.table,
                bucket=t.bucket, bias=t.bias, out_scale=t.out_scale,
                # Rows may lie apart.
                shift=None if t.shift is None else t.shift[:1],
                gate=None if t.gate is None else t.gate[:1],
            )  # fmt: skip
            (checks.last if len(shape) == 4 else checks.dense)(device, residual=t.residual)

    def check_sides(
        self, codes: Sequence[Tensor], weights: Sequence[Tensor], shape: tuple[int, ...],
        device: torch.device, strides: bool,
    ) -> None:  # fmt: skip
        """Check the sides; shape: of the sums, (N, O, H', W') or (M, O)."""
        t, parts, (count, features, *across) = self.terms, len(codes), shape
        checks.expect(parts <= 2, "side_codes", f"{parts} tensors", "at most 2")
        found = f"{len(weights)} tensors"
        checks.expect(len(weights) == parts, "side_weights", found, f"{parts}")
        parts -= is_half(codes)
        memory = checks.last if across else checks.dense
        for i, (part, weight) in enumerate(zip(codes, weights, strict=True)):
            checks.expect(part.ndim == len(shape), "side_codes", checks.kind(part), "as codes")
            channels, kinds = part.shape[1], checks.INT8 if i < parts else (torch.float16,)
            checks.sixteen(channels, features)
            checks.shaped("side_codes", part, (count, channels, *across), kinds)
            checks.weighted("side_weights", weight, (features, channels), kinds)
            if strides:
                memory(device, side_codes=part)
                checks.apart(device, "side_weights", weight)
        scales, weight_scale, table = t.side_scales, t.side_weight_scale, t.side_table
        given = [tensor is not None for tensor in (scales, weight_scale, table)]
        wanted = "all three with side_codes of int8, none of them without"
        names = "side_scales, side_weight_scale, side_table"
        checks.expect(given == [parts > 0] * 3, names, given, wanted)
        if scales is None:
            return
        entries = count if self.rows else scales.shape[-1]
        fits = scales.shape == (parts, entries) and scales.dtype == torch.float32
        wanted = f"float32 ({parts}, {entries if self.rows else 'G'})"
        checks.expect(fits, "side_scales", checks.kind(scales), wanted)
        checks.shaped("side_weight_scale", weight_scale, (features,), (torch.float32,))
        checks.shaped("side_table", table, (parts, features), (torch.int32,))
        if strides:
            checks.dense(
                device, side_scales=scales, side_weight_scale=weight_scale, side_table=table
            )

    def exact(self, acc: Tensor, side_sums: Sequence[Tensor] = ()) -> Tensor:
        """Return y of float64 sums (N, O, H', W') or (M, O); of out_dtype int32 the sums alone."""
        if self.dtype == torch.int32:
            return _packed(acc.to(torch.int32))
        t, count, rest = self.terms, acc.shape[0], (1,) * (acc.ndim - 2)

        def each(table: Tensor) -> Tensor:
            own = table if self.rows else entries(table, t.bucket, count)
            return own.double().reshape(-1, 1, *rest)

        def channel(values: Tensor | None) -> Tensor:
            assert values is not None
            return values.double().reshape(1, -1, *rest)

        y = acc * each(t.act_scale) * channel(t.weight_scale)
        if t.side_scales is not None and t.side_table is not None:
            for part, scales, table in zip(side_sums, t.side_scales, t.side_table, strict=False):
                y += (part - channel(table)) * each(scales) * channel(t.side_weight_scale)
        for part in side_sums[0 if t.side_scales is None else len(t.side_scales) :]:
            y += part
        if t.bias is not None:
            y += channel(t.bias)
        if t.shift is not None:
            y += t.shift.double().reshape(*t.shift.shape, *rest)
        value, y = y.chunk(2, 1) if self.gated else (1, y)
        y = value * ACTIVATIONS[GATED.get(self.activation, self.activation)](y)
        if t.gate is not None:
            y = y * t.gate.double().repeat_interleave(count // len(t.gate), 0)
        if t.residual is not None:
            y += t.residual.double()
        if t.out_scale is None:
            return _packed(y.to(self.out_dtype))
        scale = entries(t.out_scale, t.bucket, count).reshape(-1, 1, *rest)
        return _packed(to_codes(y, scale, self.out_zero, self.out_qmax))


def is_half(codes: Sequence[Tensor]) -> bool:
    """Return whether the last of the sides is of float16, which has no scale and no table."""
    return len(codes) > 0 and codes[-1].dtype == torch.float16


def _packed(y: Tensor) -> Tensor:
    return channels_last(y) if y.ndim == 4 else y
