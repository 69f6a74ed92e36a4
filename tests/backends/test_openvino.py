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
from quantempo.backends.openvino import (
    MAX_GRAPHS,
    MAX_ROWS,
    OpenVinoEngine,
    int8_share,
    kernel_table,
)
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


def draw_inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw inputs that are never half-way between two codes for scales 2^-5 ... 2^-2.

    Some are outside the range. Half-way values are rounded with and without the zero point added,
    which differs where that is odd; they do not occur in practice.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-220, 220, shape, generator=generator)
    return (codes + 0.3125) * 2.0**-4


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
    x = draw_inputs(shape)
    OpenVinoEngine().attach(net)
    found = net(x, 5)
    expected = integer_output(net.layer, x, [0] * len(x))
    assert torch.equal(found.double(), expected)
    (row,) = kernel_table(net)
    assert row.name == "layer/0" and row.int8, row


@pytest.mark.parametrize("zeros", [(93, 12), (0, 255)])
def test_both_halves_of_a_concatenation_have_their_own_grid(zeros: tuple[int, int]) -> None:
    net = one_layer(nn.Conv2d(24, 16, 1), zeros, segments=(16, 8))
    x = draw_inputs((2, 24, 6, 6))
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
    x = draw_inputs(shape)
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
    x = draw_inputs((3, 10, 16))
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
            low, high = (quantizer.input_value(k).get_node().data.item() for k in (1, 2))
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
    net = packed(unet)
    # A grid OpenVINO has no integers for.
    monkeypatch.setattr("quantempo.backends.openvino_graph._LEVELS", 300)
    OpenVinoEngine().attach(net)
    net(torch.randn(1, 3, 16, 16), 7)
    rows = [row for row in kernel_table(net) if row.quantized]
    assert rows and not any(row.int8 for row in rows)
    assert int8_share(net) == 0
    assert "does not run these layers in int8" in caplog.text and rows[0].name in caplog.text


@torch.no_grad()
def test_the_float_parts_equal_torch(unet: nn.Module) -> None:
    """With no integer layer at all the graph is the float network: every rewrite is an identity."""
    net = packed(unet, int8=False)
    assert not list(quantized_layers(net))
    OpenVinoEngine(attention="float32").attach(net)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    truth = copy.deepcopy(unet).double()(x.double(), 321).sample
    # Two float32 programs of some 100 operations: torch itself is at 120 dB or better here.
    assert sqnr_db(truth, unet(x, 321).sample) > 120
    assert sqnr_db(truth, net(x, 321).sample) > 117
    assert int8_share(net) == 0


@torch.no_grad()
def test_bfloat16_attention_loses_little(unet: nn.Module) -> None:
    net = packed(unet, int8=False)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    OpenVinoEngine(attention="bfloat16").attach(net)
    # One rounding to 8 bits is 2^-9 / sqrt(3), 59 dB; attention adds to a residual stream.
    assert 59 < sqnr_db(unet(x, 321).sample, net(x, 321).sample) < 110


class NormNet(nn.Module):
    """Group norms behind everything that is folded into them, and behind what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(g, 16, eps=1e-5) for g in (1, 4, 16, 8))
        self.row = nn.Linear(1, 16)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        row = self.row(timestep[:, None].to(sample.dtype) / 1000)[:, :, None, None]
        x = self.norms[0](self.first(sample) + row)
        y = self.norms[1]((self.second(x) * row + 0.5 * row) * 1.5)
        shared = y + row
        z = self.norms[2](shared) + shared
        flat = z.reshape(*z.shape[:2], -1)
        return self.norms[3](flat).transpose(1, 2) + flat.transpose(1, 2)


@torch.no_grad()
def test_group_norms_equal_torch() -> None:
    torch.manual_seed(0)
    net = NormNet().eval()
    x, t = torch.randn(3, 3, 9, 7), torch.tensor([0, 500, 999])
    twin, ratios = copy.deepcopy(net).double(), []

    def note(norm: Any, args: tuple[Tensor]) -> None:
        groups = args[0].reshape(len(args[0]), norm.num_groups, -1)
        ratios.append((groups.mean(2) ** 2 / (groups.var(2, correction=0) + norm.eps)).max())

    for norm in twin.norms:
        norm.register_forward_pre_hook(note)
    truth = twin(x.double(), t.double())
    install_clock(net, torch.zeros(STEPS, dtype=torch.int64))
    OpenVinoEngine().attach(net)
    found = net(x, t)
    assert found.shape == truth.shape
    # Some 60 float32 operations, each good to 2^-24, and the cancellation in each variance, whose
    # relative error is mean^2 / var larger (halved by the square root).
    bound = (60 + float(sum(ratios))) * 2**-24
    assert bound < 1e-3
    assert float((found - truth).abs().max()) < bound * float(truth.abs().max())


@torch.no_grad()
def test_group_norm_with_a_large_mean() -> None:
    """The variance is E[x^2] - E[x]^2: its relative error grows with mean^2 / var."""
    net = nn.Module()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.norm(sample * self.scale)

    for mean in (0.0, 10.0, 100.0):
        net = Shifted()
        x = mean + torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(3))
        truth = copy.deepcopy(net).double()(x.double(), torch.zeros(2))
        install_clock(net, torch.zeros(STEPS, dtype=torch.int64))
        OpenVinoEngine().attach(net)
        bound = 8 * 2**-23 * (1 + mean**2)
        assert sqnr_db(truth, net(x, 0)) > -20 * torch.log10(torch.tensor(bound)), mean


# --- calls -----------------------------------------------------------------------------------


@torch.no_grad()
def test_batches_of_mixed_time_steps_and_odd_sizes(engine_unet: nn.Module) -> None:
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5, 400, 999, 6, 950])
    mixed = engine_unet(x, t).sample
    for i in range(5):
        # The same integers up to the amplified last bits; another bucket is 25 % off in scale.
        alone = engine_unet(x[i : i + 1], t[i]).sample
        assert sqnr_db(alone, mixed[i : i + 1]) > 30
    same = engine_unet(x, torch.full((5,), 400)).sample
    assert torch.equal(same, engine_unet(x, 400).sample)


@torch.no_grad()
def test_time_steps_in_every_form_and_outputs_of_the_models_class(
    unet: nn.Module, engine_unet: nn.Module
) -> None:
    x = torch.randn(2, 3, 16, 16)
    first = engine_unet(x, 400)
    assert type(first) is type(unet(x, 400))
    forms = [torch.tensor(400), torch.tensor([400]), torch.tensor([400, 400], dtype=torch.int32)]
    for t in (*forms, torch.tensor(400.0), 400.0):
        assert torch.equal(engine_unet(x, t).sample, first.sample), t
    assert torch.equal(engine_unet(sample=x, timestep=400).sample, first.sample)
    answer = engine_unet(x, 400, return_dict=False)
    assert type(answer) is tuple and torch.equal(answer[0], first.sample)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not transposed.is_contiguous()
    assert torch.equal(engine_unet(transposed, 400).sample, first.sample)
    kept = first.sample.clone()
    engine_unet(-x, 1)
    assert torch.equal(first.sample, kept), "an output must survive the next call"


@torch.no_grad()
def test_conditioning_reaches_the_graph() -> None:
    text = tiny_text().unet
    given = {"encoder_hidden_states": torch.randn(2, 8, 16)}
    net = packed(text, **given)
    OpenVinoEngine().attach(net)
    reference = simulated(packed(text, **given))
    x = torch.randn(2, 4, 8, 8)
    other = {"encoder_hidden_states": given["encoder_hidden_states"].flip(0) * 3}
    for condition in (given, other):
        truth, expected = text(x, 10, **condition).sample, reference(x, 10, **condition).sample
        found = net(x, 10, **condition).sample
        assert sqnr_db(expected, found) > sqnr_db(truth, expected) - 2
    assert sqnr_db(net(x, 10, **given).sample, net(x, 10, **other).sample) < 20
    dit = tiny_dit().transformer
    labels = torch.tensor([3, 1000])
    net, t = packed(dit, class_labels=labels), torch.tensor([10, 10])
    OpenVinoEngine().attach(net)
    reference = simulated(packed(dit, class_labels=labels))
    truth = dit(x, t, class_labels=labels).sample
    expected = reference(x, t, class_labels=labels).sample
    found = net(x, t, class_labels=labels).sample
    assert sqnr_db(expected, found) > sqnr_db(truth, expected) - 2
    assert all(row.int8 for net in (net,) for row in kernel_table(net) if row.quantized)


def test_nested_arguments_and_what_is_refused() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def forward(
            self, sample: Tensor, timestep: Any, added: Any = None, factor: float = 1.0
        ) -> dict[str, Any]:
            extra = added["pair"][1] if added else 0
            return {"out": [self.layer(sample) * factor + extra, timestep], "none": None}

    net = Nested()
    install_clock(net, torch.zeros(STEPS, dtype=torch.int64))
    plain = copy.deepcopy(net)
    OpenVinoEngine().attach(net)
    x = torch.randn(2, 2, 4, 4)
    extra = {"pair": [torch.zeros(1), torch.ones(2, 1, 1, 1)], "unused": None}
    with torch.no_grad():
        for factor in (1.0, 2.0):
            expected = plain(x, torch.tensor([4, 4]), added=extra, factor=factor)
            found = net(x, 4, added=extra, factor=factor)
            assert list(found) == ["out", "none"] and found["none"] is None
            assert torch.allclose(found["out"][0], expected["out"][0], rtol=0, atol=1e-6)
            assert torch.equal(found["out"][1], torch.tensor([4, 4]))
        with pytest.raises(QuantempoError, match="got a object"):
            net(x, 4, added=object())


@torch.no_grad()
def test_a_half_precision_model_keeps_its_weights_and_answers_in_kind(unet: nn.Module) -> None:
    net = packed(unet)
    for name, parameter in net.named_parameters():
        assert "weight_scale" not in name
        parameter.data = parameter.data.bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    OpenVinoEngine().attach(net)
    x = torch.randn(1, 3, 16, 16)
    found = net(x.bfloat16(), 4).sample
    assert found.dtype == torch.bfloat16
    # Float layers with weights of 8 bits cost 2^-9 each.
    assert sqnr_db(unet(x, 4).sample, found.float()) > 25
    after = net.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


@torch.no_grad()
def test_graphs_are_kept_per_shape(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net, compiled = one_layer(nn.Conv2d(8, 8, 1)), []
    original = module._compile

    def count(*args: Any) -> Any:
        compiled.append(args)
        return original(*args)

    monkeypatch.setattr(module, "_compile", count)
    OpenVinoEngine().attach(net)
    for batch in (1, 2, 1, 2):
        net(torch.randn(batch, 8, 4, 4), 3)
    assert len(compiled) == 2
    for batch in range(3, 3 + MAX_GRAPHS):
        net(torch.randn(batch, 8, 4, 4), 3)
    net(torch.randn(1, 8, 4, 4), 3)
    assert len(compiled) == 2 + MAX_GRAPHS + 1


@torch.no_grad()
def test_a_large_batch_runs_in_parts() -> None:
    net = one_layer(nn.Conv2d(8, 8, 3, padding=1), exponents=(-5, -2))
    rows = 2 * MAX_ROWS + 3
    x, t = draw_inputs((rows, 8, 4, 4)), torch.arange(rows) * 999 // (rows - 1)
    OpenVinoEngine().attach(net)
    buckets = (t * 2 // STEPS).tolist()
    assert torch.equal(net(x, t).double(), integer_output(net.layer, x, buckets))
    assert torch.equal(net(x, 3).double(), integer_output(net.layer, x, [0] * rows))

    class Frames(nn.Module):
        """Two rows of `frames` for each sample: not to be cut by the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, sample: Tensor, timestep: Tensor, frames: Tensor) -> Tensor:
            return self.layer(sample) + frames.reshape(len(sample), 2, 1).sum(1)

    many = Frames()
    plain = copy.deepcopy(many)
    install_clock(many, torch.zeros(STEPS, dtype=torch.int64))
    OpenVinoEngine().attach(many)
    x, frames = torch.randn(rows, 1), torch.randn(2 * rows)
    assert torch.allclose(many(x, 3, frames), plain(x, t, frames), rtol=0, atol=1e-6)


@torch.no_grad()
def test_attaching_leaves_the_module_as_it_was(
    unet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = packed(unet)
    layers = dict(net.named_modules())
    with pytest.raises(QuantempoError, match="no OpenVINO graph yet"):
        kernel_table(net)
    engines.attach(net, "openvino")
    x = torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(torch.jit, "trace", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(x, 4)
    assert dict(net.named_modules()) == layers
    monkeypatch.undo()
    net(x, 4)
    assert dict(net.named_modules()) == layers
    engines.detach(net)
    assert "forward" not in net.__dict__
    with pytest.raises(QuantempoError, match="before an engine was attached"):
        net(x, 4)


@torch.no_grad()
def test_a_pipeline_just_works() -> None:
    pipe = tiny_unconditional()
    assert isinstance(pipe.scheduler, DDIMScheduler)

    def images() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        output = pipe(batch_size=2, generator=generators, num_inference_steps=4, output_type="np")
        return torch.from_numpy(output.images)

    net = packed(pipe.unet, buckets=2)
    truth = images()
    pipe.unet = simulated(net)
    expected = images()
    pipe.unet = net
    engines.attach(net, "openvino")
    found = images()
    loss = sqnr_db(truth, expected)
    assert loss > 20
    assert sqnr_db(expected, found) > loss - 3


# --- where it cannot run ---------------------------------------------------------------------


def test_without_openvino_it_says_so(monkeypatch: pytest.MonkeyPatch, unet: nn.Module) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    reason = OpenVinoEngine().missing()
    assert reason is not None and "pip install 'quantempo[openvino]'" in reason
    with pytest.raises(QuantempoError, match="engine 'openvino' cannot run here: OpenVINO is not"):
        engines.attach(packed(unet), "openvino")


def test_a_cpu_whose_sums_saturate_is_refused() -> None:
    """OneDNN can be told to leave VNNI alone; it then adds pairs of products in 16 bits."""
    code = "from quantempo.backends.openvino import OpenVinoEngine as E; print(E().missing())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "int8 sums saturate" in done.stdout or "computes int8 layers in f32" in done.stdout


def test_unknown_precisions_and_layers_are_refused() -> None:
    with pytest.raises(QuantempoError, match="got 'int8'; expected one of: float32, bfloat16"):
        OpenVinoEngine(precision="int8")
    net = one_layer(nn.Conv2d(16, 16, 1, groups=2), (3, 4), segments=(8, 8))
    with pytest.raises(QuantempoError, match="cannot take layer: groups and a split input"):
        OpenVinoEngine().attach(net)
