"""Deltas and 8-bit attention from measurement to a saved model that samples with other steps."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from quantempo.calibration.deltas import collect_deltas, delta_sizes, search_deltas
from quantempo.calibration.statistics import time_bin_edges
from quantempo.checkpoint.pack import pack_denoiser
from quantempo.engines.select import attach
from quantempo.models.attention import attention_blocks
from quantempo.models.layers import sites
from quantempo.models.sampling import call_pipeline
from quantempo.quantized import (
    delta_layers,
    int8_attention_blocks,
    limit_deltas,
    plan_memory,
    quantized_layers,
)
from quantempo.quantized.plan import plan_layers
from quantempo.recipe import Recipe
from quantempo.scales.search import LayerScales
from tests.engines.quantized import quantize_network
from tests.tiny import tiny_unconditional

STEPS = 10
EDGES = time_bin_edges(1000)
RECIPE = Recipe().override("delta", enabled=True).override("activations", bits=4)


def plans_of(recipe: Recipe) -> list[Any]:
    return plan_layers(sites(tiny_unconditional().unet), recipe)


@functools.cache
def measured() -> dict[str, Tensor]:
    pipe = tiny_unconditional()
    inputs = {p.name: p.segments for p in plans_of(RECIPE) if p.kind == "int8"}
    return collect_deltas(pipe, pipe.unet, inputs, EDGES, steps=STEPS, chains=4, seed=100)


def make(recipe: Recipe = RECIPE, attention: bool = False, megabytes: float = 0.0) -> Any:
    """Return a packed tiny pipeline; scales by min-max, of the bits that the recipe asks for."""
    pipe = tiny_unconditional()
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    twin = dict(quantized_layers(quantize_network(pipe.unet, [(noise, 999), (noise, 5)])))
    plans = plan_layers(sites(pipe.unet), recipe)
    scales, codes = {}, {}
    table = torch.arange(1000) * 3 // 1000
    for i, plan in enumerate(plans):
        if plan.kind != "int8":
            continue
        layer, qmax = twin[plan.name], 2**plan.act_bits - 1
        zero = (layer.act_zero_point.double() * qmax / 255).round().int()
        scale = (layer.act_scale, layer.act_scale * 255 / qmax)[plan.act_bits < 8]
        scales[plan.name] = LayerScales(scale, zero, layer.weight_scale)
        codes[plan.name] = layer.weight_codes
        plans[i] = replace(plan, buckets=3)
    rates: dict[str, Tensor] = {}
    if recipe.delta.enabled:
        plans = limit_deltas(plans, plan_memory(*delta_sizes(measured()), megabytes))
        bits = {p.name: p.delta_bits for p in plans if p.delta_bits}
        rates = search_deltas(measured(), bits, table, EDGES, recipe.activations)
    names = [name for name, _ in attention_blocks(pipe.unet)][:2] if attention else []
    pack_denoiser(
        pipe.unet, plans, scales, codes, bucket_of=table, per_unit=1.0, sites={},
        recipe=recipe, source_sha256="", rates=rates, attention=names,
    )  # fmt: skip
    return pipe


def sampled(pipe: Any, steps: int, count: int = 2) -> np.ndarray:
    return call_pipeline(pipe, range(count), steps=steps).astype(np.float64)


def along(network: Any, steps: int) -> list[Tensor]:
    """Return the outputs on the float model's own trajectory; errors do not feed back into x_t."""
    pipe, calls = tiny_unconditional(), []
    pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(args))
    sampled(pipe, steps)
    with torch.no_grad():
        return [network(*args).sample for args in calls]


@pytest.mark.parametrize("steps", [7, STEPS, 25])
def test_changes_of_4_bits_lose_less_than_inputs_of_4_bits(steps: int) -> None:
    # The last quarter of the steps: random weights change their inputs by as much as these are
    # until then (by a quarter after), and there is nothing to gain.
    exact = along(tiny_unconditional().unet, steps)
    recipes = [
        RECIPE.override("delta", enabled=False),
        RECIPE,
        RECIPE.override("delta", enabled=False).override("activations", bits=8),
    ]
    errors = []
    for recipe in recipes:
        network = make(recipe).unet
        attach(network, "simulated")
        pairs = list(zip(along(network, steps), exact, strict=True))[-steps // 4 :]
        errors.append(sum(float((y - x).pow(2).mean()) for y, x in pairs))
    assert errors[2] < errors[1] < 0.75 * errors[0]


def test_a_saved_model_samples_the_same(tmp_path: Path) -> None:
    pipe = make(attention=True)
    rates = {name: layer.delta_rate.clone() for name, layer in delta_layers(pipe.unet)}
    names = int8_attention_blocks(pipe.unet)
    assert rates and len(names) == 2 and {r.shape[1] for r in rates.values()} == {3}
    expected = sampled(pipe, 6)
    pipe.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed/unet/config.json").read_text())
    assert set(config["quantization_config"]["delta"]) == {"bits", "buckets", "refresh"}
    assert config["quantization_config"]["attention"] == names
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    again.set_progress_bar_config(disable=True)
    loaded = dict(delta_layers(again.unet))
    assert all(torch.equal(loaded[name].delta_rate, rate) for name, rate in rates.items())
    assert {layer.delta_bits for layer in loaded.values()} == {4}
    assert int8_attention_blocks(again.unet) == names
    assert np.array_equal(sampled(again, 6), expected)
    half = DiffusionPipeline.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    kept = dict(delta_layers(half.unet))
    assert all(torch.equal(kept[name].delta_rate, rate) for name, rate in rates.items())


def test_under_a_budget_the_other_layers_stay_plain(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quantempo"):
        pipe = make(megabytes=0.2)
        attach(pipe.unet, "simulated")
    chosen = [name for name, _ in delta_layers(pipe.unet)]
    rows = plan_memory(*delta_sizes(measured()), 0.2)
    assert 0 < len(chosen) < len(rows) and set(chosen) == {r.name for r in rows if r.delta}
    sampled(pipe, 2, count=1)
    state = 0
    for name, layer in quantized_layers(pipe.unet):
        assert layer.kernel.backend == ("simulated delta" if name in chosen else "simulated")
        if name in chosen:
            state += 4 * (layer.kernel.input.numel() + layer.kernel.output.numel())
    # What the plan promised of one image is what one image takes.
    assert state == sum(row.bytes for row in rows if row.delta) <= 0.2e6
    assert f"{len(chosen)} layers keep {state / 1e6:.2f} MB" in caplog.text


def test_batches_of_other_sizes_follow_each_other() -> None:
    pipe = make()
    attach(pipe.unet, "simulated")
    first = sampled(pipe, 5, count=3)
    sampled(pipe, 5, count=1)
    assert np.array_equal(sampled(pipe, 5, count=3), first)
