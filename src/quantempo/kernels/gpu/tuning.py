"""Which tile a contraction is cut into: a small model of measured times (layer L0).

    us = start + rounds (shared resident steps + alone steps + finish resident) + join slots

steps: of the main loop, BLOCK_C channels each; resident: programs on a multiprocessor at once;
rounds: tiles that one of them computes; slots: programs that share a tile. The coefficients are
fitted to 1,460 timings of 147 layer shapes (U-Nets of CIFAR and of Stable Diffusion 1.5, batch 1 to
256) on one H200; the tile chosen so, always one of those timed, took 2.2 % more time than the best
one on average, 23 % at worst.
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

    sides: input channels of the 1x1 segments; residual: whether an image is added; gated: whether
    one half of the channels is the gate of the other.
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
    residual: bool = False
    gated: bool = False

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


# (outs, pixels, channels, warps, programs): start, shared, finish, alone, join, side, wide, image.
# Added to `finish`: `side` for each side segment of a sum that is not split, infinite where its
# registers would spill, and `image` for a residual; to `shared`: `wide` for 3x3 kernels on images
# of 64 columns and more.
_MEASURED: dict[tuple[int, ...], tuple[float, ...]] = {
    (64, 16, 128, 4, 3): (2.71, 0.106, 0.805, 0.0, 0.148, math.inf, 0.0, 0.0),
    (64, 32, 128, 4, 3): (1.47, 0.0952, 1.32, 0.0368, 0.414, math.inf, 0.0, 0.144),
    (128, 32, 128, 4, 2): (1.33, 0.161, 1.61, 0.0, 0.608, 0.713, 0.0, 0.089),
    (128, 64, 128, 4, 2): (2.92, 0.172, 1.04, 0.0548, 0.715, 0.334, 0.119, 0.101),
    (128, 128, 64, 4, 2): (1.95, 0.257, 0.875, 0.0, 2.36, math.inf, 0.0325, 1.31),
    (128, 128, 128, 4, 2): (2.55, 0.297, 1.24, 0.0684, 2.15, math.inf, 0.174, 0.693),
    (128, 128, 128, 8, 1): (1.57, 0.00549, 4.59, 0.329, 0.966, 0.0, 0.102, 0.2),
    (128, 256, 64, 8, 1): (1.4, 0.0, 2.38, 0.375, 3.17, math.inf, 0.00582, 3.72),
    (128, 256, 128, 8, 1): (2.24, 0.646, 2.92, 0.0, 2.54, math.inf, 0.0248, 2.1),
}
_SPLITS = (1, 2, 4, 8)
# Stages of 128 channels that fit twice (or thrice) on a multiprocessor beside the output.
_STAGES = {(128, 128, 4): 3, (128, 128, 8): 3, (128, 256, 8): 3}


def _stages(outs: int, pixels: int, channels: int, warps: int) -> int:
    return _STAGES.get((outs, pixels, warps), 4) * (128 // channels)


def predict(problem: Problem, tile: Tile, processors: int) -> float:
    """Return the microseconds that a tile is expected to take, infinite if it cannot be used."""
    key = (tile.outs, tile.pixels, tile.channels, tile.warps, tile.programs)
    start, shared, finish, alone, join, side, wide, image = _MEASURED[key]
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
    if problem.sides and tile.splits == 1:
        finish += len(problem.sides) * side
    finish += image * problem.residual
    each = resident * (shared * steps + finish) + alone * steps
    return start + rounds * each + (join * slots if slots > 1 else 0.0)


def _measured(problem: Problem, tile: Tile, processors: int) -> bool:
    """Return whether the model knows such a case: it is not to be asked about others."""
    if tile.channels == 64 and problem.channels % 128 == 0:
        return False
    if tile.outs == 64 and problem.sides:
        return False
    if (tile.outs, tile.pixels, tile.warps) == (128, 128, 8) and not problem.sides:
        return False
    if problem.gated and (tile.outs, tile.warps, tile.splits) != (128, 4, 1):
        # Each of four warps holds as many gates as values.
        return False
    tiles = problem.tiles(tile)
    if tile.splits > 1:
        few = tiles <= 0.7 * processors and tiles * tile.splits <= 2.2 * processors
        return few and problem.steps(tile.channels) >= 2 * tile.splits
    if tile.pixels < 64:
        return tiles <= processors
    return tile.pixels > 64 or tiles <= 3 * processors


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
    return replace(tile, stages=_stages(tile.outs, tile.pixels, tile.channels, tile.warps))
