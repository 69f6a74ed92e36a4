"""How large a part of a map each program of the normalization kernels takes.

Plain integers, no Triton: the choice depends on the shape alone, so it is made once a shape.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

__all__ = ["Plan", "SharedPlan", "make_plan", "make_shared_plan", "power_of_two"]

# Nanoseconds of the choice between one launch and three: only their order matters.
_BYTES_A_NS = 2500.0
# One program alone: latency of its first bytes, then what its few loads under way can fetch.
_PROGRAM_NS, _PROGRAM_BYTES_A_NS = 1500.0, 12.0
_LAUNCH_NS = 2000.0
# Of the second read of a slab; the L2 of an H200 has 50 MiB, which others use too.
_CACHE = 32 << 20
# 132 multiprocessors, five programs of 8 warps and 48 registers a thread on each.
_RESIDENT = 660
# Enough programs that 132 multiprocessors do not stand idle, and that two wait on each.
_ENOUGH, _FILL = 128, 264
_SECTOR = 32
# A map of so many elements a slab stays in registers, 64 a thread: on an H200 256 pixels x 32
# channels took 27 us so where 32 a thread took 37 (N 256).
_HELD, _HELD_EACH = 8192, 64
# A slab that is read twice passes through 8 warps, 8 elements a thread with loads moved ahead, or
# 16 without, where the slab is wide.
_STREAMED = 2048
_STREAM_STAGES = 3
# Slabs of 64 bytes; where groups do not add up to that, wider ones of whole sectors.
_USUAL, _WIDE, _WIDEST = 32, 96, 4096

# Shared memory of a multiprocessor, and what a program takes beside its slab, at most (sm_90).
_SHARED, _BESIDE = 227 << 10, 9 << 10
# Of slabs that cost the same, the one nearest to this size, and no smaller than that.
_SHARED_SLAB, _SHARED_LEAST = 32 << 10, 8 << 10
# Measured on 60 layer shapes: with so many programs it was faster (1.06 to 1.75 times), but for
# maps larger than L2 whose slabs are padded by more than a quarter.
_SHARED_PROGRAMS, _SHARED_PADDED, _SHARED_CACHE = 64, 1.25, 64 << 20
# Rows of 128 bytes at most, what one swizzle pattern of TMA spans. They begin at whole 16 bytes
# (8 channels): from others TMA ends with an illegal instruction.
_SHARED_WIDE, _SHARED_STEP = 64, 8
# A box of TMA has so many rows at most, and a slab so many boxes: each has a barrier.
_BOX_ROWS, _BOXES = 256, 16


@dataclass(frozen=True)
class Plan:
    """The tiles of a call.

    one_launch: a program sees all pixels of its slab; otherwise moments are written, put together,
    applied. width: channels of a slab (whole groups with one launch); block_p, block_c: pixels of a
    tile and `width`, powers of two; stages, unroll: of the loops over tiles (1: loads are not moved
    ahead); stat_p, stat_c, stat_warps: tile of the launch that writes moments; group_c: channels,
    whole groups, of a program that puts moments together.
    """

    one_launch: bool
    width: int
    block_p: int
    block_c: int
    warps: int
    stages: int = 1
    unroll: int = 1
    stat_p: int = 0
    stat_c: int = 0
    stat_warps: int = 0
    group_c: int = 0


@dataclass(frozen=True)
class SharedPlan:
    """The tiles of a call whose slabs stay in shared memory (`hopper`).

    width: channels of a slab, whole groups; cols: `width` rounded up to a power of two, at least 8;
    rows: pixels of one TMA load, a divisor of all; warps: each holds 256 values at a time.
    """

    width: int
    cols: int
    rows: int
    warps: int


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _warps(elements: int, a_thread: int, most: int) -> int:
    return max(1, min(most, power_of_two(_ceil(elements, 32 * a_thread))))


def _cut(width: int, itemsize: int) -> float:
    """Return sectors touched over sectors needed, of segments of `width` values in a row."""
    length = width * itemsize
    return (length + _SECTOR - gcd(length, _SECTOR)) / length


def _traffic_ns(elements: int, width: int, itemsize: int, reads: int) -> float:
    """Return the time of reading `elements` so often and writing one byte for each."""
    # Neighbouring slabs find the other half of a cut sector in the cache, so a cut costs less.
    read = reads * itemsize * (1 + 0.5 * (_cut(width, itemsize) - 1))
    written = 1 + 0.5 * (_cut(width, 1) - 1)
    padded = power_of_two(width) / width
    vector = {8: 1.0, 4: 1.1, 2: 1.3, 1: 1.6}[gcd(width, 8)]
    return elements * (read + written) * vector * (1 + 0.25 * (padded - 1)) / _BYTES_A_NS


def _one_launch_ns(images: int, pixels: int, channels: int, width: int, itemsize: int) -> float:
    programs = images * _ceil(channels, width)
    # Read again out of the caches, which takes about half as long.
    alone = _PROGRAM_NS + 1.5 * pixels * power_of_two(width) * itemsize / _PROGRAM_BYTES_A_NS
    # Slabs of all programs at work that do not fit into the cache come from memory twice.
    reads = 1 + (min(programs, _RESIDENT) * pixels * width * itemsize > _CACHE)
    traffic = _traffic_ns(images * pixels * channels, width, itemsize, reads)
    # A tenth of a program's own time: among equals, the one with the shorter tail.
    return _LAUNCH_NS + max(traffic, _ceil(programs, _RESIDENT) * alone) + 0.1 * alone


@lru_cache(maxsize=4096)
def make_plan(
    images: int, pixels: int, channels: int, groups: int, itemsize: int,
    one_launch: bool | None = None,
) -> Plan:  # fmt: skip
    """Return the tiles for N images of P pixels and C channels.

    channels: C, x and skip together; groups: of the norm, a divisor of C, 0 for none; itemsize:
    bytes of an element of x; one_launch: which way, None for the one expected to be faster.
    Raises ValueError: a group of more channels than a program takes.
    """
    if groups == 0:
        return _pointwise(images, pixels, channels)
    group = channels // groups
    if group > _WIDEST:
        raise ValueError(f"got groups of {group} channels; expected at most {_WIDEST}")
    widths = [k * group for k in range(1, groups + 1) if k * group <= 128] or [group]
    single = _slab(images, channels, group, widths)
    double = min(widths, key=lambda w: _traffic_ns(1 << 24, w, itemsize, 1))
    if one_launch is None:
        traffic = _traffic_ns(images * pixels * channels, double, itemsize, 2)
        three_ns = 3 * _LAUNCH_NS + 2 * _PROGRAM_NS + traffic
        one_launch = _one_launch_ns(images, pixels, channels, single, itemsize) <= three_ns
    if not one_launch:
        few = min((w for w in widths if w >= _USUAL), default=max(widths))
        return _three_launches(images, pixels, channels, few)
    block_c = power_of_two(single)
    block_p = power_of_two(pixels)
    elements = block_p * block_c
    if images * _ceil(channels, single) < _ENOUGH:
        # Processors stand idle anyway: more threads for each program, which ends sooner.
        if elements <= 2 * _HELD:
            return Plan(True, single, block_p, block_c, _warps(elements, 16, 16))
    elif elements <= _HELD:
        return Plan(True, single, block_p, block_c, _warps(elements, _HELD_EACH, 8))
    if block_c <= 64:
        return Plan(True, single, max(1, _STREAMED // block_c), block_c, 8, _STREAM_STAGES)
    return Plan(True, single, 2 * _STREAMED // block_c, block_c, 8)


def _slab(images: int, channels: int, group: int, widths: list[int]) -> int:
    """Return how many channels a program of the one launch takes: measured rules."""
    even = [w for w in widths if w % (_SECTOR // 2) == 0]
    usual = [w for w in even if w <= _USUAL] or [w for w in even if w <= _WIDE]
    width = max(usual, default=group)
    if images * _ceil(channels, width) >= _ENOUGH:
        return width
    # Few images: smaller slabs, until there are enough of them or a slab is one group.
    narrow = [w for w in widths if w < width and images * _ceil(channels, w) >= _ENOUGH]
    return max(narrow, default=min(group, width))


def _three_launches(images: int, pixels: int, channels: int, width: int) -> Plan:
    stat_c = min(64, power_of_two(channels))
    stat_p = power_of_two(max(1, min(pixels, 32768 // stat_c)))
    while stat_p > 64 and images * _ceil(channels, stat_c) * _ceil(pixels, stat_p) < _FILL:
        stat_p //= 2
    return replace(
        _pointwise(images, pixels, channels),
        stat_p=stat_p, stat_c=stat_c, stat_warps=_warps(stat_p * stat_c, 64, 16), group_c=width,
    )  # fmt: skip


def _pointwise(images: int, pixels: int, channels: int) -> Plan:
    block_c = min(128, power_of_two(channels))
    while block_c > 32 and channels % block_c:
        block_c //= 2
    elements = 8192
    while elements > 1024 and images * pixels * channels < _FILL * elements:
        elements //= 2
    block_p = power_of_two(max(1, min(pixels, elements // block_c)))
    return Plan(False, block_c, block_p, block_c, _warps(block_p * block_c, 32, 8))


@lru_cache(maxsize=4096)
def make_shared_plan(
    images: int, pixels: int, channels: int, groups: int, always: bool = False
) -> SharedPlan | None:
    """Return the tiles for N images, P pixels, C channels of two bytes, in shared memory, or None.

    None where no slab of whole groups fits or, unless `always`, where another way is faster.
    """
    group = channels // groups
    best: tuple[tuple[bool, float, float], SharedPlan] | None = None
    for width in range(group, min(_SHARED_WIDE, channels) + 1, group):
        plan = _shared(pixels, width)
        if plan is None or (width < channels and width % _SHARED_STEP):
            continue
        size = 2 * pixels * plan.cols
        few = images * _ceil(channels, width) < _ENOUGH or size < _SHARED_LEAST
        cost = _ceil(channels, width) * plan.cols / channels * (1 + (_cut(width, 1) - 1) / 4)
        # Programs of one multiprocessor hide each other's waiting.
        cost *= {1: 1.6, 2: 1.15}.get(_SHARED // (size + _BESIDE), 1.0)
        cost *= {8: 1.0, 4: 1.05, 2: 1.1, 1: 1.2}[gcd(width, 8)]
        rank = few, cost, max(size / _SHARED_SLAB, _SHARED_SLAB / size)
        if best is None or rank < best[0]:
            best = rank, plan
    if best is None:
        return None
    plan = best[1]
    slabs = _ceil(channels, plan.width)
    padded = slabs * plan.cols > _SHARED_PADDED * channels
    worth = images * slabs >= _SHARED_PROGRAMS
    worth = worth and not (padded and 2 * images * pixels * channels > _SHARED_CACHE)
    return plan if worth or always else None


def _shared(pixels: int, width: int) -> SharedPlan | None:
    """Return the tiles for a slab of a width; None: it does not fit, or boxes do not."""
    cols = max(8, power_of_two(width))
    if 2 * pixels * cols + _BESIDE > _SHARED:
        return None
    # 64 values a thread, 128 where the slab is large.
    warps = min(8, max(1, pixels * cols // 2048))
    warps = power_of_two(warps + 1) // 2
    # TMA's swizzle repeats after 8 rows: a thread's pieces begin there.
    piece = 256 * warps // cols
    most = min(4 * piece, _BOX_ROWS)
    fitting = [r for r in range(piece, most + 1, piece) if pixels % r == 0 and r & (r - 1) == 0]
    if piece < 8 or not fitting or pixels > _BOXES * fitting[-1]:
        return None
    return SharedPlan(width, cols, fitting[-1], warps)
