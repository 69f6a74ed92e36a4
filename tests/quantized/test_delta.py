"""Deltas: what the clock follows, the memory plan, rates that are searched, plans and refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from quantempo.calibration.deltas import WIDEN, collect_deltas, delta_sizes, search_deltas
from quantempo.calibration.statistics import time_bin_edges
from quantempo.errors import QuantempoError
from quantempo.models.layers import sites
from quantempo.models.macs import count_macs
from quantempo.models.sampling import call_pipeline, swap_scheduler
from quantempo.quantized import (
    StepClock,
    delta_layers,
    fill_deltas,
    install_deltas,
    limit_deltas,
    plan_memory,
)
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from tests.engines.quantized import quantize_network
from tests.tiny import tiny_unconditional, tiny_unet

DELTAS = Recipe().override("delta", enabled=True).override("activations", bits=4)


def watching(refresh: int = 0, per_unit: float = 1.0) -> StepClock:
    clock = StepClock(torch.zeros(1000), per_unit)
    clock.watch(refresh)
    return clock


def follow(clock: StepClock, times: list) -> list[bool]:
    found = []
    for t in times:
        clock.set(t)
        found.append(bool(clock.fresh))
    return found


def test_a_trajectory_starts_once_and_again_when_time_goes_up() -> None:
    clock = watching()
    assert follow(clock, [981, 961, 21, 1]) == [True, False, False, False]
    assert follow(clock, [981, 961]) == [True, False]
    # The same time twice (Heun, both halves of guidance one by one) is no step of time.
    assert follow(clock, [961, 941]) == [True, False]


def test_the_gap_is_in_training_time_steps() -> None:
    clock = watching(per_unit=1000.0)
    follow(clock, [torch.tensor(0.98), torch.tensor([0.5, 0.5])])
    assert float(clock.gap) == pytest.approx(480, rel=1e-6) and not bool(clock.fresh)


def test_refresh_counts_the_calls_since_a_whole_one() -> None:
    assert follow(watching(3), [9, 8, 7, 6, 5, 4, 3]) == [True, False, False] * 2 + [True]
    assert follow(watching(1), [9, 8, 7]) == [True, True, True]


def test_reset_starts_anew() -> None:
    clock = watching()
    follow(clock, [900, 800])
    clock.reset()
    assert follow(clock, [700, 600]) == [True, False]


def test_mixed_time_steps_are_whole_steps_and_so_is_the_call_after() -> None:
    mixed = torch.tensor([500, 400])
    assert follow(watching(), [900, mixed, 300, 200]) == [True, True, True, False]


def test_a_clock_that_does_not_watch_keeps_nothing() -> None:
    clock = StepClock(torch.zeros(10))
    clock.set(5)
    assert clock.refresh is None and clock._last is None
    assert list(watching().state_dict()) == ["bucket_of"]


def test_the_plan_takes_the_most_work_that_fits() -> None:
    sizes = {"a": (1000, 1000), "b": (250_000, 250_000), "c": (10, 10), "d": (500, 500)}
    macs = {"a": 50, "b": 90, "c": 70, "d": 60}
    rows = plan_memory(sizes, macs, 0.01)
    assert [(row.name, row.delta) for row in rows] == [
        ("b", False), ("c", True), ("d", True), ("a", False)
    ]  # fmt: skip
    assert [row.bytes for row in rows] == [2_000_000, 80, 4000, 8000]
    assert all(row.delta for row in plan_memory(sizes, macs, 0))


@pytest.mark.parametrize("megabytes", [0.0001, 0.005, 0.012, 3.0])
def test_the_plan_never_exceeds_its_budget(megabytes: float) -> None:
    sizes = {str(i): (37 * i, 91 * i) for i in range(1, 30)}
    rows = plan_memory(sizes, {str(i): i * i % 17 for i in range(1, 30)}, megabytes)
    assert sum(row.bytes for row in rows if row.delta) <= megabytes * 1e6


def test_with_deltas_whole_inputs_have_8_bits_and_changes_the_recipe_s() -> None:
    plans = [p for p in plan_layers(sites(tiny_unet()), DELTAS) if p.kind == "int8"]
    assert plans and {(p.act_bits, p.delta_bits) for p in plans} == {(8, 4)}
    rows = plan_memory({p.name: (1, 1) for p in plans}, {p.name: 1 for p in plans}, 8e-6)
    limited = limit_deltas(plans, rows)
    assert sum(p.delta_bits == 4 for p in limited) == 1
    assert all(p.act_bits == 8 for p in limited)
    plain = plan_layers(sites(tiny_unet()), Recipe().override("activations", bits=4))
    assert {(p.act_bits, p.delta_bits) for p in plain if p.kind == "int8"} == {(4, 0)}


def recorded(network: nn.Module, name: str, run) -> list[Tensor]:
    """Return the inputs of a layer while `run` runs."""
    seen: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_pre_hook(
        lambda layer, args: seen.append(args[0].clone())
    )
    run()
    handle.remove()
    return seen


def test_changes_are_counted_per_time_step_by_time() -> None:
    pipe = tiny_unconditional()
    name, steps = "mid_block.resnets.0.conv1", 5
    edges = time_bin_edges(1000, 4)
    stats = collect_deltas(
        pipe, pipe.unet, {name: ()}, edges, steps=steps, chains=3, seed=7, batch_size=2
    )
    own = [
        recorded(pipe.unet, name, lambda s=s: call_pipeline(pipe, s, steps=steps))
        for s in ((7, 8), (9,))
    ]
    hist, (low, high) = stats[f"{name}.delta_hist"], stats[f"{name}.delta_edges"][0].tolist()
    changes = [[(b - a) / 200 for a, b in itertools.pairwise(i)] for i in own]
    flat = torch.cat([u.flatten() for run in changes for u in run])
    assert low == pytest.approx(float(flat.min()), rel=1e-5)
    assert high == pytest.approx(float(flat.max()), rel=1e-5)
    # The calls after the first are at t = 600, 400, 200 and 0.
    each = sum(run[0].numel() for run in changes)
    assert hist.sum(-1)[0].tolist() == [2 * each, each, each, 0]
    for k, calls in enumerate([(3, 2), (1,), (0,)]):
        values = torch.cat([run[c].flatten() for run in changes for c in calls])
        places = ((values - low) / (high - low) * 2048).floor().clamp(0, 2047).long()
        expected = torch.bincount(places, minlength=2048)
        # Values on an edge may round to either side.
        assert int((hist[0, k] - expected).abs().sum()) <= 1e-3 * len(values)


def test_sizes_are_those_of_one_image() -> None:
    pipe = tiny_unconditional()
    names = [s.name for s in sites(pipe.unet) if s.role in ("conv", "shortcut", "attention")]
    how = {"steps": 2, "chains": 2, "seed": 0}
    stats = collect_deltas(pipe, pipe.unet, dict.fromkeys(names, ()), time_bin_edges(1000), **how)
    sizes, macs = delta_sizes(stats)
    x = torch.zeros(3, 3, 16, 16)
    expected = count_macs(pipe.unet, lambda: pipe.unet(x, 5), 3)
    assert macs == {name: expected[name] for name in names}
    inside = pipe.unet.mid_block.resnets[0].conv1
    assert sizes["mid_block.resnets.0.conv1"] == (32 * 64, inside.out_channels * 64)


def test_a_sampler_whose_time_never_goes_down_is_refused() -> None:
    pipe = tiny_unconditional()
    with pytest.raises(QuantempoError, match="sampler of several steps"):
        collect_deltas(
            pipe, pipe.unet, {"mid_block.resnets.0.conv1": ()}, time_bin_edges(1000),
            steps=1, chains=1, seed=0,
        )  # fmt: skip


def test_a_sampler_of_two_calls_a_step_is_named(caplog: pytest.LogCaptureFixture) -> None:
    pipe = swap_scheduler(tiny_unconditional(), "heun")
    collect_deltas(
        pipe, pipe.unet, {"mid_block.resnets.0.conv1": ()}, time_bin_edges(1000),
        steps=4, chains=1, seed=0,
    )  # fmt: skip
    assert "calls start anew" in caplog.text


def test_rates_are_the_best_scales_of_what_was_counted_made_wider() -> None:
    generator = torch.Generator().manual_seed(0)
    edges, table = time_bin_edges(1000, 4), torch.arange(1000) // 500
    hist = torch.zeros(1, 4, 256, dtype=torch.int64)
    for k, width in enumerate((1.0, 1.0, 0.1, 0.1)):
        values = (torch.randn(20_000, generator=generator) * width).clamp(-4, 4)
        hist[0, k] = torch.histc(values, 256, -4, 4).long()
    stats = {"a.delta_hist": hist, "a.delta_edges": torch.tensor([[-4.0, 4.0]])}
    found = search_deltas(stats, {"a": 4}, table, edges, Recipe().activations)["a.delta_rate"]
    assert found.shape == (1, 2) and found.dtype == torch.float32
    # The best step of a 15-level uniform quantizer of a unit Gaussian is 0.335 (Max 1960: 0.3352
    # for 16 levels, 0.355 for 15).
    assert 0.29 < float(found[0, 0]) / WIDEN < 0.39
    assert 7 < float(found[0, 0] / found[0, 1]) < 13


def small_packed() -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator)
    return quantize_network(tiny_unet(), [(x, 500), (x, 20)])


def test_refusals_name_the_layer() -> None:
    packed = small_packed()
    name = "mid_block.resnets.0.conv1"
    with pytest.raises(QuantempoError, match="no integer layer"):
        install_deltas(packed, {"conv_in": 4}, 1)
    with pytest.raises(QuantempoError, match="9-bit deltas"):
        install_deltas(packed, {name: 9}, 1)
    packed.get_submodule(name).act_bits = 4
    with pytest.raises(QuantempoError, match="on 4-bit inputs"):
        install_deltas(packed, {name: 4}, 1)
    packed.get_submodule(name).act_bits = 8
    with pytest.raises(QuantempoError, match="pack it first"):
        install_deltas(tiny_unet(), {name: 4}, 1)
    install_deltas(packed, {name: 4}, 3)
    for bad in ({}, {name: torch.ones(1, 2)}, {name: torch.zeros(1, 3)}):
        with pytest.raises(QuantempoError, match="search them again"):
            fill_deltas(packed, bad)
    assert [n for n, _ in delta_layers(copy.deepcopy(packed))] == [name]


def test_no_delta_layers_leave_the_clock_alone() -> None:
    packed = small_packed()
    install_deltas(packed, {}, 1)
    assert packed.quantempo_clock.refresh is None
