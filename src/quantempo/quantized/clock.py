"""Which time bucket the denoiser is in, read by every quantized layer.

Scales are keyed by the training time-step the network receives, never by a call counter, so one
calibration serves every scheduler and step count of that model, and a batch may mix time-steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core.instance import PerThread, keep
from quantempo.errors import QuantempoError

__all__ = ["CLOCK_NAME", "StepClock"]

# The clock is a child of the denoiser under this name, so its table is saved with the weights.
CLOCK_NAME = "quantempo_clock"


class StepClock(nn.Module):
    """Map the time-step the denoiser receives to a bucket.

    bucket = bucket_of[clamp(round(t * per_unit), 0, T - 1)].

    Args:
        bucket_of: (T,) int64, the bucket of each training time-step; starts at 0.
        per_unit: training time-steps in one unit of the time the denoiser receives: 1, or T for
            networks that are given t / T (flow matching).
    """

    bucket_of: Tensor
    call: PerThread

    def __init__(self, bucket_of: Tensor, per_unit: float = 1.0) -> None:
        super().__init__()
        self.per_unit = per_unit
        self.register_buffer("bucket_of", bucket_of.to(torch.int64))
        # Of the call that a thread is in: the bucket, and what `engines` found of its rows.
        keep(self, "call", PerThread(bucket=torch.zeros((), dtype=torch.int64), rows=None))
        # The bucket of a compiled call, in which a compiler loses what is set for a thread.
        self.traced: Tensor | None = None

    @property
    def bucket(self) -> Tensor:
        """Time bucket of the call that this thread is in, () or (B,)."""
        found: Tensor = self.call.bucket if self.traced is None else self.traced
        return found

    def forward(self, timestep: Any, device: torch.device | None = None) -> None:
        """Set `bucket` from a time-step: a number or a tensor of shape (), (1,) or (B,).

        `bucket` becomes (), or (B,) for B > 1 (no host synchronisation either way), on a device,
        that of the table if None. Called as a module, whose table hooks of others may bring.
        """
        table = self.bucket_of if device is None else self.bucket_of.to(device)
        t = torch.as_tensor(timestep, device=table.device)
        if t.ndim > 1:
            raise QuantempoError(f"got a time-step of shape {tuple(t.shape)}; expected () or (B,)")
        index = (t.double() * self.per_unit).round().long().clamp(0, len(table) - 1)
        # Not by subscript: a compiled network would have to wait for the index.
        bucket = table.index_select(0, index.reshape(-1)) if t.numel() else table[:1]
        bucket = bucket.reshape(()) if t.numel() <= 1 else bucket
        compiling = torch.compiler.is_compiling()
        if compiling or self.traced is not None:
            self.traced = bucket if compiling else None
        if not compiling:
            self.call.bucket, self.call.rows = bucket, None

    set = forward

    def rows(self, table: Tensor, like: Tensor) -> Tensor:
        """Return the row of a (G,) table for the current bucket, shaped to broadcast over `like`.

        G = 1 (constant in time) or the number of buckets; like: (B', ...), B' a multiple of the
        clock's batch. Return (), or (B', 1, ...) when the batch mixes time-steps.
        """
        if len(table) == 1:
            return table[0]
        bucket = self.bucket
        value = table.index_select(0, bucket.reshape(-1))
        if bucket.ndim == 0:
            return value.reshape(())
        if like.shape[0] % len(value):
            raise QuantempoError(
                f"got {len(value)} time-steps for a layer input of {like.shape[0]} rows; "
                "expected a multiple"
            )
        value = value.repeat_interleave(like.shape[0] // len(value))
        return value.reshape(-1, *[1] * (like.ndim - 1))
