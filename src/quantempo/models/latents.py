"""What the VAE of a pipeline makes of pictures, and what time means to its scheduler."""

from typing import Any

import torch
from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = ["is_flow", "latents_of", "schedule_of"]


def is_flow(scheduler: Any) -> bool:
    """Return whether x_t = (1 - sigma) x_0 + sigma eps."""
    set_so = getattr(getattr(scheduler, "config", None), "use_flow_sigmas", False)
    return bool(set_so) or type(scheduler).__name__.startswith("FlowMatch")


def schedule_of(scheduler: Any, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (t, abar of all t), of a flow (sigma, None), for t or t / T of a scheduler's last run.

    Raises QuantempoError: a network that receives something else.
    """
    steps, known = scheduler.config.num_train_timesteps, torch.as_tensor(scheduler.timesteps).cpu()
    digits = 2 * torch.finfo(t.dtype).eps if t.is_floating_point() else 0
    for found in (t.double(), t.double() * steps) if t.ndim == 1 else ():
        if bool(((found[:, None] - known).abs().amin(1) <= digits * found).all()):
            known = None if is_flow(scheduler) else scheduler.alphas_cumprod
            return (found / steps if known is None else found), known
    raise QuantempoError("trace.source 'mimic' needs the scheduler's t; take 'trajectory'")


@torch.no_grad()
def latents_of(pipe: Any, pictures: Tensor) -> Tensor:
    """Return x_0 (n, ...) on the host, as trained on, of pictures (n, 3, H, W) in [-1, 1].

    Raises QuantempoError: a VAE that takes no pictures.
    """
    vae, config = pipe.vae, pipe.vae.config
    try:
        made = vae.encode(pictures.to(vae.device, vae.dtype))
        found = (made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent).float()
        for name, act in (("latents_mean", torch.sub), ("latents_std", torch.div)):
            if (value := getattr(config, name, None)) is not None:
                found = act(found, found.new_tensor(value).view(1, -1, 1, 1))
        found = found - (getattr(config, "shift_factor", None) or 0)
        found = found * (getattr(config, "scaling_factor", None) or 1)
        pack = getattr(pipe, "_pack_latents", None)
        return (found if pack is None else pack(found, *found.shape)).cpu()
    except (RuntimeError, ValueError, AttributeError, TypeError) as error:
        text = f"the {type(vae).__name__} of {type(pipe).__name__} encodes no pictures ({error})"
        raise QuantempoError(f"{text}; take trace.source 'trajectory'") from error
