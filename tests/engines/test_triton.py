"""Layers of the `triton` backend on a CPU, through the operators' own definition there."""

import copy
import importlib.util
import operator

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from quantempo.engines import ENGINES, attach, attached
from quantempo.engines.base import BACKENDS, MAX_TERMS, Backend, warn_once
from quantempo.engines.cuda.constants import ActivationGrid, alone, quantize, quantize_rows
from quantempo.engines.fusion import fused_modules
from quantempo.errors import QuantempoError
from quantempo.quantized import QConv2d, QLayer, fill, quantized_layers
from quantempo.recipe import WeightSettings
from quantempo.rounding.reconstruct import apply_rounding
from tests.engines.quantized import make_clock, make_conv, make_linear, quantized_unet
from tests.engines.truth import noise, relative

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def backend(on_a_cpu) -> Backend:
    return BACKENDS.get("triton")


ONE = {"kernel": (1, 1), "padding": (0, 0)}
LAYERS = {
    "conv": (make_conv(48, 32), (2, 48, 5, 4)),
    "halves": (make_conv(48, 32, segments=(16, 32), **ONE), (2, 48, 5, 4)),
    "wide halves": (make_conv(48, 32, segments=(32, 16)), (2, 48, 5, 4)),
    "linear": (make_linear(48, 32), (2, 7, 48)),
    "w4a8": (make_conv(48, 32, bits=(4, 8)), (2, 48, 5, 4)),
    "groups": (make_conv(80, 32, bits=(4, 8, 16)), (2, 80, 5, 4)),
    "groups, halves": (
        make_conv(192, 32, segments=(64, 128), bits=(4, 8, 32), **ONE),
        (2, 192, 5, 4),
    ),
    "groups, shared": (make_conv(48, 32, segments=(16, 32), bits=(4, 8, 32)), (2, 48, 5, 4)),
    "groups, linear": (make_linear(96, 32, bits=(4, 8, 64)), (2, 7, 96)),
    "w6a6": (make_linear(48, 32, bits=(6, 6)), (2, 7, 48)),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_output_is_that_of_simulated(backend, case, dtype):
    layer, shape = LAYERS[case]
    x = noise(*shape, spread=1.0).to(dtype)
    y, truth = backend.lower(layer)(x), BACKENDS.get("simulated").lower(layer)(x)
    assert y.dtype == dtype
    if y.ndim == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)
    # The same integers; float32 roundings of three terms, then one to the dtype of x.
    unit = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    error = (y.double() - truth.double()).abs()
    assert (error <= 1e-6 * truth.double().abs().max() + unit * truth.double().abs()).all()


def traced(function, *arguments):
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", fullgraph=True)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qmax", [255, 63])
def test_traced_codes_are_the_same(dtype, qmax):
    clock = make_clock(3)
    grid = ActivationGrid(
        clock, torch.tensor([0.037, 0.011, 0.25]), 100 if qmax == 255 else 20, qmax
    )
    # Ties of the last bucket, where a code may go either way; and what leaves the grid.
    ties = (torch.arange(-320, 320) + 0.5) * 0.25
    x = torch.cat([noise(1280, spread=2.0), ties, noise(128, spread=1e9)]).to(dtype)
    for steps in (999, torch.tensor([999, 0])):
        clock.set(steps)
        image, rows = x.reshape(2, 16, 8, 8), x.reshape(2, 64, 16)
        codes = quantize(image, grid)
        assert codes.dtype == torch.int8
        assert torch.equal(traced(quantize, image, grid), codes)
        assert codes.is_contiguous(memory_format=torch.channels_last)
        found = quantize_rows(rows, grid)
        assert torch.equal(traced(quantize_rows, rows, grid), found)
        scale = torch.tensor([0.25] if isinstance(steps, int) else [[[0.25]], [[0.037]]])
        ratio = (rows.float() * scale.reciprocal()).round() + grid.zero_point
        assert torch.equal(found, (ratio.clamp(0, qmax) - 128).to(torch.int8).reshape(-1, 16))


REFUSED = {
    "24 input channels are no multiple of 16": make_conv(24, 16),
    "24 output channels": make_linear(16, 24),
    "8 input channels": make_linear(32, 16, (8, 24)),
    "kernel is 5x5": make_conv(16, 16, (5, 5), padding=(2, 2)),
    "kernel is 1x3": make_conv(16, 16, (1, 3), padding=(0, 1)),
    "2 groups": make_conv(32, 16, groups=2),
    "dilation": make_conv(16, 16, dilation=(2, 2)),
    "stride is .3, 3.": make_conv(16, 16, stride=(3, 3)),
    "border is .2, 2.": make_conv(16, 16, padding=(2, 2)),
    "at most 0": make_conv(16, 16, (1, 1), padding=(1, 1)),
    "overflow": make_linear(MAX_TERMS // 16 * 16 + 16, 16, plain=True),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_the_operators_cannot_take_is_refused(backend, reason):
    with pytest.raises(QuantempoError, match=reason):
        backend.lower(REFUSED[reason])


def test_what_is_missing_is_named(monkeypatch):
    backend = BACKENDS.get("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, reason in (((7, 5), "compute capability 7.5; 8.0 is needed"), ((9, 0), None)):
        found = capability
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=found: found)
        assert (backend.missing() or "").endswith(reason or "")
        assert (backend.missing() is None) == (reason is None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.missing() == "torch finds no CUDA device"
    with pytest.raises(QuantempoError, match="no CUDA device"):
        backend.lower(make_linear(16, 16))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in backend.missing()


def test_the_engine_is_for_gpus(backend):
    network = nn.Module()
    network.layer = nn.Linear(1, 1)
    network.quantempo_clock = make_clock()
    with pytest.raises(QuantempoError, match="it runs on cuda, the model is on cpu"):
        attach(network, "triton")
    names = ENGINES.names()
    assert names.index("triton") < names.index("simulated")


@torch.no_grad()
def test_weights_are_kept_once(backend):
    layers = {"conv": make_conv(32, 16), "pointwise": make_conv(32, 16, **ONE)}
    layers |= {"linear": make_linear(32, 16), "w4": make_conv(32, 16, bits=(4, 8))}
    for name, layer in layers.items():
        before, saved = layer.weight_codes.clone(), layer.weight_int.clone()
        kernel = backend.lower(layer)
        kernel.prepare(torch.device("cpu"))
        assert kernel.constants.weights[0].data_ptr() == layer.weight_codes.data_ptr(), name
        assert torch.equal(layer.weight_codes, before)
        assert torch.equal(layer.state_dict()["weight_int"], saved)
        layer.kernel = kernel
        other = copy.deepcopy(layer)
        other.kernel = backend.lower(other)
        other.kernel.prepare(torch.device("cpu"))
        copied = other.kernel.constants.weights[0].data_ptr()
        assert copied == other.weight_codes.data_ptr() != layer.weight_codes.data_ptr()
        layer.set_codes(before)
        assert torch.equal(layer.weight_codes, before)


@pytest.mark.parametrize(
    ("layer", "shape", "bytes_each"),
    [
        (make_conv(128, 32, bits=(4, 8, 16)), (1, 128, 3, 3), 0.5625),
        (make_conv(192, 32, segments=(64, 128), bits=(4, 8, 32), **ONE), (1, 192, 3, 3), 0.53125),
        (make_linear(64, 32, bits=(3, 8, 64)), (2, 64), 0.53125),
    ],
)
def test_weights_in_groups_stay_packed(backend, layer, shape, bytes_each):
    x, before = noise(*shape, spread=1.0), copy.deepcopy(layer.state_dict())
    kernel = backend.lower(layer)
    kernel(x)
    sides = kernel.constants.sides
    held = [*kernel.constants.weights, *(sides.weights if sides else [])]
    bytes_ = {w.data_ptr(): w.untyped_storage().nbytes() for w in held}
    # The layer's own are in the host's memory.
    assert sum(bytes_.values()) == layer.weight.numel() * bytes_each
    assert layer.aside and layer.weight_int.device == layer.weight_group.device == x.cpu().device
    assert ENGINES.get("triton").holds(layer) == "packed"
    assert all(torch.equal(part, before[n]) for n, part in copy.deepcopy(layer).named_buffers())
    layer.release()
    assert layer.weight_int.is_contiguous() and not layer.aside


def test_moves_to_where_it_is_leave_what_is_aside(backend):
    layer = make_linear(64, 32, bits=(4, 8, 32)).to("meta")
    # As if "meta" were a GPU.
    layer.weight_int, layer.weight_group = torch.ones(2, 32, 32, dtype=torch.uint8)
    layer.aside, aside = True, (layer.weight_int, layer.weight_group)
    for same in (layer.to("meta"), layer.half(), nn.Sequential(layer).to("meta")[0]):
        assert all(map(operator.is_, (same.weight_int, same.weight_group), aside))
    # And else go with it.
    assert layer.to_empty(device="cpu").weight_group is not aside[1]


@pytest.mark.parametrize("rows", [[0, 3], [2, 5]])
def test_a_part_alone_needs_no_current_device(rows, monkeypatch):
    def refuse(*_, **__):
        raise BufferError("another device is current")

    monkeypatch.setattr(torch.Tensor, "__dlpack__", refuse)
    for whole in (torch.arange(40, dtype=torch.int8).view(5, 8), noise(5, 8)):
        part = whole[slice(*rows)]
        own = alone(part)
        assert own.data_ptr() == part.data_ptr() and torch.equal(own, part)
        assert own.untyped_storage().nbytes() == part.nbytes
        del whole
        assert torch.equal(copy.deepcopy(own), part)


FILLED = ("weight_scale", "bias", "act_scale", "act_zero_point", "weight_group")
WRITTEN = {
    "fill": lambda layer, codes, new: fill(layer, codes, *map(new.get, FILLED)),
    "rounding": lambda layer, codes, new: apply_rounding(
        nn.ModuleDict({"a": layer}), {"a": codes, "a.weight_group": new["weight_group"]}
    ),
    "attribute": lambda layer, _, new: [setattr(layer, *pair) for pair in new.items()],
    "in place": lambda layer, _, new: [getattr(layer, n).copy_(new[n]) for n in new],
    "load": lambda layer, _, new: layer.load_state_dict(new),
    "assign": lambda layer, _, new: layer.load_state_dict(new, assign=True),
}


@torch.no_grad()
@pytest.mark.parametrize("way", WRITTEN)
def test_what_an_engine_packed_is_read_and_written_as_ever(backend, way):
    layer, x = make_linear(64, 32, bits=(4, 8, 32)), noise(2, 64, spread=1.0)
    kernel, first = backend.lower(layer), copy.deepcopy(layer.state_dict())
    y, other = kernel(x), first | {n: first[n].flip(0) for n in ("weight_int", "weight_group")}
    for new in (other, first):
        codes = layer.weight_format.decode(new["weight_int"], (32, 64), new["weight_group"])
        WRITTEN[way](layer, codes, copy.deepcopy(new))
        kernel.prepare(x.device)
        for read in (layer.state_dict(), dict(copy.deepcopy(layer).named_buffers())):
            assert layer.aside and all(torch.equal(read[n], part) for n, part in new.items())
        assert torch.equal(kernel(x), y) == (new is first)


@pytest.mark.parametrize("group", [16, 32])
def test_a_network_in_groups_is_that_of_simulated(backend, group):
    network = quantized_unet(bits={"*_blocks.*": "w4a8"}, weights=WeightSettings(group=group))
    x, t = noise(2, 3, 16, 16, spread=1.0), torch.tensor([450, 10])
    other = copy.deepcopy(network)
    attach(other, "simulated")
    ENGINES.get("triton").attach(network)
    with torch.no_grad():
        truth, y = other(x, t).sample, network(x, t).sample
    assert any(layer.aside for _, layer in quantized_layers(network))
    # Fused blocks move a code of 8 bits here and there.
    assert relative(y, truth) < 0.03
    cpu_offload(network, torch.device("cpu"), offload_buffers=True)
    with torch.no_grad():
        assert torch.equal(network(x, t).sample, y) and torch.equal(network(x, t).sample, y)


def test_a_cpu_is_said_to_be_slow_once(backend, caplog):
    warn_once.cache_clear()
    for _ in range(2):
        layer = make_linear(32, 16, plain=True)
        layer.kernel = backend.lower(layer)
        layer(noise(2, 32))
    (said,) = (record.message for record in caplog.records if "slow" in record.message)
    assert "triton is attached and the model is on a CPU" in said and "attach an engine" in said


def test_a_layer_without_data_is_refused(backend):
    kernel = backend.lower(make_linear(16, 16).to("meta"))
    with pytest.raises(QuantempoError, match="without data"):
        kernel.prepare(torch.device("meta"))
    kernel = backend.lower(make_linear(16, 16))
    with pytest.raises(QuantempoError, match="move the model"):
        kernel(torch.empty(2, 16, device="meta"))


def test_constants_are_made_outside_of_a_trace(backend):
    kernel = backend.lower(make_linear(16, 16))
    with pytest.raises(Exception, match="attach the engine, then compile"):
        traced(lambda x: kernel(x), noise(2, 16))
    with torch.inference_mode():
        kernel(noise(2, 16))
    assert not kernel.constants.weights[0].is_inference()
    assert kernel.constants.tables[0]._dynamo_static_input_type == "unguarded"


@torch.no_grad()
def test_a_compiled_layer_quantizes_as_it_does_alone(backend):
    clock = make_clock(3)
    layer, norm = make_linear(32, 16, clock=clock), nn.LayerNorm(32)
    kernel = layer.kernel = backend.lower(layer)
    kernel.prepare(torch.device("cpu"))

    def run(x: Tensor, t: Tensor) -> Tensor:
        clock.set(t)
        return layer(norm(x))

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    x = noise(3, 8, 32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (torch.tensor(0), torch.tensor(500), torch.tensor(999)):
            assert torch.equal(compiled(x, t), run(x, t))


@torch.no_grad()
def test_layers_one_by_one_are_those_of_simulated(backend):
    network = quantized_unet()
    pairs = []
    for _, layer in network.named_modules():
        if isinstance(layer, QLayer):
            layer.kernel = BACKENDS.get("simulated").lower(layer)
            layer.register_forward_hook(lambda m, args, y: pairs.append((m, args[0], y)))
    network(noise(3, 3, 16, 16, spread=1.0), torch.tensor([970, 10, 450]))
    assert len(pairs) == 39
    different = 0
    for layer, x, y in pairs:
        found = backend.lower(layer)(x)
        error = (found - y).abs().max() / y.abs().max()
        # x / s and x (1 / s) round to other codes about once in 10^5.
        different += int(error > 1e-6)
        assert error <= 3e-2, "more than a code"
    assert different <= 2
    assert any(isinstance(layer, QConv2d) and len(layer.segments) == 2 for layer, *_ in pairs)


@torch.no_grad()
def test_a_kernel_that_is_wrong_is_named_and_not_used(on_a_cpu, packed_unet, monkeypatch, caplog):
    network, x = copy.deepcopy(packed_unet), torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(ENGINES.get("triton"), "devices", ("cpu",))
    attach(network, "triton")
    network(x, 400)
    assert "far from" not in caplog.text
    attach(network, "triton")
    name, part = next(iter(fused_modules(network).items()))
    right = part.forward.active
    part.forward.active = lambda *given, **how: -50 * right(*given, **how)
    y = network(x, 400).sample
    assert f"from {name} on" in caplog.text and attached(network) != "triton"
    attach(network, "simulated")
    assert float((network(x, 400).sample - y).norm() / y.norm()) < 0.1


@torch.no_grad()
def test_a_comparison_that_fails_is_said_alone(on_a_cpu, packed_unet, monkeypatch, caplog):
    def no_memory(_):
        raise torch.OutOfMemoryError("no memory")

    network, x = copy.deepcopy(packed_unet), torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(ENGINES.get("triton"), "devices", ("cpu",))
    attach(network, "triton")
    wanted = network(x, 400).sample
    monkeypatch.setattr("quantempo.engines.simulated.float32_copy", no_memory)
    attach(network, "triton")
    assert torch.equal(network(x, 400).sample, wanted)
    assert "not compared with simulated here: no memory" in caplog.text
    assert attached(network) == "triton"
