"""The operators under opcheck, fake tensors and torch.compile, and what they refuse."""

import inspect
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from quantempo.kernels import layout, ops

LAST = torch.channels_last
INT8 = torch.int8


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=LAST) if x.ndim == 4 else x


def int8(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-128, 128, shape, generator=generator, dtype=INT8)
    return q.contiguous(memory_format=LAST) if q.ndim == 4 else q


def convolution(count: int = 2, size: tuple[int, int] = (4, 5)) -> dict[str, object]:
    """Return arguments of qconv2d by name: 16 -> 32 channels, the sides left out."""
    return {
        "codes": int8(count, 16, *size), "weight": int8(32, 9, 16), "act_scale": torch.rand(3),
        "weight_scale": torch.rand(32), "table": torch.zeros(16, 32, dtype=torch.int32),
        "bucket": torch.tensor(1),
    }  # fmt: skip


def sides(count: int, height: int, width: int) -> dict[str, object]:
    return {
        "side_codes": [int8(count, 32, height, width)], "side_weights": [int8(32, 32)],
        "side_scales": torch.rand(1, 3), "side_weight_scale": torch.rand(32),
        "side_table": torch.zeros(1, 32, dtype=torch.int32),
    }  # fmt: skip


def gemm(rows: int = 6) -> dict[str, object]:
    return {
        "codes": int8(rows, 32), "weight": int8(16, 32), "act_scale": torch.rand(1),
        "weight_scale": torch.rand(16), "table": torch.zeros(16, dtype=torch.int32),
        "bucket": torch.tensor([0, 0]),
    }  # fmt: skip


def gated() -> dict[str, object]:
    wide = {"weight": int8(32, 32), "weight_scale": torch.rand(32), "activation": "geglu"}
    return gemm() | wide | {"table": torch.zeros(32, dtype=torch.int32)}


def segments(rows: int = 6) -> dict[str, object]:
    return gemm(rows) | {
        "act_scale": torch.rand(rows), "rows": True, "gate": floats(2, 48)[:, 16:32],
        "side_codes": [int8(rows, 48)], "side_weights": [int8(16, 48)],
        "side_scales": torch.rand(1, rows), "side_weight_scale": torch.rand(16),
        "side_table": torch.zeros(1, 16, dtype=torch.int32), "activation": "gelu_tanh",
    }  # fmt: skip


def norm(count: int = 2, size: tuple[int, int] = (4, 5)) -> dict[str, object]:
    return {
        "x": floats(count, 16, *size), "bucket": torch.tensor(0), "gamma": torch.rand(16),
        "beta": torch.rand(16), "groups": 4, "scale": torch.rand(3),
    }  # fmt: skip


def tokens(count: int = 2, size: int = 5) -> dict[str, object]:
    rows = floats(count, 96)
    return {
        "x": floats(count, size, 48)[:, :, 8:40], "bucket": torch.tensor([0] * count),
        "scale": rows[:, :32], "shift": rows[:, 40:72].half(),
    }  # fmt: skip


def heads(sizes: tuple[int, ...] = (4, 5), **how: object) -> dict[str, object]:
    parts = [floats(2, size, 3 * 48, seed=size).chunk(3, 2) for size in sizes]
    q, k, v = ([*part] for part in zip(*parts, strict=True))
    norms = {"weights": [torch.ones(16), None] * len(q), "eps": [1e-6, -1.0] * len(q)}
    return {"q": q, "k": k, "v": v, **norms, "rotary": [], "heads": 3} | how


def attended(keys: int = 9, v: int = 3, **how: object) -> dict[str, object]:
    sizes = {"q": (2, 5, 192), "k": (2, keys, 192), "v": (2, keys, 64 * v)}
    given = {name: floats(*size).unflatten(2, (-1, 64)) for name, size in sizes.items()}
    return given | {"v": given["v"][:, :, -3:]} | how


def few() -> dict[str, object]:
    given = {"x": floats(3, 24).half(), "weight": int8(40, 24)}
    return given | {"weight_scale": torch.rand(40), "bias": floats(40).float()}


def few_packed(groups: int = 2) -> dict[str, object]:
    one = {"weight": int8(40, 1, 12), "groups": int8(40, 1, groups)}
    return few() | {name: value.view(torch.uint8) for name, value in one.items()}


RAW = {"raw_scales": torch.rand(2, 3), "raw_zero_points": [3, 4], "raw_qmax": 15}
ONES = torch.ones(32)
AFFINE = {"gamma": ONES, "beta": ONES}
CALLS = [
    (ops.qconv2d, convolution()),
    (ops.qconv2d, convolution() | {"stride": 2, "border": (0, 1, 0, 1), "bias": torch.rand(32)}),
    (ops.qconv2d, convolution() | {"upsample": True, "shift": floats(2, 32)}),
    (ops.qconv2d, convolution() | sides(2, 4, 5) | {"residual": floats(2, 32, 4, 5)}),
    (ops.qconv2d, convolution(4, (1, 1)) | {"out_dtype": torch.int32}),
    (ops.qconv2d, convolution(4) | {"out_scale": torch.rand(3), "bucket": torch.tensor([0, 2])}),
    (ops.qgemm, gemm() | {"activation": "gelu", "residual": floats(6, 16)}),
    (ops.qgemm, gemm() | {"out_scale": torch.rand(1), "out_zero": 7}),
    (ops.qgemm, gated() | {"out_scale": torch.rand(1)}),
    (ops.qgemm, gemm() | {"act_scale": torch.rand(6), "bucket": torch.arange(6)}),
    (ops.qgemm, gated()),
    (ops.qgemm, segments() | {"residual": floats(6, 16)}),
    (ops.norm_modulate_quant, tokens()),
    (ops.norm_modulate_quant, tokens() | {"act_scale": torch.rand(3), "norm": "rms"}),
    (ops.norm_modulate_quant, tokens() | {"weight": ONES, "bias": ONES.half(), "scale": None}),
    (ops.join_heads, heads(rotary=[floats(9, 16), floats(9, 16)])),
    (ops.join_heads, heads((4,), v=[])),
    (ops.attention8, attended()),
    (ops.attention8, attended(130, 5)),
    (ops.weight_only_linear, few()),
    (ops.weight_only_linear, few() | {"x": floats(1, 24), "bias": None}),
    (ops.weight_only_linear, few_packed()),
    (ops.gn_act_quant, norm()),
    (ops.gn_act_quant, norm() | {"scale": None, "silu": True}),
    (ops.gn_act_quant, norm(2, (1, 1)) | {"gamma": None, "beta": None}),
    (ops.gn_act_quant, norm() | RAW | AFFINE | {"skip": floats(2, 16, 4, 5)}),
]


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_opcheck(call, arguments):
    overload = getattr(torch.ops.quantempo, call.__name__).default
    known = inspect.signature(call).parameters
    given = {name: p.default for name, p in known.items()} | arguments
    args = tuple(list(v) if isinstance(v, tuple) else v for v in given.values())
    result = torch.library.opcheck(overload, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_fake_results_have_the_strides_of_real_ones(call, arguments):
    real = call(**arguments)
    with FakeTensorMode() as mode:
        fake = call(**tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for got, wanted in zip(tree_leaves(fake), tree_leaves(real), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (wanted.shape, wanted.dtype, wanted.stride())


def test_the_operators_ask_for_unchanged_strides():
    for name in {*ops.__all__} - {"reserve"}:
        overload = getattr(torch.ops.quantempo, name).default
        layouts = {tag for tag in overload.tags if "strides" in tag.name or "layout" in tag.name}
        assert {tag.name for tag in layouts} == {"needs_exact_strides"}


KERNEL, LINEAR = int8(32, 32, 3, 3, seed=3), int8(32, 32, seed=4)


def block(x: torch.Tensor, temb: torch.Tensor, bucket: torch.Tensor) -> torch.Tensor:
    """Half a ResNet block: pointwise work around its three operators."""
    gamma, beta, steps = torch.ones(32), torch.zeros(32), torch.tensor([0.02, 0.05, 0.03])
    # Inductor would like to choose the layout of this sum.
    x = (x + 1).contiguous(memory_format=LAST)
    codes, raw, _ = ops.gn_act_quant(
        x, bucket=bucket, gamma=gamma, beta=beta, groups=8, silu=True, scale=steps, zero_point=9,
        raw_scales=steps[None], raw_zero_points=[100],
    )  # fmt: skip
    y = ops.qconv2d(
        codes, layout.conv_weight(KERNEL), steps, torch.full((32,), 1e-3),
        layout.border_table(KERNEL, 9), bucket=bucket, shift=temb, residual=x,
        side_codes=[raw], side_weights=[LINEAR], side_scales=steps[None],
        side_weight_scale=torch.full((32,), 1e-3), side_table=layout.row_table(LINEAR, 100)[None],
        out_dtype=torch.float32,
    )  # fmt: skip
    rows = (y * 0.5).permute(0, 2, 3, 1).reshape(-1, 32)
    codes = (rows / 0.03).round().clamp(-128, 127).to(INT8)
    z = ops.qgemm(
        codes, LINEAR, torch.tensor([0.03]), torch.full((32,), 1e-3),
        layout.row_table(LINEAR, 128), bucket=bucket, activation="silu", out_dtype=torch.float32,
    )  # fmt: skip
    return z.reshape(y.shape[0], *y.shape[2:], 32).permute(0, 3, 1, 2) + y


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_trace_serves_every_bucket(backend):
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend, dynamic=False)
    x, temb = floats(2, 32, 6, 5), floats(2, 32, seed=5)
    first = compiled(x, temb, torch.tensor(0))
    torch.testing.assert_close(first, block(x, temb, torch.tensor(0)), rtol=1e-6, atol=1e-6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        second = compiled(x, temb, torch.tensor(1))
    torch.testing.assert_close(second, block(x, temb, torch.tensor(1)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(first, second)


def test_one_trace_serves_every_batch_size():
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    bucket = torch.tensor(2)
    compiled(floats(2, 32, 6, 5), floats(2, 32, seed=5), bucket)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (3, 8):
            x, temb = floats(count, 32, 6, 5), floats(count, 32, seed=5)
            assert torch.equal(compiled(x, temb, bucket), block(x, temb, bucket))


def test_a_compiled_graph_meets_the_layouts_the_operators_need():
    """A transposed input: the copy to channels_last stays where the program has it."""
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    x = floats(2, 32, 5, 6).transpose(2, 3)
    # A column slice of a larger product.
    temb = floats(2, 96, seed=5)[:, 32:64]
    bucket = torch.tensor([0, 2])
    torch.testing.assert_close(compiled(x, temb, bucket), block(x, temb, bucket))


REFUSED = [
    (ops.qconv2d, convolution() | {"codes": int8(2, 8, 4, 5)}, "multiples of 16"),
    (ops.qconv2d, convolution() | {"codes": int8(2, 16, 4, 5).contiguous()}, "channels_last"),
    (ops.qconv2d, convolution() | {"codes": floats(2, 16, 4, 5)}, "codes: got torch.float32"),
    (ops.qconv2d, convolution() | {"weight": int8(32, 16, 9)}, r"weight: .* \(32, 9, 16\)"),
    (ops.qconv2d, convolution() | {"kernel": 5}, "kernel: got 5; expected one of 1, 3"),
    (ops.qconv2d, convolution() | {"stride": 3}, "stride: got 3"),
    (ops.qconv2d, convolution() | {"stride": 2, "upsample": True}, "1 with upsample"),
    (ops.qconv2d, convolution() | {"border": (2, 0, 0, 0)}, "each 0 or 1"),
    (ops.qconv2d, convolution() | {"border": (1, 1)}, "each 0 or 1"),
    (ops.qconv2d, convolution(2, (1, 5)) | {"border": (0, 0, 0, 0)}, "no smaller than the kernel"),
    (
        ops.qconv2d,
        convolution() | {"kernel": 1, "weight": int8(32, 1, 16), "border": (1, 1, 1, 1)},
        "zeros for a 1x1",
    ),
    (ops.qconv2d, convolution() | {"table": torch.zeros(9, 32, dtype=torch.int32)}, "table: "),
    (ops.qconv2d, convolution() | {"act_scale": torch.ones(())}, r"expected float32 \(G,\)"),
    (ops.qconv2d, convolution() | {"weight_scale": torch.ones(31)}, "weight_scale: got"),
    (ops.qconv2d, convolution() | {"bucket": torch.zeros(3, dtype=torch.int64)}, "B divides the 2"),
    (ops.qconv2d, convolution() | {"bucket": torch.tensor(0.0)}, "bucket: got float32"),
    (ops.qconv2d, convolution() | {"bucket": torch.tensor([0]).expand(2)}, "bucket: got strides"),
    (ops.qconv2d, convolution() | {"bias": torch.ones(32).half()}, "bias: got float16"),
    (ops.qconv2d, convolution() | {"shift": floats(3, 32)}, r"shift: .* \(2, 32\)"),
    (ops.qconv2d, convolution() | {"residual": floats(2, 32, 4, 4)}, "residual: got"),
    (ops.qconv2d, convolution() | {"residual": floats(2, 32, 4, 5).contiguous()}, "channels_last"),
    (ops.qconv2d, convolution() | {"out_dtype": torch.float64}, "out_dtype: got torch.float64"),
    (ops.qconv2d, convolution() | {"out_dtype": torch.int32, "out_scale": ONES[:1]}, "a float ty"),
    (ops.qconv2d, convolution() | {"out_scale": torch.ones(1), "out_zero": 256}, "out_zero: got"),
    (ops.qconv2d, convolution() | sides(2, 4, 4), r"side_codes: got int8 \(2, 32, 4, 4\)"),
    (ops.qconv2d, convolution() | sides(2, 4, 5) | {"side_table": None}, "all three"),
    (ops.qconv2d, convolution() | sides(2, 4, 5) | {"side_weights": []}, "side_weights: got 0"),
    (ops.qgemm, gemm() | {"activation": "relu"}, "one of none, gelu, gelu_tanh, silu, geglu, swi"),
    (ops.qgemm, gated() | {"activation": "swiglu", "gate": floats(2, 16)}, "gate: got one; .* no"),
    (ops.qgemm, segments() | {"act_scale": torch.rand(3)}, r"act_scale: .* \(6,\)"),
    (ops.qgemm, segments() | {"side_scales": torch.rand(1, 3)}, r"side_scales: .* \(1, 6\)"),
    (ops.qgemm, segments() | {"side_codes": [int8(5, 48)]}, r"side_codes: .* \(6, 48\)"),
    (ops.qgemm, segments() | {"gate": floats(4, 16)}, "gate: got .* rows that divide 6"),
    (ops.qgemm, gemm() | {"activation": "geglu"}, "a multiple of 32 rows for geglu"),
    (ops.qgemm, gated() | {"residual": floats(6, 16)}, "residual: got one; expected none"),
    (ops.qgemm, gated() | {"out_dtype": torch.int32}, "a float type with geglu"),
    (ops.qgemm, gemm() | {"codes": int8(32, 6).t()}, "codes: got strides"),
    (ops.qgemm, gemm() | {"act_scale": ONES, "out_scale": ONES[:3]}, "1 or equal lengths"),
    (ops.qgemm, gemm() | {"weight": int8(16, 48)}, r"expected int8 \(16, 32\)"),
    (ops.qgemm, gemm() | {"table": torch.zeros(16)}, "table: got float32"),
    (ops.norm_modulate_quant, tokens() | {"x": floats(2, 5, 24)}, "C a multiple of 16 up to"),
    (ops.norm_modulate_quant, tokens() | {"x": floats(2, 32, 5).mT}, "x: got strides"),
    (ops.norm_modulate_quant, tokens() | {"norm": "batch"}, "expected one of layer, rms, none"),
    (ops.norm_modulate_quant, tokens() | {"scale": floats(1, 32)}, r"scale: .* \(2, 32\)"),
    (ops.norm_modulate_quant, tokens() | {"shift": floats(32, 2).t()}, "shift: got strides"),
    (ops.qgemm, gemm() | {"weight": int8(16, 40)[:, :32]}, "rows a multiple of 16 apart"),
    (ops.weight_only_linear, few() | {"weight": int8(40, 16)}, r"weight: .* \(40, 24\)"),
    (ops.weight_only_linear, few() | {"x": floats(24, 3).t()}, "x: got strides"),
    (ops.weight_only_linear, few_packed(3), r"groups: .* ceil\(24 / G\)"),
    (ops.weight_only_linear, few_packed() | {"weight": int8(40, 24)}, r"uint8 \(40, 1, 12\)"),
    (ops.join_heads, heads(q=[]), r"got \(0, 2, 2, 4, 4, 0\); expected n, n, n or 0, 2 n"),
    (ops.join_heads, heads(heads=5), "heads: got 5; expected H of H D = 48"),
    (ops.join_heads, heads(heads=16, rotary=[floats(9, 3)] * 2), "D even with rotary"),
    (ops.join_heads, heads((4,), v=[floats(2, 5, 48)]), r"v: .* \(2, 4, 48\)"),
    (ops.join_heads, heads((4,), k=[floats(2, 4, 50)[..., :48]]), "a multiple of 8 apart"),
    (ops.join_heads, heads((4,), k=[floats(2, 9, 48)[:, :4]]), "rows of one product"),
    (ops.join_heads, heads((4,), rotary=[floats(9, 16)] * 2), r"rotary: .* \(4, 16\)"),
    (ops.attention8, attended(q=floats(2, 5, 64)), r"q: got \(2, 5, 64\); expected \(B, T, H, D\)"),
    (ops.attention8, attended(0), "with S > 0"),
    (ops.attention8, attended(v=2), r"v: .* expected float32 \(2, 9, 3, 64\)"),
    (ops.attention8, attended(k=floats(2, 9, 3, 64).half()), "k: got float16"),
    (ops.attention8, attended(k=floats(2, 3, 64, 9).permute(0, 3, 1, 2)), "k: got strides"),
    (ops.attention8, attended(q=floats(2, 5, 196)[..., 4:].unflatten(2, (3, 64))), "multiples of"),
    (ops.gn_act_quant, norm() | {"beta": None}, "both or neither"),
    (ops.gn_act_quant, norm() | {"groups": 5}, "a divisor of the 16 channels"),
    (ops.gn_act_quant, norm() | {"gamma": torch.ones(8)}, "gamma: got"),
    (ops.gn_act_quant, norm() | {"x": floats(2, 16, 4, 5).contiguous()}, "channels_last"),
    (ops.gn_act_quant, norm() | {"skip": floats(2, 16, 4, 5).half()}, "skip: got float16"),
    (ops.gn_act_quant, norm() | RAW, "S in 1..1"),
    (ops.gn_act_quant, norm() | {"raw_scales": torch.rand(1, 3)}, "raw_zero_points: got 0"),
    (ops.gn_act_quant, norm() | {"zero_point": -1}, "zero_point: got -1"),
]


@pytest.mark.parametrize(("call", "arguments", "message"), REFUSED)
def test_wrong_arguments_are_refused_in_one_sentence(call, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(**arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["weight", "bucket", "residual"])
def test_a_tensor_on_another_device_is_refused(name):
    arguments = convolution() | {"residual": floats(2, 32, 4, 5)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name}: got one on meta; expected it on cpu"):
        ops.qconv2d.__wrapped__(**arguments).check(strides=True)


def test_gradients_do_not_pass_unnoticed():
    x = floats(2, 32, 4, 5).requires_grad_()
    y = ops.qconv2d(**convolution() | {"residual": x, "out_dtype": torch.float32})
    with pytest.warns(UserWarning, match="quantempo::qconv2d: an autograd kernel was not"):
        y.sum().backward()
    assert x.grad is None


def test_nothing_in_nothing_out():
    empty = ops.qconv2d(**convolution(0), out_dtype=torch.float16)
    assert (empty.shape, empty.dtype) == ((0, 32, 4, 5), torch.float16)
    assert ops.qconv2d(**convolution(2, (0, 5))).shape == (2, 32, 0, 5)
    assert ops.qgemm(**gemm(0)).shape == (0, 16)
    assert [len(part) for part in ops.norm_modulate_quant(**tokens(2, 0))] == [0, 0]
    for tensor in ops.gn_act_quant(**norm(0), raw_scales=torch.rand(1, 3), raw_zero_points=[2])[:2]:
        assert (tensor.shape, tensor.dtype) == ((0, 16, 4, 5), INT8)


def test_triton_is_not_imported_without_a_gpu():
    code = (
        "import sys, torch\n"
        "before = 'triton' in sys.modules\n"
        "from quantempo.kernels import ops\n"
        "assert 'quantempo.kernels.gpu' not in sys.modules\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert torch.ops.quantempo.qgemm.default is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
