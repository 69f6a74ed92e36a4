"""Which candidates there are, how they are chosen, and that only right ones are timed."""

from __future__ import annotations

import copy
import importlib.util
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantempo.bench.candidates import CANDIDATES, Candidate, Subject, select
from quantempo.bench.measure import compare, prepare, sqnr_db, summarize_gpu
from quantempo.bench.workloads import Workload, quick_workload
from quantempo.errors import QuantempoError
from tests.tiny import tiny_unet

PLAIN = ("bf16/eager", "bf16/channels_last", "ours/eager")


@pytest.fixture(scope="module")
def workload() -> Workload:
    return quick_workload("tiny", tiny_unet())


@pytest.fixture
def subject(workload: Workload) -> Subject:
    return workload.subject(2, "simulated")


@pytest.fixture
def wanted(workload: Workload) -> torch.Tensor:
    with torch.no_grad():
        return workload.floating(**workload.inputs(2)).sample


class Scripted:
    """A timer that knows what each candidate costs, in the order of the calls."""

    def __init__(self, cost: list[float]) -> None:
        self.cost, self.calls = cost, []

    def sample(self, call: Any, count: int) -> float:
        if call not in self.calls:
            self.calls.append(call)
        call()
        return self.cost[self.calls.index(call)]


def test_candidates_are_chosen_by_pattern_in_their_order() -> None:
    names = [candidate.name for candidate in CANDIDATES]
    assert len(set(names)) == len(names) and {c.kind for c in CANDIDATES} == {
        "bf16", "peer", "ours",
    }  # fmt: skip
    assert select() == list(CANDIDATES)
    assert [c.name for c in select(["ours/graph", "bf16/e*"])] == ["bf16/eager", "ours/graph"]
    assert all(c.kind == "ours" for c in select(["ours/*"])) and len(select(["ours/*"])) == 6
    with pytest.raises(QuantempoError, match=r"matches 'ours/graf'.*did you mean 'ours/graph'"):
        select(["bf16/*", "ours/graf"])


def test_sqnr_is_in_decibels() -> None:
    x = torch.ones(100)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, x + 0.1) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(torch.zeros(3), x[:3]) == -math.inf


@pytest.mark.parametrize("name", PLAIN)
def test_plain_candidates_are_near_float32_and_own_their_weights(
    name: str, subject: Subject, wanted: torch.Tensor
) -> None:
    before = copy.deepcopy(subject.floating.state_dict())
    ready = prepare(select([name])[0], subject, wanted)
    # bfloat16 keeps 8 bits; ours has 8 bits in each of tens of layers besides.
    assert ready.sqnr_db > (15 if name.startswith("ours") else 30)
    assert ready.seconds > 0 and ready.peak_bytes == 0
    after = subject.floating.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert ready.forward(**subject.inputs[1]).sample.dtype == torch.bfloat16
    layout = next(p for p in ready.forward.parameters() if p.ndim == 4 and p.shape[2] > 1)
    last = layout.is_contiguous(memory_format=torch.channels_last)
    assert last == (name == "bf16/channels_last")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y * math.nan, "NaN or infinity"),
        (lambda y: torch.zeros_like(y), "dB from float32"),
        (lambda y: y.roll(1, 0), "dB from float32"),
    ],
)
def test_wrong_outputs_are_refused(
    output: Any, message: str, subject: Subject, wanted: torch.Tensor
) -> None:
    def build(_: Subject) -> Any:
        copied = copy.deepcopy(subject.floating)
        return lambda **kwargs: output(copied(**{k: v.float() if v.is_floating_point() else v
                                                 for k, v in kwargs.items()}).sample)  # fmt: skip

    candidate = Candidate("bf16/wrong", "", build)
    with pytest.raises(QuantempoError, match=message):
        prepare(candidate, subject, wanted)


def test_every_failure_is_named_and_the_rest_is_timed(
    subject: Subject, wanted: torch.Tensor
) -> None:
    def explode(_: Subject) -> Any:
        raise RuntimeError("no kernel image")

    fine = [candidate for candidate in CANDIDATES if candidate.name in PLAIN]
    absent = replace(fine[0], name="bf16/absent", missing=lambda _: "nothing to run it")
    some = [
        Candidate("bf16/broken", "", explode),
        *fine,
        absent,
    ]
    timer = Scripted([8.0, 6.0, 3.0])
    ready, times, failed = compare(some, subject, wanted, timer, rounds=3, seconds=0.0)
    assert [one.candidate.name for one in ready] == list(PLAIN) == list(times)
    assert failed == {
        "bf16/broken": "RuntimeError: no kernel image",
        "bf16/absent": "nothing to run it",
    }
    found = summarize_gpu(ready, times, failed)
    assert found["best_bf16"] == "bf16/channels_last" and found["best_ours"] == "ours/eager"
    assert found["speedup_vs_best_bf16"] == 2.0
    assert found["ms_per_forward"] == dict(zip(PLAIN, (8.0, 6.0, 3.0), strict=True))
    assert found["failed"] == failed and set(found["peak_bytes"]) == set(PLAIN)


def test_a_graph_that_was_not_recorded_is_no_graph(subject: Subject, wanted: torch.Tensor) -> None:
    # On a CPU `graphed` calls the network as it is.
    with pytest.raises(QuantempoError, match="could not be captured"):
        prepare(select(["ours/graphed"])[0], subject, wanted)


def test_without_ours_there_is_no_speed_up(subject: Subject, wanted: torch.Tensor) -> None:
    unknown = replace(subject, engine="tritium")
    ready, times, failed = compare(
        select(["bf16/eager", "ours/eager"]), unknown, wanted, Scripted([1.0]), rounds=1
    )
    found = summarize_gpu(ready, times, failed)
    assert found["best_ours"] is None and found["speedup_vs_best_bf16"] is None
    assert "no engine 'tritium'" in failed["ours/eager"]
    assert "no quantized network" in str(
        select(["ours/eager"])[0].missing(replace(subject, packed=None))
    )


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_torchao_is_listed_where_it_is_not_installed(subject: Subject) -> None:
    for candidate in select(["torchao/*"]):
        assert candidate.kind == "peer"
        assert "torchao is not installed" in str(candidate.missing(subject))


def test_compiled_candidates_of_the_cpu_run_what_they_say(
    subject: Subject, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def compile_(net: Any, **settings: Any) -> Any:
        seen.append(settings)
        return net

    monkeypatch.setattr(torch, "compile", compile_)
    for candidate in select(["*compile*", "*max-autotune*", "*reduce*"]):
        if candidate.kind != "peer":
            plain = replace(candidate, record=None)
            prepare(plain, subject, wanted)
    options = [settings["options"] or {} for settings in seen]
    assert [bool(o.get("max_autotune")) for o in options] == [
        False, False, True, True, False, True, False,
    ]  # fmt: skip
    # Its own CUDA graphs, where nothing is recorded around it.
    recorded = [c.record is not None for c in select(["*compile*", "*max-autotune*", "*reduce*"])]
    trees = [bool(o.get("triton.cudagraphs")) for o in options]
    assert [a or b for a, b in zip(recorded, trees, strict=True)] == [False] + [True] * 6
    assert not any(a and b for a, b in zip(recorded, trees, strict=True))
    assert [s["fullgraph"] for s in seen] == [False] * 4 + [True] * 3
    assert options[3]["conv_1x1_as_mm"] and not options[2].get("conv_1x1_as_mm")
    import torch._inductor.config as inductor

    # A name that inductor does not know would fail on the GPU only.
    for name in {key for o in options for key in o}:
        attribute: Any = inductor
        for part in name.split("."):
            attribute = getattr(attribute, part)
