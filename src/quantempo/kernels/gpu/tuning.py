"""Which tile a contraction is cut into: measured rules (layer L0).

A program needs about a microsecond to start, a step of its loop two thirds of one, whatever else
runs; so few programs with long loops are split, and many programs take the largest tile of which
two fit on a multiprocessor.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

__all__ = ["Problem", "Tile", "choose_tile", "multiprocessors", "tile_pixels"]


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
        """Return the steps of the main loop, and those of the sides, with `block` channels each."""
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


@functools.cache
def choose_tile(problem: Problem, path: str, processors: int) -> Tile:
    """Return the tile for a problem on a path of `launch.PATHS`, for a GPU of that many parts."""
    block = 64 if problem.channels % 128 and problem.channels % 64 == 0 else 128
    if problem.channels <= 64 or (problem.stride == 2 and problem.channels % 128):
        block = 64
    if path == "pointers":
        tile = Tile(128, 128, 64, 8, 3, programs=1)
        if problem.outs <= 64 or problem.tiles(tile) < processors:
            tile = Tile(64, 64, 64, 4, 3, programs=1)
    elif problem.sides:
        tile = Tile(128, 128, block, 8, 3 if block == 128 else 6, programs=1)
    else:
        tile = Tile(128, 128, block, 4, 3 if block == 128 else 6)
    if path != "pointers":
        if problem.outs <= 64:
            tile = replace(tile, outs=64)
        for pixels in (64, 32, 16):
            if problem.tiles(tile) > processors * 3 // 4:
                break
            tile = replace(tile, pixels=pixels, warps=4, stages=4, programs=2)
        
    tiles, steps = problem.tiles(tile), problem.steps(tile.channels)
    if tiles <= processors // 2 and steps >= 8:
        tile = replace(tile, splits=max(1, min(steps // 3, -(-processors // tiles))))
    if path == "hopper":
        fewest = problem.all_steps(tile.channels) if tile.splits == 1 else steps // tile.splits
        tile = replace(tile, stages=max(2, min(tile.stages, fewest + 1)))
    return tile
