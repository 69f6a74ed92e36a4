"""Corrections around a packed network, keyed by training time-step.

`affine` brings the network's output nearer to the float network's, `absorb` takes the variance of
its error out of the noise that a stochastic sampler adds, `stepback` treats x_t as of the earlier
time whose noise it has. Here they are applied; `calibrate.correction` fits them. Tables are linear
in time between the fitted points, so any scheduler and step count can be used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quantempo.errors import QuantempoError
from quantempo.models.inputs import bind_inputs
from quantempo.models.layers import timestep_of
from quantempo.models.schedule import (
    alpha_bars,
    check_stepback,
    scale_noise,
    stepback_times,
    wrap_stepback,
)
from quantempo.quantized.swap import find_clock

__all__ = [
    "CORRECTIONS",
    "CORRECTION_NAME",
    "OutputCorrection",
    "attach_correction",
    "channel_axis",
    "find_correction",
    "install_correction",
    "without_stepback",
]

log = logging.getLogger("quantempo")

CORRECTIONS = ("affine", "absorb", "stepback")
# A child of the denoiser under this name, so its tables are saved with the weights.
CORRECTION_NAME = "quantempo_correction"
_TABLES = ("gain", "shift", "residual", "spread", "along")


class OutputCorrection(nn.Module):
    """Hold the tables of the corrections: K fitted times, C corrected channels.

    output[:, :C] = gain(t) * output[:, :C] + shift(t)

    Buffers, all float32: times (K,) ascending training time-steps as the network receives them;
    gain, shift (K, C); residual (K, C) variance of what is left of the error; spread (K, C) =
    Var(output) - Var(float output) and along (K, C) = Cov(x_t, output - float output), both after
    the gain; variance_times (V,) ascending times of the sampler and variance (V,), the variance
    that x_t has too much there.

    Args:
        points: K; channels: C; variances: V.
        options: which of `CORRECTIONS` are on.

    Raises:
        QuantempoError: an unknown option, or absorb and stepback together: both take out the same
            surplus of variance.
    """

    times: Tensor
    gain: Tensor
    shift: Tensor
    residual: Tensor
    spread: Tensor
    along: Tensor
    variance_times: Tensor
    variance: Tensor
    alpha_bar: Tensor | None
    tau_of: Tensor | None

    def __init__(
        self, options: Sequence[str], points: int = 1, channels: int = 1, variances: int = 1
    ) -> None:
        super().__init__()
        check_options(options)
        self.options = tuple(options)
        # Whether a call of the network steps back; `without_stepback` turns it off for a while.
        self.stepping = True
        self.register_buffer("times", torch.arange(points, dtype=torch.float32))
        for name in _TABLES:
            value = 1.0 if name == "gain" else 0.0
            self.register_buffer(name, torch.full((points, channels), value))
        self.register_buffer("variance_times", torch.arange(variances, dtype=torch.float32))
        self.register_buffer("variance", torch.zeros(variances))
        # They belong to a scheduler and are there once it is attached.
        self.register_buffer("alpha_bar", None, persistent=False)
        self.register_buffer("tau_of", None, persistent=False)

    @classmethod
    def of(cls, options: Sequence[str], tensors: Mapping[str, Tensor]) -> OutputCorrection:
        """Build it from fitted tables, those of `tables`."""
        points, channels = tensors["gain"].shape
        found = cls(options, points, channels, len(tensors["variance"]))
        found.replace(**tensors)
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that build an empty one of the same shape, in JSON types."""
        points, channels = self.gain.shape
        sizes = {"points": points, "channels": channels, "variances": len(self.variance)}
        return {"options": list(self.options), **sizes}

    def tables(self) -> dict[str, Tensor]:
        """Return the saved buffers by name."""
        names = ("times", *_TABLES, "variance_times", "variance")
        return {name: self.get_buffer(name) for name in names}

    def replace(self, **tensors: Tensor) -> None:
        """Put other tables in the place of the present ones, kept on their device."""
        for name, value in tensors.items():
            old = self.tables().get(name)
            if old is None:
                raise QuantempoError(
                    f"got a table '{name}' for a correction; expected {', '.join(self.tables())}"
                )
            self._buffers[name] = value.detach().to(old.device, torch.float32).contiguous()
        self._update_tau()

    def at(self, table: Tensor, t: Tensor, times: Tensor | None = None) -> Tensor:
        """Return rows of a (K, ...) table at times t (n,): linear between points, (n, ...).

        Before the first and after the last point the table is constant.
        """
        times = self.times if times is None else times
        after = torch.searchsorted(times, t.contiguous()).clamp(0, len(times) - 1)
        before = (after - 1).clamp(min=0)
        low, high = times.index_select(0, before), times.index_select(0, after)
        share = ((t - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
        share = share.reshape(-1, *[1] * (table.ndim - 1))
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

    def excess(self, t: int, c: float, r: float) -> Tensor:
        """Return the variance (C,) that x' = r x + c output has too much after a step at t.

        Var(x') - Var(x' of the float output at the same x)
            = c^2 (Var(o) - Var(o_float)) + 2 r c Cov(x, o - o_float) = c^2 spread + 2 r c along.
        For an error independent of x and of the float output this is c^2 residual, as in PTQD. A
        least-squares gain is not that case: it shrinks the output, leaves noise in x that the
        float output would have taken out, and this is what the second term counts.

        Source: PTQD (He et al., NeurIPS 2023) for the idea; the covariance is our own.
        """
        time = torch.tensor([float(t)], device=self.times.device)
        found = c * c * self.at(self.spread, time) + 2 * r * c * self.at(self.along, time)
        return found[0]

    def step_times(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (tau, abar_t, abar_tau) of training time-steps t, each of the shape of t."""
        assert self.tau_of is not None and self.alpha_bar is not None
        index = t.to(self.tau_of.device).long().reshape(-1).clamp(0, len(self.tau_of) - 1)
        tau = self.tau_of.index_select(0, index)
        found = (tau, self.alpha_bar.index_select(0, index), self.alpha_bar.index_select(0, tau))
        return found[0].reshape(t.shape), found[1].reshape(t.shape), found[2].reshape(t.shape)

    def follow(self, bars: Tensor) -> None:
        """Take the schedule abar (T,) of a scheduler: from now on calls step back."""
        self.alpha_bar = bars.float().to(self.times.device)
        self._update_tau()

    def _update_tau(self) -> None:
        if self.alpha_bar is None:
            return
        steps = torch.arange(len(self.alpha_bar), dtype=torch.float32)
        variance = self.at(self.variance.cpu(), steps, self.variance_times.cpu())
        tau = stepback_times(self.alpha_bar.double().cpu(), variance)
        self.tau_of = tau.to(self.times.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OutputCorrection:
        # Times and gains stay float32 when the network becomes bfloat16.
        def move(value: Tensor) -> Tensor:
            moved = fn(value)
            return moved if value.is_meta else value.to(moved.device)

        super()._apply(move, recurse)
        return self


def check_options(options: Sequence[str]) -> None:
    """Raise QuantempoError for an unknown correction, or two that exclude each other."""
    for name in options:
        if name not in CORRECTIONS:
            raise QuantempoError(f"unknown correction '{name}' (known: {', '.join(CORRECTIONS)})")
    if {"absorb", "stepback"} <= set(options):
        raise QuantempoError(
            "correction.absorb and correction.stepback both take out the surplus of variance; "
            "switch one of them off"
        )


def channel_axis(output: Tensor) -> int:
    """Return the dimension of the channels: 1 of (B, C, H, W), the last of (B, tokens, C)."""
    return 1 if output.ndim >= 4 else output.ndim - 1


def find_correction(denoiser: nn.Module) -> OutputCorrection | None:
    """Return the denoiser's correction, or None."""
    return getattr(denoiser, CORRECTION_NAME, None)


def install_correction(denoiser: nn.Module, correction: OutputCorrection) -> list[RemovableHandle]:
    """Add the correction as a child of the denoiser, and the hooks that apply it.

    Absorb and stepback act on a scheduler too: call `attach_correction`.

    Returns:
        The handles of the hooks; without them and the child the denoiser is what it was.

    Raises:
        QuantempoError: the denoiser is not quantized, or has a correction already.
    """
    if find_clock(denoiser) is None:
        raise QuantempoError("a correction is for a packed denoiser; this one is not quantized")
    if find_correction(denoiser) is not None:
        raise QuantempoError("this denoiser has a correction already; fit on one without")
    denoiser.add_module(CORRECTION_NAME, correction)
    handles = []
    if "affine" in correction.options:
        handles.append(denoiser.register_forward_hook(_correct, with_kwargs=True))
    if "stepback" in correction.options:
        # First of all hooks: the clock must see the time that the network gets.
        hook = denoiser.register_forward_pre_hook(_step_back, with_kwargs=True, prepend=True)
        handles.append(hook)
    return handles


# Hooks are functions of the module they are called with, so a copy of a denoiser uses its own.
def _correct(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    correction, clock = find_correction(denoiser), find_clock(denoiser)
    assert correction is not None and clock is not None
    sample = output if isinstance(output, Tensor) else output[0]
    t = torch.as_tensor(timestep_of(args, kwargs), device=sample.device)
    sample = correction(sample, t * clock.per_unit)
    if isinstance(output, Tensor):
        return sample
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(sample=sample)


def _step_back(
    denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    correction = find_correction(denoiser)
    assert correction is not None
    if correction.tau_of is None or not correction.stepping:
        return None
    inputs = bind_inputs(denoiser, args, kwargs)
    x = inputs.sample
    # In the shape it came in: one time for the whole batch stays one.
    received = torch.as_tensor(timestep_of(args, kwargs), device=x.device)
    tau, now, earlier = correction.step_times(received)
    scale = (earlier / now).sqrt().to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    moved = (x.float() * scale).to(x.dtype)
    kwargs = dict(kwargs)
    if inputs.timestep_name in kwargs:
        kwargs[inputs.timestep_name] = tau
        rest = args[1:]
    else:
        rest = (tau, *args[2:])
    if args:
        return (moved, *rest), kwargs
    return (), {**kwargs, inputs.sample_name: moved}


def attach_correction(scheduler: Any, denoiser: nn.Module) -> None:
    """Attach the corrections of `denoiser` that act on the scheduler instance.

    Raises:
        QuantempoError: stepback with a scheduler or a kind of network that it cannot be used
            with, see `models.schedule.check_stepback`.
    """
    correction = find_correction(denoiser)
    if correction is None:
        return
    if "absorb" in correction.options:
        scale_noise(scheduler, correction.excess)
    if "stepback" in correction.options:
        check_stepback(scheduler)
        correction.follow(alpha_bars(scheduler))
        wrap_stepback(scheduler, correction.step_times)


@contextmanager
def without_stepback(denoiser: nn.Module) -> Iterator[None]:
    """Call the network at the times it is given, for example to compare outputs."""
    correction = find_correction(denoiser)
    if correction is None:
        yield
        return
    before, correction.stepping = correction.stepping, False
    try:
        yield
    finally:
        correction.stepping = before
