"""Grids below 8 bits on every backend: equal integers, and no code above the largest."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantempo.core import activation_format
from quantempo.engines import attach
from quantempo.engines.base import BACKENDS, ActivationGrids
from quantempo.engines.fusion import unfuse
from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.quantized import quantized_layers
from quantempo.recipe import WeightSettings
from tests.engines.openvino_nets import (
    draw_inputs,
    integer_output,
    kernel_table,
    needs_openvino,
    one_layer,
    packed,
    simulated,
    sqnr_db,
)
from tests.engines.quantized import make_clock, make_conv, make_linear, quantized_unet
from tests.engines.truth import codes_of, expected, noise
from tests.tiny import tiny_unet

# (weights, activations), and the group of weights that have one.
BITS = [(8, 4), (8, 6), (8, 8), (4, 8), (4, 4), (2, 2), (3, 5), (5, 3), (6, 6), (7, 7)]
BITS += [(4, 8, 16), (4, 6, 32), (3, 8, 64), (2, 8, 16)]
needs_fused = pytest.mark.skipif(
    onednn.missing() is not None or fused_cpu.load() is None,
    reason=str(onednn.missing() or fused_cpu.missing()),
)


def layers(bits: tuple[int, ...]) -> list[tuple[nn.Module, Tensor]]:
    """Return layers of plain integers (scales 1, no bias) and an input of each."""
    how: dict[str, Any] = {"plain": True, "bits": bits}
    made = [
        (make_conv(17, 5, **how), (2, 17, 5, 7)),
        (make_conv(8, 8, (3, 2), (1, 2), (2, 1), groups=2, **how), (2, 8, 6, 5)),
        (make_conv(24, 16, (1, 1), padding=(0, 0), segments=(8, 16), **how), (2, 24, 4, 4)),
        (make_linear(33, 7, **how), (2, 3, 33)),
        (make_linear(24, 7, (16, 8), **how), (5, 24)),
        # What every backend takes.
        (make_conv(32, 16, **how), (2, 32, 4, 5)),
        (make_linear(48, 16, (16, 32), **how), (3, 48)),
    ]
    return [(layer, noise(*shape, spread=0.6 * 2 ** bits[1])) for layer, shape in made]


@pytest.mark.parametrize("bits", BITS, ids=str)
def test_integers_are_exact_at_every_width(backend, bits):
    for i, (layer, x) in enumerate(layers(bits)):
        # The input leaves the grid on both sides: the largest code is met, and not passed.
        for codes, weight, zero, _ in codes_of(layer, x):
            assert (int(codes.min()), int(codes.max())) == (0, 2 ** bits[1] - 1)
            assert zero <= layer.act_qmax
            assert int(weight.abs().max()) <= layer.weight_format.qmax
        if i < 5 and backend.unsupported(layer) is not None:
            continue
        kernel = backend.lower(layer)
        assert torch.equal(kernel(x).double(), expected(layer, x))
        if x.ndim == 4:
            last = x.to(memory_format=torch.channels_last)
            assert torch.equal(kernel(last).double(), expected(layer, x))


def test_time_steps_may_be_mixed_below_8_bits(backend):
    clock = make_clock(4)
    layer, x = make_conv(32, 16, clock=clock, bits=(4, 5, 16)), noise(3, 32, 4, 5, spread=1.0)
    kernel, steps = backend.lower(layer), [999, 0, 300]
    clock.set(torch.tensor(steps))
    y = kernel(x)
    for row, step in enumerate(steps):
        truth = expected(layer, x[row : row + 1], int(clock.bucket_of[step]))
        # A few float32 roundings of the epilogue.
        assert (y[row : row + 1] - truth).abs().max() <= 1e-6 * truth.abs().max()


@pytest.mark.parametrize("act_bits", [4, 6, 8])
def test_onednn_without_the_compiled_quantizer_is_the_same(monkeypatch, act_bits):
    backend = BACKENDS.get("onednn")
    if backend.missing() is not None:
        pytest.skip(backend.missing())
    layer, linear = make_conv(40, 24, bits=(8, act_bits)), make_linear(40, 24, bits=(8, act_bits))
    x, rows = noise(2, 40, 5, 5, spread=1.0), noise(6, 40, spread=1.0)
    kernels = backend.lower(layer), backend.lower(linear)
    found = [kernel(value) for kernel, value in zip(kernels, (x, rows), strict=True)]
    monkeypatch.setattr(fused_cpu, "load", lambda: None)
    for kernel, value, y in zip(kernels, (x, rows), found, strict=True):
        assert torch.equal(kernel(value), y)


def test_grids_of_other_bits_are_other_grids():
    narrow, wide = make_linear(8, 4, bits=(8, 6)), make_linear(8, 4)
    wide.act_zero_point.copy_(narrow.act_zero_point)
    wide.act_scale.copy_(narrow.act_scale)
    assert ActivationGrids(narrow).of(0, 0)[2] == 63 and ActivationGrids(wide).of(0, 0)[2] == 255
    wide.act_format = activation_format(6)
    assert ActivationGrids(narrow).of(0, 0) == ActivationGrids(wide).of(0, 0)


MIXED = {"attention": "w8a6", "down_blocks.*": "w4a4", "up_blocks.0.resnets.*": "w5a7"}


@needs_fused
@torch.no_grad()
def test_one_model_with_mixed_bits_runs_the_same_on_both_engines():
    network = quantized_unet(bits=MIXED, weights=WeightSettings(group=16))
    widths = {(layer.weight_bits, layer.act_bits) for _, layer in quantized_layers(network)}
    assert widths == {(8, 6), (4, 4), (5, 7), (8, 8)}
    x, t = noise(2, 3, 16, 16, spread=1.0), torch.tensor([450, 10])
    truth = tiny_unet()(x, t).sample
    attach(network, "onednn")
    fused = network(x, t).sample
    unfuse(network)
    simulated, errors = BACKENDS.get("simulated"), []

    def compare(layer, args, y):
        errors.append((simulated.lower(layer)(args[0]) - y).abs().max() / y.abs().max())

    hooks = [layer.register_forward_hook(compare) for _, layer in quantized_layers(network)]
    network(x, t)
    for hook in hooks:
        hook.remove()
    # The same codes in every layer: only float32 roundings of the epilogues.
    assert len(errors) == 39 and max(errors) <= 2e-6
    attach(network, "simulated")
    reference = network(x, t).sample
    # Fused blocks move codes of 4 bits, so they are another draw of the same error (0.6 dB off).
    assert sqnr_db(truth, fused) > sqnr_db(truth, reference) - 2


@needs_openvino
@pytest.mark.parametrize("bits", [(8, 4), (8, 6), (4, 4), (2, 2), (5, 7), (4, 8, 16)], ids=str)
@pytest.mark.parametrize("place", [0.0, 0.4, 1.0])
def test_openvino_keeps_the_integers_below_8_bits(bits, place):
    zero, given = int(place * (2 ** bits[1] - 1)), {"exponents": (-4,), "bits": bits}
    cases = [
        (nn.Conv2d(17, 24, 3, padding=1), (2, 17, 9, 7), {}),
        (nn.Conv2d(24, 16, 1), (2, 24, 6, 6), {"segments": (16, 8)}),
        (nn.Linear(32, 24), (2, 7, 32), {}),
    ]
    for layer, shape, extra in cases:
        net = one_layer(layer, (zero,) * len(extra.get("segments", (1,))), **given, **extra)
        # Codes of -220 to 220 about z: far outside the grid on both sides.
        x = draw_inputs(shape)
        OpenVinoEngine().attach(net)
        assert torch.equal(net(x, 5).double(), integer_output(net.layer, x, [0, 0]))
        assert all(row.int8 for row in kernel_table(net)), kernel_table(net)


@needs_openvino
def test_openvino_takes_the_scales_of_each_time_step_below_8_bits():
    net = one_layer(nn.Conv2d(16, 8, 3, padding=1), (7,), (-5, -4, -2), bits=(4, 4))
    x = draw_inputs((4, 16, 6, 6)) / 8
    OpenVinoEngine().attach(net)
    mixed = torch.tensor([10, 990, 500, 20])
    assert torch.equal(net(x, mixed).double(), integer_output(net.layer, x, [0, 2, 1, 0]))
    assert torch.equal(net(x, 999).double(), integer_output(net.layer, x, [2] * 4))
    assert all(row.int8 for row in kernel_table(net))


@needs_openvino
def test_openvino_clamps_what_was_moved():
    net = one_layer(
        nn.Linear(16, 8), (9,), (-4, -2), before=lambda x: x.flatten(2).transpose(1, 2), bits=(8, 5)
    )
    x = draw_inputs((2, 16, 3, 5))
    OpenVinoEngine().attach(net)
    tokens = x.flatten(2).transpose(1, 2)
    for t, buckets in ((999, [1, 1]), (torch.tensor([0, 999]), [0, 1])):
        assert torch.equal(net(x, t).double(), integer_output(net.layer, tokens, buckets))
    assert all(row.int8 for row in kernel_table(net))


@needs_openvino
@pytest.mark.parametrize("scaled", [False, True])
def test_openvino_moves_the_clamp_before_what_moves_data(scaled):
    import openvino as ov
    from openvino import opset13 as ops

    from quantempo.engines.openvino.rewrite import rewrite

    def constant(value, kind):
        return ops.constant(np.asarray(value, kind))

    x = ops.parameter([2, 3, 4], np.float32)
    y = ops.transpose(x, constant([0, 2, 1], np.int64))
    if scaled:
        y = ops.multiply(y, constant(np.full((1, 1, 1), 0.5), np.float32))
    y = ops.clamp(y, -4.0, 11.0)
    ends = [constant(v, np.float32) for v in (-4.0, 251.0, -4.0, 251.0)]
    graph = ov.Model([ops.result(ops.fake_quantize(y, *ends, 256))], [x])
    value = draw_inputs((2, 3, 4)).numpy() * 4
    core = ov.Core()
    wanted = np.round(np.clip(value.transpose(0, 2, 1) * (0.5 if scaled else 1), -4, 11))
    assert wanted.min() == -4 and wanted.max() == 11
    rewrite(graph, bfloat16_attention=False)
    kinds = [node.get_type_name() for node in graph.get_ordered_ops()]
    assert kinds.index("Clamp") < kinds.index("FakeQuantize") < kinds.index("Transpose")
    assert np.array_equal(core.compile_model(graph, "CPU")([value])[0], wanted)


@needs_openvino
@torch.no_grad()
def test_openvino_runs_a_low_bit_network_in_int8():
    truth = tiny_unet()
    net = packed(truth, buckets=2, bits=(4, 6))
    reference = simulated(net)
    OpenVinoEngine().attach(net)
    x, t = noise(2, 3, 16, 16, spread=1.0), torch.tensor([450, 10])
    expected_output, found = reference(x, t).sample, net(x, t).sample
    assert sqnr_db(expected_output, found) > sqnr_db(truth(x, t).sample, expected_output) + 3
    assert all(row.int8 for row in kernel_table(net) if row.quantized)
