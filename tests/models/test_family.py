"""What a denoiser looks like: its layers, their roles, the time-step among its arguments."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DModel
from torch import nn

from quantempo.errors import QuantempoError
from quantempo.models import layers as use
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional, tiny_unet


def roles(net: nn.Module) -> dict[str, str]:
    return {site.name: site.role for site in use.sites(net)}


def test_the_denoiser_of_each_kind_of_pipeline() -> None:
    pipes = (tiny_unconditional(), tiny_text(), tiny_dit())
    found = [use.denoiser_of(pipe) for pipe in pipes]
    assert [name for name, _ in found] == ["unet", "unet", "transformer"]
    assert found[1][1] is pipes[1].unet and found[2][1] is pipes[2].transformer


def test_a_pipeline_without_a_denoiser_is_refused() -> None:
    with pytest.raises(QuantempoError, match="has no denoiser; expected a component called"):
        use.denoiser_of(SimpleNamespace(vae=nn.Linear(1, 1), unet=None))


TIME = ("timestep", 1)


def test_the_time_step_is_found_by_position_and_by_name() -> None:
    assert use.timestep_of(("x", 7), {}, TIME) == 7
    assert use.timestep_of(("x",), {"timestep": 8}, TIME) == 8
    assert use.timestep_of((), {"sample": "x", "timestep": 9}, TIME) == 9
    with pytest.raises(QuantempoError, match="without a time-step"):
        use.timestep_of(("x",), {"class_labels": 3}, TIME)


def test_the_place_of_the_time_step_is_that_of_the_signature() -> None:
    assert use.timestep_place(tiny_unet()) == TIME
    # Flux: (hidden_states, encoder_hidden_states, pooled_projections, timestep, ...)
    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=0)
    assert use.timestep_place(flux) == ("timestep", 3)
    assert use.timestep_of(("x", "text", "pooled", 7), {}, use.timestep_place(flux)) == 7
    found = roles(flux)
    names = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    assert {found[f"transformer_blocks.0.{name}"] for name in names} == {"attention"}


def test_every_role_is_described_and_unknown_ones_are_refused() -> None:
    use.check_roles(tuple(use.ROLES))
    for net in (tiny_unet(), tiny_text().unet, tiny_dit().transformer):
        assert set(roles(net).values()) <= set(use.ROLES)
    with pytest.raises(QuantempoError, match="unknown role 'head'"):
        use.check_roles(("input", "head"))


def test_sites_are_all_convolutions_and_linear_layers_in_order() -> None:
    net = tiny_unet()
    layers = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert [(site.name, site.layer) for site in use.sites(net)] == layers


def test_shortcuts_are_the_one_by_one_convolutions_around_blocks() -> None:
    net = tiny_unet()
    found = {name for name, role in roles(net).items() if role == "shortcut"}
    wanted = {name for name, _ in net.named_modules() if name.endswith(".conv_shortcut")}
    assert found == wanted and len(found) == 5


def test_names_that_only_look_like_ends_are_ordinary_layers() -> None:
    # proj_in and proj_out of a transformer block inside a U-Net are not the network's ends.
    found, ends = roles(tiny_text().unet), ("proj_in", "proj_out")
    inside = {role for name, role in found.items() if name.endswith(ends)}
    assert inside and inside <= {"conv", "linear"}


def test_the_modulation_of_a_transformer_is_time() -> None:
    found = roles(tiny_dit().transformer)
    assert found["proj_out_1"] == "time" and found["proj_out_2"] == "output"
    assert found["transformer_blocks.0.norm1.linear"] == "time"
    assert found["transformer_blocks.0.ff.net.2"] == "linear"


@torch.no_grad()
def concatenated(dim: int, run: Callable[[], Any]) -> list[tuple[int, int]]:
    """Return the widths of pairs of tensors that a call puts together along their channels."""
    real, cat = [], torch.cat

    def recorded(tensors, *args, **kwargs):
        joined = kwargs.get("dim", args[0] if args else 0)
        if joined == dim and len(tensors) == 2 and tensors[0].ndim == (4 if dim == 1 else 3):
            real.append(tuple(part.shape[dim] for part in tensors))
        return cat(tensors, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", recorded)
        run()
    return real


@pytest.mark.parametrize("widths", [(8, 16, 24), (8, 24, 16), (16, 16, 16)])
@pytest.mark.parametrize("per_block", [1, 2])
def test_skip_halves_of_other_widths(widths: tuple[int, ...], per_block: int) -> None:
    """The halves equal what the network concatenates, whatever its widths and depth."""
    net = UNet2DModel(
        sample_size=8, layers_per_block=per_block, block_out_channels=widths, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
    )  # fmt: skip
    real = concatenated(1, lambda: net(torch.zeros(1, 3, 8, 8), 5))
    shortcuts = [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(per_block + 1)]
    wanted = {f"{name}.conv_shortcut": parts for name, parts in zip(shortcuts, real, strict=True)}
    assert {site.name: site.segments for site in use.sites(net) if site.segments} == wanted


def test_networks_without_up_blocks_have_no_segments() -> None:
    assert not any(site.segments for site in use.sites(tiny_dit().transformer))


def test_parallel_blocks_read_what_they_concatenate() -> None:
    net = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    sizes = ((1, 4, 4), (1, 3, 8), (1, 8), (1,), (4, 3), (3, 3))
    real = concatenated(2, lambda: net(*map(torch.ones, sizes)))
    found = {site.name: site.segments for site in use.sites(net) if site.segments}
    names = [f"single_transformer_blocks.{i}.proj_out" for i in range(2)]
    assert found == dict(zip(names, real, strict=True)) and real == [(16, 64)] * 2
