"""Networks of well-known shapes with random weights, and random inputs for any denoiser.

For measuring speed where no checkpoint is at hand: shapes decide the time, weights do not.
"""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
from torch import Generator, Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs
from quantempo.registry import check_known

__all__ = ["LARGE", "PRESETS", "build_preset", "check_preset", "ddim_loop", "random_inputs"]

_TEXT_TOKENS = 77

_DATA = json.loads((files("quantempo") / "data/presets.json").read_text())
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (preset["class"], preset["config"]) for name, preset in _DATA["networks"].items()
}
# Class of diffusers -> argument -> its shape behind the rows, by numbers and names of its
# configuration; or the name of how many classes there are; others as they are. Tokens as for 1024
# pixels, 33 frames of 480 x 832 of Wan. U-Nets: see `_unet_inputs`.
_INPUTS: dict[str, dict[str, Any]] = _DATA["inputs"]
# Of which there is no room for copies in float32, or whose search takes minutes.
LARGE = ("flux", "sd35-large", "wan-1.3b")


def check_preset(name: str) -> None:
    """Raise QuantempoError for a name that is no preset."""
    check_known([name], PRESETS, "no diffusers folder and no model")


def build_preset(name: str, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
    """Return a preset with random weights, float32 or (LARGE) bfloat16; "meta": shapes alone."""
    check_preset(name)
    import diffusers

    kind, config = PRESETS[name]
    device = torch.device(device)
    cards = [torch.cuda.current_device()] if device.type == "cuda" else []
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if name in LARGE else torch.float32)
    try:
        with torch.random.fork_rng(devices=cards), torch.device(device):
            torch.manual_seed(seed)
            network = getattr(diffusers, kind)(**config).eval()
            blocks: Any = network.transformer_blocks if kind.startswith("DiT") else ()
            for block in blocks:
                # Those of the published one have equal embeddings of time and class.
                block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
            return network
    finally:
        torch.set_default_dtype(before)


def random_inputs(
    denoiser: nn.Module, batch: int, *, time: float = 500.0, seed: int = 0
) -> dict[str, Any]:
    """Return the keyword arguments of a call with normal x_t and conditioning.

    denoiser: one of diffusers, on its device; time: the training time-step of all rows, of 1000;
    seed: of the values, float32, which do not depend on the device.
    Raises QuantempoError: a class whose arguments are not known here, or one that needs more.
    """
    kind = type(denoiser).__name__
    if kind not in _INPUTS:
        text = f"cannot make inputs for a {kind}; bench a run folder of it (--run), whose trace has"
        raise QuantempoError(f"{text} them (expected one of: {', '.join(_INPUTS)})")
    device, noise = next(denoiser.parameters()).device, Generator().manual_seed(seed)
    config: Any = getattr(denoiser, "config", {})

    def normal(*shape: int) -> Tensor:
        return torch.randn((batch, *shape), generator=noise).to(device)

    def made(given: Any) -> Any:
        if isinstance(given, list):
            return normal(*(config[size] if isinstance(size, str) else size for size in given))
        return torch.arange(batch) % config[given] if isinstance(given, str) else given

    found = {name: made(given) for name, given in _INPUTS[kind].items()}
    if kind.startswith("UNet"):
        found = _unet_inputs(config, normal)
    elif kind.startswith("Flux"):
        grid = torch.cartesian_prod(*[torch.arange(64.0)] * 2)
        found["img_ids"] = torch.cat([torch.zeros(len(grid), 1), grid], 1)
        found["txt_ids"] = torch.zeros(512, 3)
        found["guidance"] = torch.full((batch,), 3.5) if config["guidance_embeds"] else None
    # As pipelines pass it: U-Nets get one number for all rows, flows a share of the way.
    shape = () if kind.startswith("UNet") else (batch,)
    value = time / 1000 if kind.startswith("Flux") else int(time)
    timestep = torch.full(shape, value, device=device)
    return {name: timestep if name == "timestep" else v.to(device) if isinstance(v, Tensor) else v
            for name, v in found.items()}  # fmt: skip


def _unet_inputs(config: Any, normal: Callable[..., Tensor]) -> dict[str, Any]:
    added = config.get("addition_embed_type")
    unknown = config.get("class_embed_type") or config.get("encoder_hid_dim_type")
    if unknown or added not in (None, "text_time"):
        raise QuantempoError("this U-Net takes further inputs; bench a run folder of it (--run)")
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    inputs = {"sample": normal(config["in_channels"], height, width), "timestep": None}
    batch = len(inputs["sample"])
    if "cross_attention_dim" in config:
        inputs["encoder_hidden_states"] = normal(_TEXT_TOKENS, config["cross_attention_dim"])
        if added:
            times = 6
            pooled = config["projection_class_embeddings_input_dim"]
            text = normal(pooled - times * config["addition_time_embed_dim"])
            ids = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width])
            ids = ids.to(text.device).expand(batch, times).contiguous()
            inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    elif config.get("num_class_embeds"):
        inputs["class_labels"] = torch.arange(batch) % config["num_class_embeds"]
    return inputs


@torch.no_grad()
def ddim_loop(
    forward: Any, denoiser: nn.Module, inputs: dict[str, Any], steps: int, scheduler: Any = None
) -> Tensor:
    """Denoise x_T with DDIM and a forward of fixed shapes; return x_0 float32, latents as such.

    forward: takes the arguments `inputs` of `denoiser`, of which x_t and time-step are replaced at
    every step; its next call may overwrite its output; scheduler: of the noise law, or DDIM's.
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
