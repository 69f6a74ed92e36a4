"""Which tile a contraction is cut into: a small model of measured times.

    us = start + sum over rounds of (resident (shared steps + finish) + alone steps) + join slots

steps: of the main loop, BLOCK_C channels each; rounds: tiles that a program computes one after
another; resident: programs of a multiprocessor that have one in that round; slots: programs that
share a tile. Fitted to 1,739 timings of 147 layer shapes (U-Nets of CIFAR and of Stable Diffusion
1.5, batch 1 to 256) on one H200: 2.1 % slower than the best tile on average, 23 % at worst.
"""

import functools
import math
from dataclasses import dataclass, replace

import torch

__all__ = ["Problem", "Tile", "choose_tile", "multiprocessors", "predict", "tile_pixels"]


@dataclass(frozen=True)
class Tile:
    """Sizes of one tile and how it is run.

    outs x pixels are computed from `channels` at a time; `splits` programs share the sum;
    `programs` run on a multiprocessor at once. taps: the taps of a column share their pixels.
    """

    outs: int
    pixels: int
    channels: int
    warps: int
    stages: int
    splits: int = 1
    programs: int = 2
    taps: bool = False


@dataclass(frozen=True)
class Problem:
    """One contraction: `phases` times images x height x width pixels, `outs` channels of result.

    sides: input channels of the 1x1 segments; residual: whether an image is added; gated: whether
    one half of the channels is the gate of the other; half: bytes of a pixel of a float16 side.
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
    half: int = 0

    def steps(self, block: int) -> int:
        """Return the steps of the main loop, `block` channels of one tap each."""
        return self.kernel**2 * -(-self.channels // block)

    def all_steps(self, block: int) -> int:
        """Return the steps of all segments."""
        return self.steps(block) + sum(-(-side // block) for side in (*self.sides, self.half))

    @property
    def tall(self) -> bool:
        """Return whether three taps stand above each other and read images of their own."""
        return (self.kernel, self.stride, self.phases, self.sides, self.half) == (3, 1, 1, (), 0)

    def tiles(self, tile: Tile) -> int:
        """Return the number of tiles."""
        n, h, w = tile_pixels(tile.pixels, self.images, self.height, self.width, tile.taps)
        count = -(-self.images // n) * -(-self.height // h) * -(-self.width // w)
        return self.phases * count * -(-self.outs // tile.outs)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 without a GPU (interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def tile_pixels(
    pixels: int, images: int, height: int, width: int, taps: bool = False
) -> tuple[int, int, int]:
    """Return (images, rows, columns), powers of two whose product is `pixels`.

    Of all such boxes the one that covers (images, height, width) with the fewest pixels; of equals
    the widest, whose rows are contiguous. taps: of one image, 8 columns at least, where the pattern
    of shared memory begins, and 32 at most, so that few rows are brought that are not of the tile.
    """
    powers = [1 << i for i in range(pixels.bit_length())]
    boxes = [
        (pixels // (wide * high), high, wide)
        for wide in powers
        for high in powers
        if wide * high <= pixels
        if not taps or (wide * high == pixels and 8 <= wide <= 32)
    ]

    def key(box: tuple[int, int, int]) -> tuple[int, int, int]:
        n, h, w = box
        covered = -(-images // n) * n * -(-height // h) * h * -(-width // w) * w
        return covered, -w, -h

    return min(boxes, key=key)


# (outs, pixels, channels, warps, programs, taps): start, shared, finish, alone, join, side, wide,
# image. Added to `finish`: `side` for each side segment of a sum that is not split, infinite where
# its registers would spill, and `image` for a residual; to `shared`: `wide` for 3x3 kernels on
# images of 64 columns and more.
_MEASURED: dict[tuple[int, int, int, int, int, bool], tuple[float, ...]] = {
    (64, 16, 128, 4, 3, False): (2.71, 0.106, 0.805, 0.0, 0.148, math.inf, 0.0, 0.0),
    (64, 32, 128, 4, 3, False): (1.47, 0.0952, 1.32, 0.0368, 0.414, math.inf, 0.0, 0.144),
    (128, 32, 128, 4, 2, False): (1.11, 0.16, 1.85, 0.0, 0.602, 0.714, 0.0, 0.0808),
    (128, 64, 128, 4, 2, False): (2.3, 0.223, 1.53, 0.0112, 0.723, 0.14, 0.204, 0.0855),
    (128, 128, 64, 4, 2, False): (1.58, 0.28, 0.795, 0.0, 2.45, math.inf, 0.0111, 1.39),
    (128, 128, 128, 4, 2, False): (2.51, 0.32, 1.23, 0.0536, 2.14, math.inf, 0.159, 0.683),
    (128, 128, 128, 8, 1, False): (1.57, 0.334, 4.59, 0.0, 0.966, 0.0, 0.102, 0.2),
    (128, 256, 64, 8, 1, False): (1.4, 0.373, 2.38, 0.0, 3.17, math.inf, 0.0058, 3.72),
    (128, 256, 128, 8, 1, False): (2.24, 0.0, 2.92, 0.646, 2.54, math.inf, 0.0248, 2.1),
    (128, 64, 128, 4, 2, True): (1.56, 0.19, 1.17, 0.0426, 1.06, math.inf, 0.0, 0.321),
    (128, 128, 64, 4, 2, True): (0.0, 0.0949, 0.838, 0.153, 5.01, math.inf, 0.0, 2.75),
    (128, 128, 128, 4, 2, True): (2.9, 0.31, 1.66, 0.0, 3.08, math.inf, 0.0, 0.328),
    (128, 256, 64, 8, 1, True): (0.514, 0.299, 4.15, 0.0114, 4.05, math.inf, 0.0, 2.88),
    (128, 256, 128, 8, 1, True): (0.75, 0.564, 5.45, 0.0219, 3.01, math.inf, 0.0, 1.27),
}
_SPLITS = (1, 2, 4, 8)
# Stages of 128 channels that fit twice (or thrice) on a multiprocessor beside the output.
_STAGES = {(128, 128, 4): 3, (128, 128, 8): 3, (128, 256, 8): 3}


def _stages(tile: Tile) -> int:
    """Return the stages of a tile; those of taps are stages of weights, beside which is more."""
    count = _STAGES.get((tile.outs, tile.pixels, tile.warps), 4)
    return (4 if tile.taps and tile.pixels == 256 else count) * (128 // tile.channels)


def predict(problem: Problem, tile: Tile, processors: int) -> float:
    """Return the microseconds that a tile is expected to take, infinite if it cannot be used."""
    key = (tile.outs, tile.pixels, tile.channels, tile.warps, tile.programs, tile.taps)
    start, shared, finish, alone, join, side, wide, image = _MEASURED[key]
    slots = tile.splits + len(problem.sides) if tile.splits > 1 else 1
    rounds, rest = divmod(problem.tiles(tile) * slots, processors * tile.programs)
    resident = rounds * tile.programs + -(-rest // processors)
    if tile.splits > 1:
        longest = max((-(-c // tile.channels) for c in problem.sides), default=0)
        steps = max(-(-problem.steps(tile.channels) // tile.splits), longest)
    else:
        steps = problem.all_steps(tile.channels)
    box = tile_pixels(tile.pixels, problem.images, problem.height, problem.width, tile.taps)
    if problem.kernel == 3 and box[2] >= 64:
        shared += wide
    if problem.sides and tile.splits == 1:
        finish += len(problem.sides) * side
    finish += image * problem.residual
    rounds += rest > 0
    time = start + resident * (shared * steps + finish) + rounds * alone * steps
    return time + (join * slots if slots > 1 else 0.0)


def _measured(problem: Problem, tile: Tile, processors: int) -> bool:
    """Return whether the model knows such a case: it is not to be asked about others."""
    if problem.half and tile.splits > 1:
        return False
    if tile.channels == 64 and problem.channels % 128 == 0:
        return False
    if tile.outs == 64 and problem.sides:
        return False
    if (tile.outs, tile.pixels, tile.warps) == (128, 128, 8) and not problem.sides:
        return False
    if problem.gated and (tile.outs, tile.warps, tile.splits) != (128, 4, 1):
        # Each of four warps holds as many gates as values.
        return False
    if tile.taps:
        if not problem.tall or problem.height * problem.width < tile.pixels:
            return False
        if tile.splits > 1 and (tile.pixels, tile.warps) == (128, 4):
            # Two rings and others' sums: too many registers.
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
        sides = problem.sides or problem.half
        small = problem.outs <= 64 or problem.tiles(wide) < processors or bool(sides)
        return Tile(64, 64, 64, 4, 3, programs=1) if small else wide
    best, tile = math.inf, None
    for outs, pixels, channels, warps, programs, taps in _MEASURED:
        if problem.stride == 2 and problem.channels % channels:
            continue
        for splits in _SPLITS:
            one = Tile(outs, pixels, channels, warps, 2, splits, programs, taps)
            if _measured(problem, one, processors):
                time = predict(problem, one, processors)
                best, tile = (time, one) if time < best else (best, tile)
    assert tile is not None
    # The model was fitted to weights in the cache. Read from memory, as in a network, sums in twice
    # as many parts took 6 to 12 % less time (H200, batch 1, docs/LOG.md).
    while (
        1 < tile.splits < max(_SPLITS) and not problem.sides
        and 2 * tile.splits * problem.tiles(tile) <= 1.25 * processors
        and problem.steps(tile.channels) >= 4 * tile.splits
    ):  # fmt: skip
        tile = replace(tile, splits=2 * tile.splits)
    return replace(tile, stages=_stages(tile))
