"""The contraction as machine code, for every tile that is shipped: compiled here, run nowhere.

For Hopper every way in which a layer of `layers.LAYERS` is run is compiled (see `layers.ways`); for
"pointers" on sm_80 a covering choice, which has every tile and every combination of stride,
upsampling, sides and splitting, but not every product of the two; for "pointers" on sm_89 and
sm_90, the same code for another assembler, one layer for each size of tile.
"""

import dataclasses
import functools
import itertools
import re

import pytest
import torch

from quantempo.kernels.gpu.contraction import launch
from quantempo.kernels.gpu.contraction.tiles import Tile, choose_tile, tile_pixels
from tests.gpu import harness
from tests.gpu.layers import PROCESSORS, Layer, call, covering, tensors, ways

# Registers and shared memory (KiB; each program takes one more) of a multiprocessor.
REGISTERS = 65536
SHARED = {80: 164, 89: 100, 90: 228}

# What the layers of LAYERS do not ask for, at one size.
OTHERS = (
    Layer(16, 128, 32, 128, mixed=True),
    Layer(256, 256, 16, 256, mixed=True, sides=(256, 256)),
    Layer(8192, 320, 1, 1280, kernel=0, requantize=True, activation="gelu"),
    Layer(8192, 320, 1, 2560, kernel=0, activation="geglu", mixed=True),
    # A block of FLUX at 1024 pixels, by token; of Wan, whose gates are those of several images.
    Layer(4608, 3072, 1, 12288, kernel=0, rows=True, activation="gelu_tanh"),
    Layer(4608, 3072, 1, 3072, kernel=0, rows=True, sides=(12288,), gates=1),
    Layer(4608, 1536, 1, 8192, kernel=0, rows=True, activation="swiglu", requantize=True),
    Layer(8250, 1536, 1, 1536, kernel=0, mixed=True, gates=2),
    # With LoRAs beside them.
    Layer(4608, 3072, 1, 9216, kernel=0, rows=True, half=48),
    Layer(4608, 3072, 1, 3072, kernel=0, rows=True, sides=(12288,), gates=1, half=16),
    Layer(512, 128, 1, 384, kernel=0, half=48),
    Layer(131072, 256, 1, 2048, kernel=0, activation="geglu", requantize=True, half=64),
)


def others(path: str, arch: int) -> list[tuple[Layer, Tile]]:
    return [(layer, choose_tile(layer.problem(), path, PROCESSORS[arch])) for layer in OTHERS]


def one_of_each_size(path: str, arch: int) -> list[tuple[Layer, Tile]]:
    """Return a layer for each size of tile."""
    first: dict[tuple[int, int], tuple[Layer, Tile]] = {}
    for layer, tile in ways(path, arch):
        first.setdefault((tile.outs, tile.pixels), (layer, tile))
    return list(first.values())


SHIPPED = [
    (path, arch, layer, tile)
    for path, arch, choose in (
        ("hopper", 90, ways),
        ("hopper", 90, others),
        ("pointers", 80, covering),
        ("pointers", 89, one_of_each_size),
        ("pointers", 89, others),
        ("pointers", 90, one_of_each_size),
    )
    for layer, tile in choose(path, arch)
]


def name(value: object) -> str:
    """Return a short name of a layer or tile for pytest."""
    if isinstance(value, Tile):
        taps = "t" * value.taps
        return f"{value.outs}x{value.pixels}x{value.channels}w{value.warps}k{value.splits}{taps}"
    if isinstance(value, Layer):
        marks = "u" * value.upsample + "m" * value.mixed + "q" * value.requantize
        return f"{value.images}x{value.channels}k{value.kernel}s{value.stride}{marks}"
    return str(value)


@functools.cache
def binary(path: str, arch: int, layer: Layer, tile: Tile) -> harness.Binary:
    with harness.recorded(launch) as launches:
        call(launch, layer, tensors(layer), path, tile)
    (only,) = launches
    # What was left to save time would be compiled as something else than was asked for.
    assert only.kernel.fn.__name__ == ("contract_hopper" if path == "hopper" else "contract")
    return harness.compiled(only, arch, messages=path == "hopper")


def ceiling(path: str, tile: Tile) -> int:
    """Return the registers a thread may take so that `programs` fit.

    Registers are given to a warp in units of 8 a thread, and no thread has more than 255. On Hopper
    four warps more are launched, of which one brings operands.
    """
    warps = tile.warps + (4 if path == "hopper" else 0)
    return min(255, REGISTERS // (32 * warps * tile.programs) // 8 * 8)


def room(layer: Layer, tile: Tile) -> int:
    """Return the bytes of stack a thread may use: none, but for some kinds of epilogue.

    With 32 sums a thread and more, those that read other programs' sums or the scale of every pixel
    keep a few values in local memory; with 128 those of several images, and those whose taps share
    pixels, keep fewer. The main loop never stores any.
    """
    rich = tile.splits > 1 or layer.mixed
    sums = tile.outs * tile.pixels // (32 * tile.warps)
    problem = layer.problem()
    size = (problem.images, problem.height, problem.width)
    several = tile_pixels(tile.pixels, *size, tile.taps)[0] > 1
    few = (several or tile.taps) and sums >= 128
    return 128 if rich and sums >= 32 else 32 if few else 0


def loops(layer: Layer, tile: Tile) -> int:
    """Return the main loops of a Hopper program: a split one has its share of one sum."""
    return 1 + (len(layer.sides) if tile.splits == 1 else 0)


@pytest.mark.parametrize(("path", "arch", "layer", "tile"), SHIPPED, ids=name)
def test_shipped(path, arch, layer, tile):
    made = binary(path, arch, layer, tile)
    assert made.stack <= room(layer, tile)
    assert made.spills == 0 or made.stack > 0
    assert made.registers <= ceiling(path, tile)
    assert tile.programs * (made.shared + 1024) <= SHARED[arch] * 1024
    # The portable kernel too: `tl.dot` becomes a warpgroup instruction on sm_90.
    assert made.count(r"\bIGMMA\." if arch == 90 else r"\bIMMA\.") > 0
    if path == "hopper":
        check_pipeline(made, loops(layer, tile), 3 if tile.taps else 1, layer.half > 0)
        assert (made.count(r"\bHGMMA\.") > 0) == (layer.half > 0)
    else:
        assert made.count("UTMALDG") == 0
        # Operands come by asynchronous copies, ahead of their use.
        assert made.count("LDGSTS") > 0


# Weights of 4 bits, unpacked into registers: products and convolutions, split, and with sides.
PACKED = (
    Layer(4608, 3072, 1, 12288, kernel=0, rows=True, activation="gelu_tanh", group=32),
    Layer(8192, 640, 1, 5120, kernel=0, activation="geglu", requantize=True, group=16),
    Layer(2, 320, 64, 320, group=32),
    Layer(16, 256, 16, 256, upsample=True, group=16),
    Layer(1, 256, 8, 256, sides=(256, 256), group=16),
    Layer(256, 256, 16, 256, sides=(256, 256), group=32),
)


@pytest.mark.parametrize("layer", PACKED, ids=str)
def test_packed_weights_stay_in_registers(layer):
    tile = choose_tile(layer.problem(), "hopper", PROCESSORS[90])
    made = binary("hopper", 90, layer, tile)
    assert made.stack <= room(layer, tile) and made.registers <= ceiling("hopper", tile)
    assert tile.programs * (made.shared + 1024) <= SHARED[90] * 1024
    assert made.count(KINDS["multiply"]) > 0
    assert not re.search(r"C75\d\d|serialized", made.messages)
    assert not any("spill" in loop for loop in main_loops(made.sass))


KINDS = {
    "multiply": r"IGMMA\.",
    "wait for all but one": r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1",
    "barrier": r"BAR\.SYNC",
    "give back": r"SYNCS\.ARRIVE",
    "refill": r"UTMALDG",
    "load matrix": r"LDSM",
    "spill": r"\bSTL\b",
}


def main_loops(sass: str) -> list[list[str]]:
    """Return the KINDS of instructions in each of `bodies`."""
    return [
        [kind for text in body for kind in KINDS if re.search(KINDS[kind], text)]
        for body in bodies(sass)
    ]


def bodies(sass: str) -> list[list[str]]:
    """Return the instructions of each loop that multiplies and never waits for all."""
    code = sass.splitlines()
    found = []
    for end, line in enumerate(code):
        jump = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", line)
        # Every instruction has 16 bytes.
        if jump is not None and int(jump[1], 16) // 16 <= end:
            body = code[int(jump[1], 16) // 16 : end + 1]
            multiplies = any(re.search(KINDS["multiply"], text) for text in body)
            # The loop over the tiles, and the way back from a wait, reach over the last wait.
            if multiplies and not any("DEPBAR.LE gsb0, 0x0" in text for text in body):
                found.append(body)
    return found


def check_pipeline(made: harness.Binary, count: int, steps: int, half: bool = False) -> None:
    """Assert that matrix instructions stay in flight over the `count` loops of a Hopper kernel.

    steps: that one turn of a loop makes; half: whether a loop of float16 is there, which waits.
    """
    # "wgmma.mma_async instructions are serialized": ptxas gave up and waits for each of them.
    assert "Compiling entry function" in made.messages
    assert not re.search(r"C75\d\d|serialized", made.messages)
    # One wait in each step and one behind the loop, none for each matrix instruction.
    assert made.count(r"WARPGROUP\.DEPBAR") == (steps + 1) * count + half
    found = main_loops(made.sass)
    assert len(found) == count
    assert made.count(KINDS["multiply"]) == sum(loop.count("multiply") for loop in found)
    for loop in found:
        assert "load matrix" not in loop
        assert "spill" not in loop
        waits = [i for i, kind in enumerate(loop) if kind == "wait for all but one"]
        assert len(waits) == steps
        # Multiply, wait, know that every warp has waited, only then give back what all have read
        # to the warp that refills it.
        assert "multiply" in loop[: waits[0]] and "multiply" not in loop[waits[-1] :]
        assert "give back" not in loop[: waits[0]] and "refill" not in loop
        for begin, end in itertools.pairwise([*waits, len(loop)]):
            behind = loop[begin:end]
            assert "barrier" in behind[: behind.index("give back")]
            last = len(behind) - behind[::-1].index("give back")
            assert "multiply" not in behind[:last]
    for body in bodies(made.sass):
        # Another stage each time: a step that always gave back the first made all wait for ever.
        found = [m[1] for m in (re.search(r"SYNCS\.ARRIVE.*\[(UR\d+)", t) for t in body) if m]
        assert len(found) >= steps
        for given in found:
            assert any(re.match(rf"(?:@\S+\s+)?[A-Z][\w.]*\s+{given}\b", text) for text in body)


def test_every_shipped_tile_is_compiled():
    compiled = {(path, arch, tile) for path, arch, _, tile in SHIPPED}
    for layer, tile in itertools.chain(ways("hopper", 90), others("hopper", 90)):
        assert ("hopper", 90, tile) in compiled, layer
    assert len(SHIPPED) <= 100


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # ptxas serializes: a wait behind every matrix instruction.
        (r"(IGMMA.*)", r"\1; WARPGROUP.DEPBAR.LE gsb0, 0x0"),
        # Nobody waits for the other warps before the refill.
        (r"(DEPBAR\.LE gsb0, 0x1.*\n(?:.*\n)*?.*)BAR\.SYNC", r"\1NOP"),
        # An operand passes through registers.
        (r"IGMMA", "LDSM; IGMMA"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("taps", [False, True])
def test_a_slow_or_wrong_kernel_would_be_seen(before, after, taps):
    layer, tile = next(
        (layer, tile) for layer, tile in ways("hopper", 90) if not layer.sides and tile.taps == taps
    )
    made = binary("hopper", 90, layer, tile)
    (loop,) = main_loops(made.sass)
    changed = made.sass
    for _ in range(loop.count("barrier")):
        changed = re.sub(before, after, changed)
    assert changed != made.sass
    with pytest.raises(AssertionError):
        check_pipeline(dataclasses.replace(made, sass=changed), 1, 3 if taps else 1)


def descriptor_and_pointer(layer: Layer, tile: Tile, **others) -> tuple[object, object]:
    """Return how the residual of a layer is handed over on Hopper: as boxes, as a pointer."""
    known = tensors(layer) | others
    with harness.recorded(launch) as launches:
        call(launch, layer, known, "hopper", tile)
    names = launches[0].kernel.arg_names
    given = dict(zip(names, launches[0].args, strict=False))
    return given["rows"], given["terms"].residual


def test_a_residual_is_loaded_as_a_step_where_it_is_as_large():
    layer = Layer(256, 128, 32, 128)
    tile = Tile(128, 128, 128, 4, 3)
    rows, pointer = descriptor_and_pointer(layer, tile)
    # Half a tile of 4 x 32 pixels; the pointer is for asking for it before that.
    assert rows.block_shape == [1, 2, 1, 32, 128] and pointer is not None
    # Values of four bytes are twice as large; a tile of fewer pixels is smaller.
    wide = torch.empty(256, 32, 32, 128, device="meta").permute(0, 3, 1, 2)
    rows, pointer = descriptor_and_pointer(layer, tile, residual=wide)
    assert rows is None and pointer is wide
    rows, pointer = descriptor_and_pointer(layer, Tile(128, 64, 128, 4, 4))
    assert rows is None and pointer is not None


def test_a_tile_that_reaches_too_far_is_refused():
    tile = Tile(64, 32, 128, 4, 4, programs=3)
    # A pixel of each of 32 images, since rows of odd length waste wider tiles.
    layer = Layer(32, 16, 4099, 16)
    with pytest.raises(ValueError, match="32 images of 4099 x 4099"):
        call(launch, layer, tensors(layer), "hopper", tile)
    # 2^31 values and more in all, and each tile within a row of them.
    for layer in (Layer(2, 16, 16384, 16), Layer(2**22, 16, 1, 1024, kernel=0)):
        with harness.recorded(launch) as launches:
            call(launch, layer, tensors(layer), "hopper", tile)
        assert len(launches) == 1
