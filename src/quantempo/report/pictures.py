"""Pictures of the report: pairs of samples with their difference, as data addresses."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from quantempo.errors import QuantempoError
from quantempo.run_folder import RunFolder

__all__ = ["compare", "ranked", "seeds_of", "write_pairs"]

SMALLEST_SIDE, LARGEST_SIDE = 112, 256
DIFFERENCE_GAINS = (32, 16, 8, 4, 2, 1)


def seeds_of(first: Path, second: Path) -> list[str]:
    """Return the names without suffix of PNG files that both folders have, seeds in order."""
    found = {path.stem for path in first.glob("*.png")} & {p.stem for p in second.glob("*.png")}
    return sorted(found, key=lambda seed: (len(seed), seed))


def ranked(run: RunFolder) -> tuple[list[str], dict[str, float]]:
    """Return the seeds of pairs, the worst PSNR first where it was measured, and PSNR by seed."""
    metrics = run.read_json("metrics.json") if run.has("metrics.json") else {}
    found = zip(metrics.get("seeds", ()), metrics.get("psnr_db", ()), strict=False)
    psnr = {str(seed): value for seed, value in found}
    seeds = seeds_of(run / "samples/float", run / "samples/int8")
    return sorted(seeds, key=lambda seed: psnr.get(seed, np.inf)), psnr


def compare(
    first: Path, second: Path, seeds: Sequence[str]
) -> tuple[list[tuple[str, str, str, str]], int, bool]:
    """Load pairs of pictures of the same seeds and show how they differ.

    Folders hold a PNG file per seed. Returns (cells, gain, enlarged): per seed its name
    and three data addresses, first, second and |first - second| times the gain, which leaves 99 %
    of the differences unclipped; whether pictures were enlarged.
    """
    pairs = [(_pixels(first / f"{seed}.png"), _pixels(second / f"{seed}.png")) for seed in seeds]
    differences = [np.abs(a.astype(np.int32) - b.astype(np.int32)) for a, b in pairs]
    peak = max((float(np.percentile(d, 99)) for d in differences), default=0.0)
    gain = next((g for g in DIFFERENCE_GAINS if g * peak <= 255), 1)
    cells = [
        (seed, _shown(a), _shown(b), _shown(np.clip(gain * d, 0, 255).astype(np.uint8)))
        for seed, (a, b), d in zip(seeds, pairs, differences, strict=True)
    ]
    return cells, gain, any(max(a.shape[:2]) < SMALLEST_SIDE for a, _ in pairs)


def write_pairs(first: Path, second: Path, target: Path, columns: int = 12) -> None:
    """Write one PNG: `columns` pictures of `first`, below them those of `second`, equal seeds."""
    seeds = seeds_of(first, second)[:columns]
    rows = [
        np.concatenate([_pixels(folder / f"{seed}.png") for seed in seeds], 1)
        for folder in (first, second)
    ]
    whole = Image.fromarray(np.concatenate(rows))
    factor = max(1, 96 // (whole.height // 2))
    ImageOps.scale(whole, factor, Image.Resampling.NEAREST).save(target, "PNG", optimize=True)


def _pixels(path: Path) -> np.ndarray:
    """Return (H, W, 3) uint8."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise QuantempoError(f"cannot read {path} ({error}); sample it again") from error


def _shown(pixels: np.ndarray) -> str:
    """Return a PNG address, enlarged by a whole factor (nearest neighbour) or reduced to fit."""
    image = Image.fromarray(pixels)
    side = max(image.size)
    if side > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    elif side < SMALLEST_SIDE:
        image = ImageOps.scale(image, -(-SMALLEST_SIDE // side), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
