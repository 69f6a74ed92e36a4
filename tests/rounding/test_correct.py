"""Asymmetric calibration: weights that make up for the error of a layer's inputs."""

import gc
import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.calibration.dataset import MemorySet
from quantempo.errors import QuantempoError
from quantempo.models.layers import hooked, input_of
from quantempo.pipeline.quantize import Quantized, plan
from quantempo.quantized import QConv2d, QLayer, StepClock, WeightOnlyLinear, quantized_layers
from quantempo.recipe import Recipe, RoundingSettings
from quantempo.rounding import round_alone, round_denoiser
from quantempo.rounding.base import dequantized_input
from quantempo.rounding.gptq import Inverse, moments
from quantempo.run_folder import Kept, RunFolder
from tests.engines import one_by_one as use
from tests.engines.quantized import make_clock, make_conv, make_linear
from tests.packed import KINDS
from tests.rounding.networks import Case, case

GPTQ = RoundingSettings(name="gptq", samples=16, batch=8)


def _columns(layer: QLayer, x: Tensor) -> Tensor:
    """Return what rows of the weight are multiplied with, (groups, K, N) float64."""
    if not isinstance(layer, QConv2d):
        return x.double().reshape(-1, x.shape[-1]).t()[None]
    how = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return F.unfold(x.double(), *how).permute(1, 0, 2).flatten(1).unflatten(0, (layer.groups, -1))


LAYERS: dict[str, Callable[[StepClock], QLayer]] = {
    "linear": lambda clock: make_linear(12, 5, clock=clock),
    "segments": lambda clock: make_linear(12, 5, segments=(4, 8), clock=clock),
    "tokens": lambda clock: make_linear(12, 5, clock=clock, dynamic=True),
    "conv": lambda clock: make_conv(6, 4, clock=clock),
    "strided": lambda clock: make_conv(6, 4, stride=(2, 1), padding=(0, 2), clock=clock),
    "groups": lambda clock: make_conv(6, 4, groups=2, clock=clock),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_ridge_regression_on_the_float_inputs(kind: str) -> None:
    """Argmin |W X_f - W' X|^2 + l |W' - W|^2 as least squares of stacked columns, float64."""
    layer, g = LAYERS[kind](make_clock()), torch.Generator().manual_seed(3)
    x_f = torch.randn((9, 6, 7, 6) if isinstance(layer, QConv2d) else (9, 7, 12), generator=g)
    x = dequantized_input(layer, 0.8 * x_f + 0.2 * torch.randn(x_f.shape, generator=g))
    weight = torch.randn(layer.weight_shape, generator=g).flatten(1)
    hessian, cross = moments(layer, x), moments(layer, x, x_f - x)
    parts = [*zip(weight.split(len(weight) // len(hessian)), hessian, cross, strict=True)]
    got, half = (
        torch.cat([Inverse.of(h).corrected(w, c, share) for w, h, c in parts]) for share in (1, 0.5)
    )
    expected = []
    columns = (_columns(layer, x_f), _columns(layer, x))
    for (w, *_), exact, given in zip(parts, *columns, strict=True):
        w = w.double()
        ridge = (0.01 * given.square().sum(1).mean()).sqrt() * torch.eye(len(given)).double()
        left, right = torch.cat([given.t(), ridge]), torch.cat([exact.t() @ w.t(), ridge @ w.t()])
        expected.append(torch.linalg.lstsq(left, right).solution.t())
        before, after = ((v @ given - w @ exact).square().sum() for v in (w, expected[-1]))
        assert after < 0.8 * before
    assert torch.allclose(got.double(), torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert torch.allclose(half, (got + weight) / 2, atol=1e-6)


def _rounded(
    made: Case, settings: RoundingSettings, **options: Any
) -> tuple[float, nn.Module, dict[str, Tensor]]:
    """Return the relative error of a rounded network over the trace, it, and its tensors."""
    copied, error, power = made.copied(), 0.0, 0.0
    result = round_denoiser(made.denoiser, copied, made.data, settings, **options)
    with torch.no_grad():
        for batch in made.data.batches(12):
            wanted = made.data.replay(made.denoiser, batch)
            error += float((made.data.replay(copied, batch) - wanted).square().sum())
            power += float(wanted.square().sum())
    return error / power, copied, result


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_comes_nearer_to_the_float_one(kind: str) -> None:
    """By a half, measured; a sign the other way makes it worse."""
    made = case(kind)
    without, corrected = (_rounded(made, replace(GPTQ, correct=share))[0] for share in (0.0, 1.0))
    assert corrected < 0.7 * without


def test_scales_in_groups_are_found_again_kept_and_packed(tmp_path: Path) -> None:
    made, settings = case("dit", group=16), replace(GPTQ, correct=1.0)
    kept = Kept(RunFolder(tmp_path), "k")
    without = _rounded(made, replace(GPTQ, correct=0.0))[0]
    error, copied, result = _rounded(made, settings, kept=kept)
    assert error < 0.7 * without
    again = _rounded(made, settings, kept=kept)[1]
    plans = plan(made.denoiser, made.session.recipe)
    scales = made.session.run.read_safetensors("scales.safetensors")
    packed = Quantized.of(made.session.recipe, plans, scales, result)
    others = (again, packed.install(made.denoiser, copy=True))
    for name, layer in quantized_layers(copied):
        for other in (network.get_submodule(name) for network in others):
            assert torch.equal(layer.weight, other.weight)
        assert not torch.equal(layer.weight_group, made.scales[name].weight_group)


def test_what_it_leads_beyond_the_codes_is_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, expected = case("dit"), 0
    monkeypatch.setattr(Inverse, "corrected", lambda _, weight, *__: 2 * weight)
    with caplog.at_level("INFO", "quantempo"):
        _rounded(made, replace(GPTQ, correct=1.0))
    for name, s in made.scales.items():
        ratio = (
            made.denoiser.get_submodule(name).weight.flatten(1) / s.weight_scale[:, None]
        ).abs()
        expected += int(((2 * ratio > 3.5) & (ratio <= 3.5)).sum())
    said = [m for m in caplog.messages if "beyond their codes" in m]
    assert sum(int(m.split()[3]) for m in said) == expected > 0
    caplog.clear()
    _rounded(made, GPTQ)
    assert "beyond" not in caplog.text


def test_its_matrices_are_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, alive = case("dit"), {}
    width = max(made.denoiser.get_submodule(name).weight[0].numel() for name in made.scales)

    def count(name: str, run: Any, *args: Any) -> Any:
        every = (t for t in gc.get_objects() if type(t) is Tensor)
        found = (t for t in every if t.shape[-2:] == (width, width))
        alive[name] = max(alive.get(name, 0), len({t.data_ptr() for t in found}))
        return run(*args)

    module = importlib.import_module("quantempo.rounding.gptq")
    for owner, name in ((module, "moments"), (torch, "cholesky_inverse")):
        monkeypatch.setattr(owner, name, partial(count, name, getattr(owner, name)))
    _rounded(made, replace(GPTQ, correct=1.0))
    # And one that is being made.
    assert alive == {"moments": 2, "cholesky_inverse": 4}


@torch.no_grad()
@pytest.mark.parametrize("kind, times", [("schnell", 7), ("dit", 6)])
def test_codes_are_better_on_their_inputs_than_the_nearest(kind: str, times: int) -> None:
    recipe = Recipe.load("w4a8").override("rounding", samples=7, batch=4)
    network, errors = use.tiny(kind), dict[str, list[float]]()
    data = MemorySet.of_calls(network, [use.call(kind, n, seed=n) for n in (3, 4)])
    plans = [p for p in plan(network, recipe, data) if p.kind == "weight_only"]
    layers, calls = {p.name: network.get_submodule(p.name) for p in plans}, list[str]()
    with hooked(layers, lambda name, *_: calls.append(name), before=True):
        found = round_alone(network, data, plans, recipe.rounding)
    # The second call ends at the last of the first layers of equal inputs.
    assert len(calls) == times

    def see(name: str, layer: Any, args: Any, kwargs: Any) -> None:
        x, codes = input_of(args, kwargs), [found[k] for k in found if k.startswith(name)]
        both = (WeightOnlyLinear(layer, 4, 16).fill(layer, *some) for some in (codes, ()))
        errors[name] = [float((other(x) - layer.forward(x)).norm()) for other in both]

    with hooked(layers, see, before=True):
        data.replay(network, data.rows(torch.arange(4)))
    assert len(errors) == len(plans) and all(a < 0.5 * b for a, b in errors.values())
    none = Quantized.of(recipe, plans, {"bucket_of": torch.zeros(1, dtype=torch.int64)}, {})
    with pytest.raises(QuantempoError, match=r"no scales or codes for .*norm"):
        none.install(network, copy=True)


@pytest.mark.parametrize("folder", [None, "blocks"])
def test_one_that_no_call_reaches_is_nearest_and_what_is_finished_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, folder: str | None
) -> None:
    recipe = Recipe.load("w4a8").override("rounding", samples=7, batch=4)
    network, module = use.tiny("dit"), importlib.import_module("quantempo.rounding.gptq")
    data = MemorySet.of_calls(network, [use.call("dit", n, seed=n) for n in (3, 4)])
    network.idle = nn.Linear(24, 8)
    plans = [p for p in plan(network, recipe, data) if p.kind == "weight_only"]
    plans.append(replace(plans[0], name="idle"))
    kept = folder and Kept(RunFolder(tmp_path / folder), "key")
    given = network, data, plans, recipe.rounding, kept
    before, alone = round_alone(*given), module._alone
    assert "never run by the trace, rounded to nearest: idle" in caplog.text
    near = WeightOnlyLinear(network.idle, 4, plans[0].group).fill(network.idle)
    codes = [before[f"idle{part}"] for part in ("", ".weight_scale", ".weight_group")]
    wanted = near.weight_codes, near.weight_scale, near.weight_group
    assert all(torch.equal(a, b) for a, b in zip(codes, wanted, strict=True))
    for left in (sorted(tmp_path.rglob("*.safetensors"))[:1], []):
        for file in left:
            file.unlink()
        rounded = Mock(side_effect=alone)
        monkeypatch.setattr(module, "_alone", rounded)
        after = round_alone(*given)
        assert rounded.call_count == (len(left) if folder else len(plans))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
