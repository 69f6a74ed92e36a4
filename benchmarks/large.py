"""Quantize a random FLUX of any size and say what each stage takes: seconds, device and host.

PYTHONPATH=. python benchmarks/large.py /tmp/large --size 12b --recipe w8a8 --device cuda

Weights are random bfloat16, text encoders tiny: prompt embeddings are given. The model is made in
FOLDER unless it lies there. One JSON line a stage; the run folder is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import shutil
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)

from quantempo.core.paged import save_tensors
from quantempo.pipeline import stages
from quantempo.recipe import Recipe
from tests.tiny import tiny_clip

__all__ = ["main", "make"]

# Double and single blocks, heads of 128.
SIZES = {"tiny": (1, 2, 2), "0.3b": (3, 6, 10), "3b": (5, 9, 24), "12b": (19, 38, 24)}
SHARD_BYTES = 2 * 10**9


def make(folder: Path, size: str, device: str) -> None:
    """Write the pipeline, one shard in memory at a time."""
    double, single, heads = SIZES[size]
    with init_empty_weights():
        network = FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=double, num_single_layers=single,
            num_attention_heads=heads, attention_head_dim=128, joint_attention_dim=4096,
            pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
        )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    (token, text), (token2, text2) = tiny_clip(), tiny_clip()
    texts = {
        "tokenizer": token,
        "text_encoder": text,
        "tokenizer_2": token2,
        "text_encoder_2": text2,
    }
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, vae=vae.bfloat16(), transformer=None, **texts)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    network.save_config(folder / "transformer")
    chance, shards, bytes_ = torch.Generator(device).manual_seed(0), [[]], 0
    for name, parameter in network.named_parameters():
        bytes_ += 2 * parameter.numel()
        if bytes_ > SHARD_BYTES:
            shards.append([])
            bytes_ = 2 * parameter.numel()
        shards[-1].append((name, parameter.shape))
    where = {}
    for number, named in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        made = {}
        for name, shape in named:
            value = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
            # Rows at a time, so that nothing in float32 is as large as the tensor.
            for part in value.split(max(1, 2**24 // shape[-1])) if len(shape) > 1 else ():
                part.copy_(torch.randn(part.shape, generator=chance, device=device))
                part.mul_(1 / math.sqrt(shape[1]))
            made[name], where[name] = value, file
        save_tensors(folder / "transformer" / file, made, {"format": "pt"})
    text = json.dumps({"metadata": {}, "weight_map": where})
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(text)


def main() -> None:
    """Make the model, then run the stages one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="12b")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", default="4GB")
    given = parser.parse_args()
    model, run = given.folder / given.size, given.folder / f"run-{given.recipe}"
    if not (model / "transformer/diffusion_pytorch_model.safetensors.index.json").exists():
        make(model, given.size, given.device)
    tokens, side = (256, 256) if given.size == "12b" else (16, 64)
    chance = torch.Generator().manual_seed(1)
    call = {
        "height": side, "width": side,
        "prompt_embeds": torch.randn(2, tokens, 4096, generator=chance),
        "pooled_prompt_embeds": torch.randn(2, 768, generator=chance),
    }  # fmt: skip
    recipe = Recipe.load(given.recipe).override("trace", steps=2, chains=2, picks=2)

    def said(stage: str, began: float) -> None:
        row = {"stage": stage, "seconds": round(time.time() - began, 1)}
        row["host_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
        if given.device == "cuda":
            row["device_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            row["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        print(json.dumps(row), flush=True)

    start = time.time()
    how = {"call": call, "device": given.device, "memory": given.memory}
    session = stages.load(model, run, recipe, **how)
    said("load", start)
    order = (stages.trace, stages.calibrate, stages.search, stages.round_weights, stages.pack)
    for stage in order:
        began = time.time()
        stage(session)
        said(stage.__name__, began)
    said("all", start)
    shutil.rmtree(run)


if __name__ == "__main__":
    main()
