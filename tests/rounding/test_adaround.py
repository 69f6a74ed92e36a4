"""Soft codes and the learning loop, on one small block."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from quantempo.calibration.rows import Law, Place
from quantempo.core import WEIGHT
from quantempo.quantized import LayerPlan, QLayer, fill, install_clock, swap_layers
from quantempo.recipe import RoundingSettings
from quantempo.rounding import ROUNDINGS, adaround, nearest
from quantempo.rounding.adaround import SoftKernel
from quantempo.rounding.base import BlockRun, Inputs, Unit, dequantized_input
from tests.engines.quantized import make_clock, make_linear

SPEC = replace(WEIGHT, bits=3)
SETTINGS = RoundingSettings("adaround", "nearest", samples=64, iterations=200, batch=16)


class _Toy(nn.Module):
    """x + linear(silu(conv(x)) over pixels), a residual block in small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(6, 12, 3, padding=1), nn.Linear(12, 6)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.conv(x)).permute(0, 2, 3, 1)
        return x + self.linear(hidden).permute(0, 3, 1, 2)


def _unit(
    settings: RoundingSettings = SETTINGS, shrink: float = 1.0, repeat: int = 1, noise: float = 0.0
) -> Unit:
    """Return the toy with 3-bit weights, two buckets, correlated inputs, `repeat` at a time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        toy = _Toy().eval()
        mixing = torch.randn(6, 6)
        x = torch.einsum("nchw,cd->ndhw", torch.randn(64, 6, 5, 5), mixing)
    times = torch.arange(64) // repeat * repeat * 15
    x = x * (1 + 3 * (times >= 500).float())[:, None, None, None]
    g = torch.Generator().manual_seed(1)
    moved = x + noise * torch.randn(x.shape, generator=g)
    copied = copy.deepcopy(toy)
    clock = install_clock(copied, torch.arange(1000) * 2 // 1000)
    names = ("conv", "linear")
    swap_layers(copied, [LayerPlan(n, buckets=2, weight_bits=3) for n in names], clock)
    inputs = {"conv": x, "linear": nn.functional.silu(toy.conv(x)).movedim(1, -1)}
    scales = {}
    for name in names:
        layer, float_layer = copied.get_submodule(name), toy.get_submodule(name)
        scales[name] = float_layer.weight.detach().flatten(1).abs().amax(1) / 3
        tops = [inputs[name][times // 500 == bucket].abs().max() for bucket in (0, 1)]
        act = torch.stack(tops)[None].detach() / 127 * shrink
        codes = nearest(float_layer.weight.detach(), scales[name], SPEC)
        zero = torch.tensor([128], dtype=torch.int32)
        fill(layer, codes, scales[name], float_layer.bias, act, zero)
    law: Law = {f"[0][{i}]": Place(0, 1) for i in range(2)} | {"[2]": Place(0, 1)}
    recorded, behind = Inputs(64, 2**30, law), Inputs(64, 2**30, law)
    for kept, value in ((recorded, x), (behind, moved)):
        kept.add(64, (value, times), {})
        kept.close()
    floats = {n: toy.get_submodule(n) for n in names}
    copies = {n: copied.get_submodule(n) for n in names}
    run = BlockRun("toy", toy, copied, floats, copies, recorded, behind, times, clock, 16)
    for name in names:
        run.assign(name, copies[name].weight_codes.clone())
    weights = {n: layer.weight for n, layer in floats.items()}
    return Unit(weights, scales, dict.fromkeys(names, SPEC), settings, run)


def _layer(bits: int = 3) -> QLayer:
    return make_linear(20, 8, clock=make_clock(2), bits=(bits, 8))


@pytest.mark.parametrize("shift", [-2, -1, 0, 1, 2])
def test_soft_codes_start_on_the_side_of_the_given_ones(shift: int) -> None:
    layer = _layer()
    rows = layer.weight_scale[:, None]
    g = torch.Generator().manual_seed(1)
    weight = (torch.rand(8, 20, generator=g) * 8 - 4) * rows
    codes = (nearest(weight, layer.weight_scale, SPEC) + shift).clamp(-3, 3).to(torch.int8)
    kernel = SoftKernel(layer, weight, codes, SPEC)
    assert torch.equal(kernel.codes(), codes)
    h = kernel.h()
    assert float(h.detach().min()) >= 0.0099 and float(h.detach().max()) <= 0.9901
    if shift == 0:
        # From the nearest codes the soft weight is the float one, but for ends of h and of range.
        inside = (weight / rows).abs() < 3
        gap = ((kernel.weight().detach() - weight) / rows).abs()
        assert float(gap[inside].max()) <= 0.0101


def test_soft_codes_in_groups_are_between_neighbours_of_their_grid() -> None:
    layer = make_linear(40, 8, clock=make_clock(2), bits=(4, 8, 16))
    rows, grid = layer.weight_scale[:, None], layer.grid
    weight = rows * torch.randn(8, 40, generator=torch.Generator().manual_seed(2)) * 40
    kernel = SoftKernel(layer, weight, nearest(weight, layer.weight_scale, grid), grid)
    assert torch.equal(kernel.codes(), nearest(weight, layer.weight_scale, grid))
    kernel.v.data.neg_()
    layer.set_codes(kernel.codes())
    moved = (layer.weight_codes - nearest(weight, layer.weight_scale, grid)).abs()
    assert set((moved / grid.step).flatten().tolist()) == {0.0, 1.0}


def test_soft_kernels_compute_what_the_integers_give() -> None:
    unit = _unit()
    for name, layer in unit.block.copies.items():
        x = next(unit.block.layer_inputs([name]))[name]
        expected, codes = layer.kernel(x), layer.weight_codes
        kernel = SoftKernel(layer, unit.weights[name], codes, unit.grid(name), spread=0.0)
        kernel.v.data = 100 * kernel.v.data.sign()
        # Float32 sums of up to 54 terms against exact integers.
        y = kernel(x).detach()
        assert float((y - expected).abs().max() / expected.abs().max()) < 1e-5


def test_rounding_passes_the_gradient_on_inside_the_range() -> None:
    layer = _layer(8)
    layer.clock.set(torch.tensor([700]))
    x = 3 * torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(dequantized_input(layer, x.requires_grad_()).sum(), [x])
    codes = (x / layer.act_scale[0, 1]).round() + layer.act_zero_point[0]
    inside = (codes >= 0) & (codes <= 255)
    assert not bool(inside.all()) and torch.equal(gradient, inside.float())


def test_learning_beats_its_start_and_is_the_same_for_the_same_seed() -> None:
    results = []
    for seed in (0, 0, 1):
        unit = _unit(replace(SETTINGS, seed=seed))
        with torch.no_grad():
            powers = unit.block.powers()
            before = unit.block.loss(powers)
            codes = ROUNDINGS.get("adaround").codes(unit)
            after = unit.block.loss(powers)
        assert after < 0.6 * before
        for name, layer in unit.block.copies.items():
            assert codes[name].dtype == torch.int8 and int(codes[name].abs().max()) <= 3
            assert torch.equal(layer.weight_codes, codes[name])
        results.append(codes)
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])
    assert any(not torch.equal(results[0][n], results[2][n]) for n in results[0])


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_what_is_worse_than_the_start_is_not_kept(start: str, monkeypatch) -> None:
    unit = _unit(replace(SETTINGS, start=start))
    monkeypatch.setattr(
        adaround, "_learn_codes", lambda unit, start, powers: {n: -c for n, c in start.items()}
    )
    with torch.no_grad():
        expected = ROUNDINGS.get(start).codes(_unit(replace(SETTINGS, start=start)))
        codes = ROUNDINGS.get("adaround").codes(unit)
    assert adaround.START_KEPT in unit.notes[0]
    for name, layer in unit.block.copies.items():
        assert torch.equal(codes[name], expected[name])
        assert torch.equal(layer.weight_codes, expected[name])


@pytest.mark.parametrize("start", ["nearest", "gptq"])
def test_learning_starts_near_codes_that_know_more_than_the_weight(start, monkeypatch):
    """H is at most 0.2 / 2 from the codes of gptq, and anywhere for the nearest ones."""
    seen: list[Tensor] = []

    def stop(block: BlockRun, *args: object, **kwargs: object) -> None:
        h = torch.cat([layer.kernel.h().flatten() for layer in block.copies.values()])
        seen.append((h - h.round()).abs().max())

    monkeypatch.setattr(adaround, "learn", stop)
    with torch.no_grad():
        ROUNDINGS.get("adaround").codes(_unit(replace(SETTINGS, start=start)))
    assert (float(seen[0]) <= 0.101) == (start == "gptq")


@pytest.mark.parametrize("change", ["drop", "layers"])
def test_each_part_of_the_loss_is_at_work(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs from the float model while learning (QDrop), and the errors of single layers."""

    def codes(drop: float) -> dict[str, Tensor]:
        unit = _unit(replace(SETTINGS, drop=drop, iterations=40), noise=0.5)
        with torch.no_grad():
            return adaround._learn_codes(
                unit, ROUNDINGS.get("nearest").codes(unit), unit.block.powers()
            )

    whole = codes(0.0)
    if change == "layers":
        monkeypatch.setattr(adaround, "LAYER_SHARE", 0.0)
    other = codes(1.0 if change == "drop" else 0.0)
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_elements_are_the_float_ones_with_the_probability_asked_for() -> None:
    quantized, exact = (torch.zeros(100, 100), {"a": 1}), (torch.ones(100, 100), {"a": 1})
    generator = torch.Generator().manual_seed(0)
    mixed, rest = adaround._mix(quantized, exact, 0.2, generator)
    # 10,000 draws: 5 standard deviations are 0.02.
    assert float(mixed.mean()) == pytest.approx(0.2, abs=0.02) and rest == {"a": 1}
    assert torch.equal(adaround._mix(quantized, exact, 0.0, generator)[0], quantized[0])


def test_each_time_step_has_its_own_power() -> None:
    block = _unit(repeat=3).block
    (power,) = block.powers()
    (output,) = block.run(torch.arange(64), exact=True)
    each = output.detach().square().flatten(1).mean(1)
    assert len(block.times.unique()) == 22
    for t in block.times.unique():
        here = block.times == t
        torch.testing.assert_close(power[here], each[here].mean().expand(int(here.sum())))


def test_inputs_in_half_precision_are_clipped_to_its_range() -> None:
    inputs = Inputs(2, 0, {"[0][0]": Place(0, 1)})
    inputs.add(2, (torch.tensor([[1e6, -1e6], [1.0, 2.0]]),), {})
    inputs.close()
    assert inputs.halved
    (value,), _ = inputs.take(torch.arange(2), torch.device("cpu"))
    assert value.tolist() == [[65504.0, -65504.0], [1.0, 2.0]] and value.dtype == torch.float32


def test_gptq_of_a_block_uses_the_inputs_behind_its_rounded_layers() -> None:
    unit = _unit()
    with torch.no_grad():
        powers = unit.block.powers()
        before = unit.block.loss(powers)
        codes = ROUNDINGS.get("gptq").codes(unit)
        assert unit.block.loss(powers) < before
    x = next(unit.block.layer_inputs(["linear"]))["linear"]
    layer = unit.block.copies["linear"]
    flat = dequantized_input(layer, x).flatten(0, -2)
    error = unit.weights["linear"].detach() - layer.weight_scale[:, None] * codes["linear"]
    plain = nearest(unit.weights["linear"].detach(), layer.weight_scale, SPEC)
    other = unit.weights["linear"].detach() - layer.weight_scale[:, None] * plain
    assert float((flat @ error.t()).square().sum()) < float((flat @ other.t()).square().sum())
