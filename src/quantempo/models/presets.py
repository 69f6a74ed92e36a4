"""Networks of well-known shapes with random weights, and random inputs for any denoiser.

For measuring speed where no checkpoint is at hand: shapes decide the time, weights do not.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs
from quantempo.registry import check_known

__all__ = ["PRESETS", "build_preset", "check_preset", "ddim_loop", "random_inputs"]

# Tokens of a text encoder's output.
_TEXT_TOKENS = 77

_LATENT = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
# Name -> (diffusers class, its configuration).
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # Stable Diffusion 1.5: 859.5 M parameters.
    "sd15": ("UNet2DConditionModel", {
        "sample_size": 64, **_LATENT, "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": 768, "attention_head_dim": 8,
    }),
    # Stable Diffusion XL: 2,567 M parameters, latents of 1024 x 1024 pixels.
    "sdxl": ("UNet2DConditionModel", {
        "sample_size": 128, **_LATENT, "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }),
    # The DDPM of CIFAR-10: 35.7 M parameters.
    "ddpm35m": ("UNet2DModel", {
        "sample_size": 32, "layers_per_block": 2, "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
        "freq_shift": 1, "norm_eps": 1e-6,
    }),
}  # fmt: skip


def check_preset(name: str) -> None:
    """Raise QuantempoError for a name that is no preset."""
    check_known([name], PRESETS, "no diffusers folder and no model")


def build_preset(name: str, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """Return a preset with random float32 weights, made on the device ("meta": shapes alone).

    Raises:
        QuantempoError: unknown name.
    """
    check_preset(name)
    import diffusers

    kind, config = PRESETS[name]
    device = torch.device(device)
    cards = [torch.cuda.current_device()] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards), torch.device(device):
        torch.manual_seed(seed)
        return getattr(diffusers, kind)(**config).eval()


def random_inputs(
    denoiser: nn.Module, batch: int, *, time: float = 500.0, seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of a call with normal x_t and conditioning.

    denoiser: a U-Net or DiT of diffusers, float32, on its device; time: the training time-step of
    all rows; seed: of the values, which do not depend on the device.

    Raises:
        QuantempoError: a class whose arguments are not known here, or one that needs more.
    """
    kind, config = type(denoiser).__name__, getattr(denoiser, "config", {})
    if kind not in ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"):
        raise QuantempoError(
            f"cannot make inputs for a {kind}; bench a run folder of it (--run), whose trace has "
            "them (known: UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)"
        )
    added = config.get("addition_embed_type")
    unknown = config.get("class_embed_type") or config.get("encoder_hid_dim_type")
    if unknown or added not in (None, "text_time"):
        raise QuantempoError(
            f"this {kind} takes further conditioning; bench a run folder of it (--run)"
        )
    device, noise = next(denoiser.parameters()).device, Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(device)

    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sample = "hidden_states" if kind == "DiTTransformer2DModel" else "sample"
    inputs: dict[str, Any] = {
        sample: normal(batch, config["in_channels"], height, width),
        # As pipelines pass it: U-Nets get one number for all rows.
        "timestep": torch.full((batch,) if "DiT" in kind else (), int(time), device=device),
    }
    if kind == "UNet2DConditionModel":
        inputs["encoder_hidden_states"] = normal(batch, _TEXT_TOKENS, config["cross_attention_dim"])
        if added:
            times = 6
            pooled = config["projection_class_embeddings_input_dim"]
            pooled -= times * config["addition_time_embed_dim"]
            ids = torch.tensor([8 * height, 8 * width, 0, 0, 8 * height, 8 * width], device=device)
            inputs["added_cond_kwargs"] = {
                "text_embeds": normal(batch, pooled),
                "time_ids": ids.float().expand(batch, times).contiguous(),
            }
    classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if classes and (kind != "UNet2DConditionModel"):
        inputs["class_labels"] = torch.arange(batch, device=device) % classes
    return inputs


@torch.no_grad()
def ddim_loop(
    forward: Any, denoiser: nn.Module, inputs: dict[str, Any], steps: int, scheduler: Any = None
) -> Tensor:
    """Denoise x_T with DDIM and a forward of fixed shapes; return x_0 float32, latents as such.

    Args:
        forward: takes the keyword arguments `inputs`, whose x_t and time-step are replaced at every
            step; its output may be overwritten by its next call.
        denoiser: whose argument names `inputs` has.
        scheduler: whose noise law is used; None for DDIM's default (linear betas, T = 1000).
    """
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler() if scheduler is None else DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(steps)
    names = bind_inputs(denoiser, (), inputs)
    x, times = names.sample.float(), inputs[names.timestep_name]
    # All at once: a copy a step from the host would make it wait.
    received = ddim.timesteps.to(times.device, times.dtype)
    for i, t in enumerate(ddim.timesteps.tolist()):
        call = {**inputs, names.sample_name: x.to(names.sample.dtype)}
        call[names.timestep_name] = received[i].expand(times.shape).contiguous()
        output = forward(**call)
        eps = output if isinstance(output, Tensor) else output[0]
        # Without the learned variance, which DDIM at eta = 0 does not use.
        x = ddim.step(eps[:, : x.shape[1]].float(), t, x).prev_sample
    return x
