"""Quantized layers hold integers and scales; others hold weights alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from quantempo import quantized
from quantempo.engines.base import BACKENDS
from quantempo.engines.cuda.joint import SharedModulations, modulated
from quantempo.engines.cuda.unet import SharedShifts
from quantempo.engines.onednn.blocks import FloatTimeShifts
from quantempo.errors import QuantempoError
from quantempo.kernels import ops
from tests.engines.quantized import make_linear
from tests.engines.truth import noise

CLOCK = quantized.StepClock(torch.tensor([0, 0, 1, 2]))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Draw the same float layers whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def filled(layer: quantized.QLayer, seed: int = 0) -> quantized.QLayer:
    """Fill a layer with random codes, scales that differ in every entry, and a kernel."""
    g = torch.Generator().manual_seed(seed)
    shape, (parts, buckets) = layer.weight_int.shape, layer.act_scale.shape
    quantized.fill(
        layer,
        torch.randint(-127, 128, shape, generator=g, dtype=torch.int8),
        torch.rand(shape[0], generator=g) * 0.01 + 0.001,
        torch.randn(shape[0], generator=g),
        torch.rand(parts, buckets, generator=g) * 0.05 + 0.01,
        torch.randint(0, 256, (parts,), generator=g, dtype=torch.int32),
    )
    layer.kernel = BACKENDS.get("simulated").lower(layer)
    return layer


CONVS = [
    nn.Conv2d(6, 4, 3, padding=1),
    nn.Conv2d(6, 4, (1, 3), stride=(2, 1), padding=(0, 2), dilation=(1, 2), bias=False),
    nn.Conv2d(6, 4, 3, groups=2),
]


@pytest.mark.parametrize("conv", CONVS, ids=["plain", "odd", "groups"])
def test_a_twin_has_the_shape_of_its_convolution(conv: nn.Conv2d) -> None:
    copied = quantized.QConv2d.like(conv, CLOCK, (), 3)
    for name in ("stride", "padding", "dilation", "groups"):
        assert getattr(copied, name) == getattr(conv, name)
    assert (copied.in_channels, copied.out_channels, copied.kernel_size) == (6, 4, conv.kernel_size)
    assert copied.weight_int.shape == conv.weight.shape
    assert (copied.bias is None) == (conv.bias is None)
    assert copied.segments == (6,) and copied.act_scale.shape == (1, 3)
    x = torch.randn(2, 6, 9, 8)
    assert filled(copied)(x).shape == conv(x).shape


def test_a_twin_has_the_shape_of_its_linear_layer() -> None:
    copied = quantized.QLinear.like(nn.Linear(6, 4, bias=False), CLOCK, (2, 4), 1)
    assert (copied.in_features, copied.out_features, copied.bias) == (6, 4, None)
    assert copied.segments == (2, 4) and copied.act_scale.shape == (2, 1)
    assert filled(copied)(torch.randn(2, 5, 6)).shape == (2, 5, 4)


def test_buffers_have_the_documented_types_and_the_clock_is_no_child() -> None:
    copied = quantized.QConv2d.like(nn.Conv2d(6, 4, 1), CLOCK, (2, 4), 3)
    assert {name: value.dtype for name, value in copied.state_dict().items()} == {
        "weight_int": torch.int8,
        "weight_scale": torch.float32,
        "bias": torch.float32,
        "act_scale": torch.float32,
        "act_zero_point": torch.int32,
    }
    assert list(copied.children()) == [] and copied.clock is CLOCK


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layer", [nn.Conv2d(5, 4, 3, bias=False), nn.Linear(7, 4)], ids=str)
def test_codes_of_every_width_are_kept_in_few_bytes(bits: int, layer: nn.Module) -> None:
    make = quantized.QConv2d.like if isinstance(layer, nn.Conv2d) else quantized.QLinear.like
    copied = make(layer, CLOCK, (), 1, weight_bits=bits, act_bits=bits)
    assert (copied.act_qmax, copied.weight_bits) == (2**bits - 1, bits)
    shape, low, high = layer.weight.shape, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(low, high + 1, shape, generator=g, dtype=torch.int8)
    codes.view(-1)[:2] = torch.tensor([low, high])
    copied.set_codes(codes)
    assert torch.equal(copied.weight_codes, codes) and copied.weight_codes.dtype == torch.int8
    inputs = layer.weight[0].numel()
    # An odd number of inputs: the last nibble of each row is empty.
    assert inputs % 2 and copied.weight_int.nbytes == 4 * (inputs // 2 + 1 if bits <= 4 else inputs)
    copied.weight_scale.copy_(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    wanted = codes.float() * copied.weight_scale.reshape(-1, *[1] * (codes.ndim - 1))
    assert torch.equal(copied.weight, wanted)
    # Codes that were unpacked before are replaced, however they come.
    copied.set_codes(-codes)
    assert torch.equal(copied.weight_codes, -codes)
    other = make(layer, CLOCK, (), 1, weight_bits=bits)
    other.set_codes(codes)
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied.weight_codes, codes)
    for wrong in (low - 1, high + 1):
        with pytest.raises(QuantempoError, match=rf"outside \[{low}, {high}\]"):
            copied.set_codes(torch.full(shape, wrong, dtype=torch.int16))


def test_twins_are_made_on_the_device_of_the_layer() -> None:
    with torch.device("meta"):
        layers = (nn.Conv2d(6, 4, 1), nn.Linear(6, 4))
    kinds = (quantized.QConv2d, quantized.QLinear)
    copies = [kind.like(one, CLOCK, (), 1) for kind, one in zip(kinds, layers, strict=True)]
    stored = (quantized.Float16Linear(layers[1]), quantized.WeightOnlyLinear(layers[1]))
    for copied in (*copies, *stored):
        assert all(value.is_meta for value in copied.state_dict().values())


def test_the_dequantized_weight_scales_every_output_channel() -> None:
    copied = filled(quantized.QConv2d.like(CONVS[0], CLOCK, (), 1))
    wanted = torch.einsum("oikl,o->oikl", copied.weight_int.double(), copied.weight_scale.double())
    # One float32 product: relative error 2^-24.
    torch.testing.assert_close(copied.weight.double(), wanted, rtol=2**-24, atol=0)


def test_the_scale_is_that_of_the_segment_and_the_bucket() -> None:
    copied = filled(quantized.QConv2d.like(nn.Conv2d(6, 4, 1), CLOCK, (2, 4), 3))
    x = torch.zeros(2, 6, 3, 3)
    for t, column in ((0, 0), (1, 0), (2, 1), (3, 2)):
        CLOCK.set(t)
        for segment in range(2):
            assert torch.equal(copied.scale_now(segment, x), copied.act_scale[segment, column])
    CLOCK.set(torch.tensor([3, 0]))
    assert copied.scale_now(1, x).shape == (2, 1, 1, 1)
    assert copied.scale_now(1, x).flatten().tolist() == copied.act_scale[1, [2, 0]].tolist()
    CLOCK.set(0)


@pytest.mark.parametrize("t", [0, 2, 3, torch.tensor([3, 0])], ids=str)
def test_one_bucket_is_static_quantization(t: int | torch.Tensor) -> None:
    static = filled(quantized.QLinear.like(nn.Linear(6, 4), CLOCK, (), 1))
    timed = filled(quantized.QLinear.like(nn.Linear(6, 4), CLOCK, (), 3))
    constant = static.act_scale.expand(1, 3)
    weight = static.weight_int, static.weight_scale, static.bias
    quantized.fill(timed, *weight, constant, static.act_zero_point)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    CLOCK.set(t)
    assert torch.equal(timed(x), static(x))
    CLOCK.set(0)


def test_a_layer_without_an_engine_says_so() -> None:
    with pytest.raises(QuantempoError, match="before an engine was attached"):
        quantized.QLinear.like(nn.Linear(2, 2), CLOCK, (), 1)(torch.zeros(1, 2))


def test_float16_keeps_eleven_bits_of_every_weight() -> None:
    g = torch.Generator().manual_seed(3)
    layer = nn.Linear(64, 33)
    layer.weight.data = torch.randn(33, 64, generator=g) * torch.logspace(-9, 4, 33)[:, None]
    made = quantized.Float16Linear(layer).fill(layer)
    weight = layer.weight.detach().double()
    # Half of the last of 11 bits; below 2^-14 of the smallest step, 2^-24.
    bound = (weight.abs() * 2**-11).clamp_min(2**-25)
    assert bool(((made.weight.double() - weight).abs() <= bound).all())
    assert torch.equal(made.bias, layer.bias.detach())
    x = torch.randn(5, 64, generator=g)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, layer.bias))
    # In another dtype the products are float32 all the same.
    assert torch.equal(made(x.bfloat16()), made(x.bfloat16().float()).bfloat16())
    layer.weight.data[0, 0] = 1e5
    with pytest.raises(QuantempoError, match=r"beyond 65504.*layers\.exclude"):
        made.fill(layer)


def test_float16_weights_are_two_bytes_in_a_file_and_others_are_not_rounded() -> None:
    layer = nn.Linear(6, 4)
    made = quantized.Float16Linear(layer).fill(layer)
    stored = made.state_dict()
    assert [(name, value.dtype) for name, value in stored.items()] == [
        ("weight", torch.float16),
        ("bias", torch.float32),
    ]
    assert [p.requires_grad for p in made.parameters()] == [False]
    other = quantized.Float16Linear(layer)
    other.load_state_dict(stored)
    assert other.weight.dtype == torch.float32 and torch.equal(other.weight, made.weight)
    other.weight.data = layer.weight.detach()
    assert torch.equal(other.state_dict()["weight"], layer.weight)


def test_weights_alone_are_codes_with_a_scale_a_channel() -> None:
    g = torch.Generator().manual_seed(3)
    layer = nn.Linear(64, 33)
    layer.weight.data = torch.randn(33, 64, generator=g) * torch.logspace(-9, 4, 33)[:, None]
    layer.weight.data[5] = 0
    made = quantized.WeightOnlyLinear(layer).fill(layer)
    weight, scale = layer.weight.detach().double(), made.weight_scale.double()[:, None]
    assert made.weight_int.dtype == torch.int8 and int(made.weight_int.abs().max()) == 127
    # Half a step, and a rounding of float32.
    assert bool(((made.weight.double() - weight).abs() <= scale * (0.5 + 2**-16)).all())
    x = torch.randn(2, 5, 64, generator=g)
    wanted = x.double() @ made.weight.double().t() + layer.bias.detach().double()
    # 64 terms and a bias in float32.
    room = 66 * 2**-24 * (x.abs() @ made.weight.abs().t() + 1).double()
    assert bool(((made(x) - wanted).abs() <= room).all())
    # In another type the sums are float32 all the same; an engine's product has the same rows.
    assert torch.equal(made(x.bfloat16()), made(x.bfloat16().float()).bfloat16())
    made.kernel = ops.weight_only_linear
    assert bool(((made(x) - wanted).abs() <= room).all())
    other = copy.deepcopy(made)
    other.load_state_dict(quantized.WeightOnlyLinear(layer).fill(layer).state_dict())
    assert other.kernel is None and torch.equal(other.weight, made.weight)


@torch.no_grad()
@pytest.mark.parametrize(("width", "group"), [(64, 16), (75, 32)])
def test_weights_alone_in_groups_are_the_same_codes(width, group) -> None:
    layer, x = nn.Linear(width, 33), noise(3, width)
    made = quantized.WeightOnlyLinear(layer, 4, group).fill(layer)
    plain = quantized.WeightOnlyLinear(layer).fill(layer, made.weight_codes, made.weight_scale)
    assert list(made.state_dict()) == ["bias", "weight_int", "weight_group", "weight_scale"]
    # On normal weights 0.07 to 0.09.
    assert float((made.weight - layer.weight).norm() / layer.weight.norm()) < 0.1
    for kernel in (None, ops.weight_only_linear):
        made.kernel = plain.kernel = kernel
        assert torch.equal(made(x), plain(x))
    made.unpack()
    assert made.weight_int.dtype == torch.int8 and torch.equal(made.weight, plain.weight)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_nothing_but_outputs_as_those_of_a_float_layer(dtype) -> None:
    floating, x = nn.Linear(64, 48), noise(3, 64)
    alone, engine = (quantized.WeightOnlyLinear(floating).fill(floating) for _ in range(2))
    engine.kernel = ops.weight_only_linear
    codes = make_linear(64, 48)
    codes.kernel = BACKENDS.get("simulated").lower(codes)
    for layer in (codes, alone, engine, quantized.Float16Linear(floating).fill(floating)):
        for given in (x, x.to(dtype)):
            assert layer(given).dtype == given.dtype
            exact = layer(given) if layer is codes else layer(given.float()).to(dtype)
            with torch.autocast("cpu", dtype):
                y = layer(given)
                assert y.dtype == exact.dtype and torch.equal(y, exact)
                assert layer is codes or y.dtype == floating(given).dtype
    stored = quantized.Float16Linear(floating).fill(floating)
    for shifts in (SharedShifts([stored]), FloatTimeShifts([stored])):
        wanted = shifts(0, x.clone())
        with torch.autocast("cpu", dtype):
            assert torch.equal(shifts(0, x), wanted)
    temb = x.to(dtype)
    assert torch.equal(modulated(engine, temb), SharedModulations([engine])(0, temb))
