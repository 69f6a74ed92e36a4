"""Launch every shipped tile of the contraction once, on small problems: for a race detector.

compute-sanitizer --tool racecheck python tests/gpu/race.py [hopper|pointers]
compute-sanitizer --tool memcheck python tests/gpu/race.py

Exits with 1 if a sum is wrong. Needs a CUDA device; the sizes are the least that still give a
program more than one tile and fill the last tile of each direction only in part.
"""

import dataclasses
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from quantempo.kernels.gpu.contraction import launch
from quantempo.kernels.gpu.contraction.tiles import Tile
from tests.gpu.layers import Layer, call, expected, expected_sums, tensors, ways


def small(layer: Layer, tile: Tile) -> Layer:
    """Return a small problem that is run in the same way as `layer`.

    At least two tiles of pixels and of outputs; a tile has at least STAGES - 1 steps, and each
    of its shares one step.
    """
    steps = max(tile.splits, tile.stages, 2)
    if layer.kernel:
        steps = -(-steps // 9) + 1
    # A stride of 2 wants whole blocks of channels.
    channels = tile.channels * steps + (0 if layer.stride == 2 else 16)
    outs = tile.outs + 16
    sides = tuple(tile.channels + 16 * (i + 1) for i in range(len(layer.sides)))
    if layer.kernel == 0:
        return dataclasses.replace(
            layer, images=2 * tile.pixels + 7, channels=channels, outs=outs, sides=()
        )
    size = 6
    images = max(1, 2 * tile.pixels // (size * size) + 1)
    return dataclasses.replace(
        layer, images=images, channels=channels, size=size, outs=outs, sides=sides
    )


def main(paths: list[str]) -> int:
    """Run; return the number of wrong results."""
    wrong = 0
    processors = launch.multiprocessors
    # Few programs, so that each takes several tiles: what one leaves behind meets the next.
    launch.multiprocessors = lambda device: 1
    try:
        for path in paths:
            for layer, tile in ways(path, 90):
                little = small(layer, tile)
                known = tensors(little, "cuda")
                exact = expected_sums(little, known)
                sums = call(launch, little, known, path, tile, torch.int32)
                first = call(launch, little, known, path, tile)
                again = call(launch, little, known, path, tile)
                same = torch.equal(first, again)
                wanted = expected(known, exact)
                bound = wanted.abs() * 2**-11 + wanted.abs().max() * 2**-20
                if layer.requantize:
                    codes = wanted / known["out_scale"][0].double() + known["out_zero"]
                    wanted, bound = codes.round().clamp(0, known["out_qmax"]) - 128, 1.0
                near = bool(((first.double() - wanted).abs() <= bound).all())
                good = torch.equal(sums.long(), exact) and same and near
                wrong += not good
                print("ok   " if good else "WRONG", path, tile, little, flush=True)
    finally:
        launch.multiprocessors = processors
    return wrong


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    best = launch.choose_path(torch.device("cuda"))
    sys.exit(1 if main(sys.argv[1:] or [best]) else 0)
