"""Fit corrections on packed pipelines, pack them, load them and sample."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantempo.calibration.correction import Fitted, fit_correction
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import call_pipeline, swap_scheduler
from quantempo.pipeline import quality
from quantempo.pipeline import stages as pipeline
from quantempo.quantized.correction import (
    OutputCorrection,
    find_correction,
    install_correction,
)
from quantempo.recipe import CorrectionSettings
from tests.packed import packed, recipe, saved

STEPS = 5


def pipes(kind: str, scheduler: str | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Return the float pipeline, the packed pipeline and the arguments of their calls."""
    made = packed(kind)
    found = [load_pipeline(made.source), load_pipeline(made.folder)]
    if scheduler:
        found = [swap_scheduler(pipe, scheduler) for pipe in found]
    attach(denoiser_of(found[1])[1], "simulated")
    return found[0], found[1], made.call


def fit(kind: str, scheduler: str | None = None, **settings: Any) -> tuple[Fitted, Any, Any]:
    pipe, other, call = pipes(kind, scheduler)
    wanted = CorrectionSettings(**{"chains": 4, "seed": 7, **settings})
    return fit_correction(pipe, denoiser_of(other)[1], wanted, steps=STEPS, call=call), pipe, other


def test_gains_are_least_squares_on_the_corrected_trajectory() -> None:
    found, pipe, other = fit("unconditional")
    tables, scheduler = found.tensors, pipe.scheduler
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(7 + i) for i in range(4)]
    x = torch.cat([torch.randn((1, 3, 16, 16), generator=g) for g in generators])
    assert tables["times"].tolist() == sorted(float(t) for t in scheduler.timesteps)
    for t in scheduler.timesteps:
        row = tables["times"].tolist().index(float(t))
        with torch.no_grad():
            q, f = other.unet(x, t).sample, pipe.unet(x, t).sample
        for c in range(3):
            # numpy's own least squares on the inputs of this very step, in float64.
            columns = np.stack([q[:, c].numpy().ravel(), np.ones(q[:, c].numel())], 1)
            wanted = np.linalg.lstsq(columns.astype(np.float64), f[:, c].numpy().ravel())[0]
            got = (float(tables["gain"][row, c]), float(tables["shift"][row, c]))
            # The trajectories part by float32 roundings of earlier steps.
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5)
            q[:, c] = got[0] * q[:, c] + got[1]
        x = scheduler.step(q, t, x).prev_sample
    report = found.report
    pairs = zip(report["error_after"], report["error_before"], strict=True)
    assert all(after <= before for after, before in pairs)
    assert report["clipped_gains"] == 0 and report["gains"] == 3 * STEPS


def test_nothing_is_left_on_the_networks() -> None:
    pipe, other, _ = pipes("unconditional")
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        before = [p.unet(x, t).sample for p in (pipe, other)]
        hooks = [dict(other.unet._forward_hooks), dict(other.unet._forward_pre_hooks)]
        settings = CorrectionSettings(chains=3)
        first = fit_correction(pipe, other.unet, settings, steps=STEPS)
        again = fit_correction(pipe, other.unet, settings, steps=STEPS)
        after = [p.unet(x, t).sample for p in (pipe, other)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert hooks == [dict(other.unet._forward_hooks), dict(other.unet._forward_pre_hooks)]
    assert find_correction(other.unet) is None
    assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)


@pytest.mark.parametrize(
    ("kind", "scheduler", "points", "channels"),
    [
        # Two stages a step at the same times, but for the last.
        ("unconditional", "heun", STEPS, 3),
        # Guidance: two halves in a batch; a learned variance: four channels of eight.
        ("text", None, STEPS, 4),
        ("dit", None, STEPS, 4),
    ],
)
def test_any_sampler_and_kind_of_network(
    kind: str, scheduler: str | None, points: int, channels: int
) -> None:
    found, _, other = fit(kind, scheduler, chains=2)
    assert found.tensors["gain"].shape == found.tensors["shift"].shape == (points, channels)
    assert sum(found.report["error_after"]) < sum(found.report["error_before"])
    network = denoiser_of(other)[1]
    install_correction(network, OutputCorrection.of(found.tensors))
    # Another step count than the fitted one: interpolated.
    call = packed(kind).call
    assert np.isfinite(call_pipeline(other, [1, 2], steps=3, output_type="latent", **call)).all()


def rigged(pipe: Any, amount: float) -> None:
    """Add noise to the packed network's output, the same for the same call."""
    calls = [0]

    def spoil(*args: Any) -> Any:
        output = args[-1]
        g = torch.Generator().manual_seed(100 + calls[0])
        calls[0] += 1
        sample = output if isinstance(output, Tensor) else output[0]
        spoiled = sample + amount * torch.randn(sample.shape, generator=g)
        return (spoiled,) if isinstance(output, tuple) else type(output)(sample=spoiled)

    pipe.unet.register_forward_hook(spoil)


def test_affine_shrinks_a_noisy_output_and_the_guard_holds() -> None:
    pipe, other, _ = pipes("unconditional")
    rigged(other, 10.0)
    settings = CorrectionSettings(chains=4)
    found = fit_correction(pipe, other.unet, settings, steps=STEPS)
    # The least-squares gain would be near 0.
    assert found.report["clipped_gains"] == 3 * STEPS
    assert bool((found.tensors["gain"] == 0.5).all())


@functools.cache
def corrected() -> Path:
    """Run the main line of the tiny pipeline with a correction; return the packed folder."""
    run = Path(tempfile.mkdtemp(dir=packed("unconditional").run.parent)) / "run"
    chosen = recipe().override("correction", affine=True)
    session = pipeline.load(saved("unconditional"), run, chosen)
    for stage in (pipeline.trace, pipeline.calibrate, pipeline.search, pipeline.round_weights):
        stage(session)
    pipeline.correct(session)
    return pipeline.pack(session)


def test_a_correction_is_saved_and_loaded(tmp_path: Path) -> None:
    folder = corrected()
    pipe = quality.open_model(folder, engine="simulated")
    plain = quality.open_model(packed("unconditional").folder, engine="simulated")
    found = find_correction(pipe.unet)
    assert found is not None and found.gain.dtype == torch.float32
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, t).sample, found(plain.unet(x, t).sample, t))
    images = [call_pipeline(p, [1, 2], steps=4) for p in (pipe, plain)]
    assert not np.array_equal(*images)
    # Saved again and loaded again, in half precision too, the tables are the same bits.
    pipe.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = find_correction(load_pipeline(tmp_path, dtype).unet)
        assert again is not None and again.settings == found.settings
        for name, value in found.tables().items():
            assert torch.equal(again.get_buffer(name), value)


def test_what_cannot_be_fitted_is_refused() -> None:
    pipe, _, _ = pipes("unconditional")
    with pytest.raises(QuantempoError, match="expected a packed denoiser"):
        fit_correction(pipe, pipe.unet, CorrectionSettings(), steps=STEPS)
