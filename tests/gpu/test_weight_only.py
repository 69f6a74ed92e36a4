"""Float rows times int8 codes: interpreted against float64, as machine code."""

import pytest
import torch

from quantempo.core import GroupFormat
from quantempo.kernels.gpu import weight_only_linear as kernel
from quantempo.kernels.ops.weight_only_linear import FloatRows
from tests.gpu import harness

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# (rows, inputs, outputs, type): one row, a tile of them and more, odd sizes, none.
CASES = [
    (1, 48, 33, FLOAT), (1, 1040, 70, BRAIN), (1, 7, 5, HALF), (2, 48, 33, FLOAT),
    (17, 160, 100, HALF), (70, 50, 65, FLOAT), (3, 7, 5, BRAIN), (0, 16, 4, FLOAT),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "inputs", "outs", "dtype"), CASES, ids=str)
def test_kernel_agrees_with_float64(rows: int, inputs: int, outs: int, dtype, device: str) -> None:
    g = torch.Generator().manual_seed(rows)
    # Of any size: no half of a value may overflow.
    x = torch.randn(rows, inputs, generator=g) * (2e38 / 127 if dtype == FLOAT else 1) ** 0.5
    codes = torch.randint(-127, 128, (outs, inputs), generator=g, dtype=torch.int8)
    scale, bias = torch.rand(outs, generator=g), torch.randn(outs, generator=g)
    given = (x.to(dtype).to(device), codes.to(device), scale.to(device))
    call = FloatRows(*given, bias.to(device) if rows != 2 else None)
    call.check(strides=True)
    module = harness.interpreted("weight_only_linear") if device == "cpu" else kernel
    sums = given[0].double().abs() @ call.weight.double().abs().t() * call.weight_scale.double()
    truth = given[0].double() @ call.weight.double().t() * call.weight_scale.double()
    truth = truth if call.bias is None else truth + call.bias.double()
    for launch, share in ((FloatRows.exact, 0), (module.launch, 2**-20)):
        y = launch(call)
        assert y.shape == truth.shape and y.is_contiguous() and y.dtype == dtype
        room = torch.finfo(dtype).eps / 2 * truth.abs() + share * (sums + truth.abs()) + 1e-30
        assert ((y.double() - truth).abs() <= room).all()


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "inputs", "outs", "dtype"), CASES, ids=str)
def test_packed_codes_are_multiplied_like_int8_ones(
    rows, inputs, outs, dtype, device, group
) -> None:
    g, spec, shape = torch.Generator(), GroupFormat(4, group=group), (outs, inputs)
    groups = torch.randint(0, 256, spec.group_shape(shape), generator=g, dtype=torch.uint8)
    weight = torch.randint(-127, 128, shape, generator=g).float()
    codes = spec.grid(shape, groups).round(weight).to(torch.int8)
    given = [torch.randn(rows, inputs, generator=g).to(dtype), codes, *weight[:, :1].t(), None]
    given[2] = given[2].contiguous() / 127
    eight = FloatRows(*(v if v is None else v.to(device) for v in given))
    packed = eight._replace(weight=spec.encode(codes, groups).to(device), groups=groups.to(device))
    packed.check(strides=True)
    module = harness.interpreted("weight_only_linear") if device == "cpu" else kernel
    assert torch.equal(packed.exact(), eight.exact())
    # As machine code they add up in another order.
    exact = eight._replace(x=eight.x.double()).exact()
    sums = (
        eight.x.double().abs() @ eight.weight.double().abs().t() * eight.weight_scale.double().abs()
    )
    room = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-20 * sums
    for call in (packed, eight):
        assert ((module.launch(call).double() - exact).abs() <= room).all()


@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("rows", "inputs"), [(1, 3072), (1, 1152), (2, 2432), (32, 1152)])
def test_shipped_shapes_compile_without_spills(rows, inputs, arch, packed) -> None:
    def empty(*shape: int, dtype=FLOAT) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # All modulations of FLUX are 3.2 GB: places do not fit 31 bits.
    weight = empty(1_050_624, inputs, dtype=torch.int8)
    call = FloatRows(empty(rows, inputs), weight, empty(len(weight)), None)
    if packed:
        stored = (empty(len(weight), 1, inputs // n, dtype=torch.uint8) for n in (2, 16))
        call = call._replace(weight=next(stored), groups=next(stored))
    with harness.recorded(kernel) as launches:
        kernel.launch(call)
    binary = harness.compiled(launches[0], arch)
    assert (binary.spills, binary.stack) == (0, 0)
    if rows > 1:
        # Asked for ahead of their use, for matrix instructions.
        assert binary.count("LDGSTS") > 0 and binary.count(r"MMA.*TF32") > 0
        return
    # Codes come 16 at a time, their conversion is none of the slow ones (one division has some).
    assert binary.count(r"LDG\.E\.128") >= 4 and binary.count("I2F") <= 2
    assert binary.registers <= (128 if packed else 64)
