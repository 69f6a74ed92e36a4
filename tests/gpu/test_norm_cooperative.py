"""The norm with a grid barrier: interpreted against float64, and as machine code.

The interpreter runs one program after another, so there what comes before the barrier and what
comes after it are two launches (`CooperativePlan.phases`).
"""

import dataclasses
import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from quantempo.kernels import ops
from quantempo.kernels.gpu import gn_act_quant
from quantempo.kernels.gpu.contraction import launch as launches_of
from quantempo.kernels.gpu.group_norm import cooperative as norm_cooperative
from quantempo.kernels.gpu.group_norm.plan import (
    APART,
    CooperativePlan,
    make_cooperative_plan,
    make_plan,
)
from quantempo.kernels.ops.gn_act_quant import Normalization
from tests.gpu import harness, test_gn_act_quant
from tests.gpu.layers import PROCESSORS
from tests.gpu.test_compiled import REGISTERS, SHARED
from tests.gpu.test_gn_act_quant import LAST, Case, check, exact

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def launch(call: Normalization, plan: object = None) -> tuple[Tensor, Tensor, Tensor]:
    chosen = plan if isinstance(plan, CooperativePlan) else None
    return gn_act_quant.launch(call, plan=chosen, path=None if chosen else "cooperative")


@pytest.fixture
def interpreted():
    """Return `launch`, interpreted."""
    copy = harness.interpreted("gn_act_quant")

    def run(call: Normalization, plan: object = None) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(plan, CooperativePlan):
            plan = copy._choose(call.images, call.groups, "cooperative")
        # The copy has classes of its own.
        how = dataclasses.asdict(plan) | {"phases": (1, 2)}
        return copy.launch(call, plan=copy.CooperativePlan(**how))

    return run


def tiles(width: int, block_p: int, block_c: int, rest: int = 0, warps: int = 4) -> CooperativePlan:
    return CooperativePlan(width, block_p, block_c, rest, warps, 128)


CASES = {
    "one pixel": Case(h=1, w=1, groups=8),
    "one chunk": Case(h=4, w=4, c1=64, plan=tiles(64, 16, 64)),
    "whole chunks": Case(h=8, w=8, c1=64, plan=tiles(64, 16, 64)),
    "odd": Case(n=3, h=9, w=9, c1=48, groups=16, plan=tiles(24, 16, 32)),
    "three chunks": Case(h=9, w=5, c1=64, plan=tiles(32, 16, 32)),
    "fp16": Case(h=9, w=7, c1=160, groups=32, dtype=torch.float16),
    "no silu": Case(n=1, h=9, w=9, c1=96, groups=32, silu=False),
    "two parts": Case(h=9, w=9, c1=160, groups=16, plan=tiles(80, 32, 64, 16)),
    "two parts, a group across": Case(h=7, w=9, c1=80, groups=4, plan=tiles(80, 16, 64, 16)),
    "two parts, wide groups": Case(h=5, w=7, c1=96, groups=1, plan=tiles(96, 16, 64, 32)),
    "two parts, padded": Case(h=5, w=7, c1=210, groups=21, plan=tiles(70, 16, 64, 8)),
    "two parts, the last slab narrower": Case(
        h=7, w=7, c1=200, groups=20, plan=tiles(80, 8, 64, 16)
    ),
    "the last slab narrower": Case(h=7, w=7, c1=200, groups=20, plan=tiles(60, 8, 64)),
    "groups of one": Case(h=5, w=5, c1=24, groups=24, plan=tiles(16, 8, 16)),
    "groups of three": Case(h=5, w=5, c1=48, groups=16, plan=tiles(24, 8, 32)),
    "one group": Case(h=7, w=5, c1=48, groups=1),
    "two pieces": Case(h=9, w=15, c1=64, raw_rows=1, plan=tiles(64, 64, 64, warps=1)),
    "raw": Case(h=7, w=9, c1=48, raw_rows=1),
    "concat": Case(h=5, w=5, c1=256, c2=128, groups=32),
    "concat, raw, slabs apart": Case(
        h=9, w=5, c1=32, c2=64, groups=12, raw_rows=2, plan=tiles(16, 16, 16)
    ),
    "concat, raw, groups straddle": Case(
        h=5, w=5, c1=40, c2=56, groups=8, raw_rows=2, plan=tiles(36, 8, 32, 8)
    ),
    "concat, raw, two parts": Case(
        h=7, w=9, c1=80, c2=80, groups=16, raw_rows=2, plan=tiles(80, 16, 64, 16)
    ),
    "concat, raw, one row": Case(h=3, w=5, c1=32, c2=16, groups=8, raw_rows=1),
    "a bucket an image": Case(n=3, c1=48, groups=16, buckets=4, bucket_batch=3, raw_rows=1),
    "a bucket for two images": Case(n=4, h=3, c1=32, c2=32, buckets=3, bucket_batch=2, raw_rows=2),
    "one bucket of many": Case(buckets=5),
    "not quantized": Case(c1=48, c2=48, quantize=False),
    "not quantized, no silu, raw": Case(quantize=False, silu=False, raw_rows=1),
    "four bits": Case(qmax=15, zero_point=3),
    "zero point 255": Case(zero_point=255),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_interpreted_halves_agree_with_float64(name: str, interpreted) -> None:
    case = CASES[name]
    different = check(case, interpreted)
    assert different <= 0.01 * case.n * case.h * case.w * (case.c1 + case.c2)


@pytest.mark.parametrize("plan", [tiles(64, 16, 64), tiles(48, 32, 32, 16), tiles(16, 64, 16)])
@pytest.mark.parametrize("offset", [500.0, -500.0])
def test_variance_survives_a_large_mean(plan: CooperativePlan, offset: float, interpreted) -> None:
    # E[x^2] - E[x]^2 in float32 would lose 2^-24 of 250^2 times the variance, 0.4 %.
    case = Case(
        h=9, w=9, c1=192, groups=24, silu=False, quantize=False, dtype=torch.float16,
        offset=offset, plan=plan,
    )  # fmt: skip
    call = case.call()
    y, _, _ = interpreted(call, plan=plan)
    a = exact(call)
    # Float32 x a + b with x a several hundred times larger than the result, cast once.
    assert ((y.double() - a).abs() <= 1e-4 * a.abs().max() + a.abs() * 2**-11).all()


def test_chunks_of_different_means_are_put_together(interpreted) -> None:
    # Each chunk is constant: all the variance is between them, and between channels.
    case = Case(n=1, h=9, w=4, c1=96, groups=6, silu=False, quantize=False, dtype=torch.float16)
    rows = torch.tensor([-7.0, 3, 40, 41, 5, 0, -90, 2, 1]).view(1, 1, 9, 1)
    channels = torch.arange(96.0).view(1, 96, 1, 1) / 8
    x = (rows + channels).expand(1, 96, 9, 4)
    call = case.call()._replace(x=x.half().contiguous(memory_format=LAST))
    y, _, _ = interpreted(call, plan=tiles(96, 4, 64, 32))
    a = exact(call)
    assert ((y.double() - a).abs() <= 1e-6 * a.abs().max() + a.abs() * 2**-11).all()


# --- machine code --------------------------------------------------------------------------------

# (images, height = width, channels of x, of skip): Stable Diffusion, two images.
SHIPPED = [
    (2, 64, 320, 0), (2, 64, 320, 320), (2, 64, 640, 320), (2, 32, 640, 0), (2, 32, 1280, 0),
    (2, 32, 640, 640), (2, 32, 1280, 640),
]  # fmt: skip


def recorded(
    *shape: int, dtype=torch.float16, path: str | None = "cooperative", **how: Any
) -> list[harness.Launch]:
    module = norm_cooperative
    return test_gn_act_quant.recorded(*shape, dtype=dtype, path=path, module=module, **how)


def room(launch: harness.Launch, arch: int) -> int:
    """Return the bytes of stack a thread may use: none, but in one case.

    On an A100 a map of 640 channels takes 128 values a thread; with raw codes beside the others a
    few registers too many.
    """
    how = launch.kwargs
    full = how["BLOCK_P"] * (how["BLOCK_C"] + how["REST"]) == 128 * 32 * how["num_warps"]
    return 32 if arch == 80 and full and how["RAW"] else 0


def check_binary(launch: harness.Launch, arch: int) -> harness.Binary:
    how = launch.kwargs
    if arch >= 90:
        how = how | {"EARLY": True, "launch_pdl": True}
    binary = harness.compiled(dataclasses.replace(launch, kwargs=how), arch)
    beside = -(-launch.grid[0] // PROCESSORS[arch])
    held = how["BLOCK_P"] * (how["BLOCK_C"] + how["REST"])
    threads = 32 * how["num_warps"]
    print(
        f"sm_{arch} {launch.grid} {how['WIDTH']} x {how['BLOCK_P']}, {held // threads} a thread, "
        f"{binary.registers} of {how['maxnreg']} registers, {binary.shared} bytes, "
        f"{len(binary.sass.splitlines())} lines, {binary.count('BAR.SYNC')} barriers"
    )
    assert binary.stack <= room(launch, arch)
    assert binary.spills == 0 or binary.stack > 0
    assert binary.registers <= how["maxnreg"]
    # All programs are at work at once: registers come in units of 8 a thread.
    assert -(-binary.registers // 8) * 8 * threads * beside <= REGISTERS
    assert beside * (binary.shared + 1024) <= SHARED[arch] << 10
    assert beside * threads <= 1536
    assert how["launch_cooperative_grid"] is True
    return binary


# An A100 has too few registers for the largest.
HELD = [
    (arch, shape)
    for arch in (80, 89, 90)
    for shape in SHIPPED
    if make_cooperative_plan(2, shape[1] ** 2, sum(shape[2:]), 32, PROCESSORS[arch]) is not None
]


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("arch", "shape"), HELD, ids=str)
def test_shipped_shapes_are_at_work_at_once(shape, raw: bool, arch: int, monkeypatch) -> None:
    assert len(HELD) == 20
    monkeypatch.setattr(gn_act_quant, "_PROCESSORS", PROCESSORS[arch])
    (launch,) = recorded(*shape, raw=raw)
    binary = check_binary(launch, arch)
    # The map is read once, 16 bytes a load: each thread has that many pieces of it.
    how = launch.kwargs
    pieces = how["BLOCK_P"] * (how["BLOCK_C"] + how["REST"]) // (8 * 32 * how["num_warps"])
    loads = binary.count(r"LDG\.E\.128")
    # Besides, a thread loads two vectors of 8 channels for each part.
    assert pieces <= loads <= pieces + (8 if how["REST"] else 4)


@pytest.mark.parametrize("arch", [89, 90])
def test_other_types_are_at_work_at_once(arch: int, monkeypatch) -> None:
    monkeypatch.setattr(gn_act_quant, "_PROCESSORS", PROCESSORS[arch])
    for shape in (SHIPPED[1], SHIPPED[4]):
        (launch,) = recorded(*shape, dtype=torch.bfloat16)
        check_binary(launch, arch)


@pytest.mark.parametrize("arch", [80, 90])
def test_programs_release_acquire_and_leave_in_this_order(arch: int) -> None:
    (launch,) = recorded(*SHIPPED[0])
    ptx = harness.compiled(launch, arch).ptx
    order = re.findall(
        r"st\.global(?:\.v\d)?\.b8|st\.global(?=[.\w]*b(?:32|64)|\.L)|red\.\w+\.gpu\.global\.inc\.u32"
        r"|ld\.acquire\.gpu\.global\.u32|ld\.global\.cg|bar\.sync",
        ptx,
    )
    stages = [step for step in order if step.startswith(("red", "ld"))]
    assert stages[:3] == [
        "red.release.gpu.global.inc.u32",
        "ld.acquire.gpu.global.u32",
        "red.relaxed.gpu.global.inc.u32",
    ]
    # What others wrote is read behind that, past the nearest cache, and nothing twice.
    assert len(stages) > 3 and set(stages[3:]) == {"ld.global.cg"}
    # Every thread's stores before the release, and every thread behind the acquire.
    released, acquired = (order.index(step) for step in stages[:2])
    assert order[released - 1] == "bar.sync" and order[acquired + 1] == "bar.sync"


def test_zero_points_and_map_sizes_share_a_binary() -> None:
    plan = tiles(80, 64, 64, 16, warps=8)
    variants = {
        harness.variant(recorded(n, side, 320, 0, zero_point=zero_point, plan=plan)[0])
        for n, side, zero_point in ((1, 16, 1), (2, 16, 16), (2, 16, 200))
    }
    assert len(variants) == 1


# --- plans and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("processors", [1, 24, 108, 132])
@pytest.mark.parametrize("channels", [32, 96, 320, 384, 448, 640, 896, 960, 1280, 1920, 2560])
def test_plans_fit(channels: int, processors: int) -> None:
    for images in (1, 2, 3, 8, 64):
        for pixels in (1, 35, 256, 1024, 4096, 5000, 16384):
            plan = make_cooperative_plan(images, pixels, channels, 32, processors)
            if plan is None:
                continue
            slabs, chunks = -(-channels // plan.width), -(-pixels // plan.block_p)
            threads = 32 * plan.warps
            beside = -(-images * slabs * chunks // processors)
            held = plan.block_p * (plan.block_c + plan.rest)
            assert plan.width % (channels // 32) == 0
            assert plan.width <= plan.block_c + plan.rest
            assert plan.rest < plan.block_c < 2 * plan.width
            assert plan.rest in (0, 8, 16, 32, 64, 128)
            # A part of no channel, or of half a unit, would be summed up wrongly.
            assert plan.rest == 0 or plan.width > plan.block_c >= 8
            assert beside * threads * plan.registers <= REGISTERS
            assert held <= 2 * threads * (plan.registers - 40) and held <= 128 * threads
            assert chunks <= 64 and images * slabs * APART <= launches_of._MOST


@pytest.mark.parametrize(
    ("side", "channels", "width", "programs"),
    [
        (64, 320, 80, 128), (64, 640, 160, 256), (64, 960, 240, 256), (32, 640, 80, 128),
        (32, 1280, 160, 128), (32, 1920, 240, 256),
    ],
)  # fmt: skip
def test_plans_of_stable_diffusion(side: int, channels: int, width: int, programs: int) -> None:
    plan = make_cooperative_plan(2, side * side, channels, 32, 132)
    assert plan is not None and plan.width == width
    assert not make_plan(2, side * side, channels, 32, 2).one_launch
    assert 2 * (-(-channels // width)) * (side * side // plan.block_p) == programs


def test_what_cannot_be_held_is_refused_if_asked_for() -> None:
    for shape, dtype in (
        ((8, 64, 320), torch.float16),
        ((2, 128, 320), torch.float16),
        ((2, 32, 640), torch.float32),
    ):
        with pytest.raises(ValueError, match="path='triton'"):
            recorded(*shape, dtype=dtype)
    x = torch.empty(1, 16, 4, 4, dtype=torch.float16, device="meta")
    call = ops.gn_act_quant.__wrapped__(x, bucket=torch.tensor(0), silu=True)
    with pytest.raises(ValueError, match="expected a norm"):
        gn_act_quant.launch(call, path="cooperative")


# (images, side, channels of x, of skip, groups) -> whether it is the default on Hopper.
CHOSEN = {
    (2, 64, 320, 0, 32): True,
    (2, 32, 640, 320, 32): True,
    (8, 32, 640, 0, 32): True,
    # Many images, a small map, no whole vectors, odd groups.
    (16, 32, 320, 0, 32): False,
    (2, 16, 640, 0, 32): False,
    (2, 64, 540, 180, 24): False,
    (2, 48, 544, 0, 32): False,
}


@pytest.mark.parametrize(("shape", "wanted"), CHOSEN.items(), ids=str)
def test_it_is_chosen_where_it_was_faster(shape, wanted: bool, monkeypatch) -> None:
    images, side, c1, c2, groups = shape
    empty = functools.partial(torch.empty, dtype=torch.float16, memory_format=LAST)
    parts = tuple(empty(images, c, side, side) for c in (c1, c2) if c)
    assert not isinstance(gn_act_quant._choose(parts, groups, None), CooperativePlan)
    monkeypatch.setattr(gn_act_quant, "_is_hopper", lambda device: True)
    chosen = gn_act_quant._choose(parts, groups, None)
    assert isinstance(chosen, CooperativePlan) == wanted
