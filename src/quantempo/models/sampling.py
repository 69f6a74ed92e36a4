"""Run a diffusers pipeline from one seed an image, with any scheduler; its latents and times."""

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantempo.core import ranks
from quantempo.core.progress import Progress
from quantempo.errors import QuantempoError
from quantempo.models.call import PIXEL_PIPELINES, call_pipeline, check_arguments, images_a_call
from quantempo.registry import check_known
from quantempo.run_folder import canonical

__all__ = [
    "SCHEDULERS", "call_pipeline", "check_arguments", "is_flow", "latents_of", "run_pipeline",
    "schedule_of", "scheduler_settings", "swap_scheduler",
]  # fmt: skip

# Name in a recipe or on the command line -> (diffusers class, settings that make the name true).
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}

# The noise law belongs to the weights. It is passed on explicitly because `from_config` drops
# values that were defaults of the old class and takes the new class's, and Heun's betas differ.
_NOISE_LAW = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("prediction_type", "rescale_betas_zero_snr"),
)


def swap_scheduler(pipe: Any, name: str, **overrides: Any) -> Any:
    """Return a pipeline that shares the networks of `pipe` and samples with another scheduler.

    The noise law is kept unless an override, a setting like timestep_spacing="trailing", names it;
    `pipe` itself is not changed. DDIMPipeline and DDPMPipeline, which work with their own
    schedulers only, give an UnconditionalPipeline.
    Raises QuantempoError: unknown name or setting, or a model of another kind (flow matching).
    """
    import diffusers

    check_known([name], SCHEDULERS, "unknown scheduler")
    class_name, settings = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    old = pipe.scheduler
    if kind not in old.compatibles:
        raise QuantempoError(
            f"the model of this {type(pipe).__name__} samples with {type(old).__name__}, which "
            f"cannot be replaced by {class_name}: their noise laws differ; keep its own scheduler"
        )
    known = [key for key in inspect.signature(kind.__init__).parameters if key != "self"]
    check_known(overrides, known, f"{class_name} has no setting")
    law = {key: old.config[key] for key in _NOISE_LAW if key in old.config and key in known}
    scheduler = kind.from_config(old.config, **{**law, **settings, **overrides})
    # Some classes cannot follow every law (rescale_betas_zero_snr). 1e-6 passes over those that
    # move a last value of 0 to 2^-24.
    same = torch.allclose(scheduler.alphas_cumprod, old.alphas_cumprod, rtol=0, atol=1e-6)
    if not same and not set(overrides) & set(_NOISE_LAW):
        text = f"{class_name} cannot follow the noise law this model was trained with"
        raise QuantempoError(f"{text} ({type(old).__name__}: {law}); choose another scheduler")
    if class_name != PIXEL_PIPELINES.get(type(pipe).__name__, (class_name,))[0]:
        from quantempo.models.unconditional import UnconditionalPipeline

        swapped = UnconditionalPipeline(pipe.unet, scheduler)
        swapped.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return swapped
    # A shallow copy: the constructor of some pipelines edits the scheduler's settings.
    swapped = copy.copy(pipe)
    swapped.scheduler = scheduler
    return swapped


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return class and settings of a scheduler as JSON types, without diffusers' own notes."""
    # A list of names among the private entries is in the order of a set.
    known = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return canonical({"class": type(scheduler).__name__, **known})


def run_pipeline(
    pipe: Any, seeds: Sequence[int], *, steps: int, batch_size: int = 16,
    places: Sequence[int] | None = None, on_batch: Callable[[int, np.ndarray], None] | None = None,
    **call: Any,
) -> np.ndarray:  # fmt: skip
    """Make one image for each seed; image i depends on seeds[i] (and its prompt) only.

    Args:
        batch_size: images in one call of the pipeline, of `steps` steps.
        places: of the images in the whole set; None: 0, 1, ...
        on_batch: called with (index of the first image, what was made) after every call of a rank,
            and once with nothing by a rank that has none.
        call: further arguments, those of an image (`PER_IMAGE`) with entry i modulo their length.

    Returns pictures (n, H, W, C) and films (n, F, H, W, C) as uint8, others (n, ...) float32.
    Raises QuantempoError: an argument is missing or unknown, the call fails or does not fit the
    scheduler, or its images hold NaN.
    Error: float sums in the order of a batch: a pixel may differ by one level, the noise not.
    """
    if not len(seeds):
        raise QuantempoError("got no seeds; give at least one")
    batches, places = [], range(len(seeds)) if places is None else places
    batch_size = images_a_call(pipe, call, batch_size)
    # None: unless stderr is a terminal.
    mine = ranks.part(range(0, len(seeds), batch_size))
    count = sum(len(seeds[first : first + batch_size]) for first in mine)
    with Progress(total=count, desc="sample", unit="image") as bar:
        for first in mine:
            part = slice(first, first + batch_size)
            how: dict[str, Any] = {"steps": steps, "places": places[part], "output_type": "uint8"}
            batches.append(call_pipeline(pipe, seeds[part], **how, **call))
            if on_batch is not None:
                on_batch(first, batches[-1])
            bar.update(len(batches[-1]))
    if on_batch is not None and not mine:
        on_batch(0, np.empty(0))
    return np.concatenate(ranks.joined(batches))


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
