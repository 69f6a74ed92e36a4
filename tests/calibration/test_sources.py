"""Sources of x_t: what stands in the rows, that nothing else moved, resuming, refusals."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.sources import SOURCES, replace_rows
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.sampling import swap_scheduler
from quantempo.pipeline import stages as pipeline
from tests.packed import recipe, saved
from tests.tiny import tiny_dit, tiny_flux, tiny_text, tiny_unconditional

PLAN: dict[str, Any] = {"steps": 6, "chains": 5, "picks": 3, "seed": 70, "batch_size": 2}
PLAN["time_sampler"] = make_time_sampler("uniform")


def pictures(n: int = 40, size: int = 16) -> np.ndarray:
    """Return n constant images, image i of grey level i in channel 0, so that each is known."""
    images = np.zeros((n, size, size, 3), dtype=np.uint8)
    images[..., 0] = np.arange(n)[:, None, None]
    images[..., 2] = 255
    return images


def run(folder: Path, pipe: Any = None, **changes: Any) -> TraceSet:
    pipe = pipe or tiny_unconditional()
    return trace(pipe, pipe.unet, folder, **{**PLAN, **changes})


def x_t(data: TraceSet) -> Tensor:
    return data.column("x_t")


def alpha_bar(t: Tensor) -> Tensor:
    """Return abar of linear betas, T = 1000, from its definition; linear between integers."""
    table = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000, dtype=np.float64))
    return torch.from_numpy(np.interp(t.double().numpy(), np.arange(1000), table))


@pytest.mark.parametrize("source", SOURCES.names())
def test_a_source_moves_nothing_but_x_t(tmp_path: Path, source: str) -> None:
    plain = run(tmp_path / "plain")
    data = run(tmp_path / source, source=source, images=pictures())
    for name in ("t", "chain", "pick", "half", "call", "target"):
        assert torch.equal(data.column(name), plain.column(name)), name
    assert data.column("x_t").dtype == torch.float32
    same = torch.equal(x_t(data), x_t(plain))
    assert same == (source == "trajectory")


def test_raw_rows_are_images_and_none_repeats(tmp_path: Path) -> None:
    rows = x_t(run(tmp_path / "raw", source="raw", images=pictures()))
    level = ((rows[:, 0] + 1) * 127.5).round()
    assert torch.equal(level.amin((1, 2)), level.amax((1, 2)))
    assert level.min() >= 0 and level.max() < 40
    assert bool((rows[:, 1] == -1).all()) and bool((rows[:, 2] == 1).all())
    chain = level[:, 0, 0].view(5, 3)
    assert len(chain.unique()) == chain.numel()


def test_all_images_are_used_before_one_repeats(tmp_path: Path) -> None:
    rows = x_t(run(tmp_path / "raw", source="raw", images=pictures(3), batch_size=5))
    level = ((rows[:, 0, 0, 0] + 1) * 127.5).round()
    assert torch.bincount(level.long()).tolist() == [5, 5, 5]


@pytest.mark.parametrize("source", ["raw", "noise", "mimic"])
def test_how_many_chains_run_together_does_not_matter(tmp_path: Path, source: str) -> None:
    traces = [
        x_t(run(tmp_path / str(size), source=source, images=pictures(), batch_size=size))
        for size in (2, 5)
    ]
    assert torch.equal(*traces)


def test_noise_is_standard_normal_whatever_the_time(tmp_path: Path) -> None:
    """11,520 numbers: 5 standard errors of mean and variance (false alarms 1e-6 each)."""
    rows = x_t(run(tmp_path / "noise", source="noise")).double()
    n = rows.numel()
    assert abs(float(rows.mean())) < 5 / n**0.5
    assert abs(float(rows.var()) - 1) < 5 * (2 / n) ** 0.5
    # No two rows are alike, and none is what a chain started from.
    assert len(torch.unique(rows[:, 0, 0, 0])) == len(rows)
    starts = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(70 + c)) for c in (0,)]
    assert float((rows - starts[0]).abs().amax((1, 2, 3)).min()) > 0.5


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler"])
def test_mimic_has_signal_and_noise_of_the_received_time(tmp_path: Path, scheduler: str) -> None:
    """Twice the same seed with two images of constant grey gives signal and noise number by number.

    Euler's default times are fractional.
    """
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    black, white = (np.full((1, 16, 16, 3), level, dtype=np.uint8) for level in (0, 255))
    dark = run(tmp_path / "dark", pipe, source="mimic", images=black)
    bright = run(tmp_path / "bright", pipe, source="mimic", images=white)
    assert dark.timesteps.is_floating_point() == (scheduler == "euler")
    abar = alpha_bar(dark.timesteps).view(-1, 1, 1, 1)
    low, high = x_t(dark).double(), x_t(bright).double()
    # A few float32 roundings of numbers up to 5; abar itself is a float32 product of T factors.
    assert float(((high - low) / 2 - abar.sqrt()).abs().max()) < 2e-5
    eps = (high + low) / 2 / (1 - abar).sqrt()
    n = eps.numel()
    assert abs(float(eps.mean())) < 5 / n**0.5
    assert abs(float(eps.var()) - 1) < 5 * (2 / n) ** 0.5


def test_fractional_times_take_abar_from_both_neighbours() -> None:
    rows = {
        "x_t": torch.zeros(3, 1, 1, 1),
        "t": torch.tensor([0.25, 1.0, 9.0]),
        "half": torch.zeros(3, dtype=torch.int64),
        "chain": torch.zeros(3, dtype=torch.int64),
        "pick": torch.arange(3),
    }
    table = torch.tensor([0.9, 0.5])
    white = np.full((1, 1, 1, 1), 255, dtype=np.uint8)
    black = np.zeros_like(white)
    high = replace_rows("mimic", rows, table, white, 3).double()
    low = replace_rows("mimic", rows, table, black, 3).double()
    signal = ((high - low) / 2).flatten()
    wanted = torch.tensor([0.8, 0.5, 0.5], dtype=torch.float64).sqrt()
    assert float((signal - wanted).abs().max()) < 1e-6


def test_both_halves_of_guidance_get_the_same_noise(tmp_path: Path) -> None:
    pipe = tiny_text()
    data = run(tmp_path / "noise", pipe, source="noise", call={"prompt": ["a", "b"]})
    rows, half = x_t(data), data.column("half")
    assert torch.equal(rows[half == 0], rows[half == 1])
    assert rows.shape[1:] == (4, 8, 8)


@pytest.mark.parametrize("source", ["mimic", "raw", "noise"])
def test_the_same_seed_gives_the_same_bits_and_a_torn_trace_too(tmp_path, source):
    first = run(tmp_path / "a", source=source, images=pictures())
    again = run(tmp_path / "b", source=source, images=pictures())
    names = [file.name for file in sorted((tmp_path / "a").iterdir())]
    assert len(names) == 3
    (tmp_path / "b" / names[1]).unlink()
    again = run(tmp_path / "b", source=source, images=pictures())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = run(tmp_path / "c", source=source, images=pictures(), seed=71)
    assert torch.equal(x_t(first), x_t(again)) and not torch.equal(x_t(first), x_t(other))


def test_a_trace_of_another_source_or_of_other_images_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "trace", source="raw", images=pictures())
    with pytest.raises(QuantempoError, match='source "raw", now "noise"'):
        run(tmp_path / "trace", source="noise", images=pictures())
    with pytest.raises(QuantempoError, match="other settings \\(images"):
        run(tmp_path / "trace", source="raw", images=255 - pictures())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "row"}, "unknown source of x_t 'row'; did you mean 'raw'"),
        ({"source": "raw"}, "'raw' needs images; pass a folder"),
        ({"source": "mimic"}, "'mimic' needs images; pass a folder"),
        ({"source": "raw", "images": pictures()[..., :1]}, r"\(1, 16, 16\).*\(3, 16, 16\)"),
        ({"source": "mimic", "images": pictures(size=8)}, r"\(3, 8, 8\).*\(3, 16, 16\)"),
        ({"source": "raw", "images": pictures() / 255.0}, "float64.*expected uint8"),
        ({"source": "raw", "images": pictures()[:0]}, r"\(0, 16, 16, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(QuantempoError, match=message):
        run(tmp_path / "trace", **changes)
    assert not (tmp_path / "trace").exists()


def test_images_go_through_the_vae_and_the_network_does_not_run(tmp_path: Path) -> None:
    """x_t less its noise, which the source of that name has alone, is the latents of a picture."""
    flow, call = tiny_flux(4)
    cases = (tiny_text(), {"prompt": ["a", "b"]}), (flow, call), (tiny_dit(), {"class_labels": [3]})
    for number, (pipe, given) in enumerate(cases):
        denoiser = denoiser_of(pipe)[1]
        seen, images = [], pictures(9, call["height"])
        pipe.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
        denoiser.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        found = {}
        with patch.object(denoiser, "forward", Mock(wraps=denoiser.forward)) as forward:
            for source in ("noise", "mimic"):
                folder = tmp_path / f"{number}-{source}"
                more = {"source": source, "images": images, "call": given}
                found[source] = trace(pipe, denoiser, folder, **{**PLAN, **more})
            # Twice for the probe, and at most once a batch of five chains by two.
            assert forward.call_count <= 2 * (2 + 3) < len(seen)
        t = found["mimic"].timesteps.view(-1, *[1] * (x_t(found["mimic"]).ndim - 1)).double()
        noise, signal = t, 1 - t
        if pipe is not flow:
            abar = pipe.scheduler.alphas_cumprod.double()[t.long()]
            noise, signal = (1 - abar).sqrt(), abar.sqrt()
        left = x_t(found["mimic"]).double() - noise * x_t(found["noise"])
        given = torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1
        with torch.no_grad():
            latents = (pipe.vae.encode(given).latent_dist.mode() - 0.25) * 0.5
        if pipe is flow:
            latents = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
            latents = latents.flatten(3).flatten(1, 2)
        away = (left[:, None] - signal[:, None] * latents).flatten(2).abs().amax(2).amin(1)
        # Some float32 roundings of numbers up to 5.
        assert float(away.max()) < 1e-5 and float(signal.min()) < 0.5


def test_mimic_needs_a_schedule(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    flow = SimpleNamespace(scheduler=SimpleNamespace())
    with pytest.raises(QuantempoError, match=r"needs abar_t.*SimpleNamespace"):
        trace(flow, pipe.unet, tmp_path / "t", source="mimic", images=pictures(), **PLAN)


def test_the_main_line_reads_images_from_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, image in enumerate(pictures(4, size=20)):
        Image.fromarray(image).save(folder / f"{i}.png")
    raw = recipe().override("trace", source="raw")
    with pytest.raises(QuantempoError, match="'raw' needs images"):
        pipeline.load(saved("unconditional"), tmp_path / "none", raw)
    assert not (tmp_path / "none").exists()
    session = pipeline.load(saved("unconditional"), tmp_path / "run", raw, data=folder)
    rows = x_t(pipeline.trace(session))
    assert rows.shape[1:] == (3, 16, 16) and bool((rows[:, 2] == 1).all())
    assert not pipeline.reopen(tmp_path / "run").stale("trace")
    with pytest.raises(QuantempoError, match="other settings"):
        pipeline.load(saved("unconditional"), tmp_path / "run", raw, data=tmp_path)
    # A source without images does not care where they are.
    plain = pipeline.load(saved("unconditional"), tmp_path / "plain", recipe())
    with_data = pipeline.load(saved("unconditional"), tmp_path / "plain", recipe(), data=folder)
    assert plain.key("trace") == with_data.key("trace") != session.key("trace")
