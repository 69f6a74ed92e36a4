"""Families that make videos, sound, or samples of one dimension."""

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch
import transformers as T

from tests.pipelines import parts as p
from tests.pipelines.unets import text_unet

__all__ = ["VIDEOS"]

TEXT, SIZE, WIDTH, LONG = p.TEXT, p.SIZE, p.WIDTH, p.LONG
FRAMES = {**LONG, "num_frames": 5}
# Where the pipeline cleans text with a package that need not be there (ftfy).
EMBEDDED = {**p.embeds(*p.BOTH), **SIZE, "num_frames": 5}


def animate_diff() -> Any:
    how = {"block_out_channels": (8, 16), "motion_layers_per_block": 1, "motion_norm_num_groups": 2}
    motion = D.MotionAdapter(**how, motion_num_attention_heads=2, use_motion_mid_block=False)
    parts = {"motion_adapter": motion.eval(), "scheduler": p.ddim()}
    return p.pipeline(D.AnimateDiffPipeline, text_unet(), p.clip(), **parts)


def text_to_video() -> Any:
    kinds = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
    kinds |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    unet = text_unet(D.UNet3DConditionModel, attention_head_dim=4, **kinds)
    return p.pipeline(D.TextToVideoSDPipeline, unet, p.clip(), scheduler=p.ddim())


def svd() -> Any:
    shape = {"in_channels": 8, "block_out_channels": (32, 32), "addition_time_embed_dim": 8}
    shape |= {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
    shape |= {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")}
    shape |= {"projection_class_embeddings_input_dim": 24, "num_frames": 2}
    noise = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    noise |= {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
    levels = {"block_out_channels": (32, 32), "down_block_types": p.DOWN2}
    parts = {"vae": D.AutoencoderKLTemporalDecoder(**levels), "image_encoder": p.clip_vision()}
    parts |= {"feature_extractor": T.CLIPImageProcessor()}
    parts |= {"scheduler": D.EulerDiscreteScheduler(**noise)}
    unet = p.tiny(D.UNetSpatioTemporalConditionModel, **shape)
    return p.pipeline(D.StableVideoDiffusionPipeline, unet, **parts)


def cogvideox() -> Any:
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 2, "norm_num_groups": 2}
    kinds |= {"up_block_types": ("CogVideoXUpBlock3D",) * 2, "block_out_channels": (8, 8)}
    kinds |= {"latent_channels": 4, "layers_per_block": 1, "temporal_compression_ratio": 2}
    parts = {"vae": D.AutoencoderKLCogVideoX(**kinds), "scheduler": D.CogVideoXDDIMScheduler()}
    shape = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 8}
    net = p.tiny(D.CogVideoXTransformer3DModel, **shape)
    return p.pipeline(D.CogVideoXPipeline, net, p.t5(), **parts)


def wan_net(kind: Any = D.WanTransformer3DModel, **changes: Any) -> Any:
    return p.tiny(kind, **{"in_channels": 16, "out_channels": 16, **changes})


def wan(kind: Any = D.WanPipeline, net: Any = None, **parts: Any) -> Any:
    net = wan_net() if net is None else net
    return p.pipeline(kind, net, p.t5(kind="UMT5"), vae=p.wan_vae(), **parts)


def wan_i2v() -> Any:
    net = wan_net(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=16)
    parts = {"image_encoder": p.clip_vision(T.CLIPVisionModel)}
    return wan(D.WanImageToVideoPipeline, net, image_processor=T.CLIPImageProcessor(), **parts)


def skyreels() -> Any:
    how = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    net, scheduler = wan_net(D.SkyReelsV2Transformer3DModel), D.UniPCMultistepScheduler(**how)
    return wan(D.SkyReelsV2Pipeline, net, scheduler=scheduler)


def ltx(kind: Any) -> Any:
    shape: dict[str, Any] = {"block_out_channels": (8,) * 4, "layers_per_block": (1,) * 5}
    shape |= {"spatio_temporal_scaling": (True, True, False, False)}
    shape |= {f"decoder_{key}": value for key, value in shape.items()}
    auto = D.AutoencoderKLLTXVideo(latent_channels=8, patch_size=1, **shape).eval()
    net = p.tiny(D.LTXVideoTransformer3DModel, in_channels=8, out_channels=8)
    return p.pipeline(kind, net, p.t5(), vae=auto)


def hunyuan_video() -> Any:
    shape = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    auto = D.AutoencoderKLHunyuanVideo(latent_channels=4, **shape).eval()
    net = p.tiny(D.HunyuanVideoTransformer3DModel, num_layers=1, rope_axes_dim=(2, 4, 2))
    texts, scheduler = (p.clip(), p.clip()), p.flow(shift=7.0)
    return p.pipeline(D.HunyuanVideoPipeline, net, *texts, vae=auto, scheduler=scheduler)


def mochi() -> Any:
    levels = {f"{part}_block_out_channels": (32,) * 4 for part in ("encoder", "decoder")}
    auto = D.AutoencoderKLMochi(latent_channels=12, layers_per_block=(1,) * 5, **levels).eval()
    shape = {"in_channels": 12, "out_channels": None, "max_sequence_length": 8}
    return p.pipeline(D.MochiPipeline, p.tiny(D.MochiTransformer3DModel, **shape), p.t5(), vae=auto)


def latte() -> Any:
    shape = {"out_channels": 8, "patch_size": 2, "num_layers": 1, "video_length": 2}
    shape |= {"norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000}
    shape |= {"attention_bias": True, "norm_elementwise_affine": False}
    net = p.tiny(D.LatteTransformer3DModel, activation_fn="gelu-approximate", **shape)
    return p.pipeline(D.LattePipeline, net, p.t5(), scheduler=p.ddim())


def allegro() -> Any:
    kinds = {"down_block_types": ("AllegroDownBlock3D",) * 4, "norm_num_groups": 2}
    kinds |= {"up_block_types": ("AllegroUpBlock3D",) * 4, "block_out_channels": (8,) * 4}
    auto = D.AutoencoderKLAllegro(**kinds, layers_per_block=1).eval()
    auto.enable_tiling()
    shape = {"attention_head_dim": 12, "cross_attention_dim": 24, "sample_frames": 2}
    net = p.tiny(D.AllegroTransformer3DModel, sample_height=4, sample_width=4, **shape)
    return p.pipeline(D.AllegroPipeline, net, p.t5(), vae=auto, scheduler=p.ddim())


def dance() -> Any:
    shape = {"block_out_channels": (32, 32, 64), "extra_in_channels": 16, "sample_size": 512}
    shape |= {"down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D")}
    shape |= {"up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip")}
    shape |= {"in_channels": 2, "out_channels": 2, "time_embedding_dim": 16}
    unet = p.tiny(D.UNet1DModel, sample_rate=16000, **shape)
    return p.pipeline(D.DanceDiffusionPipeline, unet, scheduler=D.IPNDMScheduler())


def sound(kind: Any, unet: Any, *texts: Any, **parts: Any) -> Any:
    shape = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    shape |= {"down_block_types": p.DOWN2, "up_block_types": p.UP2, "norm_num_groups": 4}
    parts |= {"vae": D.AutoencoderKL(**shape).eval(), "vocoder": p.vocoder()}
    return p.pipeline(kind, unet, *texts, scheduler=p.ddim(), **parts)


def sound_unet() -> Any:
    how = {"class_embed_type": "simple_projection", "class_embeddings_concat": True}
    how |= {"projection_class_embeddings_input_dim": WIDTH, "cross_attention_dim": (8, 16)}
    return text_unet(attention_head_dim=4, **how)


def audio_ldm2() -> Any:
    width = [None, WIDTH, WIDTH]
    unet = text_unet(
        D.AudioLDM2UNet2DConditionModel, attention_head_dim=4, cross_attention_dim=(width, width)
    )
    config = T.GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=60, n_positions=64)
    config.max_new_tokens = 8
    parts = {"projection_model": D.AudioLDM2ProjectionModel(WIDTH, WIDTH, WIDTH).eval()}
    parts |= {"language_model": T.GPT2LMHeadModel(config).eval()}
    parts |= {"feature_extractor": T.ClapFeatureExtractor(feature_size=16, sampling_rate=16000)}
    return sound(D.AudioLDM2Pipeline, unet, p.clap(T.ClapModel), p.t5(), **parts)


def music_ldm() -> Any:
    parts = {"feature_extractor": T.ClapFeatureExtractor(feature_size=16, sampling_rate=16000)}
    return sound(D.MusicLDMPipeline, sound_unet(), p.clap(T.ClapModel), **parts)


def stable_audio() -> Any:
    shape = {"sample_size": 4, "num_key_value_attention_heads": 2, "time_proj_dim": 8}
    shape |= {"global_states_input_dim": 2 * WIDTH, "cross_attention_input_dim": WIDTH}
    coder = {"downsampling_ratios": [1, 2], "channel_multiples": [1, 1], "sampling_rate": 4}
    coder |= {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4}
    parts = {"vae": D.AutoencoderOobleck(**coder).eval()}
    parts |= {"projection_model": D.StableAudioProjectionModel(WIDTH, WIDTH, 0, 32).eval()}
    parts |= {"scheduler": D.EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")}
    net = p.tiny(D.StableAudioDiTModel, **shape)
    return p.pipeline(D.StableAudioPipeline, net, p.t5(), **parts)


HUNYUAN = {"prompt_embeds": p.noise(2, 8, WIDTH), "pooled_prompt_embeds": p.noise(2, WIDTH)}
HUNYUAN |= {"prompt_attention_mask": torch.ones(2, 8).long(), "num_frames": 5, **SIZE}
LTX = {**FRAMES, "height": 32, "width": 32}
SHORT = {"audio_length_in_s": 0.008}

# Name -> (pipeline, arguments of its call).
VIDEOS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "AnimateDiff": lambda: (animate_diff(), {**TEXT, "num_frames": 2}),
    "Text to video (UNet3D)": lambda: (text_to_video(), {**TEXT, **SIZE, "num_frames": 2}),
    "Stable Video Diffusion": lambda: (
        svd(),
        {**p.images(), **SIZE, "num_frames": 2, "decode_chunk_size": 2},
    ),
    "CogVideoX": lambda: (cogvideox(), {**LONG, "num_frames": 3}),
    "Wan 2.1, text to video": lambda: (wan(), FRAMES),
    "Wan 2.1, image to video": lambda: (wan_i2v(), {**EMBEDDED, "image": p.image()}),
    "Wan 2.2, two experts": lambda: (
        wan(transformer_2=wan_net(), boundary_ratio=0.5),
        {**FRAMES, "guidance_scale_2": 3.0},
    ),
    "Wan 2.2 TI2V (a time a token)": lambda: (wan(expand_timesteps=True), FRAMES),
    "SkyReels V2": lambda: (skyreels(), EMBEDDED),
    "LTX, text to video": lambda: (ltx(D.LTXPipeline), LTX),
    "LTX, image to video": lambda: (ltx(D.LTXImageToVideoPipeline), {**LTX, **p.images(32)}),
    "HunyuanVideo": lambda: (hunyuan_video(), HUNYUAN),
    "Mochi": lambda: (mochi(), {**FRAMES, "num_frames": 7}),
    "Latte": lambda: (latte(), {**p.RAW, "video_length": 2}),
    "Allegro": lambda: (allegro(), {**FRAMES, "num_frames": 8, "clean_caption": False}),
    "DanceDiffusion": lambda: (dance(), {}),
    "AudioLDM": lambda: (
        sound(D.AudioLDMPipeline, sound_unet(), p.clap(T.ClapTextModelWithProjection)),
        {**TEXT, **SHORT},
    ),
    "AudioLDM 2": lambda: (audio_ldm2(), {**TEXT, **SHORT, "max_new_tokens": 4}),
    "MusicLDM": lambda: (music_ldm(), {**{n: p.noise(2, WIDTH) for n in p.BOTH}, **SHORT}),
    "Stable Audio": lambda: (stable_audio(), {**TEXT, "audio_end_in_s": 2.0}),
}
