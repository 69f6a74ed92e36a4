"""What a grid of integers is: `QuantSpec` and `QParams`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, float32, int32

from quantempo.errors import QuantempoError

__all__ = ["ACTIVATION", "WEIGHT", "QParams", "QuantSpec"]


@dataclass(frozen=True)
class QuantSpec:
    """Describe an integer grid.

    signed: qmin = -2^(b-1), qmax = 2^(b-1) - 1; unsigned: qmin = 0, qmax = 2^b - 1.

    Args:
        bits: width b, 2 to 16.
        signed: two's complement instead of unsigned.
        symmetric: the zero point is fixed: 0 if signed, 2^(b-1) if unsigned.
        narrow: drop the most negative code, so that the grid is symmetric about 0 (signed only).

    Raises:
        QuantempoError: bits out of range, or narrow without signed.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise QuantempoError(f"got bits={self.bits}; expected 2 to 16")
        if self.narrow and not self.signed:
            raise QuantempoError("got narrow=True for an unsigned grid; only signed grids have it")

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
        """The zero point of a symmetric grid of this kind."""
        return 0 if self.signed else 2 ** (self.bits - 1)


# Fixed by the CPU kernels: unsigned activations, signed weights without -128.
ACTIVATION = QuantSpec(bits=8)
WEIGHT = QuantSpec(bits=8, signed=True, symmetric=True, narrow=True)


@dataclass(frozen=True)
class QParams:
    """Hold P grids: x_hat = scale * (q - zero_point).

    Args:
        scale: (P,) float32, > 0 and finite.
        zero_point: (P,) int32.

    Raises:
        QuantempoError: wrong dtype or shape, or a scale that is not positive and finite.
    """

    scale: Tensor
    zero_point: Tensor

    def __post_init__(self) -> None:
        if self.scale.dtype != float32 or self.zero_point.dtype != int32:
            raise QuantempoError(
                f"got scale {self.scale.dtype} and zero_point {self.zero_point.dtype}; "
                "expected float32 and int32"
            )
        if self.scale.ndim != 1 or self.scale.shape != self.zero_point.shape:
            raise QuantempoError(
                f"got scale {tuple(self.scale.shape)} and zero_point "
                f"{tuple(self.zero_point.shape)}; expected the same shape (P,)"
            )
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise QuantempoError("got a scale that is not positive and finite; recalibrate")
