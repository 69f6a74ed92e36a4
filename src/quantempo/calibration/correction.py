"""Fit the affine correction of a packed network's output on its own trajectories.

One run of the pipeline with the packed denoiser. At every call the float denoiser is asked for its
output at the very inputs the packed one received; the fit of that time is made from these two and
applied at once, so that the trajectory goes on corrected and later times are fitted on what they
will meet. Nothing of the sampler is re-implemented. How it is applied: `quantized.correction`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs, denoiser_of, timestep_of, timestep_place
from quantempo.models.sampling import call_pipeline
from quantempo.quantized import find_clock
from quantempo.quantized.correction import (
    CORRECTION_NAME,
    OutputCorrection,
    channel_axis,
    find_correction,
    install_correction,
)
from quantempo.recipe import CorrectionSettings

__all__ = ["MAX_GAIN", "MIN_GAIN", "Fitted", "fit_correction"]

log = logging.getLogger("quantempo")

MIN_GAIN, MAX_GAIN = 0.5, 1.5


class Fitted(NamedTuple):
    """What a fit gives.

    tensors: tables of an `OutputCorrection`; report: JSON types:
    "chains", "seed", "times", "clipped_gains" (of how many "gains"), "error_before" and
    "error_after" (mean squared error of the output over its mean square at each time).
    """

    tensors: dict[str, Tensor]
    report: dict[str, Any]


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
    """Fit the correction; networks and pipeline are left as they were.

    Per time and channel, over all chains and positions (float64 sums):
        gain = Cov(q, f) / Var(q) in [0.5, 1.5],  shift = E f - gain E q,
    q the packed output, f the float one. Calls at the same time (guidance, the stages of Heun)
    share one fit.

    Args:
        pipe: float pipeline with the scheduler that was traced.
        packed: its packed denoiser, on the same device, without a correction.
        settings: chains and seed.
        steps: num_inference_steps.
        call: further arguments of the pipeline, as for `models.sampling.run_pipeline`.
        progress: draw a bar on stderr; None: only on a terminal.

    Raises:
        QuantempoError: a denoiser that is not packed or is corrected already, outputs that are not
            finite, or a batch that mixes times.

    Source: the least-squares gain is our own; what it answers is PTQD (He et al., NeurIPS 2023).
    """
    clock = find_clock(packed)
    if clock is None or find_correction(packed) is not None:
        raise QuantempoError("expected a packed denoiser without a correction; pack it again")
    component, denoiser = denoiser_of(pipe)
    twin = copy.copy(pipe)
    setattr(twin, component, packed)
    twin.scheduler = copy.deepcopy(pipe.scheduler)
    seeds = range(settings.seed, settings.seed + settings.chains)
    with tqdm(desc="correct", disable=None if progress is None else not progress) as bar:
        fit = _Fit(denoiser, settings, clock.per_unit, bar)
        correction = fit.correction.to(next(packed.parameters()).device)
        # In this order the fit sees the output before it is corrected.
        handles = [packed.register_forward_hook(fit.compare, with_kwargs=True)]
        handles.append(install_correction(packed, correction))
        try:
            call_pipeline(twin, seeds, **{"steps": steps, "output_type": "latent", **(call or {})})
        finally:
            for handle in handles:
                handle.remove()
            delattr(packed, CORRECTION_NAME)
    return fit.result()


class _Moments:
    """Sums of a call over rows and positions, per channel, in float64; calls add up."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: Tensor | None = None

    def add(self, q: Tensor, f: Tensor) -> None:
        """Add the packed and the float output, each (C, N)."""
        q, f = q.double(), f.double()
        # The difference is summed on its own: q q - f f from sums would cancel.
        d = q - f
        sums = torch.stack([part.sum(1) for part in (q, d, q * q, q * d, d * d, f * f)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += q.shape[1]

    def fit(self) -> dict[str, Tensor]:
        """Return gain, shift and the mean squared errors, each (C,) float64."""
        assert self.sums is not None
        q, d, qq, qd, dd, ff = self.sums / self.count
        var_q, cov_qd = qq - q * q, qd - q * d
        # Cov(q, f) / Var(q), with f = q - d.
        raw = 1 - cov_qd / var_q.clamp(min=1e-300)
        raw = torch.where(var_q > 0, raw, torch.ones_like(q))
        gain = raw.clamp(MIN_GAIN, MAX_GAIN)
        # The error after it is (gain - 1) q + d, its mean is shifted away.
        excess = gain - 1
        after = excess**2 * var_q + 2 * excess * cov_qd + dd - d * d
        clipped = (raw != gain).double()
        fit = {"gain": gain, "shift": q - d - gain * q, "clipped": clipped}
        return fit | {"before": dd, "after": after, "power": ff}


class _Fit:
    """The hook of a fit and what it has found; the correction is kept up to date."""

    def __init__(
        self, denoiser: nn.Module, settings: CorrectionSettings, per_unit: float, bar: tqdm
    ) -> None:
        self.denoiser, self.settings = denoiser, settings
        self.per_unit, self.bar, self.correction = per_unit, bar, OutputCorrection()
        self.moments: dict[float, _Moments] = {}
        self.fits: dict[float, dict[str, Tensor]] = {}

    def compare(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Fit the time of this call; the correction's own hook comes after and applies it."""
        time = self._time(args, kwargs)
        q = output if isinstance(output, Tensor) else output[0]
        f = self.denoiser(*args, **kwargs)
        f = f if isinstance(f, Tensor) else f[0]
        axis = channel_axis(q)
        seen = bind_inputs(self.denoiser, args, kwargs).sample.shape[axis]
        # A learned variance is the second half; what conditions x_t comes after its channels.
        channels = q.shape[axis] // 2 if q.shape[axis] == 2 * seen else q.shape[axis]
        if channels > seen:
            raise QuantempoError(
                f"the network turns {seen} channels into {q.shape[axis]}; a correction needs an "
                "output with the channels of x_t: switch it off"
            )
        if not bool(torch.isfinite(q).all() & torch.isfinite(f).all()):
            raise QuantempoError(f"an output at time {time} is not finite; keep more in float")
        parts = (v.narrow(axis, 0, channels).transpose(0, axis) for v in (q, f))
        moments = self.moments.setdefault(time, _Moments())
        moments.add(*(part.reshape(channels, -1) for part in parts))
        self.fits[time] = moments.fit()
        times = sorted(self.fits)
        tables = {n: torch.stack([self.fits[t][n] for t in times]) for n in ("gain", "shift")}
        self.correction.replace(times=torch.tensor(times), **tables)
        self.bar.update(1)

    def result(self) -> Fitted:
        """Return the tables and what there is to say about them; log the latter."""
        if not self.fits:
            raise QuantempoError("the pipeline never called the denoiser; nothing was fitted")
        times = sorted(self.fits)
        fits = [self.fits[t] for t in times]
        clipped, gains = int(sum(float(fit["clipped"].sum()) for fit in fits)), self.correction.gain
        before = [float(fit["before"].sum() / fit["power"].sum()) for fit in fits]
        after = [float(fit["after"].sum() / fit["power"].sum()) for fit in fits]
        report = {"chains": self.settings.chains, "seed": self.settings.seed, "times": times}
        report |= {"gains": gains.numel(), "clipped_gains": clipped}
        report |= {"error_before": before, "error_after": after}
        means = (len(times), sum(before) / len(times), sum(after) / len(times))
        log.info("correction: %d times, error of the output %.3g before and %.3g after", *means)
        if clipped:
            limits = f"[{MIN_GAIN}, {MAX_GAIN}]"
            log.warning("%d of %d gains were clipped to %s", clipped, gains.numel(), limits)
        tensors = {name: value.cpu().clone() for name, value in self.correction.tables().items()}
        return Fitted(tensors, report)

    def _time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        t = (
            torch.as_tensor(timestep_of(args, kwargs, timestep_place(self.denoiser)))
            .detach()
            .cpu()
            .double()
            .reshape(-1)
        )
        if bool((t != t[0]).any()):
            raise QuantempoError(
                "a call mixes time-steps in its batch; corrections are fitted on samplers that "
                "take all images through the same times"
            )
        # float32, as the tables hold it: equal times must meet.
        return float((t[0] * self.per_unit).float())
