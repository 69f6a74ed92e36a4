"""Records that the kernels of the contraction pass on, and the geometry of a tile.

`Block`, `Window` and `Form` are constants of a kernel; the other records are made inside one, of
arguments that Triton would specialize if they came in a tuple.
"""

from collections import namedtuple
from typing import NamedTuple

import triton
import triton.language as tl

__all__ = [
    "Block", "Place", "Scalars", "Tiles", "border_row", "pixel", "place_of", "row_of", "tiles_of",
]  # fmt: skip


class Block(NamedTuple):
    """A tile: N x H x W pixels by OUTS channels, CHANNELS a step; SPLITS programs share its sum.

    REUSE: the taps of a kernel's column share their pixels (`input_reuse`).
    PER, PER0, PER1: groups of 64 channels of the weight and those of the sides, 0 of int8 ones.
    """

    N: int
    H: int
    W: int
    OUTS: int
    CHANNELS: int
    STAGES: int
    SPLITS: int
    REUSE: bool
    PER: int
    PER0: int
    PER1: int

    @property
    def PIXELS(self) -> int:
        """Pixels of a tile."""
        return self.N * self.H * self.W


# Sizes of the images and numbers of the epilogue.
Scalars = namedtuple(
    "Scalars",
    "images in_h in_w out_h out_w outs rows_per_bucket shift_stride out_zero out_qmax gate_stride "
    "rows_per_gate",
)
# How many tiles there are, and how many across rows, columns and output channels.
Tiles = namedtuple("Tiles", "count h w o")
# The first image, row, column and output channel of a tile; which pixel of a repeated four.
Place = namedtuple("Place", "n h w phase_h phase_w o")


@triton.jit
def tiles_of(count, s, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return the Tiles of a launch of `count`."""
    h = tl.cdiv(s.in_h if WINDOW.UPSAMPLE else s.out_h, BLOCK.H)
    w = tl.cdiv(s.in_w if WINDOW.UPSAMPLE else s.out_w, BLOCK.W)
    return Tiles(count, h, w, tl.cdiv(s.outs, BLOCK.OUTS))


@triton.jit
def place_of(tile, tiles, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return the Place of a tile; tiles of the same pixels follow each other."""
    o = (tile % tiles.o) * BLOCK.OUTS
    spot = tile // tiles.o
    phase = 0
    if WINDOW.UPSAMPLE:
        # The four pixels that one input pixel becomes are tiles of their own.
        phase = spot % 4
        spot = spot // 4
    w = (spot % tiles.w) * BLOCK.W
    spot = spot // tiles.w
    n = (spot // tiles.h) * BLOCK.N
    return Place(n, (spot % tiles.h) * BLOCK.H, w, phase // 2, phase % 2, o)


@triton.jit
def pixel(p, place, s, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Return image, row and column of output pixels p of a tile."""
    n = place.n + p // (BLOCK.H * BLOCK.W)
    h = place.h + (p // BLOCK.W) % BLOCK.H
    w = place.w + p % BLOCK.W
    if WINDOW.UPSAMPLE:
        h = 2 * h + place.phase_h
        w = 2 * w + place.phase_w
    return n, h, w


@triton.jit
def row_of(n, h, w, s):
    """Return the number of pixels in memory, 0 for those outside, and which are inside."""
    seen = (n < s.images) & (h < s.out_h) & (w < s.out_w)
    return tl.where(seen, (n * s.out_h + h) * s.out_w + w, 0), seen


@triton.jit
def border_row(h, w, s, WINDOW: tl.constexpr):
    """Return the row of the border table: 4 (above + 2 below) + (left + 2 right)."""
    in_h = s.in_h
    in_w = s.in_w
    if WINDOW.UPSAMPLE:
        in_h = 2 * in_h
        in_w = 2 * in_w
    top = h * WINDOW.STRIDE - WINDOW.TOP
    left = w * WINDOW.STRIDE - WINDOW.LEFT
    row = 4 * ((top < 0).to(tl.int32) + 2 * (top + WINDOW.KERNEL > in_h).to(tl.int32))
    row += (left < 0).to(tl.int32) + 2 * (left + WINDOW.KERNEL > in_w).to(tl.int32)
    return row
