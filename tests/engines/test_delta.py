"""Layers that quantize changes: identities with whole inputs, telescoping sums, state, engines."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines import ENGINES
from quantempo.engines.base import BACKENDS
from quantempo.engines.delta import DeltaKernel, lower_delta
from quantempo.engines.layerwise import execution
from quantempo.engines.select import attach, choose, detach
from quantempo.errors import QuantempoError
from quantempo.kernels.cpu import onednn
from quantempo.quantized import (
    QConv2d,
    QLayer,
    StepClock,
    fill_deltas,
    install_deltas,
    quantized_layers,
    reset_deltas,
)
from tests.engines.quantized import make_clock, make_conv, make_linear, quantize_network
from tests.tiny import tiny_unet

NAMES = [
    "simulated",
    pytest.param(
        "onednn", marks=pytest.mark.skipif(onednn.missing() is not None, reason="no int8 kernels")
    ),
]
STEPS = (900, 700, 650, 400, 120, 3)


def walk(shape: tuple[int, ...], steps: int, size: float = 0.05, seed: int = 3) -> list[Tensor]:
    """Draw inputs that move a little from step to step."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return [x := x + size * torch.randn(shape, generator=generator) * (i > 0) for i in range(steps)]


def with_rates(layer: QLayer, bits: int, rate: float | Tensor, refresh: int = 0) -> QLayer:
    layer.clock.watch(refresh)
    layer.delta_bits = bits
    layer.delta_rate = torch.as_tensor(rate).expand(len(layer.segments), 1).clone()
    return layer


def layers(clock: StepClock) -> list[tuple[QLayer, tuple[int, ...]]]:
    return [
        (make_conv(8, 6, segments=(5, 3), clock=clock), (2, 8, 5, 5)),
        (make_conv(8, 6, stride=(2, 2), clock=clock, groups=2), (2, 8, 6, 6)),
        (make_linear(12, 7, clock=clock), (2, 9, 12)),
    ]


def weighted(layer: QLayer, x: Tensor) -> Tensor:
    """Return W x in float64, without the bias."""
    weight = layer.weight_codes.double()
    scale = layer.weight_scale.double()
    if isinstance(layer, QConv2d):
        how = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(x.double(), weight, None, *how) * scale[:, None, None]
    return F.linear(x.double(), weight) * scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(3))
def test_the_first_step_is_the_plain_layer(name: str, case: int) -> None:
    clock = make_clock(2)
    layer, shape = layers(clock)[case]
    clock.set(900)
    (x,) = walk(shape, 1)
    plain = BACKENDS.get(name).lower(layer)(x)
    kernel = lower_delta(with_rates(layer, 4, 1e-4), name)
    clock.set(900)
    y = kernel(x)
    if name == "simulated":
        assert torch.equal(y, plain)
    else:
        torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(3))
def test_with_refresh_at_every_step_all_steps_are_plain(name: str, case: int) -> None:
    clock = make_clock(2)
    layer, shape = layers(clock)[case]
    plain = BACKENDS.get(name).lower(layer)
    kernel = lower_delta(with_rates(layer, 4, 1e-4, refresh=1), name)
    for t, x in zip(STEPS, walk(shape, len(STEPS), 0.4), strict=True):
        clock.set(t)
        expected = plain(x)
        torch.testing.assert_close(kernel(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", range(3))
def test_the_sums_telescope_and_the_error_does_not_grow(name: str, case: int) -> None:
    clock = make_clock(2)
    layer, shape = layers(clock)[case]
    # |change| <= 0.05 * 5 and 127 codes of 4e-5 * gap >= 0.002: nothing is clipped.
    kernel = lower_delta(with_rates(layer, 8, 4e-5), name)
    assert isinstance(kernel, DeltaKernel)
    last = None
    for repeat in range(2):
        for t, x in zip(range(990, 0, -50), walk(shape, 20, seed=repeat), strict=False):
            clock.set(t)
            y = kernel(x)
            assert kernel.input is not None and kernel.output is not None
            expected = weighted(layer, kernel.input)
            off = (kernel.output.double() - expected).abs().max() / expected.abs().max()
            # 20 float32 additions of terms no larger than the sum of magnitudes.
            assert float(off) < 20 * 2.0**-22
            rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
            assert layer.bias is not None
            torch.testing.assert_close(y, kernel.output + layer.bias.reshape(rows))
            if t != 990:
                # The first step clips at the ends of the 8-bit grid, the others make up for it.
                bound = max(4e-5 * 50 / 2, last - 127 * 4e-5 * 50 + 0.4)
                assert float((x - kernel.input).abs().max()) <= bound * (1 + 1e-4)
            last = float((x - kernel.input).abs().max())
        assert last is not None and last <= 4e-5 * 50 / 2 * (1 + 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_integers_against_a_float64_reference(name: str) -> None:
    """Follow the formulas of the module in float64, with codes of 4 bits that do clip."""
    clock = make_clock(1)
    layer, rate = make_linear(16, 5, clock=clock, seed=4), 2e-3 / 7
    kernel = lower_delta(with_rates(layer, 4, rate), name)
    scale, zero = float(layer.act_scale[0, 0]), int(layer.act_zero_point[0])
    a_hat = torch.zeros(3, 16, dtype=torch.float64)
    clipped, time = 0, 0
    for t, x in zip(STEPS, walk((3, 16), len(STEPS), 0.1), strict=True):
        clock.set(t)
        y = kernel(x)
        if t == STEPS[0]:
            q = torch.round(x / scale).clamp(-zero, 255 - zero).double()
            step = scale
        else:
            step = rate * (time - t)
            raw = torch.round((x.double() - a_hat) / step)
            q = raw.clamp(-7, 7)
            clipped += int((raw.abs() > 7).sum())
        a_hat, time = a_hat + step * q, t
        expected = weighted(layer, a_hat) + layer.bias.double()
        # A change half way between two codes may fall to either side in float32: none does here.
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    assert clipped > 10


def test_fine_changes_give_what_float_inputs_give() -> None:
    clock = make_clock(1)
    layer = make_linear(32, 8, clock=clock)
    kernel = lower_delta(with_rates(layer, 8, 1e-5), "simulated")
    # The 8-bit first step leaves up to half of act_scale, and some are clipped; a still input is
    # then met in steps of 127 codes, to within half a code.
    (x,) = walk((4, 32), 1)
    for t in range(999, 0, -1):
        clock.set(t)
        y = kernel(x.clamp(-0.5, 0.5))
    expected = weighted(layer, x.clamp(-0.5, 0.5)) + layer.bias.double()
    bound = (layer.weight.double().abs().sum(1) * 0.5e-5 + 1e-4)[None]
    assert bool(((y.double() - expected).abs() <= bound).all())


def test_another_gap_scales_the_code() -> None:
    clock = make_clock(1)
    kernel = lower_delta(with_rates(make_linear(6, 3, clock=clock), 2, 1e-3), "simulated")
    x = torch.zeros(1, 6)
    for gap in (10, 40, 160):
        clock.set(900)
        kernel(x)
        clock.set(900 - gap)
        kernel(x + 5)
        # 2 bits: one code up at most, that is rate * gap.
        assert kernel.input is not None
        torch.testing.assert_close(kernel.input, torch.full((1, 6), 1e-3 * gap))


def test_another_shape_starts_that_layer_anew() -> None:
    clock = make_clock(1)
    layer = make_linear(6, 3, clock=clock)
    plain, kernel = BACKENDS.get("simulated").lower(layer), lower_delta(
        with_rates(layer, 4, 1e-5), "simulated"
    )  # fmt: skip
    for t, rows in ((900, 2), (800, 5), (700, 2)):
        clock.set(t)
        x = walk((rows, 6), 1, seed=rows)[0]
        assert torch.equal(kernel(x), plain(x))


def test_state_made_in_inference_mode_is_not_written_outside() -> None:
    clock = make_clock(1)
    layer = make_linear(6, 3, clock=clock)
    kernel = lower_delta(with_rates(layer, 4, 1e-5), "simulated")
    x = walk((2, 6), 1)[0]
    with torch.inference_mode():
        clock.set(900)
        first = kernel(x).clone()
    clock.set(800)
    # Starts anew instead of failing.
    assert torch.equal(kernel(x), first)


def delta_network(bits: int = 4, rate: float = 2e-4, refresh: int = 0) -> nn.Module:
    x = walk((2, 3, 16, 16), 1)[0]
    packed = quantize_network(tiny_unet(), [(x, 900), (x, 20)], buckets=2)
    names = dict.fromkeys((name for name, _ in quantized_layers(packed)), bits)
    install_deltas(packed, names, 2, refresh)
    shape = {name: len(layer.segments) for name, layer in quantized_layers(packed)}
    fill_deltas(packed, {name: torch.full((shape[name], 2), rate) for name in names})
    return packed


def run(network: nn.Module, times: Any, size: int = 2, seed: int = 3) -> list[Tensor]:
    inputs = walk((size, 3, 16, 16), len(times), seed=seed)
    with torch.no_grad():
        return [network(x, t).sample for x, t in zip(inputs, times, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_a_network_runs_two_trajectories_alike(name: str) -> None:
    network = delta_network()
    assert attach(network, name) == name
    assert set(execution(network).values()) == {f"{name} delta"}
    first, second = run(network, STEPS), run(network, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # A larger batch between, and mixed time-steps, leave nothing behind.
    run(network, STEPS[:3], size=3)
    run(network, [torch.tensor([500, 100])])
    assert torch.equal(run(network, STEPS)[-1], first[-1])
    detach(network)
    assert all(layer.kernel is None for _, layer in quantized_layers(network))


def test_engines_agree() -> None:
    if onednn.missing() is not None:
        pytest.skip("no int8 kernels")
    results = []
    for name in ("simulated", "onednn"):
        network = delta_network(8, 4e-5)
        attach(network, name)
        results.append(run(network, STEPS)[-1])
    # A code may differ where a float sum before it was ordered otherwise.
    error = (results[0] - results[1]).pow(2).mean().sqrt() / results[0].pow(2).mean().sqrt()
    assert float(error) < 5e-3


def test_a_broken_off_trajectory_needs_a_reset() -> None:
    network = delta_network(rate=1e-6)
    attach(network, "simulated")
    expected = run(network, (300, 200), seed=5)
    run(network, (900, 800))
    # Lower times than before: taken for the same trajectory, whose changes are far too small.
    assert not torch.equal(run(network, (300, 200), seed=5)[0], expected[0])
    run(network, (900, 800))
    reset_deltas(network)
    again = run(network, (300, 200), seed=5)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_a_copy_keeps_state_of_its_own() -> None:
    network = delta_network()
    attach(network, "simulated")
    expected = run(network, STEPS)
    inputs = walk((2, 3, 16, 16), len(STEPS))
    with torch.no_grad():
        network(inputs[0], STEPS[0])
        twin = copy.deepcopy(network)
        for other in (network, twin):
            for x, t in zip(inputs[1:], STEPS[1:], strict=True):
                y = other(x, t).sample
            assert torch.equal(y, expected[-1])


def test_openvino_refuses_and_auto_passes_over_it() -> None:
    network = delta_network()
    with pytest.raises(QuantempoError, match=r"cannot run delta quantization \(these can"):
        attach(network, "openvino")
    assert choose("cpu", network).name in ("onednn", "simulated")
    assert "openvino" in ENGINES.names()


def test_a_kernel_needs_rates_and_a_backend_that_can() -> None:
    layer = make_linear(6, 3)
    with pytest.raises(QuantempoError, match="no rates"):
        lower_delta(layer, "simulated")
    with pytest.raises(QuantempoError, match="expected one of: onednn, simulated"):
        lower_delta(with_rates(layer, 4, 1.0), "openvino")


def test_a_compiled_network_follows_the_same_trajectory() -> None:
    """One graph for all steps after the first two; no value is read back on the way."""
    clock = make_clock(2)
    layer = with_rates(make_linear(12, 7, clock=clock), 4, 1e-4)
    kernel, twin = lower_delta(layer, "simulated"), lower_delta(layer, "simulated")
    kernel.prepare(torch.device("cpu"))
    compiled = torch.compile(lambda x, t: (clock.set(t), kernel(x))[1], backend="eager",
                             fullgraph=True)  # fmt: skip
    results = []
    for function in (compiled, lambda x, t: (clock.set(t), twin(x))[1]):
        clock.reset()
        steps = zip(STEPS, walk((2, 9, 12), len(STEPS)), strict=True)
        results.append([function(x, torch.tensor(t)) for t, x in steps])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
