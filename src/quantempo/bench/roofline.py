"""How near to the machine's limits a kernel runs.

    floor = max(operations / peak, bytes / bandwidth)        fraction = floor / measured time

Both limits are measured in the same process: the bandwidth by a copy within the device, the 8-bit
peak as twice the best bfloat16 matrix product, which is what the datasheets of tensor cores state.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "tbytes", "tflops"]


@dataclass(frozen=True)
class Limits:
    """bf16_tflops: of the best bfloat16 product measured; copy_tbytes: read and written, TB/s."""

    bf16_tflops: float
    copy_tbytes: float

    @property
    def int8_tflops(self) -> float:
        """Twice the bfloat16 figure."""
        return 2 * self.bf16_tflops

    def floor_ms(self, operations: float, moved: float) -> float:
        """Return the least milliseconds for so many operations and bytes."""
        return max(operations / (self.int8_tflops * 1e9), moved / (self.copy_tbytes * 1e9))

    def fraction(self, operations: float, moved: float, ms: float) -> float:
        """Return floor / measured, 1 for a kernel at the limit."""
        return self.floor_ms(operations, moved) / ms


def tflops(operations: float, ms: float) -> float:
    """Return 10^12 operations a second."""
    return operations / (ms * 1e9)


def tbytes(moved: float, ms: float) -> float:
    """Return 10^12 bytes a second."""
    return moved / (ms * 1e9)
