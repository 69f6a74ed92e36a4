"""Families whose denoiser is a U-Net (or its kin) over images."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers as D
import transformers as T
from diffusers.pipelines.deprecated.wuerstchen import (
    PaellaVQModel,
    WuerstchenDiffNeXt,
    WuerstchenPrior,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)

from tests.pipelines import parts as p

__all__ = ["UNETS", "text_unet"]

BETAS, TEXT, SIZE, WIDTH = p.BETAS, p.TEXT, p.SIZE, p.WIDTH
CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def pixels(name: str, scheduler: Any, **changes: Any) -> Any:
    kind = getattr(D, f"{name}Pipeline")
    shape: dict[str, Any] = {"sample_size": 16, "block_out_channels": (8, 16)}
    shape |= {"in_channels": 3, "out_channels": 3, "norm_num_groups": 4}
    shape |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    shape |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return p.pipeline(kind, p.tiny(D.UNet2DModel, **{**shape, **changes}), scheduler=scheduler)


def score_sde_ve() -> Any:
    return pixels("ScoreSdeVe", D.ScoreSdeVeScheduler(), time_embedding_type="fourier")


def text_unet(kind: Any = D.UNet2DConditionModel, **changes: Any) -> Any:
    shape: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    shape |= {"attention_head_dim": 2, "num_attention_heads": None}
    shape |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    shape |= {"up_block_types": ("UpBlock2D", "UpBlock2D")}
    return p.tiny(kind, **{**shape, **changes})


def sd(name: str = "", scheduler: Any = None, **changes: Any) -> Any:
    kind = getattr(D, f"StableDiffusion{name}Pipeline")
    return p.pipeline(kind, text_unet(**changes), p.clip(), scheduler=scheduler or p.ddim())


def sdxl(name: str = "", scheduler: Any = None) -> Any:
    kind = getattr(D, f"StableDiffusionXL{name}Pipeline")
    scheduler = scheduler or D.EulerDiscreteScheduler(**BETAS)
    return p.pipeline(kind, xl_unet(), p.clip(), p.projected(), scheduler=scheduler)


def xl_unet(numbers: int = 6, width: int = 2 * WIDTH) -> Any:
    more: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    more |= {"projection_class_embeddings_input_dim": 8 * numbers + WIDTH}
    more |= {"use_linear_projection": True, "transformer_layers_per_block": (1, 2)}
    more |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    return text_unet(cross_attention_dim=width, **more)


def lcm() -> Any:
    unet, scheduler = text_unet(time_cond_proj_dim=8), D.LCMScheduler(**BETAS)
    return p.pipeline(D.LatentConsistencyModelPipeline, unet, p.clip(), scheduler=scheduler)


def refiner() -> Any:
    second = dict(zip(("tokenizer_2", "text_encoder_2"), p.projected(), strict=True))
    unet = xl_unet(5, WIDTH)
    parts = {"scheduler": D.EulerDiscreteScheduler(**BETAS), "requires_aesthetics_score": True}
    return p.pipeline(D.StableDiffusionXLImg2ImgPipeline, unet, **second, **parts)


def controlled(plain: Any, name: str) -> Any:
    kind = getattr(D, f"StableDiffusion{name}Pipeline")
    net = D.ControlNetModel.from_unet(plain.unet, conditioning_embedding_out_channels=(8, 8))
    return kind(**plain.components, controlnet=net.eval())


def ldm_text() -> Any:
    tokenizer, _ = p.clip()
    tokenizer.model_max_length = 77
    shape = {"encoder_layers": 1, "encoder_ffn_dim": 16, "encoder_attention_heads": 2}
    config = LDMBertConfig(60, 77, **shape, head_dim=8, d_model=WIDTH, pad_token_id=53)
    parts = {"bert": LDMBertModel(config).eval(), "tokenizer": tokenizer, "vqvae": p.vae()}
    return p.pipeline(D.LDMTextToImagePipeline, text_unet(), scheduler=p.ddim(), **parts)


def upscaler() -> Any:
    parts = {"low_res_scheduler": D.DDPMScheduler(), "scheduler": p.ddim(), "max_noise_level": 350}
    unet = text_unet(in_channels=7, num_class_embeds=1000)
    return p.pipeline(D.StableDiffusionUpscalePipeline, unet, p.clip(), **parts)


def latent_upscaler() -> Any:
    shape = {"in_channels": 8, "out_channels": 5, "block_out_channels": (32, 32, 64, 64)}
    shape |= {"down_block_types": ("KDownBlock2D", *("KCrossAttnDownBlock2D",) * 3)}
    shape |= {"up_block_types": (*("KCrossAttnUpBlock2D",) * 3, "KUpBlock2D")}
    shape |= {"norm_num_groups": None, "mid_block_type": None, "attention_head_dim": 8}
    shape |= {"act_fn": "gelu", "timestep_post_act": "gelu", "time_embedding_type": "fourier"}
    shape |= {"resnet_time_scale_shift": "scale_shift", "time_cond_proj_dim": 128 + WIDTH}
    shape |= {"conv_in_kernel": 1, "conv_out_kernel": 1}
    scheduler = D.EulerDiscreteScheduler(prediction_type="sample")
    return sd("LatentUpscale", scheduler, **shape)


def simple_unet(**changes: Any) -> Any:
    shape = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    shape |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "encoder_hid_dim": WIDTH}
    shape |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    return text_unet(**shape, resnet_time_scale_shift="scale_shift", **changes)


def deepfloyd() -> Any:
    text = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    unet = simple_unet(in_channels=3, out_channels=6, only_cross_attention=True, **text)
    scheduler = D.DDPMScheduler(variance_type="learned_range", thresholding=True)
    return p.pipeline(D.IFPipeline, unet, p.t5(), scheduler=scheduler)


def marigold() -> Any:
    how = {"prediction_type": "depth", "default_denoising_steps": 4}
    parts = {"scheduler": D.LCMScheduler(**BETAS), "default_processing_resolution": 16}
    return p.pipeline(D.MarigoldDepthPipeline, text_unet(in_channels=8), p.clip(), **how, **parts)


def kandinsky_prior() -> Any:
    prior = p.tiny(D.PriorTransformer, embedding_dim=WIDTH, num_embeddings=8)
    how = {"variance_type": "fixed_small_log", "prediction_type": "sample"}
    parts = {"scheduler": D.UnCLIPScheduler(**how, clip_sample_range=10.0)}
    parts |= {"image_encoder": p.clip_vision(), "image_processor": T.CLIPImageProcessor()}
    return p.pipeline(D.KandinskyV22PriorPipeline, prior, p.projected(), **parts)


def kandinsky_decoder() -> Any:
    image = {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
    unet = simple_unet(out_channels=8, **image)
    return p.pipeline(D.KandinskyV22Pipeline, unet, scheduler=p.ddim(), movq=p.movq())


def cascade(kind: Any, text: Any, net: Any) -> Any:
    parts = {"scheduler": D.DDPMWuerstchenScheduler()}
    if "vqgan" in inspect.signature(kind.__init__).parameters:
        parts["vqgan"] = PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=16, embed_dim=8)
    return p.pipeline(kind, net.eval(), text, **parts)


def cascade_prior() -> Any:
    clip = {"clip_text_in_channels": WIDTH, "clip_image_in_channels": WIDTH}
    net = cascade_unet(switch_level=(False,), **clip)
    return cascade(D.StableCascadePriorPipeline, p.projected(), net)


def cascade_decoder() -> Any:
    net = cascade_unet(effnet_in_channels=4, patch_size=2)
    return cascade(D.StableCascadeDecoderPipeline, p.projected(), net)


def wuerstchen_prior() -> Any:
    return cascade(D.WuerstchenPriorPipeline, p.clip(), WuerstchenPrior(4, 16, WIDTH, 8, 2, 2))


def cascade_unet(**changes: Any) -> Any:
    shape: dict[str, Any] = {"conditioning_dim": WIDTH, "block_out_channels": (16, 16)}
    shape |= dict.fromkeys(("down_num_layers_per_block", "up_num_layers_per_block"), (1, 1))
    shape |= {"num_attention_heads": (2, 2), "timestep_ratio_embedding_dim": 8}
    return p.tiny(D.StableCascadeUNet, **shape, clip_text_pooled_in_channels=WIDTH, **changes)


def wuerstchen_decoder() -> Any:
    levels = {"c_hidden": [8, 16], "nhead": [-1, 2], "blocks": [1, 1]}
    levels |= {"level_config": ["CT", "CTA"], "inject_effnet": [False, True]}
    net = WuerstchenDiffNeXt(4, 4, 8, c_cond=WIDTH, effnet_embd=4, clip_embd=WIDTH, **levels)
    return cascade(D.WuerstchenDecoderPipeline, p.clip(), net)


EDIT = {**TEXT, **p.images()}
IMAGE = {**EDIT, "strength": 0.9}
INPAINT = {**EDIT, **SIZE, **p.masks()}
LARGE, HUGE = ({"height": size, "width": size} for size in (64, 256))
STAGE_B = {"image_embeddings": p.noise(2, 4, 3, 3)}
IMAGE_EMBEDS = {n: p.noise(2, WIDTH) for n in ("image_embeds", "negative_image_embeds")}
BOXES = {"gligen_phrases": ["a"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]], "prompt": "a b", **SIZE}
V = {"scheduler": p.ddim(prediction_type="v_prediction"), "attention_head_dim": (2, 4)}
LEARNED, STEPS = D.DDPMScheduler(variance_type="learned_range"), D.CMStochasticIterativeScheduler()

# Name -> (pipeline, arguments of its call).
UNETS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "DDPM": lambda: (pixels("DDPM", D.DDPMScheduler()), {}),
    "DDPM, learned variance": lambda: (pixels("DDPM", LEARNED, out_channels=6), {}),
    "DDIM": lambda: (pixels("DDIM", D.DDIMScheduler()), {}),
    "PNDM": lambda: (pixels("PNDM", D.PNDMScheduler()), {}),
    "ScoreSdeVe": lambda: (score_sde_ve(), {}),
    "Consistency models": lambda: (pixels("ConsistencyModel", STEPS), {}),
    "Consistency models, classes": lambda: (
        pixels("ConsistencyModel", STEPS, num_class_embeds=10),
        {"class_labels": [1, 2]},
    ),
    "Latent diffusion (VQ)": lambda: (pixels("LDM", D.DDIMScheduler(), sample_size=8), {}),
    "Latent diffusion, text": lambda: (ldm_text(), {**TEXT, **LARGE, "guidance_scale": 3.0}),
    "Stable Diffusion 1, guidance": lambda: (sd(), TEXT),
    "Stable Diffusion 1, no guidance": lambda: (sd(), {**TEXT, "guidance_scale": 1.0}),
    "Stable Diffusion 2, v-prediction": lambda: (sd(use_linear_projection=True, **V), TEXT),
    "Stable Diffusion, PAG": lambda: (sd("PAG"), TEXT),
    "Stable Diffusion, GLIGEN network": lambda: (sd(attention_type="gated"), TEXT),
    "Stable Diffusion, GLIGEN boxes": lambda: (sd("GLIGEN", attention_type="gated"), BOXES),
    "Latent consistency (LCM)": lambda: (lcm(), TEXT),
    "TCD": lambda: (sd(scheduler=D.TCDScheduler(**BETAS)), TEXT),
    "Stable Diffusion, image to image": lambda: (sd("Img2Img"), IMAGE),
    "Stable Diffusion, inpainting": lambda: (sd("Inpaint", in_channels=9), INPAINT),
    "InstructPix2Pix": lambda: (sd("InstructPix2Pix", in_channels=8), EDIT),
    "ControlNet, Stable Diffusion": lambda: (controlled(sd(), "ControlNet"), EDIT),
    "ControlNet, SDXL": lambda: (controlled(sdxl(), "XLControlNet"), EDIT),
    "SDXL base": lambda: (sdxl(), TEXT),
    "SDXL refiner": lambda: (refiner(), IMAGE),
    "SDXL, image to image": lambda: (sdxl("Img2Img"), IMAGE),
    "SDXL, EDM schedule": lambda: (sdxl(scheduler=D.EDMEulerScheduler()), TEXT),
    "Stable Diffusion, x4 upscale": lambda: (upscaler(), {**TEXT, **p.images(8)}),
    "Stable Diffusion, latent upscale": lambda: (latent_upscaler(), EDIT),
    "DeepFloyd IF": lambda: (deepfloyd(), p.RAW),
    "Marigold, depth": lambda: (marigold(), {**p.images(), "processing_resolution": 0}),
    "Kandinsky 2.2, prior": lambda: (kandinsky_prior(), TEXT),
    "Kandinsky 2.2, decoder": lambda: (kandinsky_decoder(), {**IMAGE_EMBEDS, **LARGE}),
    "Stable Cascade, prior": lambda: (cascade_prior(), {**TEXT, **HUGE}),
    "Stable Cascade, decoder": lambda: (cascade_decoder(), {**TEXT, **STAGE_B}),
    "Wuerstchen, prior": lambda: (wuerstchen_prior(), {**TEXT, **HUGE}),
    "Wuerstchen, decoder": lambda: (wuerstchen_decoder(), {"prompt": "a b", **STAGE_B}),
}
