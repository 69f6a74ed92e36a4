"""Units of reconstruction: a partition of the layers, in the order in which a forward runs them."""

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn

from quantempo.models.layers import blocks, sites
from tests.tiny import TEXT_TOKENS, TEXT_WIDTH, tiny_dit, tiny_text, tiny_unet


def _unet() -> tuple[nn.Module, dict[str, Any]]:
    return tiny_unet(), {"sample": torch.randn(2, 3, 16, 16), "timestep": 7}


def _text() -> tuple[nn.Module, dict[str, Any]]:
    text = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH)
    call = {"sample": torch.randn(2, 4, 8, 8), "timestep": 7, "encoder_hidden_states": text}
    return tiny_text().unet, call


def _dit() -> tuple[nn.Module, dict[str, Any]]:
    labels, times = torch.tensor([1, 2]), torch.tensor([3, 4])
    call = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": times, "class_labels": labels}
    network: DiTTransformer2DModel = tiny_dit().transformer
    return network, call


def _pixart() -> tuple[nn.Module, dict[str, Any]]:
    network = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
        use_additional_conditions=False,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 12),
        "timestep": torch.tensor([3, 4]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return network, call


def _sd3() -> tuple[nn.Module, dict[str, Any]]:
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([3, 4]),
    }
    return network, call


NETWORKS = {"unet": _unet, "text": _text, "dit": _dit, "pixart": _pixart, "sd3": _sd3}


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_blocks_partition_the_layers(kind: str) -> None:
    network, _ = NETWORKS[kind]()
    layers = [name for block in blocks(network) for name in block.layers]
    assert sorted(layers) == sorted(site.name for site in sites(network))
    for block in blocks(network):
        assert network.get_submodule(block.name) is block.module
        assert all(n == block.name or n.startswith(f"{block.name}.") for n in block.layers)


@pytest.mark.parametrize("kind", list(NETWORKS))
@torch.no_grad()
def test_blocks_stand_in_the_order_of_execution(kind: str) -> None:
    network, call = NETWORKS[kind]()
    found = blocks(network)
    run: list[str] = []
    for block in found:
        block.module.register_forward_pre_hook(lambda m, args, name=block.name: run.append(name))
    network(**call)
    # Every unit once. The embeddings of time and text do not read images: their place among the
    # first units depends on the network and decides nothing.
    assert len(run) == len(set(run))
    early = {n for n in run if "embed" in n or n in ("context_embedder", "caption_projection")}
    assert set(run) == {block.name for block in found}
    expected = [block.name for block in found]
    assert [n for n in run if n not in early] == [n for n in expected if n not in early]
    if kind in ("unet", "text", "dit"):
        assert run == expected


def test_residual_and_attention_blocks_are_units() -> None:
    names = {block.name: block.layers for block in blocks(tiny_unet())}
    assert names["mid_block.attentions.0"] == tuple(
        f"mid_block.attentions.0.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")
    )
    resnet = "up_blocks.0.resnets.0"
    assert set(names[resnet]) == {
        f"{resnet}.{leaf}" for leaf in ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
    }
    assert names["conv_in"] == ("conv_in",)
    text = {block.name for block in blocks(tiny_text().unet)}
    inside = "mid_block.attentions.0"
    assert {f"{inside}.transformer_blocks.0", f"{inside}.proj_in", f"{inside}.proj_out"} <= text
