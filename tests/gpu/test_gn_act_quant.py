"""GroupNorm + SiLU + quantization on Triton's interpreter against float64, and as machine code.

Codes may differ by 1 from the float64 ones where the float64 quotient lies within TIE of a tie:
the kernels work in float32, and a quotient of up to 256 carries an error of some 16 2^-24 256.
"""

import dataclasses
import itertools
from types import ModuleType

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from quantempo.kernels import ops
from quantempo.kernels.gpu import gn_act_quant
from quantempo.kernels.gpu.group_norm import portable as norm_kernels
from quantempo.kernels.gpu.group_norm.plan import Plan, make_plan
from quantempo.kernels.ops.gn_act_quant import Normalization
from tests.gpu import harness

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LAST = torch.channels_last
TIE = 1e-3
INT8 = torch.int8
HALF_ULP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of `launch`, seeded random tensors included."""

    n: int = 2
    h: int = 5
    w: int = 7
    c1: int = 32
    c2: int = 0
    groups: int = 8  # 0: no norm
    dtype: torch.dtype = torch.bfloat16
    silu: bool = True
    quantize: bool = True
    raw_rows: int = 0
    buckets: int = 1
    bucket_batch: int = 0  # 0: a scalar bucket
    zero_point: int = 70
    qmax: int = 255
    offset: float = 0.5
    size: float = 1.0  # of x and skip, which are cut at 6e4
    one_launch: bool | None = None
    plan: Plan | None = None

    def call(self, device: str = "cpu") -> Normalization:
        g = torch.Generator().manual_seed(17)

        def image(channels: int, spread: float, offset: float) -> Tensor:
            x = torch.randn(self.n, channels, self.h, self.w, generator=g) * spread + offset
            x = (self.size * x).clamp(-6e4, 6e4)
            return x.to(self.dtype).to(device).contiguous(memory_format=LAST)

        x = image(self.c1, 2.0, self.offset)
        skip = image(self.c2, 3.0, -0.7) if self.c2 else None
        channels, norm = self.c1 + self.c2, self.groups > 0
        gamma = torch.randn(channels, generator=g).to(device) if norm else None
        beta = torch.randn(channels, generator=g).to(device) if norm else None
        scale = torch.rand(self.buckets, generator=g) * 0.02 + 0.01
        raw = torch.rand(self.raw_rows, self.buckets, generator=g) * 0.02 + 0.02
        shape = (self.bucket_batch,) if self.bucket_batch else ()
        bucket = torch.randint(0, self.buckets, shape, generator=g).to(device)
        zeros = [90, 101][: self.raw_rows]
        return Normalization(
            x, skip, gamma=gamma, beta=beta, groups=self.groups, silu=self.silu,
            scale=scale.to(device) if self.quantize else None, zero_point=self.zero_point,
            qmax=self.qmax, bucket=bucket, raw_scales=raw.to(device) if self.raw_rows else None,
            raw_zero_points=zeros,
        )  # fmt: skip

    def tiles(self) -> Plan:
        channels, itemsize = self.c1 + self.c2, torch.finfo(self.dtype).bits // 8
        return self.plan or make_plan(
            self.n, self.h * self.w, channels, self.groups, itemsize, self.one_launch
        )


def exact(call: Normalization) -> Tensor:
    """Return act(norm(cat)) in float64, from the formulas."""
    v = torch.cat([image.double() for image in call.images], 1)
    if call.gamma is not None:
        grouped = v.reshape(v.shape[0], call.groups, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        deviation = (centred.square().mean(2, keepdim=True) + call.eps).sqrt()
        v = (centred / deviation).reshape(v.shape)
        v = v * call.gamma.double().view(1, -1, 1, 1) + call.beta.double().view(1, -1, 1, 1)
    return v / (1 + torch.exp(-v)) if call.silu else v


def check_codes(codes: Tensor, a: Tensor, scale: Tensor, bucket: Tensor, z: int, qmax: int) -> int:
    """Assert that codes are those of a, ties aside; return how many differ."""
    entries = bucket.reshape(-1).repeat_interleave(a.shape[0] // bucket.numel())
    of_image = scale.double()[entries if len(scale) > 1 else 0 * entries].view(-1, 1, 1, 1)
    quotient = a / of_image
    assert codes.is_contiguous(memory_format=LAST)
    expected = (torch.round(quotient) + z).clamp(0, qmax) - 128
    wrong = codes.double() != expected
    assert ((codes.double() - expected).abs() <= 1).all()
    from_tie = (quotient - torch.floor(quotient) - 0.5).abs()
    assert (from_tie[wrong] <= TIE).all(), from_tie[wrong].max()
    return int(wrong.sum())


def check(case: Case, launch, device: str = "cpu") -> int:
    """Run a case, assert its results, return how many codes differ from the float64 ones."""
    call = case.call(device)
    x, bucket, raw = call.x, call.bucket, call.raw_scales
    codes, raw_x, raw_skip = launch(call, plan=case.tiles())
    a, different = exact(call), 0
    if case.quantize:
        assert codes.dtype == INT8 and codes.shape == a.shape
        different += check_codes(codes, a, call.scale, bucket, call.zero_point, call.qmax)
    elif case.groups or case.silu:
        assert codes.dtype == x.dtype and codes.is_contiguous(memory_format=LAST)
        error = (codes.double() - a).abs()
        assert (error <= a.abs() * 1.01 * HALF_ULP[x.dtype] + 2e-5).all(), error.max()
    else:
        assert codes.shape == (0,)
    for row, (result, image) in enumerate(((raw_x, x), (raw_skip, call.skip))):
        if raw is None or image is None:
            assert result.shape == (0,)
            continue
        assert result.shape == image.shape and result.dtype == INT8
        own = min(row, len(raw) - 1)
        zero = call.raw_zero_points[own]
        different += check_codes(result, image.double(), raw[own], bucket, zero, call.raw_qmax)
    return different


STREAMED = Plan(True, 16, 16, 16, 4, stages=3)
CASES = {
    "one pixel": Case(h=1, w=1, groups=8),
    "one pixel, two launches": Case(h=1, w=1, groups=8, one_launch=False),
    "held": Case(n=3, h=9, w=9, c1=48, groups=16),
    "held, fp16": Case(h=3, w=5, c1=160, groups=32, dtype=torch.float16),
    "held, large": Case(c2=32, dtype=torch.float16, size=2e4, raw_rows=1),
    "streamed, large": Case(h=9, w=9, dtype=torch.float16, size=2e4, plan=STREAMED),
    "two launches, large": Case(h=9, w=9, dtype=torch.float16, size=2e4, one_launch=False),
    "held, fp32, no silu": Case(n=1, c1=96, groups=32, dtype=torch.float32, silu=False),
    "held, raw": Case(c1=48, raw_rows=1),
    "whole pixels": Case(h=4, w=8, c1=32),
    "streamed": Case(h=9, w=9, plan=STREAMED),
    "streamed, whole tiles": Case(h=8, w=8, plan=STREAMED),
    "streamed, raw": Case(h=7, w=9, raw_rows=1, plan=STREAMED),
    "streamed, unrolled": Case(h=9, w=9, plan=dataclasses.replace(STREAMED, stages=1, unroll=2)),
    "two launches": Case(h=9, w=9, c1=96, groups=32, one_launch=False),
    "two launches, small chunks": Case(
        h=9, w=9, c1=48, groups=8,
        plan=Plan(False, 18, 16, 32, 4, stat_p=32, stat_c=32, stat_warps=4, group_c=18),
    ),
    "320 channels": Case(n=1, h=7, w=9, c1=320, groups=32, one_launch=False),
    "320 channels, held": Case(n=1, h=3, w=3, c1=320, groups=32),
    "one group": Case(h=3, w=5, c1=48, groups=1),
    "concat": Case(h=5, w=5, c1=256, c2=128, groups=32),
    "concat, raw, slabs apart": Case(h=3, w=5, c1=32, c2=64, groups=12, raw_rows=2),
    "concat, raw, groups straddle": Case(h=5, w=5, c1=40, c2=56, groups=8, raw_rows=2),
    "concat, raw, streamed": Case(
        h=7, w=7, c1=40, c2=56, groups=8, raw_rows=2, plan=Plan(True, 36, 16, 64, 4)
    ),
    "concat, raw, two launches": Case(
        h=5, w=5, c1=256, c2=128, groups=32, raw_rows=2, one_launch=False
    ),
    "concat, raw, one row": Case(h=3, w=5, c1=32, c2=16, groups=8, raw_rows=1),
    "a bucket an image": Case(n=3, c1=48, groups=16, buckets=4, bucket_batch=3, raw_rows=1),
    "a bucket for two images": Case(
        n=4, h=3, c1=32, c2=32, buckets=3, bucket_batch=2, raw_rows=2, one_launch=False
    ),
    "one bucket of many": Case(buckets=5),
    "buckets, one scale": Case(n=2, bucket_batch=2),
    "not quantized": Case(c1=48, c2=48, quantize=False),
    "not quantized, fp16": Case(quantize=False, dtype=torch.float16, silu=False),
    "not quantized, fp32, raw": Case(quantize=False, dtype=torch.float32, raw_rows=1),
    "quantized only": Case(n=3, c1=96, groups=0, silu=False, buckets=3, bucket_batch=3),
    "activated only": Case(groups=0),
    "raw only": Case(c1=64, c2=32, groups=0, silu=False, quantize=False, raw_rows=2),
    "tokens": Case(n=3, h=17, w=1, c1=160, groups=0, silu=False),
    "four bits": Case(qmax=15, zero_point=3),
    "zero point 0": Case(zero_point=0),
    "zero point 255": Case(zero_point=255),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_float64(name: str, device: str) -> None:
    module = harness.interpreted("gn_act_quant") if device == "cpu" else gn_act_quant
    case = CASES[name]
    different = check(case, module.launch, device)
    # Chance of a quotient so near a tie is 2 TIE; seen: none.
    assert device == "cuda" or different <= 0.01 * case.n * case.h * case.w * (case.c1 + case.c2)


@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_variance_survives_a_mean_a_thousand_times_larger(one_launch: bool, held: bool) -> None:
    # E[x^2] - E[x]^2 in float32 would lose 2^-24 10^6 of the variance, 6 %.
    plan = Plan(
        one_launch, 16, 64 if held else 16, 16, 4, stat_p=16, stat_c=16, stat_warps=4, group_c=16
    )
    case = Case(
        h=8, w=8, groups=2, dtype=torch.float32, silu=False, quantize=False, offset=2000.0
    )  # fmt: skip
    call = case.call()
    y, _, _ = harness.interpreted("gn_act_quant").launch(call, plan=plan)
    a = exact(call)
    # Float32 x a + b with x a 1000 times larger than the result.
    assert (y.double() - a).abs().max() < 1e-3 * a.abs().max()


@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_ties_go_to_even_whatever_the_zero_point(zero_point: int) -> None:
    launch = harness.interpreted("gn_act_quant").launch
    x = (torch.arange(-600, 600).float() / 4).view(1, 16, 75, 1).contiguous(memory_format=LAST)
    how = {"bucket": torch.tensor(0), "scale": torch.tensor([0.5]), "zero_point": zero_point}
    codes, _, _ = launch(ops.gn_act_quant.__wrapped__(x, **how))
    expected = (torch.round(x.double() * 2) + zero_point).clamp(0, 255) - 128
    assert torch.equal(codes.double(), expected)
    # Infinite values saturate.
    x = torch.tensor([3e38, -3e38, torch.inf, -torch.inf]).repeat(4).view(1, 16, 1, 1)
    codes, _, _ = launch(ops.gn_act_quant.__wrapped__(x.contiguous(memory_format=LAST), **how))
    assert codes.flatten().tolist() == [127, -128, 127, -128] * 4


# --- machine code --------------------------------------------------------------------------------

# (images, height = width, channels of x, of skip): CIFAR U-Net, SD 1.5 and SDXL layers.
SHIPPED = [
    (256, 32, 128, 0), (256, 32, 256, 128), (256, 16, 256, 0), (256, 16, 256, 256),
    (256, 8, 256, 0), (16, 4, 256, 0), (1, 32, 128, 0), (8, 64, 320, 0), (8, 32, 640, 320),
    (8, 16, 1280, 0), (2, 16, 1280, 1280), (2, 128, 320, 0), (2, 64, 640, 320),
]  # fmt: skip
MOST_REGISTERS = 128


def recorded(
    n: int, side: int, c1: int, c2: int = 0, dtype=torch.bfloat16, raw: bool = False,
    norm: bool = True, zero_point: int = 3, plan: object = None,
    module: ModuleType = norm_kernels,
) -> list[harness.Launch]:  # fmt: skip
    def empty(*shape: int, dtype=torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(n, side, side, c1, dtype=dtype).permute(0, 3, 1, 2)
    skip = empty(n, side, side, c2, dtype=dtype).permute(0, 3, 1, 2) if c2 else None
    rows = (2 if c2 else 1) if raw else 0
    gamma = empty(c1 + c2) if norm else None
    call = Normalization(
        x, skip, gamma=gamma, beta=gamma, groups=32, silu=norm, scale=empty(8),
        zero_point=zero_point, bucket=empty(dtype=torch.int64),
        raw_scales=empty(rows, 8) if raw else None, raw_zero_points=[7] * rows,
    )  # fmt: skip
    with harness.recorded(module) as launches:
        gn_act_quant.launch(call, plan=plan)
    return launches


def check_binaries(launches: list[harness.Launch], arch: int) -> None:
    assert launches
    for launch in launches:
        binary = harness.compiled(launch, arch)
        width = launch.kwargs.get("WIDTH", launch.kwargs["BLOCK_C"])
        print(launch.kernel.fn.__name__, launch.grid, arch, width, binary.registers, binary.shared)
        assert (binary.spills, binary.stack) == (0, 0)
        assert binary.registers <= MOST_REGISTERS
        tile = launch.kwargs.get("BLOCK_P", 0) * launch.kwargs["BLOCK_C"]
        if width % 8 == 0 and tile >= 8 * 32 * launch.kwargs["num_warps"]:
            assert binary.count(r"LDG\.E\.128|LDGSTS\.E\.(?:BYPASS\.)?(?:LTC128B\.)?128") > 0


COMPILED = [
    *((90, shape, {}) for shape in SHIPPED),
    *((arch, SHIPPED[i], {}) for arch in (80, 89) for i in (0, 1, 2, 7)),
    *((90, SHIPPED[i], {"raw": True}) for i in (0, 1, 3, 12)),
    *((arch, SHIPPED[0], {"norm": False}) for arch in (89, 90)),
]


@pytest.mark.parametrize(("arch", "shape", "how"), COMPILED, ids=str)
def test_shipped_shapes_compile_without_spills(arch: int, shape, how: dict[str, bool]) -> None:
    check_binaries(recorded(*shape, **how), arch)


def test_zero_points_batches_and_map_sizes_share_a_binary() -> None:
    plan = make_plan(256, 1024, 128, 32, 2)
    calls = itertools.product((256, 3, 1), (1, 16, 200))
    variants = {
        harness.variant(recorded(n, 32, 128, 0, zero_point=z, plan=plan)[0]) for n, z in calls
    }
    assert len(variants) == 1


# --- plans and refusals --------------------------------------------------------------------------


@pytest.mark.parametrize("images", [1, 2, 8, 64, 256])
@pytest.mark.parametrize("side", [1, 4, 7, 16, 32, 64, 128])
@pytest.mark.parametrize(("channels", "groups"), [(32, 32), (96, 8), (384, 32), (1280, 32)])
def test_plans_fit(images: int, side: int, channels: int, groups: int) -> None:
    for one_launch in (None, True, False):
        plan = make_plan(images, side * side, channels, groups, 2, one_launch)
        assert (plan.width if plan.one_launch else plan.group_c) % (channels // groups) == 0
        assert plan.block_c // 2 < plan.width <= plan.block_c <= 128
        assert 1 <= plan.warps <= 16 and plan.block_p * plan.block_c <= 16384
        assert plan.one_launch is one_launch or one_launch is None
        assert plan.one_launch or plan.stat_p * plan.stat_c <= 32768


def test_small_batches_of_large_maps_fill_the_chip() -> None:
    for side, channels in ((64, 320), (128, 320), (32, 1280)):
        plan = make_plan(1, side * side, channels, 32, 2)
        assert not plan.one_launch
        slabs, chunks = -(-channels // plan.width), -(-side * side // plan.block_p)
        assert slabs * chunks >= 132
        assert -(-channels // plan.stat_c) * -(-side * side // plan.stat_p) >= 132


def test_maps_too_large_for_their_indices_are_refused() -> None:
    x = torch.empty(1, 256, 256, 2**15, dtype=torch.float16, device="meta").permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"2\^31"):
        gn_act_quant.launch(ops.gn_act_quant.__wrapped__(x, bucket=torch.tensor(0), silu=True))


def test_empty_batches_give_empty_results() -> None:
    call = Case(n=0, raw_rows=1).call()
    codes, raw_x, raw_skip = harness.interpreted("gn_act_quant").launch(call)
    assert codes.shape == raw_x.shape == (0, 32, 5, 7) and raw_skip.shape == (0,)


# --- the harness itself --------------------------------------------------------------------------


def test_interpreted_copies_leave_the_compiled_kernels_alone() -> None:
    copy = harness.interpreted("gn_act_quant")
    assert copy is not gn_act_quant and not isinstance(copy.portable.one_launch, JITFunction)
    assert isinstance(norm_kernels.one_launch, JITFunction)
    assert gn_act_quant.portable.one_launch is norm_kernels.one_launch


@pytest.mark.parametrize("value", [1.999, 1.00390625, 1.01171875, -1e-40, 0.3, 3e38])
def test_harness_converts_floats_as_torch_does(value: float) -> None:
    import triton.language as tl

    data = torch.tensor([value], dtype=torch.float32)
    bits = harness.convert_float(data.numpy(), tl.float32, tl.bfloat16, None)
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), data.bfloat16())
