"""What every backend must do, walked over the registry; integers are compared for equality."""

import copy

import pytest
import torch
from torch import Tensor

from quantempo.engines.base import BACKENDS, MAX_TERMS, bucket_rows, run_per_bucket, too_many_terms
from quantempo.engines.simulated import exact_conv2d, exact_parts, sum_bound
from quantempo.errors import QuantempoError
from quantempo.quantized import QConv2d
from tests.engines.quantized import make_clock, make_conv, make_linear
from tests.engines.truth import expected, noise

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def lowered(backend, layer, must=False):
    """Return the layer's kernel, or None where the backend says that it cannot take the layer."""
    reason = backend.unsupported(layer)
    assert not (reason and must), reason
    if reason is None:
        return backend.lower(layer)
    with pytest.raises(QuantempoError, match="cannot take this layer"):
        backend.lower(layer)
    return None


CONVOLUTIONS = {
    "one": (make_conv(1, 1, (1, 1), padding=(0, 0), plain=True), (5, 7)),
    "odd": (make_conv(3, 17, plain=True), (5, 7)),
    "stride": (make_conv(17, 3, stride=(2, 2), plain=True), (5, 7)),
    "wide": (make_conv(1023, 3, plain=True), (4, 3)),
    "pixel": (make_conv(32, 16, plain=True), (1, 1)),
    "groups": (make_conv(32, 48, groups=4, plain=True), (6, 6)),
    "depthwise": (make_conv(6, 6, groups=6, plain=True), (6, 5)),
    "dilated": (make_conv(16, 8, (3, 2), (1, 2), (2, 1), (2, 1), plain=True), (9, 5)),
    "halves": (make_conv(48, 32, (1, 1), padding=(0, 0), segments=(16, 32), plain=True), (4, 4)),
    "thirds": (make_conv(51, 9, segments=(17, 1, 33), plain=True), (4, 5)),
}
ONE = {"kernel": (1, 1), "padding": (0, 0)}
# What every backend has to take: channels in multiples of 16, kernels 1x1 and 3x3, stride 1 and 2.
COMMON = {
    "pointwise": (make_conv(16, 48, plain=True, **ONE), (5, 7)),
    "odd size": (make_conv(32, 16, plain=True), (5, 7)),
    "strided": (make_conv(16, 16, stride=(2, 2), plain=True), (5, 7)),
    "bare": (make_conv(16, 32, padding=(0, 0), plain=True), (5, 4)),
    "rows": (make_conv(16, 16, padding=(1, 0), plain=True), (5, 4)),
    "one pixel": (make_conv(32, 16, plain=True), (1, 1)),
    "two": (make_conv(48, 32, segments=(16, 32), plain=True, **ONE), (4, 3)),
    "three": (make_conv(64, 32, segments=(16, 32, 16), plain=True, **ONE), (4, 3)),
    "four": (make_conv(64, 16, segments=(16,) * 4, plain=True, **ONE), (4, 3)),
    "strided two": (make_conv(48, 32, stride=(2, 2), segments=(16, 32), plain=True, **ONE), (4, 5)),
    "wide two": (make_conv(48, 16, segments=(32, 16), plain=True), (4, 5)),
}


@pytest.mark.parametrize("case", [*CONVOLUTIONS, *COMMON])
def test_convolution_integers_are_exact(backend, case):
    layer, size = (CONVOLUTIONS | COMMON)[case]
    x = noise(2, layer.in_channels, *size)
    y = expected(layer, x)
    assert y.abs().max() < 2**24
    kernel = lowered(backend, layer, must=case in COMMON)
    if kernel is None:
        return
    last = torch.channels_last
    every_other = noise(2, layer.in_channels, *size).repeat_interleave(2, 3)[..., ::2]
    for form in (x, x.to(memory_format=last), x.permute(0, 1, 3, 2).contiguous().mT, every_other):
        assert torch.equal(kernel(form).double(), y)


@pytest.mark.parametrize(
    ("channels", "out", "segments"),
    [
        (1, 1, ()), (3, 17, ()), (17, 3, ()), (1023, 5, ()), (16, 16, ()), (1040, 32, ()),
        (48, 32, (16, 32)), (64, 16, (16, 32, 16)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 5), (1,), ()])
def test_linear_integers_are_exact(backend, channels, out, segments, shape):
    layer = make_linear(channels, out, segments, plain=True)
    x = noise(*shape, channels)
    kernel = lowered(backend, layer, must=channels % 16 == 0)
    if kernel is None:
        return
    y = kernel(x)
    assert y.shape == (*shape, out)
    assert torch.equal(y.double(), expected(layer, x))
    if len(shape) == 3:
        # As attention makes it: heads swapped, rows not contiguous.
        form = x.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(kernel(form), y)


def test_large_sums_are_exact_to_float32(backend):
    # 2,560 channels of 3x3: sums near 7e8, where float32 sums of integers go wrong.
    layer = make_conv(2560, 16, plain=True)
    layer.weight_int.copy_(layer.weight_int.abs().clamp_min(100))
    layer.act_zero_point.fill_(0)
    x = noise(1, 2560, 3, 3).abs() + 200
    y = expected(layer, x)
    assert y.max() > 2**28
    error = (backend.lower(layer)(x).double() - y).abs()
    assert (error <= y.abs() * 2.0**-24).all()


@pytest.mark.parametrize(
    "layer",
    [make_conv(48, 32), make_conv(48, 32, segments=(32, 16)), make_linear(48, 32)],
    ids=["conv", "halves", "linear"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_epilogue(backend, layer, dtype):
    shape = (2, 48, 6, 5) if isinstance(layer, QConv2d) else (2, 7, 48)
    x = noise(*shape, spread=1.0).to(dtype)
    y = backend.lower(layer)(x)
    assert y.dtype == dtype
    truth = expected(layer, x)
    # A few float32 roundings of terms no larger than the largest output (bias included) times
    # three, then one rounding to the dtype of x.
    unit = torch.finfo(dtype).eps
    bound = 8 * 2.0**-23 * truth.abs().max() + (0 if dtype == torch.float32 else unit) * truth.abs()
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_batch_may_mix_time_steps(backend, kind):
    clock = make_clock(4)
    layer = make_conv(32, 16, clock=clock) if kind == "conv" else make_linear(32, 16, clock=clock)
    kernel = backend.lower(layer)
    x = noise(*((6, 32, 4, 5) if kind == "conv" else (6, 7, 32)), spread=1.0)
    # 6 rows for 3 time-steps: classifier-free guidance and frames repeat each.
    for steps in ([999, 0, 300, 300, 999, 10], [700, 100, 700], [5] * 6):
        clock.set(torch.tensor(steps))
        y = kernel(x)
        for row in range(6):
            step = steps[row // (6 // len(steps))]
            truth = expected(layer, x[row : row + 1], int(clock.bucket_of[step]))
            assert (y[row : row + 1] - truth).abs().max() <= 1e-6 * truth.abs().max()
    clock.set(750)
    assert torch.equal(kernel(x)[2:3], kernel(x[2:3]))
    clock.set(torch.tensor([1, 300, 600, 900]))
    with pytest.raises((ValueError, QuantempoError)):
        kernel(x)


def test_equal_buckets_are_the_static_layer_bit_for_bit(backend):
    timed, static = make_conv(32, 16, clock=make_clock(4)), make_conv(32, 16)
    timed.act_scale.copy_(static.act_scale.expand(1, 4))
    timed.weight_int.copy_(static.weight_int)
    timed.weight_scale.copy_(static.weight_scale)
    timed.bias.copy_(static.bias)
    timed.act_zero_point.copy_(static.act_zero_point)
    x = noise(3, 32, 5, 5, spread=1.0)
    y = backend.lower(static)(x)
    kernel = backend.lower(timed)
    for steps in (0, 999, torch.tensor([3, 990, 400])):
        timed.clock.set(steps)
        assert torch.equal(kernel(x), y)


def test_saturated_and_empty_inputs(backend):
    layer = make_conv(16, 16, plain=True)
    for x in (noise(1, 16, 4, 4) * 1e6, torch.zeros(1, 16, 4, 4)):
        assert torch.equal(backend.lower(layer)(x).double(), expected(layer, x))


def test_sums_that_could_overflow_are_refused(backend):
    # The largest sum there is fits.
    assert MAX_TERMS * 255 * 127 < 2**31 <= (MAX_TERMS + 1) * 255 * 127
    most = MAX_TERMS // 16 * 16
    assert backend.unsupported(make_linear(most, 16, plain=True)) is None
    layer = make_linear(most + 16, 16, plain=True)
    assert "overflow" in backend.unsupported(layer)
    assert too_many_terms(layer) == backend.unsupported(layer)
    with pytest.raises(QuantempoError, match="cannot take this layer"):
        backend.lower(layer)


def test_a_copied_model_runs_on_its_own(backend):
    clock = make_clock(2)
    layer = make_conv(16, 16, clock=clock)
    layer.kernel = backend.lower(layer)
    x = noise(1, 16, 4, 4)
    clock.set(0)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert other.clock is not clock and other.kernel is None
    other.kernel = backend.lower(other)
    assert torch.equal(other(x), y)
    other.clock.set(999)
    assert not torch.equal(other(x), y)
    assert torch.equal(layer(x), y)


def test_simulated_sums_in_parts_that_float32_holds():
    layer = make_linear(1000, 2, plain=True)
    layer.weight_int.fill_(127)
    layer.act_zero_point.fill_(255)
    assert sum_bound(layer.weight_int) == 1000 * 127 * 255 > 2**24
    parts = list(exact_parts(layer.weight_int))
    assert parts == [(slice(0, 500), torch.float32), (slice(500, 1000), torch.float32)]
    x = torch.zeros(1, 1000)
    x[0, 0] = -1
    # 254 - 255 once: the sum is -127, among terms that cancel.
    kernel = BACKENDS.get("simulated").lower(layer)
    assert kernel(x).tolist() == [[-127.0, -127.0]]
    # All codes at z: 0. All at 0 - z = -255: the largest sum there is, rounded once to float32.
    most = torch.tensor(1000 * 127 * 255, dtype=torch.float32).item()
    assert kernel(torch.full((1, 1000), -300.0)).tolist() == [[-most, -most]]


def test_simulated_takes_float64_where_a_sum_cannot_be_cut():
    weight = torch.full((2, 3, 32, 32), 127, dtype=torch.int8)
    assert [dtype for _, dtype in exact_parts(weight)] == [torch.float64] * 3
    assert list(exact_parts(weight, groups=2)) == [(slice(0, 3), torch.float64)]
    assert list(exact_parts(weight // 127)) == [(slice(0, 3), torch.float32)]


def test_onednn_names_what_it_cannot_take():
    backend = BACKENDS.get("onednn")
    grouped = make_conv(8, 8, groups=2, segments=(4, 4))
    assert "grouped convolution" in backend.unsupported(grouped)
    # Offloaded: it is there when it is called.
    assert backend.unsupported(make_linear(4, 4).to("meta")) is None


def test_rows_of_each_bucket():
    clock = make_clock(4)
    clock.set(torch.tensor([999, 0, 300, 999]))
    rows = bucket_rows(clock)
    assert {bucket: index.tolist() for bucket, index in rows.items()} == {0: [1], 1: [2], 3: [0, 3]}
    assert bucket_rows(clock) is rows
    clock.set(torch.tensor([300, 300]))
    assert bucket_rows(clock) == 1
    clock.set(0)
    assert bucket_rows(clock) == 0


def test_run_per_bucket_keeps_the_order_of_rows():
    clock = make_clock(4)
    clock.set(torch.tensor([999, 0, 300]))
    x = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 2, 3, 3)
    x = x.contiguous(memory_format=torch.channels_last)

    def run(bucket: int, part: Tensor, nothing: None) -> Tensor:
        assert nothing is None
        assert part.is_contiguous(memory_format=torch.channels_last)
        return part + 100 * bucket

    y = run_per_bucket(clock, run, x, None)
    assert y[:, 0, 0, 0].tolist() == [300, 301, 2, 3, 104, 105]
    with pytest.raises(QuantempoError, match="3 time-steps for a layer input of 4 rows"):
        run_per_bucket(clock, run, x[:4], None)


def test_cuts_that_still_hold_are_kept():
    layer = make_linear(1000, 2, plain=True)
    layer.weight_int.fill_(127)
    kernel = BACKENDS.get("simulated").lower(layer)
    kernel.prepare(torch.device("cpu"))
    layer.weight_int.fill_(1)
    kernel.prepare(torch.device("cpu"))
    assert [cut for _, cut, _ in kernel.parts] == [slice(0, 500), slice(500, 1000)]
    x = noise(3, 1000)
    fresh = BACKENDS.get("simulated").lower(layer)
    assert torch.equal(kernel(x), fresh(x))
    assert len(fresh.parts) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("size", [(3, 128, 32), (128, 256, 8), (256, 256, 16)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_exact_conv2d_on_a_gpu(size, layout):
    inputs, outputs, side = size
    codes = torch.randint(-255, 256, (4, inputs, side, side), device="cuda").float()
    weight = torch.randint(-20, 21, (outputs, inputs, 3, 3), device="cuda").float()
    how = ([1, 1], [1, 1], [1, 1], 1)
    y = exact_conv2d(codes.contiguous(memory_format=layout), weight, *how)
    assert torch.equal(y.double(), exact_conv2d(codes.double(), weight.double(), *how))
