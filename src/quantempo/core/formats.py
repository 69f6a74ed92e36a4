"""Formats of integers: range, storage, exact sums.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x_hat = scale * (q - zero_point)

Rounding is to nearest, ties to even. Source: Jacob et al. 2018, eq. 1; PTQ4DM eq. 1 with its zero
point's sign turned (there z is subtracted before the clamp). Kernels read unpacked bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.errors import QuantempoError
from quantempo.registry import Registry

__all__ = [
    "ACTIVATION", "FORMATS", "GROUPS", "WEIGHT", "Format", "Grid", "GroupFormat",
    "activation_format", "channels_last", "restore", "token_scale", "unpack_int12",
    "weight_format",
]  # fmt: skip

_INT32 = 2**31 - 1
# Input channels that may share a scale and a zero point, as a recipe names them.
GROUPS = (16, 32, 64)


@dataclass(frozen=True)
class Grid:
    """The codes that each weight may take: step * u for low <= u <= high, integers all.

    step, low, high: numbers, or float32 tensors (O, ...) of the shape of the weight.
    """

    step: Tensor | float
    low: Tensor | float
    high: Tensor | float

    def round(self, ratio: Tensor) -> Tensor:
        """Return the nearest codes to weight / scale, in its dtype."""
        units = torch.round(ratio / self.step)
        return units.clamp_(self.low, self.high).mul_(self.step)  # type: ignore[arg-type]

    def __getitem__(self, index: Any) -> "Grid":
        """Return the grid of weight.flatten(1)[index]: rows, or `[:, j]`, a column (O,)."""
        parts = (self.step, self.low, self.high)
        return Grid(*(v.flatten(1)[index] if isinstance(v, Tensor) else v for v in parts))

    @staticmethod
    def of(spec: "Format | Grid") -> "Grid":
        """Return a grid as it is, and that of a format without groups."""
        return spec if isinstance(spec, Grid) else spec.grid(())


@dataclass(frozen=True)
class Format:
    """Describe integers of `bits`, 2 to 8.

    signed: qmin = -2^(b-1), qmax = 2^(b-1) - 1; unsigned: qmin = 0, qmax = 2^b - 1; symmetric: the
    zero point is fixed: 0 if signed, else 2^(b-1); narrow: drop the most negative code (signed
    only). Weights are stored one row an output channel: up to 4 bits two codes a byte, else one.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False

    @property
    def name(self) -> str:
        """Name in `FORMATS`: "int4", "uint8"."""
        return f"{'int' if self.signed else 'uint'}{self.bits}"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return (-(2 ** (self.bits - 1)) + int(self.narrow)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def symmetric_zero_point(self) -> int:
        """The zero point of a symmetric grid of these codes."""
        return 0 if self.signed else 2 ** (self.bits - 1)

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits <= 4

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored codes: uint8 if packed or unsigned, else int8."""
        return torch.uint8 if self.packed or not self.signed else torch.int8

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape that codes (O, ...) are stored in: (O, ceil(K/2)) if packed."""
        return (shape[0], (math.prod(shape[1:]) + 1) // 2) if self.packed else tuple(shape)

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape of what is stored of groups; None: there are none."""
        return None

    def nbytes(self, shape: Sequence[int]) -> int:
        """Return the bytes of a weight as stored, with one float32 scale a channel."""
        stored = self.stored_shape(shape), self.group_shape(shape) or (0,)
        return sum(map(math.prod, stored)) + 4 * shape[0]

    def grid(self, shape: Sequence[int], groups: Tensor | None = None) -> Grid:
        """Return the codes that each weight may take."""
        return Grid(1.0, float(self.qmin), float(self.qmax))

    def encode(self, codes: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return codes (O, ...), integers of this range, as stored: two a byte or as is."""
        self._check(codes)
        return _pack(codes.flatten(1)) if self.packed else codes.to(self.storage)

    def _check(self, codes: Tensor) -> None:
        low, high = self.qmin, self.qmax
        if codes.is_floating_point() or (
            codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high
        ):
            raise QuantempoError(f"got {codes.dtype} outside [{low}, {high}]; expected integers")

    def decode(
        self, stored: Tensor, shape: Sequence[int], groups: Tensor | None = None,
        dtype: torch.dtype = torch.int8,
    ) -> Tensor:  # fmt: skip
        """Undo `encode`: return the codes of this shape, a byte each."""
        if not self.packed:
            return stored
        nibbles = _unpack(stored, math.prod(shape[1:]))
        # Sign extension: nibbles 8 to 15 stand for -8 to -1.
        codes = (nibbles.to(torch.int8) ^ 8) - 8 if self.signed else nibbles
        return codes.reshape(tuple(shape))

    def exact_terms(self, other: "Format") -> int:
        """Return how many terms of sum_k (q_k - z) w_k, w of `other`, always fit an int32."""
        return _INT32 // ((self.qmax - self.qmin) * max(other.qmax, -other.qmin))


@dataclass(frozen=True)
class GroupFormat(Format):
    """Describe weights in two levels: w8 = (q - z) s, q of `bits` (2 to 4), |w8| <= 127.

    s in 1..16 and z in 0..15 belong to `group` (of GROUPS) input channels of one output channel and
    kernel position (the last group may have fewer); codes are w8, exact in int8. Of a weight (O, I,
    ...) with P positions `encode` stores q, uint8 (O, P, ceil(I/2)), two a byte along I, the even
    one low. Beside them lie the groups: bytes (s - 1) << 4 | z, uint8 (O, P, ceil(I / group)).
    """

    signed: bool = True
    symmetric: bool = True
    narrow: bool = True
    group: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4 or self.group not in GROUPS or type(self.group) is not int:
            text = f"got {self.bits} bits in groups of {self.group}; expected 2 to 4 bits in groups"
            raise QuantempoError(f"{text} of {', '.join(map(str, GROUPS))}, or no groups")

    @property
    def qmin(self) -> int:
        """Smallest code w8."""
        return -self.qmax

    @property
    def qmax(self) -> int:
        """Largest code w8."""
        return 127

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (O, P, ceil(I/2))."""
        return shape[0], math.prod(shape[2:]), (shape[1] + 1) // 2

    def group_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (O, P, ceil(I / group))."""
        return shape[0], math.prod(shape[2:]), -(-shape[1] // self.group)

    def _terms(self, groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return s and z of each group, (O, P, N, 1)."""
        return ((groups >> 4).to(dtype) + 1)[..., None], (groups & 0xF).to(dtype)[..., None]

    def grid(self, shape: Sequence[int], groups: Tensor | None = None) -> Grid:
        """Return the codes that each weight may take, which fit a byte: |w8| <= 127."""
        assert groups is not None
        size, terms = (*groups.shape, self.group), self._terms(groups, torch.float32)
        step, zero = (restore(v.expand(size), shape) for v in terms)
        reach = torch.floor(self.qmax / step)
        return Grid(step, -torch.minimum(zero, reach), reach.minimum(2**self.bits - 1 - zero))

    def encode(self, codes: Tensor, groups: Tensor | None = None) -> Tensor:
        """Return the q of codes w8 (O, I, ...), which must be (q - z) s, as stored."""
        assert groups is not None
        self._check(codes)
        step, zero = self._terms(groups, torch.int16)
        flat = F.pad(channels_last(codes).to(torch.int16), (0, -codes.shape[1] % self.group))
        flat = flat.view(*groups.shape, self.group)
        q = flat.div(step, rounding_mode="floor") + zero
        if not bool((((q - zero) * step == flat) & (q >= 0) & (q < 2**self.bits)).all()):
            text = "got codes off the grids of their groups; expected (q - z) s with q from 0 to"
            raise QuantempoError(f"{text} {2**self.bits - 1}: round with `grid`")
        return _pack(q.flatten(2)[..., : codes.shape[1]])

    def decode(
        self, stored: Tensor, shape: Sequence[int], groups: Tensor | None = None,
        dtype: torch.dtype = torch.int8,
    ) -> Tensor:  # fmt: skip
        """Undo `encode`: return w8 of this shape; int16 holds those beyond 127, of a bad file."""
        assert groups is not None
        size, (step, zero) = (*groups.shape, self.group), self._terms(groups, dtype)
        q = torch.zeros(size, dtype=dtype, device=stored.device)
        pairs = q.view(*stored.shape[:2], -1, 2)[:, :, : stored.shape[2]]
        pairs[..., 0], pairs[..., 1] = stored & 0xF, stored >> 4
        return restore(q.sub_(zero).mul_(step), shape)


def channels_last(weight: Tensor) -> Tensor:
    """Return a weight (O, I, ...) as (O, P, I), a view; P = 1 of a linear layer."""
    return weight.flatten(2).movedim(1, -1) if weight.ndim > 2 else weight[:, None]


def restore(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo `channels_last`: return (O, P, I), its last axis maybe cut and filled up, contiguous."""
    rows = rows.flatten(2)[..., : shape[1]]
    return rows.movedim(-1, 1).reshape(tuple(shape)).contiguous()


def _pack(codes: Tensor) -> Tensor:
    """Return (..., L) codes of 4 bits as (..., ceil(L/2)) uint8; an odd L is padded with 0."""
    nibbles = (codes.to(torch.int16) & 0xF).to(torch.uint8)
    nibbles = F.pad(nibbles, (0, nibbles.shape[-1] % 2))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _unpack(packed: Tensor, length: int) -> Tensor:
    """Return (..., ceil(length/2)) uint8 as (..., length) uint8 of 4 bits each."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]


def unpack_int12(high: Tensor, low: Tensor) -> Tensor:
    """Return the int16 codes 16 * high + low, of weights in checkpoints of format 2.

    high: (..., L) int8; low: (..., ceil(L/2)) uint8, four bits a code, the even index low.
    """
    return (high.to(torch.int16) << 4) + _unpack(low, high.shape[-1]).to(torch.int16)


# Inputs are unsigned with a zero point; weights are signed without the most negative code.
FORMATS: Registry[Format] = Registry("format")
for _bits in range(2, 9):
    for _format in (Format(_bits), Format(_bits, signed=True, symmetric=True, narrow=True)):
        FORMATS.register(_format.name)(_format)


def weight_format(bits: int, group: int = 0) -> Format:
    """Return the format of weights, signed, symmetric, narrow; group: of up to 4 bits, or 0."""
    return GroupFormat(bits, group=group) if group and bits <= 4 else FORMATS.get(f"int{bits}")


def activation_format(bits: int) -> Format:
    """Return the format of layer inputs of these bits: unsigned, any zero point."""
    return FORMATS.get(f"uint{bits}")


WEIGHT, ACTIVATION = weight_format(8), activation_format(8)


def token_scale(x: Tensor, spec: Format) -> Tensor:
    """Return max_k |x_k| / (qmax - z), float32 (..., 1), of x (..., K); z: symmetric zero point.

    At least the smallest normal number, of rows of zeros; NaN of rows that hold NaN.
    Error: |x - x_hat| <= scale / 2, no value is clipped.
    """
    peak = x.abs().amax(-1, keepdim=True).float()
    top = spec.qmax - spec.symmetric_zero_point
    return (peak / top).clamp_min(torch.finfo(torch.float32).tiny)
