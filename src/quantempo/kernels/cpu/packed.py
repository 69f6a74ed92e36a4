"""Weights of 4 bits for `product`: unpacked at every call, into one buffer a thread."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from quantempo.kernels.cpu import fused

__all__ = ["BLOCK", "Packed"]

# Channels of a block of weights; see `fused.c`.
BLOCK = 64
_buffers = threading.local()


class Packed:
    """Input channels first .. first + inputs of a weight in groups; dense: return them as int8."""

    def __init__(
        self, stored: Tensor, groups: Tensor, group: int, first: int, inputs: int,
        dense: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        self.dense = dense
        self._held = stored.contiguous(), groups.contiguous()
        self._numbers = (*stored.shape, groups.shape[2], group, first, inputs)
        self._depth = -(-inputs // 4) * 4
        self._bytes = -(-stored.shape[0] // BLOCK) * BLOCK * stored.shape[1] * self._depth

    def write(self, to: int) -> None:
        """Write int8 (O / 64, P, C / 4, 64, 4) to an address, zeros where there are none."""
        library, held = fused.load(), [tensor.data_ptr() for tensor in self._held]
        assert library is not None
        library.unpack(*held, to, *self._numbers, BLOCK, self._depth, torch.get_num_threads())

    def unpacked(self) -> int:
        """Write them to the buffer of this thread and return its address."""
        known: Tensor | None = getattr(_buffers, "bytes", None)
        if known is None or len(known) < self._bytes:
            known = _buffers.bytes = torch.empty(self._bytes, dtype=torch.int8)
        self.write(known.data_ptr())
        return known.data_ptr()
