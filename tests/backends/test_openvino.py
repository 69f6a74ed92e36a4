"""The OpenVINO engine: our integers, our scales, and the float parts around them.

Where the tolerances come from. Single layers have scales that are powers of two and sums below
2^24, so float32 is exact and results must be *equal* to integer arithmetic. Whole networks amplify:
a last-bit difference before a rounding moves a code by one, and after some layers the two results
differ by as much as each differs from float. There the bound is the quantization error itself.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.backends import engine as engines
from quantempo.backends import openvino as module
from quantempo.backends.openvino import MAX_GRAPHS, OpenVinoEngine, int8_share, kernel_table
from quantempo.backends.simulated import SimulatedBackend
from quantempo.errors import QuantempoError
from quantempo.models.family import sites
from quantempo.quantizers import (
    LayerPlan,
    QConv2d,
    QLayer,
    fill,
    find_clock,
    install_clock,
    quantized_layers,
    swap_layers,
)
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional, tiny_unet

_REASON = OpenVinoEngine().missing()
needs_openvino = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
pytestmark = needs_openvino

STEPS = 1000


def sqnr_db(truth: Tensor, found: Tensor) -> float:
    """Return 10 log10(sum truth^2 / sum (found - truth)^2)."""
    error = (found - truth).double().pow(2).sum().clamp_min(1e-300)
    return float(10 * torch.log10(truth.double().pow(2).sum() / error))


# --- one layer, exact ------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A denoiser that is one layer, called as diffusers calls them."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        if self.before is not None:
            sample = self.before(sample)
        return self.layer(sample) * scale


def one_layer(
    layer: nn.Module,
    zero_points: tuple[int, ...] = (93,),
    exponents: tuple[int, ...] = (-4,),
    before: Callable[[Tensor], Tensor] | None = None,
    segments: tuple[int, ...] = (),
) -> OneLayer:
    """Quantize a layer with random integers; act_scale[s, g] = 2^(exponents[g] + s)."""
    net = OneLayer(copy.deepcopy(layer), before).eval()
    buckets = len(exponents)
    clock = install_clock(net, torch.arange(STEPS) * buckets // STEPS)
    swap_layers(net, [LayerPlan("layer", "int8", segments, buckets)], clock)
    quantized: Any = net.layer
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int, shape: torch.Size) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    out = quantized.weight_int.shape[:1]
    fill(
        quantized,
        draw(-127, 127, quantized.weight_int.shape).to(torch.int8),
        torch.exp2(draw(-9, -6, out).float()),
        draw(-50, 50, out).float() if quantized.bias is not None else None,
        torch.exp2(torch.tensor([[e + s for e in exponents] for s in range(len(zero_points))])),
        torch.tensor(zero_points, dtype=torch.int32),
    )
    return net


def integer_output(layer: QLayer, x: Tensor, buckets: list[int]) -> Tensor:
    """Return the layer's output from int64 sums, row by row; independent of every backend.

    Padding is done by hand, with the zero point.
    """
    rows = []
    for row, bucket in zip(x.double(), buckets, strict=True):
        total: Any = 0.0
        parts = row.split(layer.segments, 0 if isinstance(layer, QConv2d) else -1)
        width = layer.segments if len(parts) > 1 else (layer.weight_int.shape[1],)
        for i, (part, weight) in enumerate(
            zip(parts, layer.weight_int.long().split(width, 1), strict=True)
        ):
            scale = layer.act_scale[i, bucket].double()
            zero = int(layer.act_zero_point[i])
            codes = (torch.round(part / scale) + zero).clamp(0, 255).long()
            if isinstance(layer, QConv2d):
                pad = (layer.padding[1],) * 2 + (layer.padding[0],) * 2
                codes = F.pad(codes, pad, value=zero)
                sums = F.conv2d(
                    codes[None] - zero,
                    weight,
                    None,
                    layer.stride,
                    0,
                    layer.dilation,
                    layer.groups,
                )[0]
                shape = (-1, 1, 1)
            else:
                sums, shape = (codes - zero) @ weight.T, (-1,)
            total = total + sums.double() * scale * layer.weight_scale.double().reshape(shape)
        if layer.bias is not None:
            total = total + layer.bias.double().reshape(shape)
        rows.append(total)
    return torch.stack(rows)


def on_grid(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw inputs at quarter steps (never half-way), some of them outside the range."""
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.randint(-220, 220, shape, generator=generator) * 4
    offset = torch.randint(-1, 2, shape, generator=generator)
    return (quarters + offset) / 4 * 2.0**-4


LAYERS = {
    "3x3": (nn.Conv2d(17, 24, 3, padding=1), (2, 17, 9, 7)),
    "3x3, stride 2": (nn.Conv2d(16, 8, 3, stride=2, padding=1), (1, 16, 8, 8)),
    "3x3, no padding, dilated": (nn.Conv2d(8, 16, 3, dilation=2), (1, 8, 9, 9)),
    "1x1, no bias": (nn.Conv2d(32, 16, 1, bias=False), (1, 32, 5, 5)),
    "uneven": (nn.Conv2d(3, 5, (3, 1), stride=(1, 2), padding=(2, 0)), (1, 3, 6, 8)),
    "groups": (nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "linear": (nn.Linear(48, 40), (3, 48)),
    "linear, tokens": (nn.Linear(33, 20), (2, 11, 33)),
    "linear, no bias": (nn.Linear(64, 64, bias=False), (2, 9, 64)),
}


@pytest.mark.parametrize("zero", [0, 93, 128, 255])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_integer_arithmetic(name: str, zero: int) -> None:
    layer, shape = LAYERS[name]
    net = one_layer(layer, (zero,))
    x = on_grid(shape)
    OpenVinoEngine().attach(net)
    found = net(x, 5)
    expected = integer_output(net.layer, x, [0] * len(x))
    assert expected.abs().max() * 2**13 < 2**24 * 2**7
    assert torch.equal(found.double(), expected)
    (row,) = kernel_table(net)
    assert row.name == "layer/0" and row.int8, row


@pytest.mark.parametrize("zeros", [(93, 12), (0, 255)])
def test_both_halves_of_a_concatenation_have_their_own_grid(zeros: tuple[int, int]) -> None:
    net = one_layer(nn.Conv2d(24, 16, 1), zeros, segments=(16, 8))
    x = on_grid((2, 24, 6, 6))
    OpenVinoEngine().attach(net)
    assert torch.equal(net(x, 5).double(), integer_output(net.layer, x, [0, 0]))
    assert [(row.name, row.int8) for row in kernel_table(net)] == [
        ("layer/0", True),
        ("layer/1", True),
    ]
    macs = [row.macs for row in kernel_table(net)]
    assert macs == [16 * 16 * 36, 8 * 16 * 36]


@pytest.mark.parametrize(
    ("layer", "shape", "segments"),
    [
        (nn.Conv2d(16, 8, 3, padding=1), (4, 16, 6, 6), ()),
        (nn.Conv2d(16, 8, 3, padding=1, bias=False), (4, 16, 6, 6), ()),
        (nn.Conv2d(16, 8, 1), (4, 16, 6, 6), (8, 8)),
        (nn.Linear(32, 24), (4, 7, 32), ()),
    ],
)
def test_each_time_step_takes_its_own_scales(
    layer: nn.Module, shape: tuple[int, ...], segments: tuple[int, ...]
) -> None:
    zeros = (93, 140)[: len(segments) or 1]
    net = one_layer(layer, zeros, (-5, -4, -2), segments=segments)
    x = on_grid(shape)
    OpenVinoEngine().attach(net)
    for t, bucket in ((0, 0), (333, 0), (334, 1), (666, 1), (667, 2), (999, 2)):
        found = net(x, t).double()
        assert torch.equal(found, integer_output(net.layer, x, [bucket] * 4)), t
    # The same as a layer that has only this row of the table.
    single = one_layer(layer, zeros, (-4,), segments=segments)
    OpenVinoEngine().attach(single)
    assert torch.equal(net(x, 500), single(x, 500))
    mixed = torch.tensor([10, 990, 500, 20])
    assert torch.equal(net(x, mixed).double(), integer_output(net.layer, x, [0, 2, 1, 0]))
    assert all(row.int8 for row in kernel_table(net))


def test_a_layer_may_see_several_rows_of_each_sample() -> None:
    """Windows, heads and frames are folded into the batch: row i * n + k belongs to sample i."""
    net = one_layer(
        nn.Linear(16, 8), exponents=(-5, -2), before=lambda x: x.reshape(-1, 5, x.shape[-1])
    )
    x = on_grid((3, 10, 16))
    OpenVinoEngine().attach(net)
    found = net(x, torch.tensor([0, 999, 1])).double()
    folded = x.reshape(6, 5, 16)
    assert torch.equal(found, integer_output(net.layer, folded, [0, 0, 1, 1, 0, 0]))


def test_the_graph_holds_our_integers_and_scales() -> None:
    from quantempo.backends.openvino_graph import build_graph

    net = packed(tiny_unet(), buckets=3)
    inputs = [torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3, 16, 16), torch.zeros(2)]
    graph, calls = build_graph(net, lambda x, t: [type(net).forward(net, x, t).sample], inputs)
    nodes = {node.get_friendly_name(): node for node in graph.get_ops()}
    assert {call.name for call in calls} == {name for name, _ in quantized_layers(net)}
    for call in calls:
        layer = call.layer
        widths = layer.segments if len(layer.segments) > 1 else (layer.weight_int.shape[1],)
        for i, integers in enumerate(layer.weight_int.split(widths, 1)):
            node = nodes[f"{call.name}/{i}"]
            product = node.input_value(1).get_node()
            stored = product.input_value(0).get_node().input_value(0).get_node()
            assert str(stored.get_element_type()) == "<Type: 'int8_t'>"
            assert torch.equal(torch.from_numpy(stored.data.copy()), integers)
            scale = torch.from_numpy(product.input_value(1).get_node().data.copy())
            assert torch.equal(scale.reshape(-1), layer.weight_scale)
            quantizer = node.input_value(0).get_node()
            low, high = (float(quantizer.input_value(k).get_node().data) for k in (1, 2))
            zero, reference = int(layer.act_zero_point[i]), float(layer.act_scale[i].max())
            # One rounding to float32 each.
            assert low == pytest.approx(-zero * reference, rel=2**-23)
            assert high == pytest.approx((255 - zero) * reference, rel=2**-23)


# --- whole networks --------------------------------------------------------------------------


def packed(denoiser: nn.Module, buckets: int = 1, int8: bool = True, **given: Any) -> nn.Module:
    """Quantize a copy of a denoiser from the ranges it shows on random inputs (or none of it)."""
    net = copy.deepcopy(denoiser)
    observed: dict[str, list[Tensor]] = {}
    found = [site for site in sites(net) if site.role not in ("input", "output", "time") and int8]
    hooks = []
    for site in found:
        axis = 1 if isinstance(site.layer, nn.Conv2d) else -1

        def observe(
            _: nn.Module, args: tuple[Tensor], name: str = site.name, dim: int = axis
        ) -> None:
            channels = args[0].detach().transpose(dim, 0).flatten(1)
            ends = torch.stack([channels.amin(1), channels.amax(1)])
            observed.setdefault(name, []).append(ends)

        hooks.append(site.layer.register_forward_pre_hook(observe))
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, *sample_shape(net))
        with torch.no_grad():
            net(x, torch.tensor([100, 900]), **given)
    for hook in hooks:
        hook.remove()
    clock = install_clock(net, torch.arange(STEPS) * buckets // STEPS)
    layers = {site.name: site.layer for site in found}
    swap_layers(net, [LayerPlan(s.name, "int8", s.segments, buckets) for s in found], clock)
    for name, layer in quantized_layers(net):
        fill_from_ranges(layer, layers[name], torch.stack(observed[name]))
    return net.eval()


def fill_from_ranges(layer: QLayer, float_layer: Any, ends: Tensor) -> None:
    """Fill a layer with min-max grids; bucket g is 1 + g / 4 times as wide as bucket 0."""
    scales, zeros = [], []
    for part in ends.transpose(0, 1).split(layer.segments, 2):
        low, high = min(0.0, float(part[0].min())), max(0.0, float(part[1].max()))
        zeros.append(round(-low * 255 / (high - low)))
        scales.append((high - low) / 255)
    weight = float_layer.weight.detach()
    weight_scale = weight.flatten(1).abs().amax(1) / 127
    integers = torch.round(weight / weight_scale.reshape(-1, *[1] * (weight.ndim - 1)))
    growth = 1 + torch.arange(layer.act_scale.shape[1]) / 4
    fill(
        layer,
        integers.to(torch.int8),
        weight_scale,
        None if float_layer.bias is None else float_layer.bias.detach(),
        torch.tensor(scales)[:, None] * growth,
        torch.tensor(zeros, dtype=torch.int32),
    )


def sample_shape(net: Any) -> tuple[int, int, int]:
    return net.config.in_channels, net.config.sample_size, net.config.sample_size


def simulated(net: nn.Module) -> nn.Module:
    """Return a copy of a packed network that runs on the simulated backend."""
    twin = copy.deepcopy(net)
    clock = find_clock(twin)
    twin.register_forward_pre_hook(
        lambda _, args, kwargs: clock.set(kwargs.get("timestep", args[1] if args[1:] else None)),
        with_kwargs=True,
    )
    for _, layer in quantized_layers(twin):
        object.__setattr__(layer, "clock", clock)
        layer.kernel = SimulatedBackend().lower(layer)
    return twin


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    return tiny_unet()


@pytest.fixture(scope="module")
def engine_unet(unet: nn.Module) -> nn.Module:
    net = packed(unet, buckets=3)
    OpenVinoEngine().attach(net)
    return net


@torch.no_grad()
def test_a_network_is_as_good_as_on_the_simulated_backend(
    unet: nn.Module, engine_unet: nn.Module
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    reference = simulated(packed(unet, buckets=3))
    for t in (50, 950):
        truth, expected = unet(x, t).sample, reference(x, t).sample
        found = engine_unet(x, t).sample
        loss = sqnr_db(truth, expected)
        assert 25 < loss < 60
        # See the top of the file; 1 dB covers the luck of one draw of 2304 output values.
        assert sqnr_db(expected, found) > loss - 1
        assert abs(sqnr_db(truth, found) - loss) < 1


@torch.no_grad()
def test_all_layers_run_in_int8_and_the_others_are_listed(
    unet: nn.Module, engine_unet: nn.Module
) -> None:
    engine_unet(torch.randn(3, 3, 16, 16), 7)
    rows = kernel_table(engine_unet)
    expected: dict[str, int] = {}
    in_float: list[int] = []
    for site in sites(unet):
        outputs = spatial_size(unet, site.name) * site.layer.weight.shape[0]
        macs = outputs * site.layer.weight[0].numel()
        if site.role in ("input", "output", "time"):
            in_float.append(macs)
            continue
        widths = site.segments or (1,)
        for i, width in enumerate(widths):
            expected[f"{site.name}/{i}"] = macs * width // sum(widths)
    assert {row.name: row.macs for row in rows if row.quantized} == expected
    assert all(row.precision in ("u8", "i8") for row in rows if row.quantized)
    rest = [row for row in rows if not row.quantized]
    assert sorted(row.macs for row in rest) == sorted(in_float)
    assert not any(row.int8 for row in rest)
    share = sum(expected.values()) / (sum(expected.values()) + sum(in_float))
    assert int8_share(engine_unet) == pytest.approx(share, rel=1e-12)


def spatial_size(net: nn.Module, name: str) -> int:
    """Return the number of output positions of a layer, from a float forward pass."""
    sizes = []
    layer = net.get_submodule(name)

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        sizes.append(output[0].numel() // layer.weight.shape[0])

    hook = layer.register_forward_hook(note)
    with torch.no_grad():
        net(torch.zeros(1, 3, 16, 16), 0)
    hook.remove()
    return sizes[0]


@torch.no_grad()
def test_a_layer_that_is_not_int8_is_shown(
    unet: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = OpenVinoEngine()
    config = engine.config()
    monkeypatch.setattr(engine, "config", lambda: config | {"ENABLE_TENSOR_PARALLEL": False})
    config["LP_TRANSFORMS_MODE"] = False
    net = packed(unet)
    engine.attach(net)
    net(torch.randn(1, 3, 16, 16), 7)
    rows = [row for row in kernel_table(net) if row.quantized]
    assert rows and not any(row.int8 for row in rows)
    assert int8_share(net) == 0
    assert "does not run these layers in int8" in caplog.text and rows[0].name in caplog.text
