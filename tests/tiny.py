"""Build tiny random diffusers pipelines for tests; nothing is downloaded.

Every builder gives the same weights for the same seed, leaves the global random state alone, and
runs in milliseconds on one core. The weights are random: pictures are noise, arithmetic is real.
"""

from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TEXT_TOKENS = 8
TEXT_WIDTH = 16


def tiny_unet(seed: int = 0, size: int = 16) -> diffusers.UNet2DModel:
    """Make a two-level UNet2DModel (3 channels, `size` pixels) with attention and skip inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DModel(
            sample_size=size, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
            attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    return unet.eval()


def tiny_unconditional(
    seed: int = 0, size: int = 16, sampler: str = "ddim"
) -> diffusers.DDIMPipeline | diffusers.DDPMPipeline:
    """Make an unconditional pixel pipeline: DDIMPipeline, or DDPMPipeline for `sampler="ddpm"`."""
    unet = tiny_unet(seed, size)
    if sampler == "ddpm":
        pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=1000))
    else:
        pipe = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(num_train_timesteps=1000))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_vae(channels: int = 4) -> diffusers.AutoencoderKL:
    """Make an AutoencoderKL that halves the size once; call it with the random state forked."""
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def tiny_clip() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Make a letter tokenizer and a one-layer text encoder; random weights, no files."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    end = vocab["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=len(vocab), hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=TEXT_TOKENS,
        bos_token_id=vocab["<|startoftext|>"], eos_token_id=end, pad_token_id=end,
    )  # fmt: skip
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TEXT_TOKENS)
    return tokenizer, CLIPTextModel(config).eval()


def tiny_text(seed: int = 0, size: int = 8) -> diffusers.StableDiffusionPipeline:
    """Make a StableDiffusionPipeline; call it with `prompt=[...]` or with `**tiny_embeds(n)`.

    guidance_scale > 1 (the default) doubles the denoiser's batch: uncond rows, then cond rows.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, text_encoder = tiny_clip()
        unet = diffusers.UNet2DConditionModel(
            sample_size=size, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8,
            attention_head_dim=2, cross_attention_dim=TEXT_WIDTH,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip
        vae = tiny_vae()
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, steps_offset=1,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


DENOISERS = {
    "unet": tiny_unet,
    "text": lambda: tiny_text().unet,
    "dit": lambda: tiny_dit().transformer,
}


def tiny_embeds(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw prompt_embeds and negative_prompt_embeds, each (n, TEXT_TOKENS, TEXT_WIDTH) float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, TEXT_TOKENS, TEXT_WIDTH)
    return {
        "prompt_embeds": torch.randn(shape, generator=generator),
        "negative_prompt_embeds": torch.randn(shape, generator=generator),
    }


def tiny_dit(seed: int = 0, size: int = 8) -> diffusers.DiTPipeline:
    """Make a class-conditional DiTPipeline (1000 classes, label 1000 = none) with learned sigma."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
            num_layers=2, sample_size=size, patch_size=2, num_embeds_ada_norm=1000,
        ).eval()  # fmt: skip
        vae = tiny_vae()
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_flux(tokens: int, size: int = 4) -> tuple[diffusers.FluxPipeline, dict[str, Any]]:
    """Make a FluxPipeline of size^2 image tokens, and a call of 4 embeddings of `tokens` tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ).eval()
        parts = {"vae": tiny_vae(), "transformer": transformer}
    none = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(diffusers.FlowMatchEulerDiscreteScheduler(), **parts, **none)
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": noise(4, tokens, 16), "pooled_prompt_embeds": noise(4, 16, seed=1)}
    return pipe, {"height": 4 * size, "width": 4 * size, **embeds}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return standard normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
