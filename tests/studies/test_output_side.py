"""Quantized outputs of layers, against the float layers followed by the grid by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from quantempo.models.layers import hooked, sites
from studies.ptq4dm.output_side import install_output_side, output_side_layers
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

    def keep(name: str, layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen[name] = (args[0].clone(), output.clone())

    with hooked({site.name: site.layer for site in sites(net)}, keep), torch.no_grad():
        net(*inputs())
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
        net, {name: coarse(weight) for name, weight in before.items()}, dict.fromkeys(outputs, GRID)
    )
    reference = tiny_unet()
    for name, (x, y) in watched(net).items():
        layer = reference.get_submodule(name)
        if name in weights:
            layer.weight.data = coarse(before[name])
        with torch.no_grad():
            wanted = layer(x)
        if name in outputs:
            assert not torch.equal(wanted, y)
            wanted = ((wanted / GRID[0]).round() + GRID[1]).clamp(0, 255).sub(GRID[1]) * GRID[0]
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
