"""Which time bucket the denoiser is in, read by every quantized layer.

Scales are keyed by the training time-step the network receives, never by a call counter, so one
calibration serves every scheduler and step count of that model, and a batch may mix time-steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError

__all__ = ["CLOCK_NAME", "StepClock", "writable"]

# The clock is a child of the denoiser under this name, so its table is saved with the weights.
CLOCK_NAME = "quantempo_clock"


class StepClock(nn.Module):
    """Map the time-step the denoiser receives to a bucket.

    bucket = bucket_of[clamp(round(t * per_unit), 0, T - 1)].

    Args:
        bucket_of: (T,) int64, the bucket of each training time-step; starts at 0.
        per_unit: training time-steps in one unit of the time the denoiser receives: 1, or T for
            networks that are given t / T (flow matching).

    Attributes:
        refresh: None, or trajectories are followed, see `watch`.
    """

    bucket_of: Tensor

    def __init__(self, bucket_of: Tensor, per_unit: float = 1.0) -> None:
        super().__init__()
        self.per_unit = per_unit
        self.register_buffer("bucket_of", bucket_of.to(torch.int64))
        self.bucket: Tensor = torch.zeros((), dtype=torch.int64)
        self.refresh: int | None = None
        # The time of the call before and the calls since a full one. Written in place, never
        # exchanged, so that a recorded (CUDA) graph of the network goes on reading them.
        self._last: Tensor | None = None
        self._age: Tensor | None = None
        self.fresh: Tensor = torch.ones((), dtype=torch.bool)
        self.gap: Tensor = torch.ones((), dtype=torch.float32)

    def watch(self, refresh: int = 0) -> None:
        """Follow trajectories from now on: every `set` renews `fresh` and `gap`.

        fresh () bool: this call starts anew, because time did not decrease since the call before,
        `reset` was called, the batch mixes time-steps, or `refresh` calls have passed (0: never).
        gap () float32: training time-steps since the call before; meaningless where fresh.
        Nothing waits for the device.
        """
        self.refresh = refresh
        self.reset()

    def reset(self) -> None:
        """Forget the call before: the next one starts a trajectory."""
        if self._last is not None and writable(self._last):
            self._last.fill_(torch.nan)
        else:
            self._last = None

    def _advance(self, t: Tensor) -> None:
        """Compare the time-steps of a call (n,) with the call before."""
        now, device = t.select(0, 0).to(torch.float64), t.device
        known = self._last is not None and self._last.device == device and writable(self._last)
        if not known or self._last is None or self._age is None:
            self._last = torch.full((), torch.nan, dtype=torch.float64, device=device)
            self._age = torch.zeros((), dtype=torch.int64, device=device)
        gap, same = self._last - now, (t == t.select(0, 0)).all()
        # NaN (no call before, or one of mixed times) is not above 0.
        fresh = ~(same & (gap > 0))
        if self.refresh:
            fresh = fresh | (self._age >= self.refresh)
        self.fresh, self.gap = fresh, gap.to(torch.float32)
        self._age.copy_(torch.where(fresh, 1, self._age + 1))
        self._last.copy_(torch.where(same, now, torch.nan))

    def set(self, timestep: Any) -> None:
        """Set `bucket` from a time-step: a number or a tensor of shape (), (1,) or (B,).

        `bucket` becomes (), or (B,) for B > 1 (no host synchronisation either way).
        """
        t = torch.as_tensor(timestep, device=self.bucket_of.device)
        if t.ndim > 1:
            raise QuantempoError(f"got a time-step of shape {tuple(t.shape)}; expected () or (B,)")
        trained = t.double() * self.per_unit
        if self.refresh is not None:
            self._advance(trained.reshape(-1))
        index = trained.round().long().clamp(0, len(self.bucket_of) - 1)
        # Not by subscript: a compiled network would have to wait for the index.
        bucket = self.bucket_of.index_select(0, index.reshape(-1))
        self.bucket = bucket.reshape(()) if t.numel() == 1 else bucket

    def rows(self, table: Tensor, like: Tensor) -> Tensor:
        """Return the row of a (G,) table for the current bucket, shaped to broadcast over `like`.

        Args:
            table: (G,), G = 1 (constant in time) or the number of buckets.
            like: (B', ...) with B' a multiple of the clock's batch.

        Returns:
            (), or (B', 1, ...) when the batch mixes time-steps.
        """
        if len(table) == 1:
            return table[0]
        value = table.index_select(0, self.bucket.reshape(-1))
        if self.bucket.ndim == 0:
            return value.reshape(())
        if like.shape[0] % len(value):
            raise QuantempoError(
                f"got {len(value)} time-steps for a layer input of {like.shape[0]} rows; "
                "expected a multiple"
            )
        value = value.repeat_interleave(like.shape[0] // len(value))
        return value.reshape(-1, *[1] * (like.ndim - 1))


def writable(state: Tensor) -> bool:
    """Return whether a tensor kept from an earlier call may be written in place in this one.

    One made in inference mode may not be written outside of it; a compiler makes its own.
    """
    if torch.compiler.is_compiling():
        return True
    return state.is_inference() == torch.is_inference_mode_enabled()
