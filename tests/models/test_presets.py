"""Presets have the published shapes, inputs fit their networks, and the loop is DDIM."""

import copy

import pytest
import torch

from quantempo.errors import QuantempoError
from quantempo.models.presets import build_preset, ddim_loop, random_inputs
from tests.tiny import DENOISERS, tiny_dit, tiny_unconditional


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
