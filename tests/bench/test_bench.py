"""Timing: candidates take turns, and speed-ups are over the best baseline of each dtype."""

from __future__ import annotations

import torch

from quantempo.bench.cpu import float_candidates, interleave, summarize
from quantempo.core.machine import machine
from tests.tiny import tiny_unet


def test_candidates_take_turns_forwards_and_backwards() -> None:
    calls: list[str] = []
    candidates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(candidates, rounds=4, seconds=0.0)
    # One warm-up each, then the rounds.
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("abc", 4)
    assert all(value >= 0 for values in times.values() for value in values)


def test_a_sample_lasts_long_enough_and_is_per_call() -> None:
    clock, calls = [0.0], [0]

    def call() -> None:
        calls[0] += 1
        clock[0] += 0.010

    import quantempo.bench.cpu as bench

    before = bench.time.perf_counter
    bench.time.perf_counter = lambda: clock[0]
    try:
        times = interleave({"a": call}, rounds=3, seconds=0.1)
    finally:
        bench.time.perf_counter = before
    assert all(abs(value - 10.0) < 1e-6 for value in times["a"]) and len(times["a"]) == 3
    # 10 or 11 calls fill a sample (float sums), and one warm-up.
    assert 1 + 3 * 10 <= calls[0] <= 1 + 3 * 11


def test_speed_ups_are_over_the_best_median_of_each_dtype() -> None:
    times = {
        "eager/float32": [40.0, 41.0, 90.0],
        "compiled/float32": [31.0, 30.0, 10.0],
        "eager/bfloat16": [22.0, 20.0, 21.0],
        "channels_last/bfloat16": [25.0, 24.0, 26.0],
        "onednn/int8": [10.0, 12.0, 11.0],
        "openvino/int8": [1.0, 1.0, 1.0],
    }
    found = summarize(times, "onednn/int8")
    assert found["ms_per_forward"]["eager/float32"] == 41.0
    assert found["ms_min"]["compiled/float32"] == 10.0
    # Medians, not minima; the other engine is no baseline.
    assert found["speedup_vs_best_fp32"] == round(30 / 11, 3)
    assert found["speedup_vs_best_bf16"] == round(21 / 11, 3)
    assert found["engine"] == "onednn/int8"


def test_without_a_baseline_there_is_no_speed_up() -> None:
    found = summarize({"eager/float32": [4.0], "a/int8": [2.0]}, "a/int8")
    assert found["speedup_vs_best_fp32"] == 2.0 and found["speedup_vs_best_bf16"] is None


def test_float_candidates_compute_what_the_network_computes() -> None:
    net = tiny_unet()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    g = torch.Generator().manual_seed(0)
    args = (torch.randn(2, 3, 16, 16, generator=g), torch.tensor([500, 500]))
    calls = float_candidates(net, (args, {}), compiled=False)
    assert list(calls) == [
        f"{form}/{dtype}"
        for dtype in ("float32", "bfloat16")
        for form in ("eager", "channels_last")
    ]
    with torch.no_grad():
        wanted = net(*args).sample
    for name, call in calls.items():
        got = call().sample
        assert str(got.dtype).endswith(name.split("/")[1]) and not got.requires_grad
        # bfloat16 keeps 8 bits; some tens of layers.
        bound = 1e-5 if name.endswith("float32") else 0.05
        assert float((got.float() - wanted).norm() / wanted.norm()) < bound, name
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert next(net.parameters()).dtype == torch.float32


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads()
    assert isinstance(found["cpu"], str) and found["cpu"]
