"""What each layer becomes: all int8 or with a reason; roles and skip halves as the network runs.

The truth comes from running the networks: which layers hear x_t, which hear the time, what is
concatenated. Nothing here repeats the names the plan goes by.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.models.layers import Site, hooked, sites
from quantempo.pipeline.quantize import check_recipe
from quantempo.quantized import LayerPlan, plan_layers
from quantempo.recipe import LayerSettings, Recipe
from tests.engines.one_by_one import tiny
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, tiny_dit, tiny_text, tiny_unet

Denoise = Callable[[Tensor, int], Any]


def unconditional() -> tuple[nn.Module, Denoise, tuple[int, ...]]:
    net = tiny_unet()
    return net, net, (1, 3, 16, 16)


def text() -> tuple[nn.Module, Denoise, tuple[int, ...]]:
    net = tiny_text().unet
    states = torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(9))
    return net, lambda x, t: net(x, t, encoder_hidden_states=states), (1, 4, 8, 8)


def dit() -> tuple[nn.Module, Denoise, tuple[int, ...]]:
    net = tiny_dit().transformer
    # adaLN of a random DiT is not zero, so that the time really acts.
    label = torch.tensor([3])
    return net, lambda x, t: net(x, torch.tensor([t]), class_labels=label), (1, 4, 8, 8)


NETWORKS = {"UNet2DModel": unconditional, "UNet2DConditionModel": text, "DiT": dit}


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Denoise, tuple[int, ...]]:
    return NETWORKS[request.param]()


@torch.no_grad()
def heard(net: nn.Module, denoise: Denoise, x: Tensor, t: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (input, output) of each Conv2d and Linear in the order of execution."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, layer: nn.Module, args: Any, kwargs: Any, out: Tensor) -> None:
        seen[name] = (args[0].clone(), out.clone())

    layers = {n: m for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    with hooked(layers, keep):
        denoise(x, t)
    return seen


def test_every_layer_is_int8_or_has_a_reason(network: Any) -> None:
    net = network[0]
    plans = plan_layers(sites(net), Recipe(layers=LayerSettings()))
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [plan.name for plan in plans] == layers
    for plan in plans:
        assert plan.kind in ("int8", "float16", "weight_only", "float")
        assert (plan.reason is None) == (plan.kind == "int8"), plan
    assert sum(plan.kind == "int8" for plan in plans) > len(plans) / 3


def test_roles_agree_with_what_layers_hear(network: Any) -> None:
    net, denoise, shape = network
    g = torch.Generator().manual_seed(0)
    x, other = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
    base, moved = heard(net, denoise, x, 700), heard(net, denoise, other, 700)
    later = heard(net, denoise, x, 20)
    roles = {site.name: site.role for site in sites(net)}
    assert set(base) <= set(roles)
    for name, role in roles.items():
        if name not in base:
            continue
        hears_x = not torch.equal(base[name][0], moved[name][0])
        hears_t = not torch.equal(base[name][0], later[name][0])
        # What hears the time (or a class label) and not the image is the time embedding.
        assert (role == "time") == (hears_t and not hears_x), name
        reads_x = base[name][0].shape == x.shape and torch.equal(base[name][0], x)
        assert (role == "input") == reads_x, name
    last = list(base)[-1]
    assert [name for name, role in roles.items() if role == "output"] == [last]


def test_text_projections_are_attention_though_they_never_hear_x() -> None:
    roles = {site.name: site.role for site in sites(text()[0])}
    cross = [role for name, role in roles.items() if ".attn2.to_" in name]
    assert cross and set(cross) == {"attention"}


@pytest.mark.parametrize("build", [unconditional, text])
def test_skip_halves_are_those_the_network_concatenates(build, monkeypatch):
    net, denoise, shape = build()
    joined: list[tuple[Tensor, tuple[Tensor, ...]]] = []
    cat = torch.cat

    def recorded(tensors: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = cat(tensors, *args, **kwargs)
        joined.append((result, tuple(tensors)))
        return result

    halves: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            for result, parts in joined:
                if result.shape == args[0].shape and torch.equal(result, args[0]):
                    halves[name] = tuple(part.shape[1] for part in parts)

        return hook

    found = sites(net)
    for site in found:
        site.layer.register_forward_pre_hook(note(site.name))
    monkeypatch.setattr(torch, "cat", recorded)
    with torch.no_grad():
        denoise(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 500)
    segments = {site.name: site.segments for site in found if site.segments}
    # Nothing but a skip is concatenated right before a layer of these networks, except sinusoids.
    halves = {name: parts for name, parts in halves.items() if len(name.split(".")) > 2}
    assert segments == halves and len(segments) == 4
    for site in found:
        if site.segments:
            assert sum(site.segments) == site.layer.in_channels
    plans = {p.name: p for p in plan_layers(found, Recipe(layers=LayerSettings()))}
    assert {n: p.segments for n, p in plans.items() if p.segments} == segments
    joint = plan_layers(found, Recipe(layers=LayerSettings(split_skips=False)))
    assert not any(plan.segments for plan in joint)


@pytest.mark.parametrize("kind", ["flux", "sd35", "dit", "latte"])
def test_modulations_of_blocks_are_wide_layers_of_the_time(kind: str) -> None:
    plans = plan_layers(sites(tiny(kind)), Recipe(layers=LayerSettings()))
    norms = ("norm.linear", "norm1.linear", "norm1_context.linear")
    wanted = [p.name for p in plans if "blocks." in p.name and p.name.endswith(norms)]
    assert [p.name for p in plans if p.kind == "weight_only"] == wanted
    assert bool(wanted) == (kind != "latte")
    assert all(p.role == "time" for p in plans if p.kind in ("weight_only", "float16"))


@pytest.mark.parametrize("name, few", [("w4a8", 1), ("w4a8-adaround", 1), ("w8a8", 0)])
def test_modulations_are_in_groups_where_a_rounding_looks_at_inputs(name: str, few: bool) -> None:
    recipe = Recipe.load(name)
    others = recipe.override("rounding", name="nearest"), recipe.override("weights", group=0)
    others += (recipe.override("layers", bits={"*norm*.linear": "w8a8"}),)
    for one, packed in ((recipe, few), *((other, False) for other in others)):
        plans = [p for p in plan_layers(sites(tiny("flux")), one) if p.kind == "weight_only"]
        found = {(p.weight_bits, p.act_bits, p.group) for p in plans}
        assert found == {(4, 32, 16) if packed else (8, 8, 0)}


def test_what_the_default_recipe_keeps_in_float() -> None:
    plans = {p.name: p for p in plan_layers(sites(tiny_unet()), Recipe(layers=LayerSettings()))}
    assert plans["conv_in"].kind == plans["conv_out"].kind == "float"
    assert plans["time_embedding.linear_1"].kind == "float16"
    # Shifts of residual blocks: in int8 they cost 0.4 dB.
    assert plans["mid_block.resnets.0.time_emb_proj"].kind == "float16"
    conv = LayerPlan("mid_block.resnets.0.conv1", "int8", role="conv")
    assert plans[conv.name] == conv
    everything = plan_layers(sites(tiny_unet()), Recipe(layers=LayerSettings(float_roles=())))
    assert {plan.kind for plan in everything} == {"int8"}


def test_exclude_takes_shell_patterns_and_names_them_as_the_reason() -> None:
    settings = LayerSettings(exclude=("mid_block.*", "*.to_q"))
    plans = {p.name: p for p in plan_layers(sites(tiny_unet()), Recipe(layers=settings))}
    for name, plan in plans.items():
        excluded = name.startswith("mid_block.") or name.endswith(".to_q")
        assert excluded == ("excluded by" in (plan.reason or "")), name
        assert not excluded or plan.kind == "float"
    assert plans["mid_block.attentions.0.to_q"].reason == "excluded by 'mid_block.*'"
    assert plans["up_blocks.0.attentions.0.to_q"].reason == "excluded by '*.to_q'"


def test_layers_no_kernel_takes_stay_in_float() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
        nn.Conv2d(4, 4, 3, groups=2),
    )
    plans = plan_layers(sites(net), Recipe(layers=LayerSettings(float_roles=())))
    assert [plan.kind for plan in plans] == ["float"] * 5 + ["int8"]
    wanted = ("padding", "padding", "depthwise", "ConvTranspose2d", "Conv1d")
    for plan, word in zip(plans, wanted, strict=False):
        assert word in (plan.reason or "")


def test_bits_may_name_a_layer_of_another_network_of_the_pipeline() -> None:
    recipe = Recipe(layers=LayerSettings(bits={"only_here*": "w4a8"}))
    with pytest.raises(QuantempoError, match="matches no layer"):
        check_recipe(recipe, tiny_unet())
    check_recipe(recipe, tiny_unet(), nn.ModuleDict({"only_here": nn.Linear(2, 2)}))


def test_an_unknown_role_is_refused_with_the_known_ones() -> None:
    with pytest.raises(QuantempoError, match=r"unknown role 'outptu'.*output"):
        plan_layers([], Recipe(layers=LayerSettings(float_roles=("outptu",))))


def test_a_convolution_of_the_time_role_stays_a_convolution() -> None:
    site = Site("adaln.conv", nn.Conv2d(2, 2, 1), "time")
    assert plan_layers([site], Recipe(layers=LayerSettings()))[0].kind == "float"
