"""The three GPU operators on a CPU against integer sums and float64 formulas written out here."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from quantempo.kernels import layout, ops
from tests.kernels import reference

LAST = torch.channels_last
NOW = torch.tensor(0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    q = torch.randint(0, 256, shape, generator=generator(seed), dtype=torch.uint8)
    return q.contiguous(memory_format=LAST) if q.ndim == 4 else q


def stored(q: torch.Tensor) -> torch.Tensor:
    """Return q' = q - 128, int8, of codes q, uint8; the memory layout is kept."""
    # Flipping the top bit subtracts 128 modulo 256.
    return (q ^ 128).view(torch.int8)


def unsigned(q: torch.Tensor) -> torch.Tensor:
    """Return q = q' + 128, uint8, of stored codes q', int8."""
    return q.view(torch.uint8) ^ 128


def weights(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)


def floats(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(shape, generator=generator(seed)).to(dtype)
    return x.contiguous(memory_format=LAST) if x.ndim == 4 else x


def scales(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(shape, generator=generator(seed)) * 0.02 + 0.001


def sums(q, w, zero, stride=1, border=(0, 0, 0, 0), upsample=False):
    """Return the integer sums by the reference, on an image padded with the zero point."""
    if upsample:
        q = q.repeat_interleave(2, 2).repeat_interleave(2, 3)
    top, bottom, left, right = border
    padded = F.pad(q.int(), (left, right, top, bottom), value=zero).to(torch.uint8)
    return reference.conv2d_accumulator(padded, w, zero, (stride, stride))


def convolve(q, w, zero, **options):
    usual = {
        "act_scale": torch.ones(1), "weight_scale": torch.ones(w.shape[0]), "bucket": NOW,
        "table": layout.border_table(w, zero), "kernel": w.shape[2],
    }  # fmt: skip
    return ops.qconv2d(codes=stored(q), weight=layout.conv_weight(w), **usual | options)


# --- layout ---------------------------------------------------------------------------------------


def test_weight_layout_puts_channels_last():
    w = weights(3, 5, 3, 3)
    packed = layout.conv_weight(w)
    assert packed.shape == (3, 9, 5)
    assert packed.is_contiguous()
    for o, c, i, j in itertools.product(range(3), range(5), range(3), range(3)):
        assert packed[o, 3 * i + j, c] == w[o, c, i, j]


@pytest.mark.parametrize("zero", [0, 117, 255])
@pytest.mark.parametrize("kernel", [1, 3])
def test_border_table_by_hand(kernel, zero):
    w = weights(2, 7, kernel, kernel)
    table = layout.border_table(w, zero)
    assert table.dtype == torch.int32
    for above, below, left, right in itertools.product((0, 1), repeat=4):
        rows = set(range(kernel)) - set([0] * above + [kernel - 1] * below)
        columns = set(range(kernel)) - set([0] * left + [kernel - 1] * right)
        total = sum(w[:, :, i, j].long().sum(1) for i in rows for j in columns)
        expected = (zero - 128) * total * torch.ones(2, dtype=torch.int64)
        kind = 4 * (above + 2 * below) + left + 2 * right
        got = table[0] + (table[kind] if kind else 0)
        assert got.tolist() == expected.tolist()


def test_the_largest_sums_fit():
    w = torch.full((16, 14000, 3, 3), -128, dtype=torch.int8)
    assert layout.border_table(w, 0)[0, 0] == 128 * 128 * 14000 * 9
    assert layout.row_table(w[:, :, 0, 0], 0)[0] == 128 * 128 * 14000


# --- qconv2d --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (2, 2), (5, 6), (8, 6)])
@pytest.mark.parametrize(("stride", "upsample"), [(1, False), (2, False), (1, True)])
def test_convolution_sums_are_exact(size, stride, upsample):
    q, w = codes(2, 16, *size), weights(32, 16, 3, 3)
    repeat = 2 if upsample else 1
    seen = 0
    for border in itertools.product((0, 1), repeat=4):
        fits = repeat * size[0] + sum(border[:2]) >= 3 and repeat * size[1] + sum(border[2:]) >= 3
        for zero in (0, 131):
            options = {"stride": stride, "border": border, "upsample": upsample}
            if not fits:
                continue
            got = convolve(q, w, zero, out_dtype=torch.int32, **options)
            expected = sums(q, w, zero, **options)
            assert got.dtype == torch.int32
            assert got.is_contiguous(memory_format=LAST)
            assert torch.equal(got.long(), expected)
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize(("stride", "upsample"), [(1, False), (2, False), (1, True)])
def test_pointwise_convolution_sums_are_exact(stride, upsample):
    q, w = codes(3, 48, 5, 3), weights(16, 48, 1, 1)
    got = convolve(q, w, 77, stride=stride, upsample=upsample, out_dtype=torch.int32)
    assert torch.equal(got.long(), sums(q, w, 77, stride, upsample=upsample))


def test_a_convolution_is_the_float_one_of_dequantized_codes():
    q, w, zero = codes(2, 16, 5, 4), weights(16, 16, 3, 3), 99
    step, rows = scales(1), scales(16)
    x = (q.double() - zero) * step.double()
    real = w.double() * rows.double().reshape(-1, 1, 1, 1)
    y = convolve(q, w, zero, act_scale=step, weight_scale=rows, out_dtype=torch.float32)
    expected = F.conv2d(x, real, padding=1)
    torch.testing.assert_close(y.double(), expected, rtol=1e-7, atol=1e-7)


def everything(count=4, buckets=3):
    """Return all optional arguments of a 16 -> 32 convolution of (count, 16, 5, 4), and more."""
    side_q = [codes(count, channels, 5, 4, seed=10 + channels) for channels in (16, 48)]
    side_w = [weights(32, channels, seed=20 + channels) for channels in (16, 48)]
    tables = [layout.row_table(w, zero) for w, zero in zip(side_w, (5, 200), strict=True)]
    options = {
        "act_scale": scales(buckets),
        "weight_scale": scales(32, seed=4),
        "bias": floats(32),
        "shift": floats(count, 32, seed=5, dtype=torch.bfloat16),
        "residual": floats(count, 32, 5, 4, seed=6, dtype=torch.float16),
        "side_codes": [stored(q) for q in side_q],
        "side_weights": side_w,
        "side_scales": scales(2, buckets, seed=7),
        "side_weight_scale": scales(32, seed=8),
        "side_table": torch.stack(tables),
        "bucket": torch.tensor([2, 0]),
    }
    return options, side_q, side_w


def by_hand(q, w, zero, options, side_q, side_w):
    """Return y in float64, image by image."""
    images = []
    for n in range(q.shape[0]):
        b = int(options["bucket"][n // 2])
        acc = sums(q, w, zero, border=(1, 1, 1, 1))[n].double()
        y = options["act_scale"][b].double() * acc * options["weight_scale"].double()[:, None, None]
        for i, side_zero in enumerate((5, 200)):
            shifted = side_q[i][n].double() - side_zero
            extra = torch.einsum("chw,oc->ohw", shifted, side_w[i].double())
            step = options["side_scales"][i, b].double()
            y += step * extra * options["side_weight_scale"].double()[:, None, None]
        y += options["bias"].double()[:, None, None] + options["shift"][n].double()[:, None, None]
        images.append(y + options["residual"][n].double())
    return torch.stack(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_whole_epilogue(dtype):
    options, side_q, side_w = everything()
    q, w = codes(4, 16, 5, 4), weights(32, 16, 3, 3)
    expected = by_hand(q, w, 30, options, side_q, side_w)
    y = convolve(q, w, 30, out_dtype=dtype, **options)
    assert y.dtype == dtype
    # Rounded once, from float64.
    torch.testing.assert_close(y, expected.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("form", ["columns", "one row"])
def test_a_shift_may_be_part_of_a_larger_tensor(form):
    q, w, row = codes(4, 16, 5, 4), weights(32, 16, 3, 3), floats(1, 32)
    part = floats(4, 96)[:, 32:64] if form == "columns" else row.expand(4, -1)
    assert not part.is_contiguous()
    expected = convolve(q, w, 30, shift=part.clone(memory_format=torch.contiguous_format))
    assert torch.equal(convolve(q, w, 30, shift=part), expected)


def test_requantized_results_are_the_codes_of_the_result():
    options, side_q, side_w = everything()
    q, w = codes(4, 16, 5, 4), weights(32, 16, 3, 3)
    y = by_hand(q, w, 30, options, side_q, side_w)
    steps = torch.tensor([0.5, 9.0, 0.25])
    got = convolve(q, w, 30, out_scale=steps, out_zero=11, out_qmax=63, **options)
    assert got.dtype == torch.int8
    for n, b in enumerate((2, 2, 0, 0)):
        expected = reference.quantize(y[n], float(steps[b]), 11, 63)
        assert torch.equal(unsigned(got[n].contiguous()), expected)
    assert {int(got.min()), int(got.max())} == {-128, 63 - 128}


def test_a_bucket_of_a_table_is_that_entry_alone():
    options, _, _ = everything()
    q, w = codes(4, 16, 5, 4), weights(32, 16, 3, 3)
    mixed = convolve(q, w, 30, **options)
    for b, images in ((2, slice(0, 2)), (0, slice(2, 4))):
        alone = options | {
            "act_scale": options["act_scale"][b : b + 1],
            "side_scales": options["side_scales"][:, b : b + 1].contiguous(),
            # With one entry the bucket's value does not count.
            "bucket": torch.tensor(1),
        }
        assert torch.equal(convolve(q, w, 30, **alone)[images], mixed[images])


# --- qgemm ----------------------------------------------------------------------------------------


def test_an_argument_given_twice_or_of_no_operator_is_refused():
    q, w = stored(codes(4, 48)), weights(32, 48)
    given = (q, w, torch.ones(1), torch.ones(32), layout.row_table(w, 0))
    for wrong in ({"weight": w}, {"wieght": w}):
        with pytest.raises(TypeError, match="expected each of"):
            ops.qgemm(*given, bucket=NOW, **wrong)


@pytest.mark.parametrize("rows", [1, 17, 64])
def test_gemm_sums_are_exact(rows):
    q, w = codes(rows, 48), weights(32, 48)
    given = (stored(q), w, torch.ones(1), torch.ones(32), layout.row_table(w, 201))
    got = ops.qgemm(*given, bucket=NOW, out_dtype=torch.int32)
    assert torch.equal(got.long(), reference.linear_accumulator(q, w, 201))


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemm_epilogue(activation, dtype):
    q, w = codes(6, 32), weights(16, 32)
    tables, rows, bias = scales(2), scales(16, seed=4), floats(16)
    residual = floats(6, 16, seed=9)
    act = {"none": lambda v: v, "gelu": F.gelu, "silu": F.silu}[activation]
    step = tables[torch.tensor([1, 1, 1, 0, 0, 0])].double()[:, None]
    acc = reference.linear_accumulator(q, w, 40).double()
    expected = act(acc * step * rows.double() + bias.double()) + residual.double()
    arguments = (stored(q), w, tables, rows, layout.row_table(w, 40))
    common = {"bucket": torch.tensor([1, 0]), "bias": bias, "residual": residual}
    common["activation"] = activation
    y = ops.qgemm(*arguments, **common, out_dtype=dtype)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-23
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-12)
    steps = torch.tensor([0.125, 0.5])
    got = ops.qgemm(*arguments, **common, out_scale=steps, out_zero=130)
    for m in range(6):
        expected_codes = reference.quantize(expected[m], float(steps[1 if m < 3 else 0]), 130)
        assert torch.equal(unsigned(got[m]), expected_codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_gemm(dtype):
    q, w = codes(6, 32), weights(96, 32)
    rows, bias = scales(96, seed=4), floats(96)
    sums = reference.linear_accumulator(q, w, 40).double() * 0.01 * rows.double() + bias.double()
    expected = sums[:, :48] * F.gelu(sums[:, 48:])
    arguments = (stored(q), w, torch.tensor([0.01]), rows, layout.row_table(w, 40))
    common = {"bucket": NOW, "bias": bias, "activation": "geglu"}
    y = ops.qgemm(*arguments, **common, out_dtype=dtype)
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-20
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-9)
    got = ops.qgemm(*arguments, **common, out_scale=torch.tensor([0.25]), out_zero=130)
    assert torch.equal(unsigned(got), reference.quantize(expected, 0.25, 130))


# --- gn_act_quant ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("split", [None, 12])
@pytest.mark.parametrize("silu", [False, True])
def test_norm_in_float(dtype, split, silu):
    whole = floats(2, 48, 5, 3, dtype=dtype) * 2 + 30
    gamma, beta = floats(48, seed=3), floats(48, seed=4)
    x, skip = (whole, None) if split is None else (whole[:, :split], whole[:, split:])
    x = x.contiguous(memory_format=LAST)
    skip = None if skip is None else skip.contiguous(memory_format=LAST)
    y, raw_x, raw_skip = ops.gn_act_quant(
        x, skip, bucket=NOW, gamma=gamma, beta=beta, groups=8, eps=1e-3, silu=silu
    )
    expected = F.group_norm(whole.double(), 8, gamma.double(), beta.double(), 1e-3)
    expected = F.silu(expected) if silu else expected
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=unit, atol=1e-7)
    assert raw_x.shape == raw_skip.shape == (0,)


@pytest.mark.parametrize("rows", [1, 2])
def test_norm_to_codes_with_raw_codes(rows):
    x, skip = floats(4, 16, 3, 5) * 3, floats(4, 32, 3, 5, seed=8) * 3
    gamma, beta = floats(48, seed=3), floats(48, seed=4)
    step, raw = torch.tensor([0.0625, 0.03125]), torch.tensor([[0.25, 0.5], [0.125, 1.0]])[:rows]
    zeros = [100, 7][:rows]
    got, raw_x, raw_skip = ops.gn_act_quant(
        x, skip, bucket=torch.tensor([1, 0]), gamma=gamma, beta=beta, groups=4, silu=True,
        scale=step, zero_point=20, qmax=127, raw_scales=raw, raw_zero_points=zeros, raw_qmax=200,
    )  # fmt: skip
    y = F.group_norm(torch.cat([x, skip], 1).double(), 4, gamma.double(), beta.double(), 1e-5)
    y = F.silu(y)
    for n, b in enumerate((1, 1, 0, 0)):
        expected = reference.quantize(y[n], float(step[b]), 20, 127)
        assert torch.equal(unsigned(got[n].contiguous()), expected)
        for part, codes_of_part, row in ((x, raw_x, 0), (skip, raw_skip, rows - 1)):
            expected = reference.quantize(part[n], float(raw[row, b]), zeros[row], 200)
            assert torch.equal(unsigned(codes_of_part[n].contiguous()), expected)
    for tensor in (got, raw_x, raw_skip):
        assert tensor.dtype == torch.int8
        assert tensor.is_contiguous(memory_format=LAST)


def test_quantization_without_a_norm_rounds_ties_to_even_and_saturates():
    values = torch.tensor([-1e9, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 1e9, 3e38])
    x = values.repeat(16, 1).t().reshape(1, 10, 16, 1).permute(0, 2, 1, 3)
    x = x.contiguous(memory_format=LAST)
    got, _, _ = ops.gn_act_quant(x, bucket=NOW, scale=torch.ones(1), zero_point=100)
    assert unsigned(got[0, 3, :, 0].contiguous()).tolist() == [
        0, 98, 98, 100, 100, 100, 102, 102, 255, 255,
    ]  # fmt: skip


@pytest.mark.parametrize("step", [0.0371, 0.0125, 3e-3])
def test_multiplying_by_the_reciprocal_moves_no_code_by_more_than_one(step):
    x = floats(2, 16, 16, 16) * 40 * step
    got, _, _ = ops.gn_act_quant(x, bucket=NOW, scale=torch.tensor([step]), zero_point=128)
    expected = reference.quantize(x, step, 128).int()
    difference = (unsigned(got.contiguous()).int() - expected).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 1e-3
