"""Quantized outputs of layers, against the float layers followed by the grid by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION, QParams, fake_quantize
from quantempo.errors import QuantempoError
from quantempo.models.layers import sites
from quantempo.quantized import install_output_side, output_side_layers
from quantempo.quantized.output_side import OutputQuantizer
from tests.tiny import tiny_dit, tiny_unet

GRID = (torch.tensor(0.03125), torch.tensor(120, dtype=torch.int32))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([500, 20])


def coarse(weight: Tensor) -> Tensor:
    return (weight.detach() * 64).round() / 64


def watched(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (input, output) of every Conv2d and Linear in one call."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def keep(_: Any, args: Any, output: Tensor, name: str = name) -> None:
                seen[name] = (args[0].clone(), output.clone())

            handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        net(*inputs())
    for handle in handles:
        handle.remove()
    return seen


def same_weights(net: nn.Module) -> bool:
    pairs = zip(net.parameters(), tiny_unet().parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_attention_and_the_last_output_stay_in_float() -> None:
    found = sites(tiny_unet())
    weights, outputs = output_side_layers(found)
    roles = {site.name: site.role for site in found}
    assert set(roles) - set(weights) == {n for n, role in roles.items() if role == "attention"}
    assert set(weights) - set(outputs) == {"conv_out"}
    # Time embedding, input and shortcuts are quantized there, unlike in our recipes.
    assert {"input", "time", "shortcut", "conv"} <= {roles[name] for name in outputs}
    assert [n for n in roles if n in weights] == weights and len(roles) > len(weights) > 10


def test_a_transformer_has_the_same_exceptions() -> None:
    found = sites(tiny_dit().transformer)
    weights, outputs = output_side_layers(found)
    assert not any(".attn" in name for name in weights)
    assert set(weights) - set(outputs) == {"proj_out_2"}


def test_each_output_is_the_float_layer_of_its_input_put_on_the_grid() -> None:
    net = tiny_unet()
    weights, outputs = output_side_layers(sites(net))
    before = {name: net.get_submodule(name).weight.detach().clone() for name in weights}
    install_output_side(
        net,
        {name: coarse(weight) for name, weight in before.items()},
        dict.fromkeys(outputs, GRID),
    )
    reference = tiny_unet()
    for name, (x, y) in watched(net).items():
        layer = reference.get_submodule(name)
        if name in weights:
            layer.weight.data = coarse(before[name])
        with torch.no_grad():
            wanted = layer(x)
        if name in outputs:
            grid = QParams(GRID[0].reshape(1), GRID[1].reshape(1))
            assert not torch.equal(wanted, y)
            wanted = fake_quantize(wanted, grid, ACTIVATION)
        assert torch.equal(y, wanted), name


def test_only_what_is_named_changes() -> None:
    net = tiny_unet()
    install_output_side(net, {}, {"conv_in": GRID})
    plain, got = watched(tiny_unet()), watched(net)
    assert torch.equal(got["conv_in"][0], plain["conv_in"][0])
    codes = got["conv_in"][1] / GRID[0] + GRID[1]
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= 255
    assert same_weights(net)
    hooked = [name for name, module in net.named_modules() if module._forward_hooks]
    assert hooked == ["conv_in"]


def test_the_quantizer_is_fake_quantize_in_every_dtype() -> None:
    x = 10 * torch.randn(4000, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scale, zero = torch.tensor(0.037), torch.tensor(100, dtype=torch.int32)
        got = OutputQuantizer(scale, zero)(x.to(dtype))
        wanted = fake_quantize(x.to(dtype), QParams(scale.reshape(1), zero.reshape(1)), ACTIVATION)
        assert got.dtype == dtype and torch.equal(got, wanted)


def test_quantizers_move_with_the_network() -> None:
    net = tiny_unet()
    install_output_side(net, {}, {"conv_in": GRID})
    assert net.to("meta").conv_in.get_submodule("quantempo_output").scale.device.type == "meta"


@pytest.mark.parametrize(
    ("weights", "grids", "message"),
    [
        ({"conv": torch.zeros(1)}, {}, "'conv' is no float Conv2d or Linear of this UNet2DModel"),
        ({}, {"mid_block": GRID}, "'mid_block' is no float"),
        ({"conv_in": torch.zeros(16, 3, 1, 1)}, {}, r"\(16, 3, 1, 1\) for conv_in; expected \(16"),
        ({}, {"conv_in": (torch.tensor(0.0), GRID[1])}, "one positive finite scale"),
        ({}, {"conv_in": (torch.tensor(float("nan")), GRID[1])}, "one positive finite scale"),
        ({}, {"conv_in": (torch.ones(16), GRID[1])}, "one positive finite scale"),
        ({}, {"conv_in": (GRID[0], torch.tensor(256))}, "zero point 256.*expected 0 to 255"),
    ],
)
def test_mistakes_change_nothing(weights: dict, grids: dict, message: str) -> None:
    net = tiny_unet()
    good = {"conv_out": torch.zeros(3, 16, 3, 3)}
    with pytest.raises(QuantempoError, match=message):
        install_output_side(net, {**good, **weights}, {"conv_out": GRID, **grids})
    assert same_weights(net)
    assert not any(module._forward_hooks for module in net.modules())


def test_a_second_quantizer_on_one_output_is_refused() -> None:
    net = tiny_unet()
    install_output_side(net, {}, {"conv_in": GRID})
    with pytest.raises(QuantempoError, match="conv_in has an output quantizer already"):
        install_output_side(net, {}, {"conv_in": GRID})
