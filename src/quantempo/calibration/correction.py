"""Fit the corrections around a packed network on its own trajectories.

One run of the pipeline with the packed denoiser. At every call the float denoiser is asked for its
output at the very inputs the packed one received; the fit of that time is made from these two and
applied at once, so that the trajectory goes on corrected and later times are fitted on what they
will meet. Nothing of the sampler is re-implemented. How corrections are applied, and what the
tables mean: `quantizers.correction`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.errors import QuantempoError
from quantempo.models.inputs import bind_inputs
from quantempo.models.layers import denoiser_of, timestep_of
from quantempo.models.sampling import call_pipeline
from quantempo.models.schedule import check_stepback
from quantempo.quantized import find_clock
from quantempo.quantized.correction import (
    CORRECTION_NAME,
    CORRECTIONS,
    OutputCorrection,
    attach_correction,
    channel_axis,
    find_correction,
    install_correction,
)
from quantempo.recipe import CorrectionSettings

__all__ = ["MAX_GAIN", "MIN_GAIN", "Fitted", "fit_correction", "options_of"]

log = logging.getLogger("quantempo")

MIN_GAIN, MAX_GAIN = 0.5, 1.5
# A surplus of variance within so many of its standard errors over chains counts as none.
_CERTAIN = 2.0


class Fitted(NamedTuple):
    """What a fit gives.

    tensors: tables for `export.pack.pack_denoiser` and a safetensors file; report: JSON types:
    "options", "chains", "seed", "times", "clipped_gains" (of how many "gains"),
    "error_before" and "error_after" (mean squared error of the output over its mean square at
    each time), "stepback" (list of [t, tau] with tau > t).
    """

    tensors: dict[str, Tensor]
    report: dict[str, Any]


def options_of(settings: CorrectionSettings) -> tuple[str, ...]:
    """Return the corrections that are on, in the order of `CORRECTIONS`."""
    return tuple(name for name in CORRECTIONS if getattr(settings, name))


@torch.no_grad()
def fit_correction(
    pipe: Any,
    packed: nn.Module,
    settings: CorrectionSettings,
    *,
    steps: int,
    call: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Fitted:
    """Fit the corrections of a recipe; networks and pipeline are left as they were.

    affine, per time and channel, over all chains and positions (float64 sums):
        gain = Cov(q, f) / Var(q) in [0.5, 1.5],  shift = E f - gain E q,
    q the packed output, f the float one. Calls at the same time (guidance, the stages of Heun)
    share one fit. stepback: v(t) = max(0, E_chains[Var(x_packed) - Var(x_float)]) of trajectories
    from equal seeds, 0 where it is within two standard errors over the chains.

    Args:
        pipe: float pipeline with the scheduler that was traced.
        packed: its packed denoiser, on the same device, without a correction.
        settings: at least one of the corrections on.
        steps: num_inference_steps.
        call: further arguments of the pipeline, as for `models.sampling.run_pipeline`.
        progress: draw a bar on stderr; None: only on a terminal.

    Raises:
        QuantempoError: nothing to fit, a denoiser that is not packed or is corrected already,
            outputs that are not finite, a batch that mixes times, or see `attach_correction`.

    Source: the least-squares gain is our own; what it answers is PTQD (He et al., NeurIPS 2023)
        and StepbaQ (NeurIPS 2024).
    """
    options = options_of(settings)
    if not options:
        raise QuantempoError(f"no correction is on; expected one of: {', '.join(CORRECTIONS)}")
    clock = find_clock(packed)
    if clock is None or find_correction(packed) is not None:
        raise QuantempoError("expected a packed denoiser without a correction; pack it again")
    component, denoiser = denoiser_of(pipe)
    twin = copy.copy(pipe)
    setattr(twin, component, packed)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    seeds = range(settings.seed, settings.seed + settings.chains)
    run = {"steps": steps, "output_type": "latent", **(call or {})}
    with tqdm(desc="correct", disable=None if progress is None else not progress) as bar:
        fit = _Fit(denoiser, OutputCorrection(options), settings, clock.per_unit, bar)
        if "stepback" in options:
            check_stepback(twin.scheduler)
            with _hooked(denoiser, before=fit.note_float):
                call_pipeline(pipe, seeds, **run)
        # In this order the fit sees x_t before it is stepped back and the output before it is
        # corrected.
        with (
            _hooked(packed, after=fit.compare),
            _corrected(packed, fit.correction),
            _hooked(packed, before=fit.measure),
        ):
            attach_correction(twin.scheduler, packed)
            call_pipeline(twin, seeds, **run)
    return fit.result()


@contextmanager
def _hooked(denoiser: nn.Module, before: Any = None, after: Any = None) -> Any:
    """Have `before` see the arguments and `after` the output of every call, for a while."""
    handles = []
    if before is not None:
        hook = denoiser.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        handles.append(hook)
    if after is not None:
        handles.append(denoiser.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _corrected(denoiser: nn.Module, correction: OutputCorrection) -> Any:
    """Install a correction for a while."""
    handles = install_correction(denoiser, correction.to(next(denoiser.parameters()).device))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        delattr(denoiser, CORRECTION_NAME)


class _Moments:
    """Sums of a call over rows and positions, per channel, in float64; calls add up."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, x: Tensor, q: Tensor, f: Tensor) -> None:
        """Add x_t, the packed and the float output, each (C, N)."""
        x, q, f = x.double(), q.double(), f.double()
        # The difference is summed on its own: q q - f f from sums would cancel.
        d = q - f
        parts = (q, d, x, f, q * q, q * d, d * d, x * q, x * d, f * f)
        sums = torch.stack([part.sum(1) for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += x.shape[1]

    def fit(self, affine: bool) -> dict[str, Tensor]:
        """Return gain, shift, residual, spread, along and the plain errors, each (C,) float64."""
        assert self.sums is not None
        q, d, x, f, qq, qd, dd, xq, xd, ff = self.sums / self.count
        var_q, cov_qd, var_d = qq - q * q, qd - q * d, dd - d * d
        cov_xq, cov_xd, var_f = xq - x * q, xd - x * d, ff - f * f
        raw = torch.ones_like(q)
        if affine:
            # Cov(q, f) / Var(q), with f = q - d.
            raw = torch.where(var_q > 0, 1 - cov_qd / var_q.clamp(min=1e-300), raw)
        gain = raw.clamp(MIN_GAIN, MAX_GAIN)
        shift = (q - d) - gain * q if affine else torch.zeros_like(q)
        # The error after it is (gain - 1) q + d.
        excess = gain - 1
        residual = excess**2 * var_q + 2 * excess * cov_qd + var_d
        spread = gain**2 * var_q - var_f
        mean = excess * q + d + shift
        return {
            "gain": gain,
            "shift": shift,
            "residual": residual,
            "spread": spread,
            "along": excess * cov_xq + cov_xd,
            "clipped": (raw != gain).double(),
            "before": dd,
            "after": residual + mean**2,
            "power": ff,
        }


class _Fit:
    """The hooks of a fit and what they have found; the correction is kept up to date."""

    def __init__(
        self,
        denoiser: nn.Module,
        correction: OutputCorrection,
        settings: CorrectionSettings,
        per_unit: float,
        bar: tqdm,
    ) -> None:
        self.denoiser, self.correction, self.settings = denoiser, correction, settings
        self.per_unit, self.bar, self.halves = per_unit, bar, 1
        self.moments: dict[float, _Moments] = {}
        self.fits: dict[float, dict[str, Tensor]] = {}
        self.references: list[tuple[float, Tensor]] = []
        self.surplus: dict[float, float] = {}
        self.calls = 0

    def note_float(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the variance of each chain of the float trajectory."""
        time, x = self._x_t(args, kwargs)
        self.references.append((time, _chain_variance(x)))
        self.bar.update(1)

    def measure(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compare x_t with the float trajectory's at the same call, before it is stepped back."""
        if "stepback" not in self.correction.options:
            return
        time, x = self._x_t(args, kwargs)
        known, reference = self.references[self.calls]
        if known != time:
            raise QuantempoError(
                f"call {self.calls} is at time {time} with the packed and {known} with the float "
                "denoiser; stepback needs a sampler whose times do not depend on the network"
            )
        self.calls += 1
        if time in self.surplus:
            return
        difference = _chain_variance(x) - reference
        mean, chains = float(difference.mean()), len(difference)
        error = float(difference.std()) / chains**0.5 if chains > 1 else 0.0
        self.surplus[time] = mean if mean > _CERTAIN * error else 0.0
        times = sorted(self.surplus)
        self.correction.replace(
            variance_times=torch.tensor(times),
            variance=torch.tensor([self.surplus[t] for t in times]),
        )

    def compare(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Fit the time of this call; the correction's own hook comes after and applies it."""
        inputs = bind_inputs(self.denoiser, args, kwargs)
        time = self._time(args, kwargs)
        q = output if isinstance(output, Tensor) else output[0]
        f = self.denoiser(*args, **kwargs)
        f = f if isinstance(f, Tensor) else f[0]
        axis, seen = channel_axis(q), inputs.sample.shape[channel_axis(q)]
        # A learned variance is the second half; what conditions x_t comes after its channels.
        channels = q.shape[axis] // 2 if q.shape[axis] == 2 * seen else q.shape[axis]
        if channels > seen:
            raise QuantempoError(
                f"the network turns {seen} channels into {q.shape[axis]}; a correction needs an "
                "output with the channels of x_t: switch it off"
            )
        if not bool(torch.isfinite(q).all() & torch.isfinite(f).all()):
            raise QuantempoError(f"an output at time {time} is not finite; keep more in float")
        self.halves = max(self.halves, len(q) // self.settings.chains)
        parts = (v.narrow(axis, 0, channels).transpose(0, axis) for v in (inputs.sample, q, f))
        moments = self.moments.setdefault(time, _Moments())
        moments.add(*(part.reshape(channels, -1) for part in parts))
        self.fits[time] = moments.fit("affine" in self.correction.options)
        times = sorted(self.fits)
        names = ("gain", "shift", "residual", "spread", "along")
        tables = {name: torch.stack([self.fits[t][name] for t in times]) for name in names}
        self.correction.replace(times=torch.tensor(times), **tables)
        self.bar.update(1)

    def result(self) -> Fitted:
        """Return the tables and what there is to say about them; log the latter."""
        if not self.fits:
            raise QuantempoError("the pipeline never called the denoiser; nothing was fitted")
        correction, times = self.correction, sorted(self.fits)
        fits = [self.fits[t] for t in times]
        clipped = int(sum(float(fit["clipped"].sum()) for fit in fits))
        gains = correction.gain.numel() if "affine" in correction.options else 0
        stepped = []
        if correction.tau_of is not None:
            tau = correction.tau_of.tolist()
            stepped = [[int(t), tau[int(t)]] for t in self.surplus if tau[int(t)] > int(t)]
        before = [float(fit["before"].sum() / fit["power"].sum()) for fit in fits]
        after = [float(fit["after"].sum() / fit["power"].sum()) for fit in fits]
        report: dict[str, Any] = {
            "options": list(correction.options),
            "chains": self.settings.chains,
            "seed": self.settings.seed,
            "times": times,
            "gains": gains,
            "clipped_gains": clipped,
            "error_before": before,
            "error_after": after,
            "stepback": sorted(stepped),
        }
        log.info(
            "correction (%s): %d times, error of the output %.3g before and %.3g after, %d steps "
            "from an earlier time",
            ", ".join(correction.options),
            len(times),
            sum(before) / len(times),
            sum(after) / len(times),
            len(stepped),
        )
        if clipped:
            limits = f"[{MIN_GAIN}, {MAX_GAIN}]"
            log.warning("%d of %d gains were clipped to %s", clipped, gains, limits)
        if self.halves > 1 and "absorb" in correction.options:
            log.warning(
                "correction.absorb was measured on the halves of guidance, not on the guided "
                "output, whose error is larger: it absorbs too little"
            )
        tensors = {name: value.cpu().clone() for name, value in correction.tables().items()}
        return Fitted(tensors, report)

    def _time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        t = torch.as_tensor(timestep_of(args, kwargs)).detach().cpu().double().reshape(-1)
        if bool((t != t[0]).any()):
            raise QuantempoError(
                "a call mixes time-steps in its batch; corrections are fitted on samplers that "
                "take all images through the same times"
            )
        # float32, as the tables hold it: equal times must meet.
        return float((t[0] * self.per_unit).float())

    def _x_t(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, Tensor]:
        # The halves of guidance hold the same x_t.
        x = bind_inputs(self.denoiser, args, kwargs).sample[: self.settings.chains]
        return self._time(args, kwargs), x


def _chain_variance(x: Tensor) -> Tensor:
    """Return the variance of each chain about the channel means of all: (B, C, ...) -> (B,)."""
    x = x.double()
    dims = [d for d in range(x.ndim) if d != channel_axis(x)]
    centred = x - x.mean(dims, keepdim=True)
    return centred.square().flatten(1).mean(1).cpu()
