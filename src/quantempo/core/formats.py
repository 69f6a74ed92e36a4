"""Formats of integers: range, storage, exact sums.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x_hat = scale * (q - zero_point)

Rounding is to nearest, ties to even. Source: Jacob et al. 2018, eq. 1; PTQ4DM eq. 1 with its
zero point's sign turned (there z is subtracted before the clamp).

A width is an entry of `FORMATS`; kernels read bytes, whatever is packed in a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.errors import QuantempoError
from quantempo.registry import Registry

__all__ = [
    "ACTIVATION", "FORMATS", "WEIGHT", "Format", "activation_format", "token_scale",
    "unpack_int12", "weight_format",
]  # fmt: skip

_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Format:
    """Describe integers of one width.

    signed: qmin = -2^(b-1), qmax = 2^(b-1) - 1; unsigned: qmin = 0, qmax = 2^b - 1. A weight is
    stored row by row, one row an output channel: up to 4 bits two codes a byte, else one.

    Args:
        bits: width b, 2 to 8.
        symmetric: the zero point is fixed: 0 if signed, 2^(b-1) if unsigned.
        narrow: drop the most negative code, so that the range is symmetric about 0 (signed only).

    Raises:
        QuantempoError: bits out of range, or narrow without signed.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise QuantempoError(f"got bits={self.bits}; expected 2 to 8")
        if self.narrow and not self.signed:
            raise QuantempoError("got narrow=True for unsigned codes; only signed ones have it")

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

    def encode(self, codes: Tensor) -> Tensor:
        """Return codes (O, ...) as stored: two a byte, the even index low, or as is.

        Raises:
            QuantempoError: they are not integers of this range.
        """
        low, high = self.qmin, self.qmax
        if codes.is_floating_point() or (
            codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high
        ):
            raise QuantempoError(
                f"got {codes.dtype} outside [{low}, {high}]; expected integers inside"
            )
        return _pack(codes.flatten(1)) if self.packed else codes.to(self.storage)

    def decode(self, stored: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `encode`: return the codes of this shape, a byte each."""
        if not self.packed:
            return stored
        nibbles = _unpack(stored, math.prod(shape[1:]))
        # Sign extension: nibbles 8 to 15 stand for -8 to -1.
        codes = (nibbles.to(torch.int8) ^ 8) - 8 if self.signed else nibbles
        return codes.reshape(tuple(shape))

    def exact_terms(self, other: "Format") -> int:
        """Return how many terms sum_k (q_k - z) w_k may have and always fit an int32.

        q of this format with any zero point z of its range, w of `other`.
        """
        return _INT32 // ((self.qmax - self.qmin) * max(other.qmax, -other.qmin))


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

    Args:
        high: (..., L) int8; low: (..., ceil(L/2)) uint8, four bits a code, the even index low.
    """
    return (high.to(torch.int16) << 4) + _unpack(low, high.shape[-1]).to(torch.int16)


# Inputs are unsigned with a zero point; weights are signed without the most negative code.
FORMATS: Registry[Format] = Registry("format")
for _bits in range(2, 9):
    for _format in (Format(_bits), Format(_bits, signed=True, symmetric=True, narrow=True)):
        FORMATS.register(_format.name)(_format)


def weight_format(bits: int) -> Format:
    """Return the format of weights of these bits: signed, symmetric, narrow."""
    return FORMATS.get(f"int{bits}")


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
