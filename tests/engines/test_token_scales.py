"""Layers with a scale for every token: integers by int64 sums, on every backend and engine."""

import copy

import pytest
import torch
from torch import Tensor, nn

from quantempo.core import activation_format, token_scale
from quantempo.engines import ENGINES
from quantempo.engines.fusion import report
from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.quantized import QLayer, quantized_layers
from tests.engines.openvino_nets import kernel_table, needs_openvino, one_layer
from tests.engines.quantized import INPUTS as PIXELS
from tests.engines.quantized import make_clock, make_linear, quantize_network
from tests.engines.test_fused_transformer import INPUTS, call, tiny
from tests.engines.truth import noise
from tests.kernels import reference
from tests.tiny import tiny_unet

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def truth(layer: QLayer, x: Tensor) -> Tensor:
    """Return the output in float64, token by token; scales as float32, as every kernel has them."""
    rows, half = x.float().reshape(-1, x.shape[-1]), 2 ** (layer.act_bits - 1)
    weights = layer.weight_codes.split(layer.segments, 1)
    result = torch.zeros(len(rows), len(layer.weight_scale), dtype=torch.float64)
    for y, row in zip(result, rows, strict=True):
        for part, weight in zip(row.split(layer.segments), weights, strict=True):
            scale = float(part.abs().max() / (half - 1)) or 1.0
            codes = reference.quantize(part, scale, half, layer.act_qmax)
            acc = reference.linear_accumulator(codes, weight, half)
            y += reference.epilogue(acc, scale, layer.weight_scale, None, -1)
    return (result + layer.bias.double()).reshape(*x.shape[:-1], -1)


def whole(*shape: int, segments: tuple[int, ...], top: int = 127) -> Tensor:
    """Return integers of full range in every token and segment, times a power of 2 a token."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-top, top + 1, shape, generator=g).float()
    for part in x.split(segments, -1):
        part[..., -1] = torch.where(part[..., 0] > 0, top, -top)
    return x * torch.exp2(torch.randint(-9, 10, (*shape[:-1], 1), generator=g))


@pytest.mark.parametrize("bits", [(8, 8), (4, 5), (8, 2), (4, 8, 16)])
@pytest.mark.parametrize(
    ("channels", "out", "segments"),
    [(1, 1, ()), (17, 3, ()), (1023, 5, ()), (48, 16, ()), (48, 32, (16, 32)), (21, 7, (1, 20))],
)
def test_integers_are_exact(backend, channels, out, segments, bits):
    layer = make_linear(channels, out, segments, plain=True, bits=bits, dynamic=True)
    if backend.unsupported(layer) is not None:
        assert channels % 16 or out % 16
        return
    kernel = backend.lower(layer)
    for shape in ((5,), (2, 3, 7), ()):
        x = whole(*shape, channels, segments=layer.segments, top=2 ** (bits[1] - 1) - 1)
        y = kernel(x)
        assert y.shape == (*shape, out)
        assert torch.equal(y.double(), truth(layer, x))
        if shape:
            assert torch.equal(kernel(x.mT.contiguous().mT), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("segments", [(), (32, 16)])
def test_float_epilogue(backend, segments, dtype):
    layer = make_linear(48, 32, segments, clock=make_clock(4), dynamic=True)
    x = (noise(3, 7, 48) * torch.logspace(-3, 1, 7)[:, None]).to(dtype)
    y, right = backend.lower(layer)(x), truth(layer, x)
    assert y.dtype == dtype
    # Roundings of terms as large as a token's largest output to float32, of y to the dtype of x.
    # The inverse of a scale moves a code that is next to a tie: two steps of the input and weight.
    step = token_scale(x, layer.act_format).double() * layer.weight_scale * 254
    unit = 0 if dtype == torch.float32 else torch.finfo(dtype).eps
    bound = 8 * 2.0**-23 * right.abs().amax(-1, keepdim=True) + unit * right.abs()
    assert ((y.double() - right).abs() <= bound + step * (backend.name == "triton")).all()
    # A token does not depend on the others, nor on the time.
    layer.clock.set(torch.tensor([1, 500, 999]))
    assert torch.equal(backend.lower(layer)(x), y)
    assert torch.equal(backend.lower(layer)(x[1:, 3]), y[1:, 3])


def test_zeros_and_nan_stay_in_their_token(backend):
    layer = make_linear(16, 16, dynamic=True)
    x = noise(4, 16)
    x[0], x[1, 3], x[2] = 0, torch.nan, x[2] * 1e-36
    y = backend.lower(layer)(x)
    assert torch.equal(y[0], layer.bias)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_value_is_further_than_half_a_step(bits, dtype):
    spec, g = activation_format(bits), torch.Generator().manual_seed(bits)
    x = (torch.randn(400, 33, generator=g) * torch.logspace(-4, 4, 400)[:, None]).to(dtype)
    scale = token_scale(x, spec)
    assert scale.dtype == torch.float32 and scale.shape == (400, 1)
    codes = torch.round(x.float() / scale).double()
    # As far as a float32 quotient tells a tie.
    assert ((codes * scale.double() - x.double()).abs() <= 0.50001 * scale).all()
    assert (codes.abs().amax(-1) == 2 ** (bits - 1) - 1)[x.abs().amax(-1) > 1e-3].all()


@needs_openvino
@pytest.mark.parametrize("segments", [(), (16, 8)])
def test_openvino_runs_them_in_integers(segments):
    net = one_layer(nn.Linear(24, 16), (128,) * max(1, len(segments)), (), segments=segments)
    x = whole(4, 5, 24, segments=net.layer.segments)
    OpenVinoEngine().attach(net)
    assert torch.equal(net(x, 5).double(), truth(net.layer, x))
    assert all(row.quantized and row.int8 for row in kernel_table(net))


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("name", ["triton", "onednn"])
def test_a_fused_block_is_refused_with_its_reason(name):
    if ENGINES.get(name).missing() is not None:
        pytest.skip(f"{name} cannot run here")
    # The blocks of the one are transformers, of the other attention on pixels.
    made = (tiny, INPUTS, call(2)) if name == "triton" else (tiny_unet, PIXELS, PIXELS[0])
    net = quantize_network(made[0](), made[1])
    whole_net = copy.deepcopy(net)
    layer = next(m for n, m in quantized_layers(net) if n.endswith("to_q"))
    layer.act_scale = layer.act_scale[:, :0]
    layer.act_zero_point.fill_(128)
    exact = copy.deepcopy(net)
    for each, engine in ((net, name), (whole_net, name), (exact, "simulated")):
        ENGINES.get(engine).attach(each)
    said = [row for row in report(net) if row.reason == "a layer in it has a scale for every token"]
    fused = {row.name for row in report(whole_net) if row.reason is None}
    assert said and {row.name for row in said} <= fused
    y, right = (each(*made[2])[0] for each in (net, exact))
    assert (y - right).norm() <= 0.05 * right.norm()
