"""Which candidates there are, what they compute, and that only right ones are timed."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantempo.bench.candidates import CANDIDATES, Candidate, Subject, cast_inputs, select
from quantempo.bench.forwards import compare, prepare
from quantempo.bench.networks import Network, quick_network
from quantempo.bench.results import Results
from quantempo.errors import QuantempoError
from quantempo.models.presets import random_inputs
from quantempo.quantized.attention import mark_attention, marked_attention
from tests.bench.timers import Steady
from tests.tiny import noise, tiny_dit, tiny_text, tiny_unet

PLAIN = ("bf16/eager", "bf16/channels_last", "ours/simulated")
HEAD = {"model": "tiny", "batch": 2}


@pytest.fixture(scope="module")
def network() -> Network:
    return quick_network("tiny", tiny_unet())


@pytest.fixture
def subject(network: Network) -> Subject:
    return network.subject(2, "simulated")


@pytest.fixture
def wanted(subject: Subject) -> torch.Tensor:
    with torch.no_grad():
        return subject.floating(**subject.inputs).sample


def named(*names: str) -> list[Candidate]:
    return [candidate for candidate in CANDIDATES if candidate.name in names]


def test_candidates_are_chosen_by_pattern_and_device_in_their_order() -> None:
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names)
    gpu, cpu = ([c.name for c in select(device=device)] for device in ("cuda", "cpu"))
    assert {c.kind for c in select()} == {"bf16", "peer", "ours"}
    assert "fp32/compile" in cpu and "ours/onednn" in cpu and "ours/graph" not in cpu
    assert "fp32/compile" not in gpu and not {"ours/onednn", "ours/triton"} & set(gpu)
    assert "ours/triton" not in cpu
    assert [c.name for c in select(["ours/graph", "bf16/e*"])] == ["bf16/eager", "ours/graph"]
    assert len(select(["ours/*"])) == 8
    with pytest.raises(QuantempoError, match=r"matches 'ours/graf'.*did you mean 'ours/graph'"):
        select(["bf16/*", "ours/graf"])


def test_weights_of_films_have_no_channels_last() -> None:
    forward = named("bf16/channels_last")[0].build(Subject(torch.nn.Conv3d(4, 4, 1), None, {}))
    assert forward.weight.dtype == torch.bfloat16


def test_attentions_in_8_bits_are_counted(subject: Subject, wanted: torch.Tensor) -> None:
    def build(subject: Subject) -> Any:
        net = copy.deepcopy(subject.floating)
        mark_attention(net, {"conv_in": [0.01, 4], "conv_out": [0.01, 4], "mid_block": [9.0, 4]}, 1)
        for known in marked_attention(net).values():
            known.note(known.chosen, 4)
        return net

    row = prepare(Candidate("ours/x", build), subject, wanted, Steady()).row([])
    assert row["attentions_8bit"] == 2


@pytest.mark.parametrize("name", ["ours/onednn", "ours/openvino"])
def test_an_engine_is_attached_under_no_mode(name: str, subject: Subject, wanted: torch.Tensor):
    # A tracer loses what a mode of torch's dispatcher looks at.
    assert prepare(named(name)[0], subject, wanted, Steady()).row([])["sqnr_db"] > 5


@pytest.mark.parametrize("name", ["fp32/eager", "fp32/channels_last", *PLAIN])
def test_plain_candidates_are_near_float32_and_own_their_weights(name, subject, wanted):
    before = copy.deepcopy(subject.floating.state_dict())
    ready = prepare(named(name)[0], subject, wanted, Steady())
    # bfloat16 keeps 8 bits; ours has 8 bits in each of tens of layers.
    assert ready.sqnr_db > {"fp32": 90, "bf16": 30, "ours": 15}[ready.candidate.kind]
    assert ready.ms == 2.0 and ready.seconds > 0 and ready.peak_bytes == 0
    after = subject.floating.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
    assert ready().sample.dtype == dtype
    layout = next(p for p in ready.forward.parameters() if p.ndim == 4 and p.shape[2] > 1)
    last = layout.is_contiguous(memory_format=torch.channels_last)
    assert last == name.endswith("channels_last")


WHOLE = [c.name for c in CANDIDATES if c.compiled and c.kind != "peer" and "blocks" not in c.name]


@pytest.mark.parametrize("name", WHOLE)
def test_compiled_candidates_compute_the_network_in_one_graph(name, subject, wanted, monkeypatch):
    import torch._inductor.config as inductor

    given: dict[str, Any] = {}

    def compile_(net: Any, *, options: dict[str, Any] | None, **settings: Any) -> Any:
        given.update(options or {})
        return net

    monkeypatch.setattr(torch, "compile", compile_)
    candidate = named(name)[0]
    ready = prepare(replace(candidate, graph=None), subject, wanted, Steady())
    assert ready.sqnr_db > {"fp32": 90, "bf16": 30, "ours": 15}[candidate.kind]
    # A name that inductor does not know would fail on the GPU only.
    for option in given:
        found: Any = inductor
        for part in option.split("."):
            found = getattr(found, part)
    # Ours or the compiler's, and none for plain compilation.
    graphs = (candidate.graph is not None) + bool(given.get("triton.cudagraphs"))
    assert graphs == (0 if name.endswith("/compile") else 1)


@pytest.mark.parametrize("name", ["bf16/blocks+graph", "torch/int8", "torch/fp8"])
def test_blocks_of_transformers_are_compiled_by_class(name, monkeypatch):
    compiled: list[str] = []

    def compile_(block: torch.nn.Module, **_: Any) -> None:
        compiled.append(type(block).__name__)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    net = tiny_dit().transformer
    inputs = random_inputs(net, 2) | {"hidden_states": noise(2, 4, 8, 8)}
    subject = Subject(net, None, inputs)
    with torch.no_grad():
        wanted = net(**inputs).sample
    ready = prepare(replace(named(name)[0], graph=None), subject, wanted, Steady())
    assert ready.sqnr_db > 20 and compiled == ["BasicTransformerBlock"] * 2
    # A scale a token and a channel; what reads the time, and both ends, stay as they were.
    kinds = [type(m).__name__ for m in ready.forward.modules()]
    assert kinds.count("_Dynamic") == (0 if name.startswith("bf16") else 2 * 6)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y * math.nan, "NaN or infinity"),
        (lambda y: torch.zeros_like(y), "dB from float32"),
        (lambda y: y.roll(1, 0), "dB from float32"),
    ],
)
def test_wrong_outputs_are_refused(output, message, subject, wanted):
    candidate = Candidate("fp32/wrong", lambda s: lambda **kw: output(s.floating(**kw).sample))
    with pytest.raises(QuantempoError, match=message):
        prepare(candidate, subject, wanted, Steady())


def test_every_failure_is_named_and_the_rest_is_timed(subject, wanted):
    def explode(_: Subject) -> Any:
        raise RuntimeError("no kernel image")

    fine = named(*PLAIN)
    absent = replace(fine[0], name="bf16/absent", missing=lambda _: "nothing to run it")
    some = [Candidate("bf16/broken", explode), *fine, absent]
    # First a call of each, then turns.
    timer = Steady(80.0, 60.0, 30.0, 8.0, 6.0, 3.0)
    written: list[dict[str, Any]] = []
    results = Results({"engine": "simulated"}, written.append)
    ready = compare(some, subject, wanted, timer, results, HEAD, rounds=3, seconds=0.0)
    assert list(ready) == list(PLAIN)
    record = results.record()
    rows = {row["candidate"]: row for row in record["rows"]}
    assert {name: row["failed"] for name, row in rows.items() if "failed" in row} == {
        "bf16/broken": "RuntimeError: no kernel image",
        "bf16/absent": "nothing to run it",
    }
    assert [rows[name]["ms_per_forward"] for name in PLAIN] == [8.0, 6.0, 3.0]
    assert all(rows[name]["rounds"] == 3 for name in PLAIN)
    assert record["speedup_vs_best_bf16"] == {"tiny_b2": 2.0}
    # One record after each candidate, with the time of its first call, and one after each round.
    assert [len(one["rows"]) for one in written] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert written[1]["rows"][1]["ms_per_forward"] == 80.0 and not written[1]["rows"][1]["rounds"]
    assert written[3]["speedup_vs_best_bf16"] == {"tiny_b2": 2.0}


def test_a_graph_that_was_not_recorded_is_no_graph(subject: Subject, wanted: torch.Tensor) -> None:
    # On a CPU `graphed` calls the network as it is.
    with pytest.raises(QuantempoError, match="could not be captured"):
        prepare(named("ours/graphed")[0], subject, wanted, Steady())


def test_without_a_quantized_network_ours_is_missing(subject: Subject) -> None:
    eager = named("ours/eager")[0]
    assert eager.missing(subject) is None
    assert "no quantized network" in str(eager.missing(replace(subject, packed=None)))


def test_casting_inputs_leaves_times_and_integers() -> None:
    inputs = quick_network("text", tiny_text().unet).inputs(2)
    inputs["added"] = {"ids": torch.ones(2, 6), "scale": torch.tensor(0.5), "name": "x"}
    found = cast_inputs(inputs, torch.bfloat16)
    assert found["sample"].dtype == found["added"]["ids"].dtype == torch.bfloat16
    assert found["timestep"] is inputs["timestep"]
    assert found["added"]["scale"].dtype == torch.float32 and found["added"]["name"] == "x"
    assert inputs["sample"].dtype == torch.float32
