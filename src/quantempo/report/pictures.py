"""Pictures of the report: pairs of samples side by side with their difference, as data addresses.
Reads png files, knows nothing of models.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["compare", "write_pairs"]

SEEDS_SHOWN = 16
SMALLEST_SIDE, LARGEST_SIDE = 112, 256
DIFFERENCE_GAINS = (32, 16, 8, 4, 2, 1)


def compare(
    first: Path, second: Path, seeds: Sequence[str]
) -> tuple[list[tuple[str, str, str, str]], int, bool]:
    """Load pairs of pictures of the same seeds and show how they differ.

    Args:
        first: folder with a PNG file per seed.
        second: the same of the other model.
        seeds: file names without suffix; the first 16 are taken.

    Returns:
        (cells, gain, enlarged): per seed its name and three data addresses, first, second and
        |first - second| times the gain, which leaves 99 % of the differences unclipped; whether
        pictures were enlarged.
    """
    from PIL import Image

    pairs = []
    for seed in seeds[:SEEDS_SHOWN]:
        files = (first / f"{seed}.png", second / f"{seed}.png")
        pairs.append([np.asarray(Image.open(file).convert("RGB")) for file in files])
    differences = [np.abs(a.astype(np.int32) - b.astype(np.int32)) for a, b in pairs]
    peak = max(float(np.percentile(difference, 99)) for difference in differences)
    gain = next((g for g in DIFFERENCE_GAINS if g * peak <= 255), 1)
    cells = [
        (seed, _shown(a), _shown(b), _shown(np.clip(gain * d, 0, 255).astype(np.uint8)))
        for seed, (a, b), d in zip(seeds, pairs, differences, strict=False)
    ]
    return cells, gain, max(pairs[0][0].shape[:2]) < SMALLEST_SIDE


def write_pairs(first: Path, second: Path, target: Path, columns: int = 12) -> None:
    """Write one PNG: pictures of `first` in the upper row, of `second` with the same seeds below.

    Args:
        first, second: folders with a PNG file per seed, the same ones.
        target: file to write.
        columns: pictures in a row, the lowest seeds.
    """
    from PIL import Image

    seeds = sorted(int(path.stem) for path in first.glob("*.png"))[:columns]
    rows = [
        np.concatenate(
            [np.asarray(Image.open(folder / f"{seed}.png").convert("RGB")) for seed in seeds], 1
        )
        for folder in (first, second)
    ]
    whole = Image.fromarray(np.concatenate(rows))
    factor = max(1, 96 // (whole.height // 2))
    size = (whole.width * factor, whole.height * factor)
    whole.resize(size, Image.Resampling.NEAREST).save(target, "PNG", optimize=True)


def _png(image: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _shown(pixels: np.ndarray) -> str:
    """Return a PNG address, enlarged by a whole factor (nearest neighbour) or reduced to fit."""
    from PIL import Image

    image = Image.fromarray(pixels)
    side = max(image.size)
    factor = -(-SMALLEST_SIDE // side)
    if side > LARGEST_SIDE:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
    elif factor > 1:
        size = (image.width * factor, image.height * factor)
        image = image.resize(size, Image.Resampling.NEAREST)
    return _png(image)
