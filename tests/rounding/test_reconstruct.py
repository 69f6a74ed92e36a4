"""The drive over all blocks: integers in range, smaller errors, mean outputs, resuming."""

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import blocks, hooked
from quantempo.quantized import quantized_layers
from quantempo.recipe import RoundingSettings
from quantempo.rounding import nearest, reconstruct, round_denoiser
from quantempo.rounding.base import BlockRun
from quantempo.rounding.reconstruct import apply_rounding
from quantempo.run_folder import Kept, RunFolder
from tests.packed import KINDS
from tests.rounding.networks import Case, case

QUICK = RoundingSettings(samples=16, iterations=60, batch=8)


def _round(
    made: Case, settings: RoundingSettings, **options
) -> tuple[dict[str, Tensor], nn.Module]:
    copied = made.copied()
    parts = (made.denoiser, copied, made.data, settings)
    return round_denoiser(*parts, **options), copied


@torch.no_grad()
def _error(made: Case, copied: nn.Module) -> float:
    """Return the relative error of the packed network's output over the trace."""
    attach(copied, "simulated")
    pairs = [
        (made.data.replay(copied, b).double(), made.data.replay(made.denoiser, b).double())
        for b in made.data.batches(12)
    ]
    error = sum(float((got - wanted).square().sum()) for got, wanted in pairs)
    return error / sum(float(wanted.square().sum()) for _, wanted in pairs)


@pytest.mark.parametrize("kind", ["unconditional", "dit"])
def test_nearest_is_the_plain_function(kind: str) -> None:
    made = case(kind)
    result, copied = _round(made, replace(QUICK, name="nearest"))
    assert set(result) == set(made.scales)
    for name, layer in quantized_layers(copied):
        weight = made.denoiser.get_submodule(name).weight.detach()
        expected = nearest(weight, made.scales[name].weight_scale, made.specs[name])
        assert torch.equal(result[name], expected)
        assert torch.equal(layer.weight_codes, expected)


@pytest.mark.parametrize(("kind", "group"), [*((kind, 0) for kind in KINDS), ("dit", 16)])
def test_gptq_lowers_the_error_of_the_network(kind: str, group: int) -> None:
    made = case(kind, group=group)
    plain = _error(made, made.copied())
    result, copied = _round(made, replace(QUICK, name="gptq"))
    for name, layer in quantized_layers(copied):
        assert result[name].dtype == torch.int8 and result[name].shape == layer.weight_shape
        assert int(result[name].abs().max()) <= made.specs[name].qmax
        assert torch.equal(layer.weight_codes, result[name])
    # Random networks have nearly white inputs, where the gain is smallest.
    assert _error(made, copied) < 0.9 * plain


def test_errors_of_blocks_are_computed_for_a_log_that_shows_them(caplog, monkeypatch) -> None:
    made, calls = case("dit"), []
    plain = BlockRun.loss
    monkeypatch.setattr(BlockRun, "loss", lambda *args: calls.append(0) or plain(*args))
    quiet, _ = _round(made, replace(QUICK, name="gptq"))
    assert not calls
    with caplog.at_level(logging.DEBUG, logger="quantempo"):
        said, _ = _round(made, replace(QUICK, name="gptq"))
    assert len(calls) == 2 * caplog.text.count(": error ") > 0
    assert all(torch.equal(quiet[name], said[name]) for name in said)


@pytest.mark.parametrize("around", [True, False])
def test_a_block_whose_layers_run_outside_its_call_grows(around: bool, monkeypatch) -> None:
    """Lumina's block calls the last layer of its attention itself, others the network."""
    made = case("dit")

    def is_unit(module: nn.Module) -> bool:
        # Around the list of all blocks there is the network alone.
        return isinstance(module, nn.ModuleList) and isinstance(module[0], nn.Linear) == around

    monkeypatch.setattr("quantempo.models.layers.is_unit", is_unit)
    plain = _error(made, made.copied())
    result, copied = _round(made, replace(QUICK, name="gptq"))
    assert set(result) == set(made.scales)
    assert _error(made, copied) < 0.9 * plain


def test_the_float_network_and_the_engine_are_left_as_they_were() -> None:
    made = case("dit")
    before = {k: v.clone() for k, v in made.denoiser.state_dict().items()}
    _, copied = _round(made, replace(QUICK, name="adaround", iterations=3, bias=True))
    after = made.denoiser.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    for network in (made.denoiser, copied):
        assert all(p.grad is None for p in network.parameters())
        inner = [m for n, m in network.named_modules() if n]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in inner)
    assert all(layer.kernel.backend == "simulated" for _, layer in quantized_layers(copied))


@pytest.mark.parametrize("kind", ["unconditional", "dit"])
@torch.no_grad()
def test_after_bias_correction_mean_outputs_are_the_float_ones(kind: str) -> None:
    made = case(kind)
    # In float64, where sums in other batches move no code that sits on a rounding edge.
    floats = copy.deepcopy(made.denoiser).double()
    copied = made.copied(floats)
    settings = replace(QUICK, name="nearest", bias=True, samples=len(made.data))
    result = round_denoiser(floats, copied, made.data, settings)
    names = [name for name, layer in quantized_layers(copied) if layer.bias is not None]
    assert {f"{name}.bias" for name in names} == {k for k in result if k.endswith(".bias")}
    means: list[dict[str, list[Tensor]]] = []
    for network in (floats, copied):
        seen: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            layer = network.get_submodule(name)
            axis = 1 if hasattr(layer, "kernel_size") else -1

            def see(m, args, y, name=name, axis=axis, seen=seen) -> None:
                seen[name].append(y.movedim(axis, -1).flatten(0, -2).double())

            layer.register_forward_hook(see)
        for batch in made.data.batches(12):
            made.data.replay(network, batch)
        for module in network.modules():
            module._forward_hooks.clear()
        means.append(seen)
    for name in names:
        wanted, got = (torch.cat(seen[name]).mean(0) for seen in means)
        spread = torch.cat(means[0][name]).square().mean().sqrt()
        # Float32 outputs, whose sums are float64: far below a thousandth of the output's size.
        assert float((got - wanted).abs().max() / spread) < 1e-5, name
        layer = copied.get_submodule(name)
        assert torch.equal(layer.bias, result[f"{name}.bias"])


def test_blocks_are_rounded_as_a_run_meets_them() -> None:
    made = case("unconditional")
    job = reconstruct._Job(made.denoiser, made.copied(), made.data, QUICK, reconstruct.BUDGET)
    names, run = [block.name for block in job.blocks], list[str]()
    parts = {name: made.denoiser.get_submodule(name) for name in names}
    with hooked(parts, lambda name, *_: run.append(name), before=True):
        made.data.replay(made.denoiser, job.batches[0])
    assert names == run != [b.name for b in blocks(made.denoiser) if b.name in parts]


def test_finished_blocks_are_read_back(tmp_path: Path, monkeypatch) -> None:
    made = case("dit")
    settings = replace(QUICK, name="adaround", iterations=2, bias=True)
    kept = Kept(RunFolder(tmp_path), "k")
    first, _ = _round(made, settings, kept=kept)
    calls = []
    plain = reconstruct._Job.round

    def counted(job, block):
        calls.append(block.name)
        return plain(job, block)

    monkeypatch.setattr(reconstruct._Job, "round", counted)
    again, copied = _round(made, settings, kept=kept)
    assert not calls
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = made.copied()
    apply_rounding(other, first)
    for network in (copied, other):
        for name, layer in quantized_layers(network):
            assert torch.equal(layer.weight_codes, again[name])
            assert layer.bias is not None and torch.equal(layer.bias, again[f"{name}.bias"])
            assert torch.equal(layer.act_scale, made.scales[name].act_scale)
    # A killed run: the last block is missing. It and no other is done again, to the same bits.
    last = max(tmp_path.glob("*.safetensors"))
    last.unlink()
    third, _ = _round(made, settings, kept=kept)
    assert len(calls) == 1
    assert all(torch.equal(first[k], third[k]) for k in first)
    last.write_bytes(last.read_bytes()[:64])
    _round(made, settings, kept=kept)
    assert calls == [calls[0]] * 2
    _round(made, replace(settings, iterations=0), kept=kept)
    assert len(calls) == 2 + len(list(tmp_path.glob("*.safetensors")))


def test_inputs_beyond_the_budget_are_kept_in_half_precision() -> None:
    made = case("dit")
    settings = replace(QUICK, name="gptq")
    whole, copied = _round(made, settings)
    halves, other = _round(made, settings, budget=1)
    moved = sum(int((whole[k] != halves[k]).sum()) for k in whole)
    # A relative 2^-11 of the inputs: few codes of a three-bit grid are that near a border.
    assert moved / sum(v.numel() for v in whole.values()) < 0.1
    assert _error(made, other) == pytest.approx(_error(made, copied), rel=0.2)


def test_a_float_copy_and_wrong_names_are_refused() -> None:
    made = case("unconditional")
    with pytest.raises(QuantempoError, match="not quantized"):
        round_denoiser(made.denoiser, made.denoiser, made.data, QUICK)
    with pytest.raises(QuantempoError, match="gptq"):
        _round(made, replace(QUICK, name="gtpq"))
    with pytest.raises(QuantempoError, match=r"rounding\.start needs a start itself: 'adaround'"):
        _round(made, replace(QUICK, name="adaround", start="adaround"))
