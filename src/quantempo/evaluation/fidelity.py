"""Paired fidelity: PSNR and SSIM of images of equal seeds, SQNR of outputs on equal inputs."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantempo.core import ranks
from quantempo.errors import QuantempoError
from quantempo.evaluation.features import check_images
from quantempo.evaluation.scores import import_torchmetrics

__all__ = [
    *("PSNR_CAP_DB", "SQNR_CAP_DB", "check_pairs", "eps_sqnr", "sqnr_pairs"),
    *("prediction", "psnr_db", "sqnr_db", "ssim"),
]

# One level of difference in one value of a 32 x 32 x 3 image is 83 dB, of a 256 x 256 x 3 one
# 101 dB: the cap only meets (almost) identical images.
PSNR_CAP_DB = 100.0

# Rounding an exact result to float32 leaves about 150 dB; identical outputs get this value.
SQNR_CAP_DB = 150.0

# torchmetrics' Gaussian window (sigma 1.5) is 11 wide and pads by reflection.
SSIM_MIN_SIDE = 6


def check_pairs(first: np.ndarray, second: np.ndarray) -> None:
    """Raise QuantempoError unless two sets of images (`check_images`) can be compared in pairs."""
    check_images(first, "the first image set")
    check_images(second, "the second image set")
    if first.shape != second.shape:
        text = f"cannot pair image sets of shapes {first.shape} and {second.shape}"
        raise QuantempoError(f"{text}; generate both from the same seeds at the same size")


def psnr_db(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return (n,) float64: 10 log10(255^2 / mean((first_i - second_i)^2)), at most `PSNR_CAP_DB`.

    Of images (`check_pairs`). Error: exact integer differences, then one float64 logarithm.
    """
    check_pairs(first, second)
    # int32: the square of a difference of two bytes does not fit int16.
    difference = first.astype(np.int32) - second.astype(np.int32)
    mse = np.square(difference).reshape(len(first), -1).mean(axis=1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.minimum(10.0 * np.log10(255.0**2 / mse), PSNR_CAP_DB)


def ssim(first: np.ndarray, second: np.ndarray, batch: int = 64, device: str = "cpu") -> np.ndarray:
    """Return (n,) float64, the structural similarity of pairs of images, 1 when equal.

    Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, data range 255, mean over pixels and
    channels, in float64, `batch` pairs at a time.
    Raises QuantempoError: see `check_pairs`; images too small for the window; no torchmetrics.
    Source: Wang et al., Image quality assessment, 2004, https://doi.org/10.1109/TIP.2003.819861
    """
    check_pairs(first, second)
    if min(first.shape[1:3]) < SSIM_MIN_SIDE:
        text = f"SSIM needs images of at least {SSIM_MIN_SIDE} x {SSIM_MIN_SIDE} pixels"
        raise QuantempoError(f"{text}; got {first.shape[1]} x {first.shape[2]}")
    library = import_torchmetrics("torchmetrics.functional.image")
    compare = library.structural_similarity_index_measure
    rows = []
    whole = zip(*(torch.from_numpy(x).split(batch) for x in (first, second)), strict=True)
    for some in ranks.part(list(whole)):
        pair = (images.to(device).permute(0, 3, 1, 2).double() for images in some)
        rows.append(compare(*pair, sigma=1.5, data_range=255.0, reduction="none").reshape(-1))
    return torch.cat(ranks.joined(rows)).cpu().numpy()


def prediction(output: Any) -> Tensor:
    """Return a denoiser's tensor: itself, a list of its rows, the head of a tuple, or `.sample`."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, list) and output and all(isinstance(row, Tensor) for row in output):
        return torch.stack(output)
    parts = list(output.values()) if isinstance(output, Mapping) else output
    if isinstance(parts, tuple | list) and parts:
        return prediction(parts[0])
    if isinstance(getattr(output, "sample", None), Tensor):
        return output.sample
    text = f"a denoiser returned {type(output).__name__}; expected a tensor, a tuple that starts"
    raise QuantempoError(f"{text} with one, or an object with a tensor `.sample`")


def _powers(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return per row sum(reference^2) and sum((reference - other)^2), float64."""
    if reference.shape != other.shape:
        text = f"got outputs of shapes {tuple(reference.shape)} and {tuple(other.shape)} for the"
        raise QuantempoError(f"{text} same inputs; compare two versions of one model")
    rows = reference.shape[0]
    # float64 before the difference: at 60 dB and above float32 sums lose the noise.
    exact = reference.detach().double().reshape(rows, -1)
    noise = exact - other.detach().double().reshape(rows, -1)
    return exact.square().sum(dim=1), noise.square().sum(dim=1)


def _keys(timestep: Tensor | float, rows: int, bins: Sequence[float] | None) -> list[float]:
    values = torch.as_tensor(timestep).detach().double().cpu().reshape(-1)
    if values.numel() not in (1, rows):
        text = f"got {values.numel()} times for {rows} rows"
        raise QuantempoError(f"{text}; give one, or one per row")
    values = values.expand(rows) if values.numel() == 1 else values
    if bins is None:
        return values.tolist()
    edges = torch.as_tensor(list(bins), dtype=torch.float64)
    # The key of a bin is its centre; a value outside goes to the nearest bin.
    index = (torch.bucketize(values, edges, right=True) - 1).clamp(0, len(edges) - 2)
    return ((edges[index] + edges[index + 1]) / 2).tolist()


@torch.no_grad()
def eps_sqnr(
    float_denoiser: Callable[..., Any], int8_denoiser: Callable[..., Any],
    batches: Iterable[tuple[tuple[Any, ...], dict[str, Any], Tensor | float]], *,
    bins: Sequence[float] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Compare two denoisers on the same recorded inputs, time-step by time-step.

    SQNR(t) = 10 log10(sum |eps|^2 / sum |eps - eps_q|^2) over all rows with that time-step, at most
    `SQNR_CAP_DB`. Errors do not accumulate along the trajectory: both see the float model's x_t.

    batches: (args, kwargs, t), t a number, () or (B,) tensor of training time-steps, read once;
    bins: increasing edges of time intervals, whose centres are then the t; None: distinct t.
    Returns {"t": ascending, "sqnr_db": one value per t}, plain floats.
    Raises QuantempoError: no batch, outputs of different shapes, not finite, or all zero in float.
    Error: sums in float64; relative error of each power below 1e-12.
    """
    if bins is not None and (len(bins) < 2 or any(b <= a for a, b in pairwise(bins))):
        raise QuantempoError(f"got time bin edges {list(bins)}; expected at least 2, increasing")
    found: dict[float, Tensor] = {}
    for args, kwargs, timestep in batches:
        exact = prediction(float_denoiser(*args, **kwargs))
        # Cloned: an engine may hand out the same output buffer on its next call.
        powers = _powers(exact.clone(), prediction(int8_denoiser(*args, **kwargs)))
        keys = _keys(timestep, exact.shape[0], bins)
        for key, both in zip(keys, torch.stack(powers, 1).cpu(), strict=True):
            if not both.isfinite().all():
                text = f"got NaN or infinity at t = {key:g}"
                raise QuantempoError(f"{text}; check the denoiser's scales")
            found[key] = found.get(key, 0) + both
    if not found:
        raise QuantempoError("got no batches to compare denoisers on; trace some inputs first")
    steps = sorted(found)
    for t in steps:
        if found[t][0] == 0:
            raise QuantempoError(f"the float denoiser returned only zeros at t = {t:g}; check it")
    return {"t": steps, "sqnr_db": [_decibels(*found[t].tolist()) for t in steps]}


def _decibels(signal: float, noise: float) -> float:
    if noise == 0.0:
        return SQNR_CAP_DB
    return min(10.0 * math.log10(signal / noise), SQNR_CAP_DB) if signal else -math.inf


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Return 10 log10(sum reference^2 / sum (reference - other)^2), at most `SQNR_CAP_DB`."""
    signal, noise = _powers(reference, other)
    return _decibels(float(signal.sum()), float(noise.sum()))


def sqnr_pairs(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the SQNR of each pair; that of nothing but noise is minus the cap."""
    pairs = zip(torch.from_numpy(first).split(1), torch.from_numpy(other).split(1), strict=True)
    return np.clip([sqnr_db(*pair) for pair in pairs], -SQNR_CAP_DB, SQNR_CAP_DB)
