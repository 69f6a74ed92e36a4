"""Which tile a contraction is cut into: a small model of measured times (layer L0).

    us = start + rounds (shared resident steps + alone steps + finish resident) + join slots

steps: of the main loop, BLOCK_C channels each; resident: programs on a multiprocessor at once;
rounds: tiles that one of them computes; slots: programs that share a tile. The coefficients are
fitted to 1,335 timings of 147 layer shapes (U-Nets of CIFAR and of Stable Diffusion 1.5, batch 1 to
256) on one H200; the tile chosen so took 1.9 % more time than the best one on average, 29 % at
worst.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch

__all__ = ["Problem", "Tile", "choose_tile", "multiprocessors", "predict", "tile_pixels"]


@dataclass(frozen=True)
class Tile:
    """Sizes of one tile and how it is run.

    outs x pixels are computed from `channels` at a time; `splits` programs share the sum;
    `programs` run on a multiprocessor at once.
    """

    outs: int
    pixels: int
    channels: int
    warps: int
    stages: int
    splits: int = 1
    programs: int = 2


@dataclass(frozen=True)
class Problem:
    """One contraction: `phases` times images x height x width pixels, `outs` channels of result.

    sides: input channels of the 1x1 segments.
    """

    images: int
    height: int
    width: int
    phases: int
    outs: int
    channels: int
    kernel: int
    stride: int
    sides: tuple[int, ...] = ()

    def steps(self, block: int) -> int:
        """Return the steps of the main loop, `block` channels of one tap each."""
        return self.kernel**2 * -(-self.channels // block)

    def all_steps(self, block: int) -> int:
        """Return the steps of all segments."""
        return self.steps(block) + sum(-(-side // block) for side in self.sides)

    def tiles(self, tile: Tile) -> int:
        """Return the number of tiles."""
        n, h, w = tile_pixels(tile.pixels, self.images, self.height, self.width)
        count = -(-self.images // n) * -(-self.height // h) * -(-self.width // w)
        return self.phases * count * -(-self.outs // tile.outs)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 without a GPU (interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tile_pixels(pixels: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """Return (images, rows, columns), powers of two whose product is `pixels`.

    Of all such boxes the one that covers (images, height, width) with the fewest pixels; of equals
    the widest, whose rows are contiguous in memory.
    """
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [
        (pixels // (wide * high), high, wide)
        for wide in powers
        for high in powers
        if wide * high <= pixels
    ]

    def key(box: tuple[int, int, int]) -> tuple[int, int, int]:
        n, h, w = box
        covered = -(-images // n) * n * -(-height // h) * h * -(-width // w) * w
        return covered, -w, -h

    return min(boxes, key=key)


# (outs, pixels, channels, warps, programs): start, shared, finish, alone, join, side, wide. `side`
# is added to `finish` for each side segment, infinite where registers would spill; `wide` to
# `shared` for 3x3 kernels on images of 64 columns and more.
_MEASURED: dict[tuple[int, ...], tuple[float, ...]] = {
    (64, 16, 128, 4, 3): (2.5, 0.0575, 0.613, 0.171, 0.231, 0.03, 0.0),
    (64, 32, 128, 4, 3): (2.77, 0.0405, 0.454, 0.2, 0.39, 0.08, 0.0),
    (64, 64, 128, 4, 3): (3.47, 0.081, 0.312, 0.163, 0.416, 0.557, 0.0),
    (64, 128, 128, 4, 2): (3.92, 0.0847, 0.648, 0.184, 0.681, 0.513, 0.0186),
    (128, 16, 128, 4, 2): (2.43, 0.0985, 0.561, 0.178, 0.379, 0.0489, 0.0),
    (128, 32, 128, 4, 2): (2.81, 0.0848, 0.568, 0.185, 0.576, 0.446, 0.0),
    (128, 64, 128, 4, 2): (3.17, 0.0916, 0.859, 0.194, 0.783, 0.389, 0.0947),
    (128, 128, 64, 4, 2): (3.72, 0.101, 1.58, 0.147, 1.35, math.inf, 0.0639),
    (128, 128, 128, 4, 2): (2.89, 0.242, 1.65, 0.12, 1.75, math.inf, 0.108),
    (128, 128, 128, 8, 1): (3.74, 0.383, 4.05, 0.0, 0.729, 0.49, 0.127),
    (128, 256, 64, 8, 1): (2.54, 0.407, 3.68, 0.0, 2.57, math.inf, 0.0178),
    (128, 256, 128, 8, 1): (2.32, 0.679, 4.05, 0.0, 2.36, math.inf, 0.0),
}
_SPLITS = (1, 2, 4, 8)
# Stages of 128 channels that fit twice (or thrice) on a multiprocessor beside the output.
_STAGES = {(128, 128, 4): 3, (128, 128, 8): 3, (128, 256, 8): 3}


def _stages(outs: int, pixels: int, channels: int, warps: int) -> int:
    return _STAGES.get((outs, pixels, warps), 4) * (128 // channels)


def predict(problem: Problem, tile: Tile, processors: int) -> float:
    """Return the microseconds that a tile is expected to take, infinite if it cannot be used."""
    key = (tile.outs, tile.pixels, tile.channels, tile.warps, tile.programs)
    start, shared, finish, alone, join, side, wide = _MEASURED[key]
    slots = tile.splits + len(problem.sides) if tile.splits > 1 else 1
    work = problem.tiles(tile) * slots
    rounds = -(-work // (processors * tile.programs))
    resident = min(tile.programs, -(-work // processors))
    if tile.splits > 1:
        longest = max((-(-c // tile.channels) for c in problem.sides), default=0)
        steps = max(-(-problem.steps(tile.channels) // tile.splits), longest)
    else:
        steps = problem.all_steps(tile.channels)
    broad = tile_pixels(tile.pixels, problem.images, problem.height, problem.width)[2] >= 64
    if problem.kernel == 3 and broad:
        shared += wide
    if problem.sides:
        finish += len(problem.sides) * side
    each = resident * (shared * steps + finish) + alone * steps
    return start + rounds * each + (join * slots if slots > 1 else 0.0)


def _measured(problem: Problem, tile: Tile, processors: int) -> bool:
    """Return whether the model knows such a case: it is not to be asked about others."""
    tiles = problem.tiles(tile)
    if tile.splits > 1:
        few = tiles <= 0.7 * processors and tiles * tile.splits <= 2.2 * processors
        return few and problem.steps(tile.channels) >= 2 * tile.splits
    if tile.pixels < 64:
        return tiles <= processors
    if (tile.outs, tile.pixels, tile.warps) == (128, 128, 8):
        return bool(problem.sides)
    small = tile.outs * tile.pixels < 128 * 128
    return not small or bool(problem.sides) or tiles <= 3 * processors


@functools.cache
def choose_tile(problem: Problem, path: str, processors: int) -> Tile:
    """Return the tile for a problem on a path of `launch.PATHS`, for a GPU of that many parts."""
    if path != "hopper":
        # One program a multiprocessor, whose tensor cores wait for each other little.
        wide = Tile(128, 128, 64, 8, 3, programs=1)
        small = problem.outs <= 64 or problem.tiles(wide) < processors or bool(problem.sides)
        return Tile(64, 64, 64, 4, 3, programs=1) if small else wide
    best, tile = math.inf, None
    for outs, pixels, channels, warps, programs in _MEASURED:
        if problem.stride == 2 and problem.channels % channels:
            continue
        for splits in _SPLITS:
            one = Tile(outs, pixels, channels, warps, 2, splits, programs)
            if _measured(problem, one, processors):
                time = predict(problem, one, processors)
                best, tile = (time, one) if time < best else (best, tile)
    assert tile is not None
    # A program looks STAGES - 1 steps ahead, and never further than one tile.
    most = problem.all_steps(tile.channels) + 1
    stages = _stages(tile.outs, tile.pixels, tile.channels, tile.warps)
    return replace(tile, stages=max(2, min(stages, most)))
