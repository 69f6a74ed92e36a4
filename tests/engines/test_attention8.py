"""Attention in 8 bits: chosen by its measured error, recorded, run where it was chosen."""

import copy
import functools
import importlib
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models import attention_dispatch
from torch.nn import functional as F

from quantempo.bench import networks
from quantempo.bench.candidates import cast_inputs
from quantempo.calibration.dataset import TraceSet
from quantempo.engines import attach, cuda
from quantempo.evaluation.fidelity import sqnr_db
from quantempo.kernels.ops import attention
from quantempo.pipeline import stages
from quantempo.pipeline.quantize import quantize
from quantempo.quantized import attention as ours
from quantempo.quantized import quantized_layers
from quantempo.run_folder import RunFolder
from tests.engines.one_by_one import ENGINE, call, quantized, tiny
from tests.tiny import tiny_flux

pytestmark = pytest.mark.usefixtures("on_a_cpu", "short")

LONG = {"flux": 4, "qwen": 2, "sd3": 3, "sd35": 4, "wan": 2, "pixart": 2}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few tokens and small heads pass for many and large ones, a CPU for a Hopper."""
    monkeypatch.setattr(ours, "LEAST", dict.fromkeys((8, 16), 9))
    monkeypatch.setattr(attention, "supported", lambda *_: True)


def marked(kind: str, known: Any = 0.0, outlier: float = 0.0) -> torch.nn.Module:
    """Return a network on engine triton whose long attentions have this error (and tokens)."""
    network = copy.deepcopy(quantized(kind))
    if outlier:
        network.single_transformer_blocks[1].attn.norm_k.weight.data[3] = outlier
    ours.mark_attention(network, dict.fromkeys(ours.attending(tiny(kind)), known), 0.01)
    ENGINE.attach(network)
    return network


def quick(most: float) -> Any:
    trace = {"steps": 2, "chains": 2, "picks": 2}
    return networks.quick_recipe().override("attention", max_error=most).override("trace", **trace)


@torch.no_grad()
def test_those_within_the_limit_are_chosen_recorded_and_read_back(tmp_path, monkeypatch):
    (pipe, given), name = tiny_flux(9), "single_transformer_blocks.0.attn"
    network, first = pipe.transformer, "transformer_blocks.0.attn"
    network.get_submodule(name).norm_k.weight.data[3] = 200.0
    packed = stages.quantize(pipe, tmp_path, quick(0.03), call=given)
    data = TraceSet(tmp_path / "trace")
    marks = ours.marked_attention(FluxTransformer2DModel.from_pretrained(packed / "transformer"))
    with ours.measured_attention(network) as worst:
        for row in range(len(data)):
            data.replay(network, data.rows(torch.tensor([row])))
    assert 0 < worst[first][0] <= 0.03 < worst[name][0]
    assert {k: known.chosen for k, known in marks.items()} == {first: True, name: False}
    for k, known in marks.items():
        assert [known.error, known.tokens] == pytest.approx(worst[k], rel=1e-4)
    reason = RunFolder(tmp_path).read_json("layers.json")[-1]["reason"]
    assert reason.startswith("1 of 2 in 8 bits") and f"not {name}: {worst[name][0]:.2%}" in reason
    assert not quantize(network, data, quick(0.0)).attention
    monkeypatch.setattr(ours, "LEAST", dict.fromkeys((8, 16), 2048))
    assert not quantize(network, data, quick(0.03)).attention


@torch.no_grad()
@pytest.mark.parametrize("kind", LONG)
def test_fused_blocks_run_the_definition_where_chosen(kind, monkeypatch):
    network, plain, given = marked(kind), marked(kind, 1.0), call(kind)
    if kind in ("flux", "wan"):
        known = functools.cache(lambda *_: bool(importlib.import_module("torch")))
        monkeypatch.setattr(attention, "supported", known)
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(**given)[0], network(**given)[0])
    seen, run, own = [], cuda.joint.ops.attention8, F.scaled_dot_product_attention
    monkeypatch.setattr(cuda.joint.ops, "attention8", lambda *x: seen.append(x) or run(*x))
    y, wanted = network(**given)[0], plain(**given)[0]
    with attention_dispatch.attention_backend("_native_math"):
        network(**given)
    assert len(seen) == LONG[kind] and not torch.equal(y, wanted)

    def exact(query: Any, key: Any, value: Any, attn_mask: Any = None, **how: Any) -> Any:
        if attn_mask is not None or query.shape != key.shape:
            return own(query, key, value, attn_mask, **how)
        return attention.exact(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", exact)
        assert torch.equal(plain(**given)[0], y)
    monkeypatch.setattr(ours, "LEAST", dict.fromkeys((8, 16), 15))
    assert torch.equal(network(**given)[0], wanted)


@torch.no_grad()
def test_the_check_of_a_first_call_has_the_same_attention(monkeypatch):
    network, given, found = marked("flux", outlier=200.0), call("flux"), []
    monkeypatch.setattr(cuda, "_far", lambda y, exact, _: found.append(sqnr_db(exact[0], y[0])))
    output = network(**given)
    ENGINE.first_wrong(network, (), given, output)
    monkeypatch.setattr(cuda, "attentions", lambda *_: nullcontext())
    ENGINE.first_wrong(network, (), given, output)
    assert found[0] > found[1] + 10, found


@torch.no_grad()
@pytest.mark.parametrize("half", [False, True])
def test_the_check_judges_by_what_the_attention_was_given(half, monkeypatch):
    """Float32 in a network that returns bfloat16, which has no 8 bits; the other way round."""
    monkeypatch.setattr(ours, "_supported", lambda *how: how[2] == torch.bfloat16)
    network, given, found = marked("flux", outlier=200.0), call("flux"), []
    own, end = (torch.bfloat16, torch.float32)[:: 1 if half else -1]
    torch.nn.Module.to(network, own).proj_out.register_forward_hook(lambda _, args, y: y.to(end))
    ENGINE.attach(network)
    given = cast_inputs(given, own)
    output = network(**given)
    assert {known.ran for known in ours.marked_attention(network).values()} == {half}
    assert ENGINE.first_wrong(network, (), given, output) is None
    with torch.autocast("cpu", torch.bfloat16):
        # What that costs by itself is no fault of the engine.
        assert ENGINE.first_wrong(network, (), given, network(**given)) is None
    output = network(**given)
    monkeypatch.setattr(cuda, "_far", lambda y, exact, free: found.append(exact[0]))
    ENGINE.first_wrong(network, (), given, output)
    monkeypatch.setattr(cuda, "attentions", lambda *_: nullcontext())
    ENGINE.first_wrong(network, (), given, output)
    assert torch.equal(*found) == (not half)


@torch.no_grad()
@pytest.mark.parametrize("known", [0.0, [0.0, 7], [0.0, 6]])
def test_a_call_over_twice_as_long_as_measured_is_said_once_a_module(known, caplog):
    network, given = marked("flux", known), call("flux")
    with caplog.at_level("DEBUG", "quantempo"):
        for _ in range(2):
            network(**given)
    said = [r.levelname for r in caplog.records if "measured on 6: quantize" in r.getMessage()]
    assert said == (["WARNING", "DEBUG", "DEBUG", "DEBUG"] if known == [0.0, 6] else [])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_networks_of_the_benchmark_measure_theirs(dtype, monkeypatch):
    monkeypatch.setattr(networks, "random_inputs", lambda _, rows, **how: call("wan", rows))
    network = torch.nn.Module.to(copy.deepcopy(tiny("wan")), dtype)
    recipe = quick(0.5).override("layers", float_roles=["output", "time"])
    made = networks.quick_network("wan", network, recipe=recipe)
    assert list(ours.marked_attention(made.packed)) == ["blocks.0.attn1", "blocks.1.attn1"]
    assert "patch_embedding" in dict(quantized_layers(made.packed))
    attach(made.packed, "simulated")
    given = cast_inputs(made.subject(2).inputs, dtype)
    assert sqnr_db(network(**given)[0].float(), made.packed(**given)[0].float()) > 15
