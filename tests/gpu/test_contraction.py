"""The contraction on Triton's interpreter against float64, and on a GPU where there is one.

Sums are compared as integers, which must be equal; the rest to within float32 arithmetic.
"""

import dataclasses
import functools

import pytest
import torch
from torch.utils._pytree import tree_map_only

from quantempo.kernels import layout
from quantempo.kernels.gpu.contraction import launch
from quantempo.kernels.gpu.contraction.tiles import Tile
from quantempo.kernels.ops import qconv2d, qgemm
from quantempo.kernels.ops.qgemm import Product
from tests.gpu import harness
from tests.gpu.cases import Case, Example, check_values

# Triton's interpreter with NumPy 2.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),
]

SMALL = Tile(32, 32, 64, 4, 2)
SPLIT = dataclasses.replace(SMALL, splits=3)
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32

CASES = {
    "odd": Case(),
    "one row": Case(n=1, c=32, h=1, w=5, o=16, sides=(32,)),
    "one column": Case(n=1, c=32, h=5, w=1, o=16, tile=SMALL),
    "3x5 half": Case(c=80, h=3, w=5, o=80, out=HALF, residual=HALF, tile=SMALL),
    "4x4 brain": Case(n=3, c=96, h=4, w=4, o=32, out=BRAIN, residual=BRAIN, shift="column"),
    "5x5 one tap": Case(c=96, h=5, w=5, o=32, kernel=1, border=(0,) * 4, mixed=True),
    "images share a tile": Case(n=5, c=64, h=3, w=3, o=32, mixed=True, shift="row"),
    "stride below": Case(c=64, h=8, w=6, o=32, stride=2, border=(0, 1, 0, 1)),
    "stride around": Case(c=64, h=4, w=4, o=32, stride=2, tile=SPLIT),
    "stride of odd sides": Case(c=80, h=7, w=5, o=32, stride=2),
    "borders differ": Case(c=32, h=5, w=6, o=32, border=(1, 0, 0, 1), tile=SMALL),
    "borders differ, stride": Case(c=64, h=6, w=4, o=32, stride=2, border=(0, 1, 1, 1), tile=SMALL),
    "larger pixels": Case(c=32, h=3, w=5, o=32, upsample=True),
    "larger, split": Case(c=32, h=4, w=4, o=48, upsample=True, tile=SPLIT),
    "one side": Case(c=32, h=5, w=4, o=48, sides=(80,), mixed=True, tile=SMALL),
    "two sides": Case(c=48, h=4, w=4, o=32, sides=(16, 96), shift="none"),
    "split": Case(c=80, h=4, w=4, o=32, tile=SPLIT),
    "split, one side": Case(c=80, h=4, w=4, o=32, sides=(48,), tile=SPLIT),
    "split, two sides": Case(n=3, c=80, h=4, w=4, o=32, sides=(16, 48), mixed=True, tile=SPLIT),
    "split finer than the steps": Case(
        c=16, h=3, w=3, o=16, kernel=1, border=(0,) * 4, tile=SPLIT
    ),
    "packed": Case(c=80, o=80, group=16),
    "packed, wide": Case(n=1, c=272, h=3, w=5, o=32, group=64, kernel=1, border=(0,) * 4),
    "packed, split": Case(c=144, h=4, w=4, o=32, group=32, tile=SPLIT),
    "packed, stride": Case(c=64, h=8, w=6, o=32, group=32, stride=2, border=(0, 1, 0, 1)),
    "packed, larger": Case(c=48, h=3, w=5, o=32, group=32, upsample=True, mixed=True),
    "packed, sides": Case(c=48, h=4, w=4, o=32, group=32, sides=(80, 96), shift="none"),
    "packed, sides apart": Case(
        n=1, c=128, h=8, w=8, o=128, group=16, sides=(128, 128), shift="none", tile=SPLIT
    ),
    "packed, quantized": Case(
        c=80, h=4, w=4, o=80, group=16, sides=(32,), requantize=True, residual=None, tile=SPLIT
    ),
    "quantized": Case(c=48, h=5, w=5, requantize=True, mixed=True, tile=SMALL),
    "quantized, split": Case(c=48, h=4, w=4, o=32, requantize=True, sides=(32,), tile=SPLIT),
    "gelu": Case(c=48, h=3, w=5, o=32, activation="gelu", shift="none", tile=SMALL),
    "silu": Case(c=48, h=3, w=5, o=32, activation="silu", residual=None, tile=SMALL),
    "one scale": Case(c=48, h=3, w=3, o=32, buckets=1, sides=(32,), tile=SMALL),
    "nothing added": Case(
        c=48, h=3, w=3, o=32, bias=False, shift="none", residual=None, tile=SMALL
    ),
}  # fmt: skip


@functools.cache
def example(name: str) -> Example:
    return Example(CASES[name])


def check(module, made: Example, path: str, device: str = "cpu") -> None:
    sums = made.run(module, path, device, sums=True)
    assert sums.dtype == torch.int32
    assert torch.equal(sums.long(), made.sums().long())
    made.check(made.run(module, path, device))
    assert all(not counters.any() for counters in module._counters.values())


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name):
    check(harness.interpreted("contraction.launch"), example(name), "pointers")


def test_split_sums_use_the_counters():
    module = harness.interpreted("contraction.launch")
    module._counters.clear()
    check(module, example("split, two sides"), "pointers")
    (counters,) = module._counters.values()
    assert counters.numel() >= 1 << 14


@pytest.mark.parametrize("name", ["odd", "one side", "stride below", "larger pixels", "quantized"])
def test_convolution_entry(name):
    made, case = example(name), CASES[name]
    known = made.arguments() | {"border": list(case.border), "out_dtype": HALF}
    y = harness.interpreted("contraction.launch").launch(qconv2d.__wrapped__(**known))
    assert y.is_contiguous(memory_format=torch.channels_last)
    scale = None if made.out_scale is None else made.per_image(made.out_scale)
    check_values(y, made.exact(), HALF, scale)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("requantize", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_linear_entry(activation, requantize, tokens):
    # 22 rows of two images: a row is an image of one pixel to the reference.
    case = Case(
        n=22, c=80, h=1, w=1, o=48, kernel=1, border=(0,) * 4, shift="none", mixed=False,
        activation=activation, requantize=requantize,
    )  # fmt: skip
    made = Example(case)
    made.bucket = torch.tensor([2, 0])
    if tokens:
        made.act_scale, made.bucket = made.rand(22), torch.arange(22)
        made.out_scale = made.out_scale[:1] if requantize else None
    same = ("act_scale", "weight_scale", "bucket", "bias", "out_scale", "out_zero", "out_qmax")
    known = {key: value for key, value in made.arguments().items() if key in same}
    weight = made.weight.flatten(1)
    call = qgemm.__wrapped__(
        made.codes.flatten(1), weight, table=layout.row_table(weight, case.zero),
        residual=made.residual.flatten(1), activation=activation, out_dtype=torch.float32, **known,
    )  # fmt: skip
    y = harness.interpreted("contraction.launch").launch(call)
    assert y.shape == (22, 48)
    assert y.is_contiguous()
    # The scale of each row, for the reference.
    made.bucket = made.bucket.repeat_interleave(22 // len(made.bucket))
    scale = made.per_image(made.out_scale) if requantize else None
    check_values(y[:, :, None, None], made.exact(), torch.float32, scale)


# (rows, channels, values, whether each half of the rows has a time of its own), odd for any tile.
GATED = {"many times": (22, 80, 48, True), "one time": (37, 48, 80, False)}


ACTIVATIONS = {
    "none": lambda v: v,
    "gelu_tanh": lambda v: v / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
    "geglu": torch.nn.functional.gelu,
    "swiglu": torch.nn.functional.silu,
}


def check_gated(launcher, name: str, device: str, quantized: bool, activation: str) -> None:
    rows, width, outs, many = GATED[name]
    g = torch.Generator().manual_seed(7)
    codes, weight = (
        torch.randint(-8, 9, (n, width), generator=g, dtype=torch.int8) for n in (rows, 2 * outs)
    )
    weight_scale, bias = (torch.rand(2 * outs, generator=g) * k for k in (0.1, 4.0))
    scales, steps = torch.tensor([0.02, 0.05]), torch.tensor([0.03, 0.04])
    bucket = torch.tensor([1, 0]) if many else torch.tensor(1)
    table = layout.row_table(weight, 130)
    now = bucket.repeat_interleave(rows // 2) if many else bucket.expand(rows)
    sums = codes.double() @ weight.double().T - table.double()
    y = sums * scales[now].double()[:, None] * weight_scale.double() + bias.double() - 2
    low, up = (torch.randn(n, 16, generator=g).half() for n in (rows, 2 * outs))
    how = {"side_codes": [low.to(device)], "side_weights": [up.to(device)]}
    y += low.double() @ up.double().T
    exact = y[:, :outs] * ACTIVATIONS[activation](y[:, outs:])
    if quantized:
        how |= {"out_scale": steps.to(device), "out_zero": 70, "out_qmax": 255}
    call = qgemm.__wrapped__(
        *(part.to(device) for part in (codes, weight, scales, weight_scale, table)),
        bucket=bucket.to(device), bias=(bias - 2).to(device), activation=activation,
        out_dtype=torch.float32, **how,
    )  # fmt: skip
    got = launcher(call).cpu()
    assert got.shape == (rows, outs) and got.is_contiguous()
    scale = steps[now].double()[:, None, None, None] if quantized else None
    check_values(got[:, :, None, None], exact[:, :, None, None], torch.float32, scale)


def test_without_images_there_is_no_launch():
    made = Example(Case(n=1, c=16, h=3, w=3, o=16, tile=None))
    made.case = dataclasses.replace(made.case, n=0)
    assert made.run(harness.interpreted("contraction.launch"), "pointers").shape == (0, 16, 3, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("path", launch.PATHS)
@pytest.mark.parametrize("name", CASES)
def test_on_a_device(name, path):
    if path == "hopper" and launch.choose_path(torch.device("cuda")) != "hopper":
        pytest.skip("needs Hopper")
    made = example(name)
    if path == "hopper":
        # Its matrix instruction has least sizes: the tile is that of the rules.
        made = Example(dataclasses.replace(CASES[name], tile=None))
    check(launch, made, path, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("activation", ["geglu", "swiglu"])
def test_gates(activation, name, quantized, device):
    module = harness.interpreted("contraction.launch") if device == "cpu" else launch
    check_gated(module.launch, name, device, quantized, activation)


@dataclasses.dataclass(frozen=True)
class Block:
    """A product of a transformer block: M rows, whose scales and gates may be of their own."""

    m: int = 70
    k: int = 96
    o: int = 80
    rows: bool = True
    images: int = 2
    gates: int = 0
    residual: torch.dtype | None = None
    sides: tuple[int, ...] = ()
    activation: str = "none"
    requantize: bool = False
    half: int = 0


BLOCKS = {
    "a scale a row": Block(),
    "codes out": Block(activation="gelu_tanh", requantize=True),
    "tanh": Block(rows=False, activation="gelu_tanh", images=1),
    "gates of a tile": Block(m=192, gates=2, residual=BRAIN),
    "gates within a tile": Block(gates=5, residual=FLOAT, rows=False),
    "one gate": Block(gates=1, residual=HALF, images=1),
    "two segments": Block(sides=(160,), gates=1, residual=BRAIN),
    "three segments": Block(sides=(48, 32), rows=False, activation="gelu_tanh", gates=2),
    "large": Block(m=4620, k=512, o=1280, sides=(1024,), gates=3, residual=BRAIN),
    "large, not by row": Block(m=1320, k=1024, o=384, rows=False, gates=2, residual=HALF),
    "a float16 side": Block(half=48),
    "segments, a float16 side": Block(sides=(160,), gates=1, residual=BRAIN, half=80),
    "a float16 side, codes out": Block(
        rows=False, activation="gelu_tanh", requantize=True, half=16
    ),
    "large, a float16 side": Block(m=4620, k=3072, o=1280, gates=3, residual=BRAIN, half=192),
    "large segments, a float16 side": Block(m=1100, k=512, o=1280, sides=(1024,), half=64),
    "large codes": Block(m=1100, k=256, o=1024, activation="gelu_tanh", requantize=True),
}


def product(case: Block, device: str) -> tuple[Product, torch.Tensor, torch.Tensor | None]:
    """Return a call, its result in float64 before it is rounded, and the scale of its codes."""
    g = torch.Generator().manual_seed(3)
    m, o, widths = case.m, case.o, (case.k, *case.sides)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g) + 0.2

    codes, weights = (
        [torch.randint(-128, 128, (n, k), generator=g, dtype=torch.int8) for k in widths]
        for n in (m, o)
    )
    bucket = torch.arange(case.images).flip(0)
    now = bucket.repeat_interleave(m // case.images)
    steps = rand(len(widths), m if case.rows else case.images) * 0.02
    of_row = (steps if case.rows else steps[:, now]).double()
    factors, zeros = [rand(o) * 0.01 for _ in range(2)], (128, 100, 201)
    tables = [layout.row_table(w, z) for w, z in zip(weights, zeros, strict=False)]
    reach = case.k**0.5
    bias, gate = rand(o) * reach, (torch.randn(case.gates, 3 * o, generator=g)).to(BRAIN)
    kind = case.residual
    rest = None if kind is None else (torch.randn(m, o, generator=g) * reach).to(kind)
    y = bias.double().expand(m, o)
    for i, (q, w) in enumerate(zip(codes, weights, strict=True)):
        part = (q.double() - (zeros[i] - 128)) @ w.double().T
        y = y + part * of_row[i][:, None] * factors[min(i, 1)].double()
    low, up = (torch.randn(n, case.half, generator=g).half() for n in (m, o))
    y = ACTIVATIONS[case.activation](y + low.double() @ up.double().T)
    if case.gates:
        y = y * gate[:, o : 2 * o].double().repeat_interleave(m // case.gates, 0)
    y = y if rest is None else y + rest.double()
    out = rand(case.images) * reach * 0.02
    how: dict[str, object] = {"out_scale": out, "out_zero": 70} if case.requantize else {}
    if case.sides:
        how |= {
            "side_codes": codes[1:], "side_weights": weights[1:], "side_scales": steps[1:],
            "side_weight_scale": factors[1], "side_table": torch.stack(tables[1:]),
        }  # fmt: skip
    if case.half:
        how["side_codes"], how["side_weights"] = [*codes[1:], low], [*weights[1:], up]
    given = {
        "codes": codes[0], "weight": weights[0], "act_scale": steps[0], "weight_scale": factors[0],
        "table": tables[0], "bucket": bucket, "bias": bias, "rows": case.rows,
        "gate": gate, "activation": case.activation, "residual": rest, "out_dtype": FLOAT, **how,
    }  # fmt: skip
    moved = tree_map_only(torch.Tensor, lambda x: x.to(device), given)
    moved["gate"] = moved["gate"][:, o : 2 * o] if case.gates else None
    if case.sides:
        # Parts of one weight, as a layer of several segments has them.
        whole = torch.cat([moved["weight"], *moved["side_weights"][: len(case.sides)]], 1)
        moved["weight"], *moved["side_weights"][: len(case.sides)] = whole.split(widths, 1)
    call = qgemm.__wrapped__(**moved)
    call.check(strides=True)
    scale = out[now].double()[:, None, None, None] if case.requantize else None
    return call, y[..., None, None], scale


HERE = ("definition", "interpreted")
PRODUCTS = [
    *((name, path) for name in BLOCKS for path in HERE if "large" not in name),
    *(pytest.param(name, path, marks=pytest.mark.cuda) for name in BLOCKS for path in launch.PATHS),
]


@pytest.mark.parametrize(("name", "path"), PRODUCTS)
def test_products_of_transformers(name, path, monkeypatch):
    if path == "hopper" and launch.choose_path(torch.device("cuda")) != "hopper":
        pytest.skip("needs Hopper")
    call, exact, scale = product(BLOCKS[name], "cpu" if path in HERE else "cuda")
    module = harness.interpreted("contraction.launch") if path == "interpreted" else launch
    if path in launch.PATHS:
        monkeypatch.setattr(launch, "choose_path", lambda device: path)
    got = call.exact() if path == "definition" else module.launch(call).cpu()
    assert got.is_contiguous()
    check_values(got[..., None, None], exact, FLOAT, scale)
