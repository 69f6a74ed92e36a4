"""Weights in groups packed or as bytes: as asked, or as measured at the first call; same output."""

import copy
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantempo.engines import ENGINES, attach, base, forms, select
from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.quantized import quantized_layers
from quantempo.recipe import WeightSettings
from tests.engines.quantized import INPUTS, quantized_unet

GROUPS = WeightSettings(bits=4, group=16)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("engine", ["onednn", "triton"])
@torch.no_grad()
def test_the_form_is_the_one_asked_for_and_changes_no_bit(engine, monkeypatch, caplog):
    if engine == "onednn" and fused_cpu.missing():
        pytest.skip(fused_cpu.missing())
    bits = {"up_blocks.*": "w8a8", "down_blocks.*": "w8a8"}
    network, calls = quantized_unet(weights=GROUPS, bits=bits), []
    grouped = {name for name, q in quantized_layers(network) if q.weight_group is not None}
    some = {name for name in grouped if "conv1" in name}

    def timed(*call):
        calls.append(call)
        return [
            {"layers": [name], "w4a8_ms": 2.0, "w8a8_ms": 1.0 if name in some else 1.95}
            for name, _ in quantized_layers(network)
        ]

    monkeypatch.setattr(forms, "time_forms", timed)
    monkeypatch.setattr(ENGINES.get(engine), "devices", ("cpu",))
    outputs, wanted = [], {"keep": set(), "unpack": grouped, "auto": some}
    for how, names in wanted.items():
        net = copy.deepcopy(network)
        attach(net, engine, how)
        with caplog.at_level(logging.INFO, "quantempo"):
            caplog.clear()
            outputs += [net(*INPUTS[0]).sample, net(*INPUTS[0]).sample]
        layers = {name: net.get_submodule(name) for name in grouped}
        assert {name for name, layer in layers.items() if layer.unpack} == names
        holds = {name for name, q in layers.items() if ENGINES.get(engine).holds(q) == "as bytes"}
        assert holds == names
        # Those of the bits and moved; a copy has the same choice to make.
        assert len(calls) == (how == "auto")
    size = sum(math.prod(network.get_submodule(name).weight_shape) for name in some)
    text = f"{len(some)} of {len(grouped)} weights in groups as bytes, which take "
    megabytes = ENGINES.get(engine).copies * size / 1e6
    assert [m for m in caplog.messages if "as bytes" in m] == [
        f"engine {engine} holds {text}{megabytes:.1f} MB"
    ]
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    with pytest.raises(
        QuantempoError, match=r"got packed 'bytes' \(expected one of: keep, unpack, auto\)"
    ):
        attach(network, engine, "bytes")


@torch.no_grad()
def test_a_first_call_is_timed_once_whoever_calls(on_a_cpu, monkeypatch):
    network, calls = quantized_unet(weights=GROUPS), []
    empty = [x[:0] if x.ndim else x for x in INPUTS[0]]
    monkeypatch.setattr(forms, "time_forms", lambda *call: calls.append(call) or [])
    attach(network, "onednn", "auto")
    for _ in range(2):
        assert len(network(*empty).sample) == 0 and not calls
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda _: network(*INPUTS[0]).sample, range(12)))
    assert len(calls) == 1 and all(torch.equal(y, outputs[0]) for y in outputs)
    network(*empty)
    assert len(calls) == 1


@pytest.mark.parametrize("weights", [GROUPS, WeightSettings()], ids=["groups", "w8a8"])
@torch.no_grad()
def test_what_is_asked_for_in_vain_is_said_once(weights, caplog):
    base.warn_once.cache_clear()
    network = quantized_unet(weights=weights)
    for packed in ("keep", "auto", "auto"):
        attach(network, "simulated", packed)
        network(*INPUTS[0])
    said = [m for m in caplog.messages if "changes nothing" in m]
    assert len(said) == 1 and "'auto'" in said[0]


@pytest.mark.parametrize("packed", ["keep", "unpack", "auto"])
@torch.no_grad()
def test_an_engine_that_replaces_a_wrong_one_is_asked_the_same(packed, on_a_cpu, monkeypatch):
    network, calls = quantized_unet(weights=GROUPS), []
    monkeypatch.setattr(forms, "time_forms", lambda name, *_: calls.append(name) or [])
    monkeypatch.setattr(ENGINES.get("triton"), "devices", ("cpu",))
    monkeypatch.setattr(ENGINES.get("triton"), "first_wrong", lambda *_: "conv_in")
    monkeypatch.setattr(select, "choose", lambda *_, **__: ENGINES.get("onednn"))
    attach(network, "triton", packed)
    network(*INPUTS[0])
    assert select.attached(network) == "onednn"
    assert calls == (["triton", "onednn"] if packed == "auto" else [])
    assert {q.unpack for _, q in quantized_layers(network) if q.weight_group is not None} == {
        packed == "unpack"
    }


@pytest.mark.usefixtures("on_a_cpu")
def test_nothing_is_said_of_random_weights(monkeypatch, caplog):
    def missing():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(forms.log.warning, "of another thread").result()
        return "no compiler"

    monkeypatch.setattr(fused_cpu, "missing", missing)
    monkeypatch.setattr(fused_cpu, "load", lambda: None)
    monkeypatch.setattr(forms, "_ROUNDS", 1)
    base.warn_once.cache_clear()
    forms.time_forms("onednn", quantized_unet(), *(INPUTS[0], {}))
    assert "held as bytes" not in caplog.text and "of another thread" in caplog.text
    # What is true of a network is said all the same.
    network = quantized_unet(weights=GROUPS)
    attach(network, "onednn")
    with torch.no_grad():
        network(*INPUTS[0])
    assert "held as bytes: no compiler" in caplog.text


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("engine", ["onednn", "triton"])
@pytest.mark.parametrize("weights", [GROUPS, WeightSettings()], ids=["groups", "w8a8"])
def test_each_shape_of_layers_is_timed_once_both_ways(engine, weights, monkeypatch):
    if (reason := BACKENDS.get(engine).missing()) is not None:
        pytest.skip(reason)
    network = quantized_unet(weights=weights)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    monkeypatch.setattr(forms, "_ROUNDS", 1)
    rows = forms.time_forms(engine, network, *(INPUTS[0], {}))
    able = BACKENDS.get(engine).unsupported
    layers = {name for name, layer in quantized_layers(network) if not able(layer)}
    assert sorted(name for row in rows for name in row["layers"]) == sorted(layers)
    assert len({row["shape"] for row in rows}) > 4
    assert all(row["w4a8_ms"] > 0 and row["w8a8_ms"] > 0 for row in rows)
    for row in rows:
        shapes = {network.get_submodule(name).weight_shape for name in row["layers"]}
        (shape,) = shapes
        assert row["shape"].endswith(" by " + "x".join(map(str, shape)))
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(q.kernel is None and not q.unpack for _, q in quantized_layers(network))
