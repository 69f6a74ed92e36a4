"""Bit packing of integer weights."""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = ["check_codes", "pack_int4", "unpack_int4", "unpack_int12"]


def check_codes(q: Tensor, low: int, high: int) -> None:
    """Raise QuantempoError unless q holds integers in [low, high] only."""
    if q.is_floating_point() or (q.numel() and (int(q.min()) < low or int(q.max()) > high)):
        raise QuantempoError(f"got {q.dtype} outside [{low}, {high}]; expected integers inside")


def pack_int4(q: Tensor) -> Tensor:
    """Pack int4 codes in [-8, 7] two to a byte, the even index in the low nibble.

    Args:
        q: (..., L) integers; an odd L is padded with 0.

    Returns:
        (..., ceil(L/2)) uint8.
    """
    check_codes(q, -8, 7)
    nibbles = (q.to(torch.int16) & 0xF).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, length: int) -> Tensor:
    """Undo `pack_int4`: (..., ceil(length/2)) uint8 -> (..., length) int8 in [-8, 7]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :length]
    # Sign extension: codes 8..15 stand for -8..-1.
    return ((nibbles.to(torch.int8) ^ 8) - 8).to(torch.int8)


def unpack_int12(high: Tensor, low: Tensor) -> Tensor:
    """Return (..., L) int16 codes in [-2048, 2047]: 16 * high + low.

    Args:
        high: (..., L) int8; low: (..., ceil(L/2)) uint8, four bits a code, the even index low.
    """
    nibble = unpack_int4(low, high.shape[-1]).to(torch.int16) & 0xF
    return (high.to(torch.int16) << 4) + nibble
