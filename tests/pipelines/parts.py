"""Parts of tiny random pipelines: networks, text encoders, autoencoders, arguments of calls.

Hidden sizes of 8 to 32, one or two blocks, 8 to 32 pixels, letters for words. `tiny` shrinks any
network of diffusers by the names of its settings, `pipeline` fills any pipeline by the names of its
components, so that a builder says only what is special about its family.
"""

import inspect
import string
from typing import Any

import diffusers as D
import torch
import transformers as T
from PIL import Image

from tests.tiny import noise, tiny_clip, tiny_vae

WIDTH = 16
PROMPTS = ["a b", "c d"]

# Setting of a network -> a small value.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("in_channels", "out_channels"), 4),
    **dict.fromkeys(("sample_size", "attention_head_dim", "cross_attention_head_dim"), 8),
    **dict.fromkeys(("num_layers", "num_attention_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "n_layers", "n_heads", "n_kv_heads", "num_heads"), 2),
    **dict.fromkeys(("num_single_layers", "num_mmdit_layers", "num_single_dit_layers"), 1),
    **dict.fromkeys(("num_refiner_layers", "n_refiner_layers", "num_kv_heads"), 1),
    **dict.fromkeys(("time_embed_dim", "timestep_embed_dim", "timestep_guidance_channels"), 8),
    **dict.fromkeys(("joint_attention_dim", "cross_attention_dim", "caption_channels"), WIDTH),
    **dict.fromkeys(("caption_projection_dim", "pooled_projection_dim", "text_dim"), WIDTH),
    **dict.fromkeys(("text_embed_dim", "cap_feat_dim", "context_in_dim", "hidden_size"), WIDTH),
    **dict.fromkeys(("ffn_dim", "freq_dim", "intermediate_size", "multiple_of"), 16),
    **dict.fromkeys(("pos_embed_max_size", "max_text_seq_length", "rope_max_seq_len"), 16),
    "axes_dims_rope": (4, 2, 2),
    "condition_dim": 4,
    "layers_per_block": 1,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DOWN2, UP2 = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
SIZE = {"height": 16, "width": 16}
TEXT = {"prompt": PROMPTS}
LONG = {**TEXT, **SIZE, "max_sequence_length": 8}
RAW = {**TEXT, **SIZE, "clean_caption": False}
BOTH = ("prompt_embeds", "negative_prompt_embeds")


def tiny(kind: Any, **changes: Any) -> Any:
    """Return a network of a class with every setting small that `SMALL` knows."""
    known = inspect.signature(kind.__init__).parameters
    small = {key: value for key, value in SMALL.items() if key in known}
    return kind(**{**small, **changes}).eval()


def pipeline(kind: Any, network: torch.nn.Module, *texts: Any, **parts: Any) -> Any:
    """Return a pipeline; `texts` are its pairs of tokenizer and encoder, `parts` go by name."""
    known = inspect.signature(kind.__init__).parameters
    given = dict.fromkeys({"unet", "transformer", "prior", "decoder"} & set(known), network)
    for place, pair in enumerate(texts):
        end = f"_{place + 1}" if place else ""
        given |= {f"tokenizer{end}": pair[0], f"text_encoder{end}": pair[1]}
    parts = given | parts
    makers = {"vae": vae, "vqvae": vq, "scheduler": flow, "requires_safety_checker": lambda: False}
    for name, parameter in list(known.items())[1:]:
        if name in makers and name not in parts:
            parts[name] = makers[name]()
        elif parameter.default is parameter.empty:
            parts.setdefault(name, None)
    return kind(**parts)


def ddim(**settings: Any) -> Any:
    """Return the scheduler of models that predict noise."""
    return D.DDIMScheduler(**{**BETAS, "clip_sample": False, **settings})


def flow(**settings: Any) -> Any:
    """Return the scheduler of flow-matching models."""
    return D.FlowMatchEulerDiscreteScheduler(**settings)


def image(size: int = 16, seed: int = 0) -> Image.Image:
    """Return a picture of noise."""
    pixels = noise(size, size, 3, seed=seed).mul(60).add(128).clamp(0, 255).byte()
    return Image.fromarray(pixels.numpy())


def images(size: int = 16) -> dict[str, Any]:
    """Return two pictures as the argument `image`."""
    return {"image": [image(size, seed) for seed in (1, 2)]}


def masks(size: int = 16) -> dict[str, Any]:
    """Return two masks, one empty, as the argument `mask_image`."""
    return {"mask_image": [Image.new("L", (size, size), grey) for grey in (0, 255)]}


def embeds(*names: str, tokens: int = 8, masks: str = "") -> dict[str, torch.Tensor]:
    """Return text embeddings (2, tokens, WIDTH), and masks under `masks` (a format) if asked."""
    found = {name: noise(2, tokens, WIDTH, seed=i) for i, name in enumerate(names)}
    return found | {masks.format(name): torch.ones(2, tokens).bool() for name in names if masks}


def clip(kind: Any = T.CLIPTextModel) -> tuple[Any, Any]:
    """Return tokenizer and CLIP text encoder."""
    tokenizer, encoder = tiny_clip()
    encoder.config.update({"projection_dim": WIDTH})
    return tokenizer, kind(encoder.config).eval()


def projected() -> tuple[Any, Any]:
    """Return tokenizer and CLIP text encoder with a projection."""
    return clip(T.CLIPTextModelWithProjection)


def clip_vision(kind: Any = T.CLIPVisionModelWithProjection) -> Any:
    """Return a CLIP image encoder."""
    shape = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 112}
    return kind(T.CLIPVisionConfig(**shape)).eval()


def t5(width: int = WIDTH, kind: str = "T5") -> tuple[Any, Any]:
    """Return tokenizer and T5 (or UMT5) text encoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_letters + string.digits + ".,:!'-"]
    config = {"d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config |= {"vocab_size": len(pieces), "feed_forward_proj": "gated-gelu"}
    encoder = getattr(T, f"{kind}EncoderModel")(getattr(T, f"{kind}Config")(**config))
    return T.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=8), encoder.eval()


def decoder_lm(tokenizer: Any, config: Any, model: Any, layers: int) -> tuple[Any, Any]:
    """Return tokenizer and a language model that pipelines read hidden states of."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 16, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": layers}
    return tokenizer, model(config(vocab_size=len(tokenizer.get_vocab()), **shape)).eval()


def gemma() -> tuple[Any, Any]:
    """Return tokenizer and Gemma 2 text encoder."""
    return decoder_lm(t5()[0], T.Gemma2Config, T.Gemma2Model, 1)


def qwen3() -> tuple[Any, Any]:
    """Return tokenizer and Qwen 3 text encoder."""
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, range(33, 400))]
    tokenizer = T.Qwen2Tokenizer({word: i for i, word in enumerate(dict.fromkeys(words))}, [])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return decoder_lm(tokenizer, T.Qwen3Config, T.Qwen3ForCausalLM, 2)


def clap(kind: Any) -> tuple[Any, Any]:
    """Return tokenizer and CLAP text encoder (or both encoders)."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "Ġ", *string.ascii_letters]
    tokenizer = T.RobertaTokenizer({word: i for i, word in enumerate(words)}, [])
    tokenizer.model_max_length = 8
    text = {"vocab_size": 60, "hidden_size": WIDTH, "intermediate_size": 16, "pad_token_id": 1}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": WIDTH}
    if kind is T.ClapTextModelWithProjection:
        return tokenizer, kind(T.ClapTextConfig(**text)).eval()
    sound = {"num_mel_bins": 16, "patch_embeds_hidden_size": 8, "hidden_size": 16, "patch_size": 2}
    sound |= {"depths": [1, 1], "num_attention_heads": [1, 1], "spec_size": 16, "window_size": 2}
    sound |= {"projection_dim": WIDTH, "patch_stride": 2}
    config = T.ClapConfig(text_config=text, audio_config=sound, projection_dim=WIDTH)
    return tokenizer, kind(config).eval()


def vocoder() -> Any:
    """Return a HiFi-GAN that makes sound of spectra of 16 bins."""
    shape = {"model_in_dim": 16, "upsample_initial_channel": 16, "normalize_before": False}
    shape |= {"upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4]}
    more = {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]]}
    return T.SpeechT5HifiGan(T.SpeechT5HifiGanConfig(**shape, **more)).eval()


def vae() -> Any:
    """Return an autoencoder that halves the size once and has a shift."""
    made = tiny_vae()
    made.register_to_config(shift_factor=0.1, scaling_factor=0.5)
    return made


def vq(**changes: Any) -> Any:
    """Return a VQModel that halves the size once."""
    shape: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}
    shape |= {"down_block_types": DOWN2, "up_block_types": UP2, **changes}
    return D.VQModel(**shape).eval()


def movq() -> Any:
    """Return the autoencoder of Kandinsky."""
    norms = {"norm_type": "spatial", "block_out_channels": (32, 32), "norm_num_groups": 32}
    return vq(latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, **norms)


def wan_vae(kind: str = "Wan") -> Any:
    """Return the causal video autoencoder that Wan and Qwen-Image share."""
    shape = {"base_dim": 3, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return getattr(D, f"AutoencoderKL{kind}")(**shape, temperal_downsample=[False, True, True])
