"""The names that networks had where they come from, some for layers that diffusers keeps apart."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core.paged import loaded

__all__ = ["groups", "joined", "parted"]

# Class -> original layer = layers of diffusers, joined by rows; *: number of the block; ~: halves
# are the other way around there.
_ORIGINAL = {
    "FluxTransformer2DModel": """\
        img_in = x_embedder
        txt_in = context_embedder
        time_in.in_layer = time_text_embed.timestep_embedder.linear_1
        time_in.out_layer = time_text_embed.timestep_embedder.linear_2
        guidance_in.in_layer = time_text_embed.guidance_embedder.linear_1
        guidance_in.out_layer = time_text_embed.guidance_embedder.linear_2
        vector_in.in_layer = time_text_embed.text_embedder.linear_1
        vector_in.out_layer = time_text_embed.text_embedder.linear_2
        final_layer.adaLN_modulation.1 = ~norm_out.linear
        final_layer.linear = proj_out
        double_blocks.*.img_mod.lin = transformer_blocks.*.norm1.linear
        double_blocks.*.txt_mod.lin = transformer_blocks.*.norm1_context.linear
        double_blocks.*.img_attn.qkv = transformer_blocks.*.attn. to_q to_k to_v
        double_blocks.*.txt_attn.qkv = transformer_blocks.*.attn. add_q_proj add_k_proj add_v_proj
        double_blocks.*.img_attn.norm.query_norm = transformer_blocks.*.attn.norm_q
        double_blocks.*.img_attn.norm.key_norm = transformer_blocks.*.attn.norm_k
        double_blocks.*.txt_attn.norm.query_norm = transformer_blocks.*.attn.norm_added_q
        double_blocks.*.txt_attn.norm.key_norm = transformer_blocks.*.attn.norm_added_k
        double_blocks.*.img_attn.proj = transformer_blocks.*.attn.to_out.0
        double_blocks.*.txt_attn.proj = transformer_blocks.*.attn.to_add_out
        double_blocks.*.img_mlp.0 = transformer_blocks.*.ff.net.0.proj
        double_blocks.*.img_mlp.2 = transformer_blocks.*.ff.net.2
        double_blocks.*.txt_mlp.0 = transformer_blocks.*.ff_context.net.0.proj
        double_blocks.*.txt_mlp.2 = transformer_blocks.*.ff_context.net.2
        single_blocks.*.modulation.lin = single_transformer_blocks.*.norm.linear
        single_blocks.*.linear1 = single_transformer_blocks.*. \
            attn.to_q attn.to_k attn.to_v proj_mlp
        single_blocks.*.norm.query_norm = single_transformer_blocks.*.attn.norm_q
        single_blocks.*.norm.key_norm = single_transformer_blocks.*.attn.norm_k
        single_blocks.*.linear2 = single_transformer_blocks.*.proj_out
    """
}
# Of rows; what else a layer has is the same for all of its parts.
_BY_ROW = ("weight", "bias", "weight_scale", "weight_s_rel", "weight_s_channel")


def groups(network: nn.Module) -> dict[str, list[str]]:
    """Return original layer -> layers of a network, "~" before one of other halves; {}: unknown."""
    found, known = dict[str, list[str]](), dict(network.named_modules())
    for line in _ORIGINAL.get(type(network).__name__, "").strip().splitlines():
        theirs, first, *names = line.replace("=", "").split()
        ours = [first + name for name in names or [""]]
        for i in range(len(known)) if "*" in theirs else [0]:
            here = [name.replace("*", str(i)) for name in ours]
            if here[0].removeprefix("~") not in known:
                break
            found[theirs.replace("*", str(i))] = here
    return found


def joined(tensors: dict[str, Tensor], known: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """Return the tensors of a network by their original names; those of its layers are joined."""
    result = dict(tensors)
    for theirs, ours in known.items():
        names = [name.removeprefix("~") for name in ours]
        for leaf in [key.removeprefix(f"{names[0]}.") for key in tensors if _of(key, names[0])]:
            parts = [loaded(result.pop(f"{name}.{leaf}")) for name in names]
            whole = torch.cat(parts) if leaf in _BY_ROW and len(parts) > 1 else parts[0]
            whole = torch.cat(whole.chunk(2)[::-1]) if _swapped(ours, leaf) else whole
            result[f"{theirs}.{_leaf(theirs, leaf, 'weight', 'scale')}"] = whole
    return result


def parted(
    tensors: dict[str, Tensor], marks: dict[str, Any], known: Mapping[str, list[str]],
    network: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, Any]]:  # fmt: skip
    """Return tensors and marks of original names by the names of a network: `joined` undone."""
    result, marked = dict(tensors), dict(marks)
    for theirs, ours in known.items():
        names = [name.removeprefix("~") for name in ours]
        layers: list[Any] = [network.get_submodule(name) for name in names]
        rows = [len(layer.weight) for layer in layers]
        if theirs in marked:
            marked |= dict.fromkeys(names, marked.pop(theirs))
        for leaf in [key.removeprefix(f"{theirs}.") for key in tensors if _of(key, theirs)]:
            whole = loaded(result.pop(f"{theirs}.{leaf}"))
            whole = torch.cat(whole.chunk(2)[::-1]) if _swapped(ours, leaf) else whole
            split = leaf in _BY_ROW and whole.ndim > 0 and len(whole) == sum(rows)
            parts = whole.split(rows) if split else [whole] * len(names)
            leaf = _leaf(theirs, leaf, "scale", "weight")
            result |= {f"{name}.{leaf}": part for name, part in zip(names, parts, strict=True)}
    return result, marked


def _of(key: str, layer: str) -> bool:
    return key.rpartition(".")[0] == layer


def _leaf(theirs: str, leaf: str, old: str, new: str) -> str:
    return new if leaf == old and theirs.endswith("_norm") else leaf


def _swapped(ours: list[str], leaf: str) -> bool:
    return ours[0].startswith("~") and leaf in _BY_ROW
