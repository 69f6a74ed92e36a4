"""Layers are replaced in place, under their names, on any device; the clock is set by a hook."""

import copy

import pytest
import torch
from torch import nn

from quantempo import quantized
from quantempo.errors import QuantempoError
from tests.tiny import tiny_unet

TABLE = torch.arange(1000) // 250
PLANS = [
    quantized.LayerPlan("conv_in", "float", reason="input"),
    quantized.LayerPlan("time_embedding.linear_1", "float16", reason="time"),
    quantized.LayerPlan("mid_block.attentions.0.to_q", "int8", (), 4),
    quantized.LayerPlan("mid_block.attentions.0.to_out.0", "int8"),
    quantized.LayerPlan("up_blocks.0.resnets.0.conv_shortcut", "int8", (32, 32), 4),
]
KINDS = {
    "conv_in": nn.Conv2d,
    "time_embedding.linear_1": quantized.Float16Linear,
    "mid_block.attentions.0.to_q": quantized.QLinear,
    "mid_block.attentions.0.to_out.0": quantized.QLinear,
    "up_blocks.0.resnets.0.conv_shortcut": quantized.QConv2d,
}


def test_names_types_and_shapes_after_a_swap() -> None:
    unet = tiny_unet()
    before = dict(unet.named_modules())
    shapes = {name: before[name].weight.shape for name in KINDS}
    clock = quantized.install_clock(unet, TABLE)
    quantized.swap_layers(unet, PLANS, clock)
    after = dict(unet.named_modules())
    assert list(after) == [*before, quantized.CLOCK_NAME]
    for name, kind in KINDS.items():
        assert type(after[name]) is kind, name
        if kind in (quantized.QConv2d, quantized.QLinear):
            assert after[name].weight_int.shape == shapes[name]
            assert after[name].clock is clock
    assert all(after[name] is before[name] for name in before if name not in KINDS)
    assert after["conv_in"] is before["conv_in"]
    assert after["up_blocks.0.resnets.0.conv_shortcut"].segments == (32, 32)
    assert [name for name, _ in quantized.quantized_layers(unet)] == [
        name
        for name, module in unet.named_modules()
        if isinstance(module, quantized.QConv2d | quantized.QLinear)
    ]
    assert {name: layer.act_scale.shape[1] for name, layer in quantized.quantized_layers(unet)} == {
        plan.name: plan.buckets for plan in PLANS if plan.kind == "int8"
    }


def test_a_model_without_memory_can_be_swapped() -> None:
    with torch.device("meta"):
        unet = type(tiny_unet())(**tiny_config())
    clock = quantized.install_clock(unet, TABLE)
    quantized.swap_layers(unet, PLANS, clock)
    for name, layer in quantized.quantized_layers(unet):
        assert all(value.is_meta for value in layer.state_dict().values()), name
    assert unet.get_submodule("time_embedding.linear_1").weight.is_meta


def tiny_config() -> dict:
    return {k: v for k, v in tiny_unet().config.items() if not k.startswith("_")}


def test_training_mode_is_kept() -> None:
    unet = tiny_unet().train()
    quantized.swap_layers(unet, PLANS, quantized.install_clock(unet, TABLE))
    clock = quantized.find_clock(unet)
    assert all(module.training for module in unet.modules() if module is not clock)


def test_hooks_that_are_lost_are_said(caplog: pytest.LogCaptureFixture) -> None:
    unet = tiny_unet()
    quantized.swap_layers(copy.deepcopy(unet), PLANS, quantized.StepClock(TABLE))
    assert not caplog.records
    unet.get_submodule("conv_in").register_forward_hook(print)
    unet.get_submodule("mid_block.attentions.0.to_q").register_forward_pre_hook(print)
    quantized.swap_layers(unet, PLANS, quantized.StepClock(TABLE), lambda *_: None)
    (said,) = caplog.messages
    assert "1 layers lose hooks" in said and "mid_block.attentions.0.to_q" in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mid_block.attentions.7.to_q", "belongs to another model"),
        ("no_such_layer", "belongs to another model"),
        ("conv_norm_out", "GroupNorm"),
    ],
)
def test_plans_of_another_model_are_refused(name: str, message: str) -> None:
    unet = tiny_unet()
    with pytest.raises(QuantempoError, match=message):
        quantized.swap_layers(unet, [quantized.LayerPlan(name)], quantized.StepClock(TABLE))


def test_the_clock_hears_every_call_however_it_is_made() -> None:
    unet = tiny_unet()
    clock = quantized.install_clock(unet, TABLE)
    assert quantized.find_clock(unet) is clock
    x = torch.zeros(2, 3, 16, 16)
    with torch.no_grad():
        unet(x, 600)
        assert int(clock.bucket) == 2
        unet(sample=x, timestep=torch.tensor(999))
        assert int(clock.bucket) == 3
        unet(x, timestep=torch.tensor([0, 300]))
        assert clock.bucket.tolist() == [0, 1]


def test_a_second_clock_is_refused() -> None:
    unet = tiny_unet()
    quantized.install_clock(unet, TABLE)
    with pytest.raises(QuantempoError, match="quantized already"):
        quantized.install_clock(unet, TABLE)


def test_fill_copies_and_keeps_types() -> None:
    layer = quantized.QLinear.like(nn.Linear(3, 2), quantized.StepClock(TABLE), (), 2)
    scale = torch.tensor([[0.5, 0.25]])
    codes = torch.tensor([[1, -2, 3], [4, 5, -127]], dtype=torch.int8)
    quantized.fill(layer, codes, torch.ones(2), torch.tensor([7.0, 8.0]), scale, torch.tensor([9]))
    scale.zero_()
    assert layer.act_scale.tolist() == [[0.5, 0.25]]
    assert torch.equal(layer.weight_int, codes) and layer.weight_int.dtype == torch.int8
    assert layer.bias.tolist() == [7.0, 8.0] and layer.act_zero_point.tolist() == [9]
    assert layer.act_zero_point.dtype == torch.int32
