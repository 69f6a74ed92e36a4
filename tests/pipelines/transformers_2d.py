"""Families whose denoiser is a transformer over images."""

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch
import transformers as T
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

from tests.pipelines import parts as p

__all__ = ["TRANSFORMERS"]

# It makes every picture a megapixel.
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (16, 16, None)

TEXT, SIZE, WIDTH, LONG, BOTH = p.TEXT, p.SIZE, p.WIDTH, p.LONG, p.BOTH
IMAGE = {**p.images(), "strength": 0.9}


def dit() -> Any:
    return p.pipeline(
        D.DiTPipeline, p.tiny(D.DiTTransformer2DModel, out_channels=8), scheduler=p.ddim()
    )


def pixart(kind: Any) -> Any:
    net = p.tiny(D.PixArtTransformer2DModel, out_channels=8, use_additional_conditions=False)
    return p.pipeline(kind, net, p.t5(), scheduler=p.ddim())


def dc_vae() -> Any:
    shape = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1)}
    shape |= {"qkv_multiscales": ((), (), ()), "block_types": "ResBlock"}
    both = {f"{part}_{key}": v for part in ("encoder", "decoder") for key, v in shape.items()}
    return D.AutoencoderDC(latent_channels=4, attention_head_dim=8, **both).eval()


def sana_sprint() -> Any:
    more = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return sana(D.SanaSprintPipeline, D.SCMScheduler(), **more)


def sana(kind: Any, scheduler: Any, **changes: Any) -> Any:
    net = p.tiny(D.SanaTransformer2DModel, **changes)
    return p.pipeline(kind, net, p.gemma(), vae=dc_vae(), scheduler=scheduler)


def sd3(name: str = "", **changes: Any) -> Any:
    kind = getattr(D, f"StableDiffusion3{name}Pipeline")
    widths = {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH}
    net = p.tiny(D.SD3Transformer2DModel, **widths, **changes)
    return p.pipeline(kind, net, p.projected(), p.projected(), p.t5(2 * WIDTH))


def flux(name: str = "", **changes: Any) -> Any:
    shape = {"in_channels": 16, "out_channels": None, "num_layers": 1}
    net = p.tiny(D.FluxTransformer2DModel, **{**shape, **changes})
    return p.pipeline(getattr(D, f"Flux{name}Pipeline"), net, p.clip(), p.t5())


def patched(name: str, text: Any, **changes: Any) -> Any:
    shape = {"in_channels": 16, "num_layers": 1, **changes}
    net = p.tiny(getattr(D, f"{name}Transformer2DModel"), **shape)
    return p.pipeline(getattr(D, f"{name}Pipeline"), net, text)


def flux2() -> Any:
    more = {"joint_attention_dim": 2 * WIDTH, "axes_dims_rope": (2, 2, 2, 2), "num_layers": 1}
    widths = {"in_channels": 16, "out_channels": None, "guidance_embeds": False}
    net = p.tiny(D.Flux2Transformer2DModel, **widths, **more)
    return p.pipeline(D.Flux2KleinPipeline, net, p.qwen3(), vae=flux2_vae())


def chroma() -> Any:
    more = {"approximator_num_channels": 8, "approximator_hidden_dim": 16}
    return patched("Chroma", p.t5(), out_channels=None, approximator_layers=1, **more)


def flux2_vae() -> Any:
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    kinds = {"down_block_types": p.DOWN2, "up_block_types": p.UP2}
    return D.AutoencoderKLFlux2(latent_channels=4, **kinds, **shape).eval()


def qwen(kind: Any, **parts: Any) -> Any:
    net = p.tiny(D.QwenImageTransformer2DModel, in_channels=64, out_channels=16)
    return p.pipeline(kind, net, p.clip(), vae=p.wan_vae("QwenImage"), **parts)


def krea2() -> Any:
    text = {"text_hidden_dim": WIDTH, "num_text_layers": 2, "text_intermediate_size": 16}
    text |= dict.fromkeys(("text_num_attention_heads", "text_num_key_value_heads"), 2)
    text |= dict.fromkeys(("num_layerwise_text_blocks", "num_refiner_text_blocks"), 1)
    net = p.tiny(D.Krea2Transformer2DModel, in_channels=64, **text)
    return p.pipeline(D.Krea2Pipeline, net, p.clip(), vae=p.wan_vae("QwenImage"))


def cogview(name: str, scheduler: Any, **changes: Any) -> Any:
    net = p.tiny(getattr(D, f"{name}Transformer2DModel"), **changes)
    return p.pipeline(getattr(D, f"{name}Pipeline"), net, p.t5(), scheduler=scheduler)


def hunyuan_dit() -> Any:
    shape = {"patch_size": 2, "cross_attention_dim_t5": WIDTH, "text_len": 8, "text_len_t5": 8}
    net = p.tiny(D.HunyuanDiT2DModel, activation_fn="gelu-approximate", **shape)
    return p.pipeline(D.HunyuanDiTPipeline, net, p.clip(), scheduler=D.DDPMScheduler())


def two_texts() -> dict[str, Any]:
    """Return the embeddings and masks of HunyuanDiT."""
    found = p.embeds(*(f"{name}{end}" for name in BOTH for end in ("", "_2")))
    masks = ("prompt_attention_mask", "negative_prompt_attention_mask")
    return found | {f"{n}{end}": torch.ones(2, 8).long() for n in masks for end in ("", "_2")}


def aura_flow() -> Any:
    return p.pipeline(D.AuraFlowPipeline, p.tiny(D.AuraFlowTransformer2DModel), p.t5())


def lumina() -> Any:
    return p.pipeline(D.LuminaPipeline, p.tiny(D.LuminaNextDiT2DModel, hidden_size=32), p.gemma())


def lumina2() -> Any:
    axes = {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 16, 16)}
    return p.pipeline(D.Lumina2Pipeline, p.tiny(D.Lumina2Transformer2DModel, **axes), p.gemma())


def z_image() -> Any:
    axes = {"dim": 32, "axes_dims": [8, 4, 4], "axes_lens": [128, 16, 16]}
    text = p.qwen3()
    # Like the real one it leaves no text empty.
    text[0].chat_template = "<|im_start|>" + text[0].chat_template
    return p.pipeline(D.ZImagePipeline, p.tiny(D.ZImageTransformer2DModel, **axes), text)


def prx() -> Any:
    net = p.tiny(D.PRXTransformer2DModel, depth=2, axes_dim=[4, 4])
    return p.pipeline(D.PRXPipeline, net, p.clip(), vae=p.vae(), default_sample_size=16)


LARGE = {"height": 32, "width": 32}
WHOLE = {"use_resolution_binning": False}
PIXART = {**p.RAW, **WHOLE}
SANA = {**LONG, **WHOLE, **LARGE, "complex_human_instruction": None}
SPRINT = {**SANA, "intermediate_timesteps": None}
KONTEXT = {**LONG, **p.images(), "max_area": 256, "_auto_resize": False}
EMBEDS = {**p.embeds(*BOTH), **SIZE}
MASKED = {**p.embeds(*BOTH, masks="{}_mask"), **SIZE}
ONE = {key: value[:1] for key, value in MASKED.items() if key not in SIZE}
KREA = {n: p.noise(2, 8, 2, WIDTH, seed=i) for i, n in enumerate(BOTH)}
# With guidance the pipeline of PRX repeats the time twice: one image a call.
PRX = {"prompt_embeds": p.noise(2, 8, WIDTH), "guidance_scale": 1.0, **SIZE, **WHOLE}
PRX |= {"prompt_attention_mask": torch.ones(2, 8).bool()}

# Name -> (pipeline, arguments of its call).
TRANSFORMERS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "DiT": lambda: (dit(), {"class_labels": [1, 2]}),
    "PixArt alpha": lambda: (pixart(D.PixArtAlphaPipeline), PIXART),
    "PixArt sigma": lambda: (pixart(D.PixArtSigmaPipeline), PIXART),
    "Sana": lambda: (sana(D.SanaPipeline, p.flow()), SANA),
    "Sana Sprint": lambda: (sana_sprint(), SPRINT),
    "Stable Diffusion 3": lambda: (sd3(), LONG),
    "Stable Diffusion 3.5": lambda: (sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), LONG),
    "Stable Diffusion 3, image to image": lambda: (sd3("Img2Img"), {**LONG, **IMAGE}),
    "Flux schnell": lambda: (flux(), LONG),
    "Flux dev (guidance embedded)": lambda: (flux(guidance_embeds=True), LONG),
    "Flux, image to image": lambda: (flux("Img2Img"), {**LONG, **IMAGE}),
    "Flux Kontext": lambda: (flux("Kontext", guidance_embeds=True), KONTEXT),
    "Flux Fill": lambda: (
        flux("Fill", in_channels=48, out_channels=16),
        {**LONG, **p.images(), **p.masks()},
    ),
    "Flux 2 Klein": lambda: (flux2(), {**LONG, "text_encoder_out_layers": (1, 2)}),
    "AuraFlow": lambda: (aura_flow(), LONG),
    "Chroma": lambda: (chroma(), LONG),
    "Krea 2": lambda: (krea2(), {**MASKED, **KREA}),
    "Ovis-Image": lambda: (
        patched("OvisImage", p.clip(), out_channels=16),
        {**EMBEDS, "negative_prompt": None},
    ),
    "Bria 3.2": lambda: (patched("Bria", p.t5(), pooled_projection_dim=None), LONG),
    "CogView 3 Plus": lambda: (
        cogview("CogView3Plus", D.CogVideoXDDIMScheduler()),
        {**LONG, "max_sequence_length": 16},
    ),
    "CogView 4": lambda: (cogview("CogView4", p.flow(), rope_axes_dim=(8, 8)), EMBEDS),
    "HunyuanDiT": lambda: (hunyuan_dit(), {**two_texts(), **SIZE, **WHOLE}),
    "Lumina": lambda: (lumina(), {**p.RAW, **LARGE, "max_sequence_length": 8}),
    "Lumina 2": lambda: (lumina2(), {"prompt": ["a", "a b c"], **LARGE, "system_prompt": "s"}),
    "Z-Image": lambda: (z_image(), {**TEXT, **SIZE, "prompt": ["a b", "c" * 40]}),
    "Qwen-Image": lambda: (qwen(D.QwenImagePipeline), MASKED),
    "Qwen-Image-Edit": lambda: (
        qwen(D.QwenImageEditPipeline, processor=T.CLIPImageProcessor()),
        {**ONE, **SIZE, "image": p.image()},
    ),
    "PRX": lambda: (prx(), PRX),
}
