"""oneDNN's int8 operators against the int64 reference: integers are equal, borders included."""

import os
import subprocess
import sys

import pytest
import torch

from quantempo.kernels.cpu import onednn
from tests.kernels import reference
from tests.kernels.test_reference import codes, weights

pytestmark = pytest.mark.skipif(onednn.missing() is not None, reason=str(onednn.missing()))

GEOMETRIES = [
    # channels, out, kernel, stride, padding, dilation, groups, height, width
    (1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1, 5, 7),
    (3, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1, 5, 7),
    (17, 3, (3, 3), (2, 2), (1, 1), (1, 1), 1, 5, 7),
    (1023, 3, (3, 3), (1, 1), (1, 1), (1, 1), 1, 4, 3),
    (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, 1, 1),
    (32, 48, (3, 3), (1, 1), (1, 1), (1, 1), 4, 6, 6),
    (6, 6, (3, 3), (1, 1), (1, 1), (1, 1), 6, 6, 5),
    (16, 8, (3, 2), (1, 2), (2, 1), (2, 1), 1, 9, 5),
    (128, 64, (3, 3), (2, 2), (0, 0), (1, 1), 1, 9, 9),
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("zero_point", [0, 117, 255])
def test_convolution_sums_are_exact(geometry, zero_point):
    channels, out, kernel, *how, height, width = geometry
    x, w = codes(2, channels, height, width), weights(out, channels // how[-1], *kernel)
    conv = onednn.Int8Conv2d(w, torch.ones(out), *how)
    expected = reference.conv2d_accumulator(x, w, zero_point, *how)
    # With scales of 1 the float output is the integer itself while it fits 24 bits.
    assert expected.abs().max() < 2**24
    y = conv(x, 1.0, zero_point, None)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y.long(), expected)


def test_one_operator_serves_other_batches_sizes_and_layouts():
    w = weights(8, 5, 3, 3)
    conv = onednn.Int8Conv2d(w, torch.ones(8), padding=(1, 1))
    for shape in [(1, 5, 8, 8), (3, 5, 8, 8), (2, 5, 4, 9), (1, 5, 8, 8)]:
        x = codes(*shape)
        for form in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
            y = conv(form, 1.0, 3, None)
            assert torch.equal(y.long(), reference.conv2d_accumulator(form, w, 3, padding=(1, 1)))


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("terms", "out"), [(1, 1), (3, 17), (17, 3), (1023, 5), (256, 256)])
@pytest.mark.parametrize("zero_point", [0, 117])
def test_linear_sums_are_exact(rows, terms, out, zero_point):
    x, w = codes(rows, terms), weights(out, terms)
    expected = reference.linear_accumulator(x, w, zero_point)
    assert expected.abs().max() < 2**24
    y = onednn.Int8Linear(w, torch.ones(out))(x, 1.0, zero_point, None)
    assert torch.equal(y.long(), expected)


def test_sums_near_the_end_of_int32_do_not_wrap():
    # 66,000 terms of one sign: 2.1e9, just inside int32. Float32 carries 24 of its bits.
    terms = 66_000
    x = torch.full((2, terms), 255, dtype=torch.uint8)
    w = torch.full((16, terms), 127, dtype=torch.int8)
    w[1::2] = -127
    expected = reference.linear_accumulator(x, w, 0).double()
    y = onednn.Int8Linear(w, torch.ones(16))(x, 1.0, 0, None).double()
    assert ((y - expected).abs() <= expected.abs() * 2.0**-24).all()


def test_epilogue_scales_and_bias():
    x, w = codes(2, 32, 6, 6), weights(16, 32, 3, 3)
    generator = torch.Generator().manual_seed(2)
    weight_scale = torch.rand(16, generator=generator) * 1e-3 + 1e-4
    bias = torch.randn(16, generator=generator)
    acc = reference.conv2d_accumulator(x, w, 100, padding=(1, 1))
    expected = reference.epilogue(acc, 0.02, weight_scale, bias, 1)
    conv = onednn.Int8Conv2d(w, weight_scale, padding=(1, 1))
    y = conv(x, 0.02, 100, bias)
    # Three roundings of float32: the product of scales, the product, the sum.
    assert (y - expected).abs().max() <= 3 * 2.0**-24 * expected.abs().max() * 2
    half = conv(x, 0.02, 100, bias, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, y.bfloat16())


def test_linear_adds_and_accumulates():
    x, w = codes(7, 33), weights(5, 33)
    linear, other = onednn.Int8Linear(w, torch.ones(5)), torch.ones(7, 5)
    expected = reference.linear_accumulator(x, w, 9) + 1
    kept = other.clone()
    assert torch.equal(linear(x, 1.0, 9, None, add=other).long(), expected)
    assert torch.equal(other, kept)
    linear(x, 1.0, 9, None, into=other)
    assert torch.equal(other.long(), expected)


def test_quantize_equals_the_reference_in_any_layout():
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    for form in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.bfloat16()):
        got = onednn.quantize(form, 0.013, 77)
        assert torch.equal(got, reference.quantize(form, 0.013, 77))
    assert onednn.quantize(torch.tensor([1e9, -1e9]), 0.1, 3).tolist() == [255, 0]
    # Ties go to the even quotient, not to the even code.
    assert onednn.quantize(torch.tensor([0.5, 1.5]), 1.0, 3).tolist() == [3, 5]


@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_kernels_without_vnni_are_refused(isa):
    # They saturate; the self-test must see it, in one clause that names the way out.
    code = "from quantempo.kernels.cpu import onednn; print(onednn.missing())"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "self-test failed" in done.stdout
    assert "simulated or the openvino engine" in done.stdout


@pytest.mark.parametrize(
    ("owner", "name", "value", "said"),
    [
        (torch.cpu, "get_capabilities", lambda: {"avx512_vnni": False}, "no VNNI"),
        (onednn, "_OPERATORS", ("qconv_pointwise", "gone"), "no longer has the int8"),
    ],
)
def test_what_is_missing_is_named(owner, name, value, said, monkeypatch):
    monkeypatch.setattr(owner, name, value)
    onednn.missing.cache_clear()
    try:
        assert said in str(onednn.missing())
    finally:
        onednn.missing.cache_clear()


def test_an_older_torch_does_not_say_what_the_cpu_has(monkeypatch):
    known = onednn.capabilities()
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    read = onednn.capabilities()
    sets = ("avx2", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16")
    assert [bool(read.get(n)) for n in sets] == [bool(known.get(n)) for n in sets]
