"""Units of reconstruction: a partition of the layers."""

import pytest
from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
from torch import nn

from quantempo.models.layers import blocks, sites
from tests.tiny import DENOISERS, tiny_text, tiny_unet


def _pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2, cross_attention_dim=16, caption_channels=12,
        use_additional_conditions=False,
    )  # fmt: skip


def _sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip


NETWORKS = {**DENOISERS, "pixart": _pixart, "sd3": _sd3}


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_blocks_partition_the_layers(kind: str) -> None:
    network = NETWORKS[kind]()
    layers = [name for block in blocks(network) for name in block.layers]
    assert sorted(layers) == sorted(site.name for site in sites(network))
    for block in blocks(network):
        assert network.get_submodule(block.name) is block.module
        assert all(n == block.name or n.startswith(f"{block.name}.") for n in block.layers)


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
