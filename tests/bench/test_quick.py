"""Presets, random inputs, and quantizing without data: enough to time, checked as arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from quantempo.bench.forwards import sample_of
from quantempo.bench.quick import cast_floats, quick_quantize, quick_recipe
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.evaluation.fidelity import sqnr_db
from quantempo.models.presets import build_preset, ddim_loop, fuse_projections, random_inputs
from quantempo.quantized import Float16Linear, quantized_layers
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional, tiny_unet

MAKERS: dict[str, Any] = {
    "unet": tiny_unet,
    "text": lambda: tiny_text().unet,
    "dit": lambda: tiny_dit().transformer,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sdxl", 2_567_463_684), ("sd15", 859_520_964), ("ddpm35m", 35_746_307)],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    net = build_preset(name, "meta")
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert not net.training


@pytest.mark.parametrize(("name", "size", "text"), [("sd15", 64, 768), ("sdxl", 128, 2048)])
def test_text_presets_take_latents_and_77_tokens(name: str, size: int, text: int) -> None:
    net = build_preset(name, "meta")
    net.conv_in.to_empty(device="cpu")
    # The first parameter says where the inputs go.
    inputs = random_inputs(net, 2)
    assert inputs["sample"].shape == (2, 4, size, size)
    assert inputs["encoder_hidden_states"].shape == (2, 77, text)
    assert inputs["timestep"].shape == () and inputs["timestep"].dtype == torch.int64
    if name == "sdxl":
        added = inputs["added_cond_kwargs"]
        assert added["text_embeds"].shape == (2, 1280)
        assert added["time_ids"].tolist() == [[1024, 1024, 0, 0, 1024, 1024]] * 2


def test_unknown_presets_and_networks_are_refused() -> None:
    with pytest.raises(QuantempoError, match=r"no model 'sd16'.*did you mean 'sd15'"):
        build_preset("sd16")
    with pytest.raises(QuantempoError, match="cannot make inputs for a Conv2d"):
        random_inputs(torch.nn.Conv2d(3, 3, 1), 1)


def test_a_preset_is_the_same_every_time_and_leaves_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, again = (build_preset("ddpm35m").conv_in.weight for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("kind", MAKERS)
def test_inputs_are_those_of_the_network(kind: str) -> None:
    net = MAKERS[kind]()
    inputs = random_inputs(net, 3, time=123, seed=5)
    again = random_inputs(net, 3, time=123, seed=5)
    with torch.no_grad():
        output = sample_of(net(**inputs))
    assert output.shape[0] == 3 and bool(output.isfinite().all())
    assert torch.equal(output, sample_of(net(**again)))
    # One number for all rows, as pipelines pass it; DiT pipelines pass one for each.
    expected = [123] * 3 if "DiT" in type(net).__name__ else 123
    assert inputs["timestep"].tolist() == expected


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_quick_network_computes_what_the_float_one_does(
    kind: str, dtype: torch.dtype | None, request: pytest.FixtureRequest
) -> None:
    net = MAKERS[kind]()
    packed = copy.deepcopy(net)
    plans = quick_quantize(packed, [random_inputs(net, 2, time=t) for t in (900, 300)], dtype=dtype)
    layers = dict(quantized_layers(packed))
    assert layers.keys() == {plan.name for plan in plans if plan.kind == "int8"}
    assert attach(packed, "simulated") == "simulated"
    inputs = random_inputs(net, 2, time=500, seed=9)
    given = {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        wanted, got = sample_of(net(**inputs)), sample_of(packed(**given))
    # 8 bits over min-max ranges: some 48 dB a layer at best, tens of layers.
    assert sqnr_db(wanted, got.float()) > 15
    assert got.dtype == (dtype or torch.float32)
    for layer in layers.values():
        assert layer.act_scale.shape[1] == 1 and layer.act_scale.dtype == torch.float32
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias is None or layer.bias.dtype == torch.float32
        assert int(layer.weight_codes.abs().max()) == 127
    # The float network is left as it was.
    assert next(net.parameters()).dtype == torch.float32 and not dict(quantized_layers(net))


def test_weights_are_the_nearest_codes_and_grids_cover_the_inputs() -> None:
    net = tiny_unet()
    packed = copy.deepcopy(net)
    calls = [random_inputs(net, 2)]
    quick_quantize(packed, calls)
    name = "up_blocks.0.resnets.0.conv_shortcut"
    layer, weight = dict(quantized_layers(packed))[name], net.get_submodule(name).weight
    assert len(layer.segments) == 2
    error = (layer.weight - weight).abs().amax((1, 2, 3))
    assert bool((error <= layer.weight_scale * 0.5001).all())
    # An independent look at what reaches the layer.
    seen: list[torch.Tensor] = []
    hook = net.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        net(**calls[0])
    hook.remove()
    for i, part in enumerate(seen[0].split(layer.segments, 1)):
        scale, zero = float(layer.act_scale[i, 0]), int(layer.act_zero_point[i])
        # The zero point is rounded: half a step is lost at one end.
        assert -scale * (zero + 0.51) <= float(part.min())
        assert float(part.max()) <= scale * (255 - zero + 0.51)
        assert scale == pytest.approx(float(part.max() - part.min()) / 255, rel=1e-5)


def test_symmetric_grids_and_fewer_bits() -> None:
    net = tiny_unet()
    recipe = quick_recipe().override("activations", symmetric=True, bits=6)
    recipe = recipe.override("weights", bits=4)
    quick_quantize(net, [random_inputs(net, 2)], recipe)
    for _, layer in quantized_layers(net):
        assert layer.act_zero_point.unique().tolist() == [32]
        assert int(layer.weight_codes.abs().max()) <= 7
    attach(net, "simulated")
    assert bool(net(**random_inputs(net, 2)).sample.isfinite().all())


def test_ranges_need_a_call_and_finite_values() -> None:
    net = tiny_unet()
    with pytest.raises(QuantempoError, match="got no calls"):
        quick_quantize(net, [])
    inputs = random_inputs(net, 1)
    inputs["sample"][0, 0, 0, 0] = torch.inf
    with pytest.raises(QuantempoError, match="NaN or infinity"):
        quick_quantize(net, [inputs])
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_casting_leaves_integers_and_scales() -> None:
    net = tiny_unet()
    quick_quantize(net, [random_inputs(net, 1)])
    before = {n: v.dtype for n, v in net.state_dict().items()}
    cast_floats(net, torch.float16)
    stored = {n for n, m in net.named_modules() if isinstance(m, Float16Linear)}
    assert stored
    kept = stored | {name for name, _ in quantized_layers(net)} | {"quantempo_clock"}
    for name, value in net.state_dict().items():
        owner = name.rpartition(".")[0]
        changes = owner not in kept and before[name] == torch.float32
        assert value.dtype == (torch.float16 if changes else before[name]), name


def test_the_loop_is_ddim() -> None:
    pipe = tiny_unconditional()
    net = pipe.unet
    inputs = random_inputs(net, 2)
    found = ddim_loop(net, net, inputs, 4, pipe.scheduler)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(4)
    x = inputs["sample"]
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(net(x, t).sample, t, x).prev_sample
    assert float((found - x).abs().max()) < 1e-4
    assert inputs["timestep"].tolist() == 500


def test_the_loop_drops_a_learned_variance() -> None:
    net = tiny_dit().transformer
    inputs = random_inputs(net, 2)
    assert ddim_loop(net, net, inputs, 2).shape == inputs["hidden_states"].shape


def test_projections_are_fused_where_diffusers_can() -> None:
    net = tiny_text().unet
    inputs = random_inputs(net, 1)
    with torch.no_grad():
        wanted = net(**inputs).sample
        assert fuse_projections(net)
        assert sqnr_db(wanted, net(**inputs).sample) > 80
    assert not fuse_projections(tiny_unet())
