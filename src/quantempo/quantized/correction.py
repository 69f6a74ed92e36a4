"""Affine correction of a packed network's output, keyed by training time-step.

    output[:, :C] = gain(t) output[:, :C] + shift(t)

Here it is applied; `calibration.correction` fits it. Tables are linear in time between the fitted
points, so any scheduler and step count can be used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantempo.core.instance import put_buffer
from quantempo.errors import QuantempoError
from quantempo.models.layers import timestep_of, timestep_place
from quantempo.quantized.swap import find_clock

__all__ = [
    "CORRECTION_NAME",
    "OutputCorrection",
    "channel_axis",
    "find_correction",
    "install_correction",
]

# A child of the denoiser under this name, so its tables are saved with the weights.
CORRECTION_NAME = "quantempo_correction"
_TABLES = ("times", "gain", "shift")


class OutputCorrection(nn.Module):
    """Hold gains and shifts at K fitted times for the first C channels of the output.

    Buffers, float32: times (K,) ascending training time-steps; gain, shift (K, C).

    Args:
        points: K; channels: C.
    """

    times: Tensor
    gain: Tensor
    shift: Tensor

    def __init__(self, points: int = 1, channels: int = 1) -> None:
        super().__init__()
        self.register_buffer("times", torch.arange(points, dtype=torch.float32))
        self.register_buffer("gain", torch.ones(points, channels))
        self.register_buffer("shift", torch.zeros(points, channels))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> OutputCorrection:
        """Build it from fitted tables, those of `tables`."""
        found = cls(*tensors["gain"].shape)
        found.replace(**tensors)
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that build an empty one of the same shape, in JSON types."""
        return dict(zip(("points", "channels"), self.gain.shape, strict=True))

    def tables(self) -> dict[str, Tensor]:
        """Return the saved buffers by name."""
        return {name: self.get_buffer(name) for name in _TABLES}

    def replace(self, **tensors: Tensor) -> None:
        """Replace tables, kept on their device."""
        for name, value in tensors.items():
            if name not in _TABLES:
                raise QuantempoError(
                    f"got a table '{name}' for a correction; expected {', '.join(_TABLES)}"
                )
            device = self.get_buffer(name).device
            put_buffer(self, name, value.detach().to(device, torch.float32).contiguous())

    def at(self, table: Tensor, t: Tensor) -> Tensor:
        """Return rows of a (K, C) table at times t (n,): linear between points, (n, C).

        Before the first and after the last point the table is constant.
        """
        times = self.times
        after = torch.searchsorted(times, t.contiguous()).clamp(0, len(times) - 1)
        before = (after - 1).clamp(min=0)
        low, high = times.index_select(0, before), times.index_select(0, after)
        share = ((t - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)[:, None]
        # `lerp` is exact at both ends.
        return torch.lerp(table.index_select(0, before), table.index_select(0, after), share)

    def forward(self, output: Tensor, t: Tensor) -> Tensor:
        """Return the output with its first C channels corrected, same shape and dtype.

        Args:
            output: (B, C_out, ...) or (B, tokens, C_out), C_out >= C.
            t: () or (B',) training time-steps, B a multiple of B'.
        """
        t = t.reshape(-1).to(output.device, torch.float32)
        gain, shift = self.at(self.gain, t), self.at(self.shift, t)
        if len(t) > 1:
            gain = gain.repeat_interleave(output.shape[0] // len(t), 0)
            shift = shift.repeat_interleave(output.shape[0] // len(t), 0)
        axis, channels = channel_axis(output), gain.shape[1]
        shape = [len(gain), *[1] * (output.ndim - 1)]
        shape[axis] = channels
        part = output.narrow(axis, 0, channels)
        part = (part.float() * gain.reshape(shape) + shift.reshape(shape)).to(output.dtype)
        rest = output.shape[axis] - channels
        return torch.cat([part, output.narrow(axis, channels, rest)], axis) if rest else part

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OutputCorrection:
        # Times and gains stay float32 when the network becomes bfloat16.
        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if value.is_meta else value.to(moved.device)

        super()._apply(move, recurse)
        return self


def channel_axis(output: Tensor) -> int:
    """Return the dimension of the channels: 1 of (B, C, H, W), the last of (B, tokens, C)."""
    return 1 if output.ndim >= 4 else output.ndim - 1


def find_correction(denoiser: nn.Module) -> OutputCorrection | None:
    """Return the denoiser's correction, or None."""
    return getattr(denoiser, CORRECTION_NAME, None)


def install_correction(denoiser: nn.Module, correction: OutputCorrection) -> RemovableHandle:
    """Add the correction as a child of the denoiser, and the hook that applies it; return the hook.

    Raises:
        QuantempoError: the denoiser is not quantized, or has a correction already.
    """
    if find_clock(denoiser) is None:
        raise QuantempoError("a correction is for a packed denoiser; this one is not quantized")
    if find_correction(denoiser) is not None:
        raise QuantempoError("this denoiser has a correction already; fit on one without")
    denoiser.add_module(CORRECTION_NAME, correction)
    return denoiser.register_forward_hook(_correct, with_kwargs=True)


# A function of the module it is called with, so that a copy of a denoiser uses its own.
def _correct(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    correction, clock = find_correction(denoiser), find_clock(denoiser)
    assert correction is not None and clock is not None
    sample = output if isinstance(output, Tensor) else output[0]
    t = torch.as_tensor(timestep_of(args, kwargs, timestep_place(denoiser)), device=sample.device)
    sample = correction(sample, t * clock.per_unit)
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(sample=sample)
