"""Presets have the published shapes, inputs fit their networks, and the loop is DDIM."""

import copy

import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.models.presets import LARGE, PRESETS, build_preset, ddim_loop, random_inputs
from tests.tiny import DENOISERS, tiny_dit, tiny_unconditional


@pytest.mark.parametrize(
    ("name", "millions", "shapes"),
    [
        ("ddpm35m", 35.746, {"sample": (3, 32, 32)}),
        ("sd15", 859.521, {"sample": (4, 64, 64), "encoder_hidden_states": (77, 768)}),
        ("sdxl", 2567.464, {"sample": (4, 128, 128), "encoder_hidden_states": (77, 2048)}),
        ("flux", 11901.408, {"hidden_states": (4096, 64), "encoder_hidden_states": (512, 4096)}),
        ("sd35-large", 8056.628, {"hidden_states": (16, 128, 128), "pooled_projections": (2048,)}),
        ("pixart-sigma", 610.856, {"hidden_states": (4, 128, 128)}),
        ("dit-xl", 749.826, {"hidden_states": (4, 32, 32), "class_labels": ()}),
        ("wan-1.3b", 1418.997, {"hidden_states": (16, 9, 60, 104)}),
    ],
)
def test_presets_have_the_published_shapes_and_take_their_inputs(name, millions, shapes) -> None:
    net = build_preset(name, "meta")
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(millions * 1e6, abs=500)
    assert not net.training and torch.get_default_dtype() == torch.float32
    assert next(net.parameters()).dtype == (torch.bfloat16 if name in LARGE else torch.float32)
    inputs = random_inputs(net, 2)
    assert {key: tuple(inputs[key].shape[1:]) for key in shapes} == shapes
    x = next(iter(inputs.values()))
    y = torch.nn.Module.to(net, "meta", torch.float32)(**inputs)[0]
    assert y.shape[0] == 2 and y.shape[2:] == x.shape[2:]
    if name == "sdxl":
        added = inputs["added_cond_kwargs"]
        assert added["text_embeds"].shape == (2, 1280) and added["time_ids"].shape == (2, 6)


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


@pytest.mark.parametrize("kind", DENOISERS)
def test_inputs_are_those_of_the_network(kind: str) -> None:
    net = DENOISERS[kind]()
    inputs = random_inputs(net, 3, time=123, seed=5)
    again = random_inputs(net, 3, time=123, seed=5)
    with torch.no_grad():
        output = net(**inputs)[0]
    assert output.shape[0] == 3 and bool(output.isfinite().all())
    assert torch.equal(output, net(**again)[0])
    # One number for all rows, as pipelines pass it; DiT pipelines pass one for each.
    expected = [123] * 3 if "DiT" in type(net).__name__ else 123
    assert inputs["timestep"].tolist() == expected


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


def test_blocks_of_dit_have_equal_embeddings(monkeypatch):
    config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}
    monkeypatch.setitem(PRESETS, "dit-xl", ("DiTTransformer2DModel", config))
    one, two = (b.norm1.emb.state_dict() for b in build_preset("dit-xl").transformer_blocks)
    assert all(torch.equal(one[name], two[name]) for name in one)
