"""The norm with slabs in shared memory: against float64 on a GPU of Hopper, elsewhere compiled.

Gluon kernels cannot be interpreted, so without a GPU only their machine code is looked at.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from quantempo.kernels.gpu import gn_act_quant
from quantempo.kernels.gpu.group_norm import hopper as norm_hopper
from quantempo.kernels.gpu.group_norm.plan import Plan, SharedPlan, make_shared_plan
from quantempo.kernels.ops.gn_act_quant import Normalization
from tests.gpu import harness
from tests.gpu.test_gn_act_quant import LAST, Case, check, exact

pytestmark = pytest.mark.usefixtures("poisoned_memory")

needs_hopper = pytest.mark.cuda(major=9)


def launch(call: Normalization, plan: SharedPlan | None = None) -> tuple[Tensor, Tensor, Tensor]:
    size = len(call.x), call.x[0, 0].numel(), call.channels, call.groups
    return gn_act_quant.launch(call, plan=plan or make_shared_plan(*size, always=True))


def square(side: int, c1: int, c2: int = 0, groups: int = 32, **others) -> Case:
    return Case(h=side, w=side, c1=c1, c2=c2, groups=groups, **others)


CASES = {
    "one box": square(8, 64, groups=8),
    "one box, one warp": square(4, 64, groups=8),
    "four boxes": square(32, 128),
    "four boxes, fp16": square(32, 128, dtype=torch.float16),
    "four boxes, fp16, large": square(32, 128, dtype=torch.float16, size=2e4, raw_rows=1),
    "groups of 16": square(16, 512),
    "groups of 8, wide slabs": square(16, 256),
    "groups of 12, slabs across": square(32, 256, 128),
    "groups of 12, across, raw": square(16, 256, 128, raw_rows=2),
    "groups of 20": square(16, 640),
    "groups of 10": square(32, 320),
    "groups of 16, large slabs": square(64, 512, n=1),
    "groups of 48": square(16, 1024, 512),
    "the last slab is narrower": square(16, 120, groups=5),
    "concat, apart": square(32, 128, 128),
    "concat, raw": square(16, 128, 128, raw_rows=2),
    "concat, raw, one row": square(8, 64, 32, groups=12, raw_rows=1),
    "raw": square(16, 128, raw_rows=1),
    "multiples of 8 only": square(8, 24, 40, groups=16, raw_rows=2),
    "not a square": Case(h=24, w=16, c1=64, groups=16),
    "one group": square(16, 64, groups=1),
    "no silu": square(16, 128, silu=False),
    "a bucket an image": square(16, 64, n=3, groups=16, buckets=4, bucket_batch=3, raw_rows=1),
    "not quantized": square(16, 96, 32, quantize=False),
    "not quantized, no silu, raw": square(16, 96, quantize=False, silu=False, raw_rows=1),
    "four bits": square(16, 64, qmax=15, zero_point=3),
    "zero point 0": square(16, 64, zero_point=0),
    "zero point 255": square(16, 64, zero_point=255),
}


def meta(case: Case) -> Normalization:
    call = case.call()
    moved = {k: v.to("meta") for k, v in vars(call).items() if isinstance(v, Tensor)}
    for name in {"x", "skip"} & set(moved):
        moved[name] = moved[name].contiguous(memory_format=LAST)
    return dataclasses.replace(call, **moved)


def recorded(case: Case) -> harness.Launch:
    with harness.recorded(norm_hopper) as launches:
        launch(meta(case))
    return launches[0]


@needs_hopper
@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_float64(name: str) -> None:
    case = CASES[name]
    different = check(case, launch, "cuda")
    assert different <= 0.01 * case.n * case.h * case.w * (case.c1 + case.c2)


@needs_hopper
@pytest.mark.parametrize("width", [8, 16, 32])
@pytest.mark.parametrize(("warps", "pieces"), [(1, 4), (2, 2), (4, 4), (4, 1), (8, 2)])
def test_every_tile_agrees_with_float64(width: int, warps: int, pieces: int) -> None:
    cols = max(8, width)
    plan = SharedPlan(width, cols, min(256, pieces * 256 * warps // cols), warps)
    case = square(16, 32, 32, groups=16, raw_rows=2)
    check(dataclasses.replace(case, plan=plan), launch, "cuda")


# Groups that do not fill their slab change places in shared memory, where the barriers were.
@needs_hopper
@pytest.mark.parametrize("size", [(4, 192), (8, 256, 192), (8, 192, 192), (8, 192, 128), (16, 128)])
def test_equal_calls_have_equal_bits(size: tuple[int, ...]) -> None:
    call = square(*size, n=512, dtype=torch.float16).call("cuda")
    first = launch(call)[0]
    assert not torch.stack([(launch(call)[0] != first).any() for _ in range(60)]).any()


# Float32 x a + b with x a several hundred times
# larger than the result, cast once.
@needs_hopper
@pytest.mark.parametrize(
    ("offset", "outliers", "bound"),
    [(0, 1, 2e-3), (500, 1, 2e-3), (-500, 1, 2e-3), (0.5, 1e3, 1e-4)],
)
def test_variance_survives_a_large_mean_and_outliers(offset, outliers, bound):
    case = square(32, 64, groups=16, silu=False, quantize=False, dtype=torch.float16, offset=offset)
    call = case.call("cuda")
    call.x[:, ::3, 0, :] *= outliers
    y, _, _ = launch(call)
    a = exact(call)
    assert ((y.double() - a).abs() <= bound * a.abs().max() + a.abs() * 2**-10).all()


@needs_hopper
def test_it_is_the_default_where_it_pays() -> None:
    case = square(32, 128, n=64)
    with harness.recorded(norm_hopper) as launches:
        gn_act_quant.launch(case.call("cuda"))
    assert len(launches) == 1


# --- machine code --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_as_meant(name: str) -> None:
    compiled = recorded(CASES[name])
    binary = harness.compiled(compiled, 90)
    how = compiled.kwargs
    slab = 2 * how["PIXELS"] * how["COLS"]
    # Values a thread has in an iteration of either loop.
    each = how["ROWS"] * how["COLS"] // (32 * how["num_warps"])
    lines = len(binary.sass.splitlines())
    print(f"{name}: {binary.registers} registers, {binary.shared} bytes, {lines} for {each} values")
    assert (binary.spills, binary.stack) == (0, 0)
    assert slab <= binary.shared <= slab + (9 << 10)
    assert binary.registers * 32 * how["num_warps"] * min(3, (227 << 10) // (slab + 1024)) <= 65536
    boxes = how["PIXELS"] // how["ROWS"]
    assert binary.count(r"UTMALDG\.2D") == boxes * (1 if how["FORM"].SOURCE == 0 else 2)
    # A barrier's memory is nothing else's before it is invalidated (PTX, mbarrier.inval).
    assert binary.ptx.count("mbarrier.inval") == binary.ptx.count("mbarrier.init") == boxes
    # Once each way, a piece a load; with one box the first of all is not asked for again.
    pieces = how["ROWS"] // (256 * how["num_warps"] // how["COLS"])
    assert binary.count(r"LDS\.128") >= 2 * pieces - 1


@pytest.mark.parametrize("silu", [True, False])
def test_few_instructions_a_value(silu: bool) -> None:
    binary = harness.compiled(recorded(square(32, 128, n=256, silu=silu)), 90)
    # The loop that writes is the last: from its first load of the slab to its last store.
    lines = binary.sass.splitlines()
    stores = [i for i, line in enumerate(lines) if "STG.E.64" in line]
    loads = [i for i, line in enumerate(lines) if "LDS.128" in line]
    assert len(stores) == 4
    written = stores[-1] - loads[-4] + 1
    assert written <= 12 * 32, written
    assert binary.count(r"I2IP\.S8\.S32\.SAT") == 16
    # No narrow loads, and no conversions but those that divide the number of the program.
    assert binary.count(r"LDS\.U?(?:8|16)") == 0 and binary.count("F2I|I2F") <= 4
    assert "MUFU.EX2" in binary.sass or not silu


# --- plans and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [16, 64, 100, 256, 384, 1024, 4096, 16384])
@pytest.mark.parametrize("channels", [32, 128, 256, 320, 384, 512, 640, 960, 1280, 1920, 2560])
def test_plans_fit(pixels: int, channels: int) -> None:
    for images in (1, 8, 256):
        plan = make_shared_plan(images, pixels, channels, 32, True)
        if plan is None:
            continue
        piece = 256 * plan.warps // plan.cols
        assert (
            plan.width % (channels // 32) == 0
            and plan.width % 8 == 0
            and plan.width <= plan.cols <= 128
        )
        assert pixels % plan.rows == 0 and plan.rows % piece == 0 and plan.rows <= 256
        assert 2 * pixels * plan.cols <= 218 << 10 and piece >= 8
        assert pixels // plan.rows <= 16
        usual = make_shared_plan(images, pixels, channels, 32)
        assert usual is None or images * -(-channels // usual.width) >= 64


@pytest.mark.parametrize(
    ("pixels", "channels", "width"),
    [(1024, 128, 32), (1024, 256, 32), (256, 256, 64), (256, 384, 48)],
)
def test_plans_of_the_main_layers(pixels: int, channels: int, width: int) -> None:
    plan = make_shared_plan(256, pixels, channels, 32)
    assert plan is not None and plan.width == width


def test_what_does_not_fit_into_shared_memory_is_run_without(monkeypatch) -> None:
    monkeypatch.setattr(gn_act_quant, "_is_hopper", lambda device: True)

    def chosen(case: Case) -> type:
        return type(gn_act_quant._choose(meta(case).images, case.groups))

    assert chosen(square(16, 64, n=64)) is SharedPlan
    for case in (
        square(10, 64, groups=8),
        square(128, 320, n=1),
        # Slabs that would begin at 20 and at 120 bytes.
        square(64, 320, n=1),
        square(16, 1280, 640),
        square(16, 64, dtype=torch.float32),
        square(16, 36, groups=4),
        square(16, 64, groups=0),
    ):
        assert chosen(dataclasses.replace(case, n=max(case.n, 64))) is Plan
