"""The OpenVINO engine on single layers: our integers, our scales.

Scales are powers of two and sums stay below 2^24, so float32 is exact and results must be equal to
integer arithmetic.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.quantized import quantized_layers
from tests.engines import openvino_nets as nets
from tests.tiny import tiny_unet

pytestmark = nets.needs_openvino


@pytest.mark.parametrize("zero", [0, 93, 128, 255])
@pytest.mark.parametrize("name", nets.LAYERS)
def test_a_layer_equals_integer_arithmetic(name: str, zero: int) -> None:
    layer, shape = nets.LAYERS[name]
    net = nets.one_layer(layer, (zero,))
    x = nets.draw_inputs(shape)
    OpenVinoEngine().attach(net)
    found = net(x, 5)
    expected = nets.integer_output(net.layer, x, [0] * len(x))
    assert torch.equal(found.double(), expected)
    (row,) = nets.kernel_table(net)
    assert row.name == "layer/0" and row.int8, row


@pytest.mark.parametrize("zeros", [(93, 12), (0, 255)])
def test_both_halves_of_a_concatenation_have_their_own_grid(zeros: tuple[int, int]) -> None:
    net = nets.one_layer(nn.Conv2d(24, 16, 1), zeros, segments=(16, 8))
    x = nets.draw_inputs((2, 24, 6, 6))
    OpenVinoEngine().attach(net)
    assert torch.equal(net(x, 5).double(), nets.integer_output(net.layer, x, [0, 0]))
    rows = nets.kernel_table(net)
    assert [(row.name, row.int8) for row in rows] == [("layer/0", True), ("layer/1", True)]


@pytest.mark.parametrize(
    ("layer", "shape", "segments"),
    [
        (nn.Conv2d(16, 8, 3, padding=1), (4, 16, 6, 6), ()),
        (nn.Conv2d(16, 8, 3, padding=1, bias=False), (4, 16, 6, 6), ()),
        (nn.Conv2d(16, 8, 1), (4, 16, 6, 6), (8, 8)),
        (nn.Linear(32, 24), (4, 7, 32), ()),
    ],
)
def test_each_time_step_takes_its_own_scales(layer, shape, segments):
    zeros = (93, 140)[: len(segments) or 1]
    net = nets.one_layer(layer, zeros, (-5, -4, -2), segments=segments)
    x = nets.draw_inputs(shape)
    OpenVinoEngine().attach(net)
    for t, bucket in ((0, 0), (333, 0), (334, 1), (666, 1), (667, 2), (999, 2)):
        found = net(x, t).double()
        assert torch.equal(found, nets.integer_output(net.layer, x, [bucket] * 4)), t
    # The same as a layer that has only this row of the table.
    single = nets.one_layer(layer, zeros, (-4,), segments=segments)
    OpenVinoEngine().attach(single)
    assert torch.equal(net(x, 500), single(x, 500))
    mixed = torch.tensor([10, 990, 500, 20])
    assert torch.equal(net(x, mixed).double(), nets.integer_output(net.layer, x, [0, 2, 1, 0]))
    assert all(row.int8 for row in nets.kernel_table(net))


def test_a_layer_may_see_several_rows_of_each_sample() -> None:
    """Windows, heads and frames are folded into the batch: row i * n + k belongs to sample i."""
    net = nets.one_layer(
        nn.Linear(16, 8), exponents=(-5, -2), before=lambda x: x.reshape(-1, 5, x.shape[-1])
    )
    x = nets.draw_inputs((3, 10, 16))
    OpenVinoEngine().attach(net)
    found = net(x, torch.tensor([0, 999, 1])).double()
    folded = x.reshape(6, 5, 16)
    assert torch.equal(found, nets.integer_output(net.layer, folded, [0, 0, 1, 1, 0, 0]))


def test_a_linear_layer_of_rows_keeps_their_shape_in_every_bucket() -> None:
    """Two dimensions: the channels are at 1 as in a convolution, where the bias is added early."""
    net = nets.one_layer(nn.Linear(16, 8), exponents=(-5, -2), before=lambda x: x[:, :, 0, 0])
    x = nets.draw_inputs((3, 16, 2, 2))
    OpenVinoEngine().attach(net)
    found = net(x, torch.tensor([0, 999, 1]))
    assert torch.equal(found.double(), nets.integer_output(net.layer, x[:, :, 0, 0], [0, 1, 0]))


def test_the_graph_holds_our_integers_and_scales() -> None:
    from quantempo.engines.openvino.graph import build_graph

    net = nets.packed(tiny_unet(), buckets=3)
    inputs = [torch.zeros(1, dtype=torch.int64), torch.zeros(2, 3, 16, 16), torch.zeros(2)]
    graph, calls = build_graph(net, lambda n, x, t: [type(net).forward(n, x, t).sample], inputs)
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
