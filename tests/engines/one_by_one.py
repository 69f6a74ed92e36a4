"""Run the fused blocks of transformers against their layers one by one, on a CPU."""

import copy
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import diffusers
import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from quantempo.engines import ENGINES
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, report, unfuse
from quantempo.models.layers import hooked
from quantempo.quantized import QLinear, quantized_layers
from quantempo.recipe import WeightSettings
from tests.engines.quantized import quantize_network
from tests.engines.truth import relative
from tests.tiny import noise

ENGINE = ENGINES.get("triton")
# Multiples of nothing: 9 tokens of the image.
TEXT, SIZE = 5, 6
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
IMAGE = {**HEADS, "sample_size": SIZE, "in_channels": 4, "out_channels": 4}
SD3 = {**IMAGE, "num_layers": 3, "joint_attention_dim": 48, "caption_projection_dim": 32}
SD3 |= {"pooled_projection_dim": 32, "pos_embed_max_size": 8}
PIXART = {"cross_attention_dim": 32, "caption_channels": 48, "use_additional_conditions": False}
LATTE = {"cross_attention_dim": 32, "caption_channels": 48, "activation_fn": "gelu-approximate"}
LATTE |= {"norm_type": "ada_norm_single", "norm_elementwise_affine": False}
LATTE |= {"video_length": 3, "patch_size": 2}
SANA = {**IMAGE, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16}
SANA |= {"cross_attention_dim": 32, "caption_channels": 48, "qk_norm": "rms_norm_across_heads"}
WAN = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": 48, "freq_dim": 32, "ffn_dim": 64}
FLUX = {**HEADS, "in_channels": 16, "num_layers": 2, "num_single_layers": 2}
FLUX |= {"joint_attention_dim": 48, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}
QWEN = {**HEADS, "in_channels": 16, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=True),
    "schnell": lambda: diffusers.FluxTransformer2DModel(**FLUX),
    # Modulations in groups.
    "packed": lambda: diffusers.FluxTransformer2DModel(**FLUX),
    "sd3": lambda: diffusers.SD3Transformer2DModel(**SD3),
    # The first block attends to the image alone as well.
    "sd35": lambda: diffusers.SD3Transformer2DModel(
        **SD3, qk_norm="rms_norm", dual_attention_layers=(0,)
    ),
    "qwen": lambda: diffusers.QwenImageTransformer2DModel(**QWEN, num_layers=2),
    # The last block has an embedding of its own.
    "dit": lambda: diffusers.DiTTransformer2DModel(**IMAGE, num_layers=3, num_embeds_ada_norm=10),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(**IMAGE, num_layers=2, **PIXART),
    "latte": lambda: diffusers.LatteTransformer3DModel(**IMAGE, num_layers=2, **LATTE),
    "sana": lambda: diffusers.SanaTransformer2DModel(**SANA, num_layers=2),
    "wan": lambda: diffusers.WanTransformer3DModel(**WAN, num_layers=2, cross_attn_norm=True),
}
# What quantization alone does to the output; without norms of q and k some softmaxes are steep.
PACKED = {"bits": {"*norm*.linear": "w4a8"}, "weights": WeightSettings(group=16)}
LEVELS = {"flux": 0.02, "schnell": 0.02, "packed": 0.12, "qwen": 0.03, "sd3": 0.15, "sd35": 0.03}
LEVELS |= {"dit": 0.05, "pixart": 0.05, "latte": 0.1, "sana": 0.1, "wan": 0.05}


@cache
def tiny(kind: str) -> nn.Module:
    """Make a random network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = randomized(NETWORKS[kind]())
    if kind == "dit":
        first, second, _ = (block.norm1.emb for block in network.transformer_blocks)
        second.load_state_dict(first.state_dict())
    return network


def call(kind: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of a call."""
    given = {"hidden_states": noise(batch, 4, SIZE, SIZE, seed=seed)}
    given["timestep"] = torch.linspace(900, 100, batch).round()
    if kind == "dit":
        return given | {"class_labels": torch.arange(batch) + seed % 5}
    given["encoder_hidden_states"] = noise(batch, TEXT, 48, seed=seed + 1)
    if kind in ("latte", "wan"):
        frames = 3 if kind == "latte" else 1
        return given | {"hidden_states": noise(batch, 4, frames, SIZE, SIZE, seed=seed)}
    if kind in ("pixart", "sana"):
        return given | {"encoder_attention_mask": torch.ones(batch, TEXT).tril(1)}
    if kind == "qwen":
        given |= {"hidden_states": noise(batch, 9, 16, seed=seed)}
        return given | {"timestep": given["timestep"] / 1000, "img_shapes": [[(1, 3, 3)]] * batch}
    given["pooled_projections"] = noise(batch, 32, seed=seed + 2)
    if "sd3" in kind:
        return given
    given |= {"hidden_states": noise(batch, 9, 16, seed=seed), "timestep": given["timestep"] / 1000}
    given |= {"img_ids": (noise(9, 3) * 4).round(), "txt_ids": torch.zeros(TEXT, 3)}
    return given | ({"guidance": torch.full((batch,), 3.5)} if kind == "flux" else {})


@cache
def quantized(kind: str, exclude: tuple[str, ...] = ()) -> nn.Module:
    """Return its integer form, no engine attached; copy it before that."""
    network, inputs = tiny(kind), []
    for seed in (0, 11):
        bound = inspect.signature(network.forward).bind(**call(kind, 3, seed))
        bound.apply_defaults()
        inputs.append(bound.args)
    # Names do not say that these of Wan read the time.
    how: Any = PACKED if kind == "packed" else {}
    return quantize_network(network, inputs, exclude=(*exclude, "condition_embedder.*"), **how)


def fused(kind: str, *exclude: str) -> nn.Module:
    """Return it with its blocks fused, layers in `exclude` left in float."""
    network = copy.deepcopy(quantized(kind, exclude))
    ENGINE.attach(network)
    return network


def randomized(network: nn.Module) -> nn.Module:
    """Give norms weights that matter; else gates and shifts are next to nothing."""
    for module in network.modules():
        if isinstance(module, nn.RMSNorm | RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3)
    return network.eval()


class Scaled(nn.Module):
    """What adapters put in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 4


def by_token(network: nn.Module, every: int) -> nn.Module:
    """Give every so manyth layer a scale for every token."""
    linear = [layer for _, layer in quantized_layers(network) if isinstance(layer, QLinear)]
    for layer in linear[::every]:
        layer.act_scale = layer.act_scale[:, :0]
        layer.act_zero_point.fill_(128)
    ENGINE.attach(network)
    return network


def reasons(network: nn.Module) -> set[str | None]:
    return {row.reason for row in report(network)}


@torch.no_grad()
def errors(network: nn.Module, **arguments: Any) -> list[float]:
    """Return how far each stream of each block is from its layers run one by one."""
    seen: dict[str, Any] = {}

    def see(name: str, block: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        seen[name] = args, kwargs, y

    rows = report(network)
    unfuse(network)
    blocks = {row.name: network.get_submodule(row.name) for row in rows if row.reason is None}
    with hooked(blocks, see):
        network(**arguments)
    fuse(network, BLOCKS)
    found = []
    for name, (args, kwargs, expected) in seen.items():
        blocks[name].forward.prepare(torch.device("cpu"))
        pairs = zip(_streams(blocks[name](*args, **kwargs)), _streams(expected), strict=True)
        for y, truth in pairs:
            assert y.dtype == truth.dtype and y.shape == truth.shape
            found.append(relative(y, truth))
    return sorted(found)


def check_errors(found: list[float]) -> None:
    # A code of 255 that moves by one costs about 1e-3; where none does, nothing hides an error.
    assert found[-1] <= 8e-3 and found[len(found) // 4] <= 2e-6, found


def _streams(y: Any) -> list[Tensor]:
    return [part for part in (y if isinstance(y, tuple) else (y,)) if part is not None]
