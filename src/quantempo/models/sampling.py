"""Run a diffusers pipeline from one seed an image, with any scheduler.

The pipeline itself is called; nothing here re-implements a sampler. Tracing, image generation and
timing share these functions. `unconditional` holds the one pipeline that diffusers lacks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantempo.core.random import generators
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.scheduler_step import scheduler_noise
from quantempo.registry import nearest
from quantempo.run_folder import canonical

__all__ = [
    "SCHEDULERS",
    "call_pipeline",
    "denoising_with",
    "entries",
    "run_pipeline",
    "schedule_times",
    "scheduler_settings",
    "swap_scheduler",
]

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

# Schedulers the stock pixel pipelines run correctly, their own first (the one they give all
# arguments of); others need UnconditionalPipeline.
_PIXEL_PIPELINES = {
    "DDIMPipeline": ("DDIMScheduler",),
    "DDPMPipeline": ("DDPMScheduler", "DDIMScheduler"),
}

# Arguments of pipelines with one entry an image, and what the command line calls them.
_PER_IMAGE = {
    "prompt": "--prompts FILE",
    "class_labels": "--class-labels",
    **dict.fromkeys(("prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2")),
    **dict.fromkeys(("prompt_embeds", "negative_prompt_embeds")),
    **dict.fromkeys(("pooled_prompt_embeds", "negative_pooled_prompt_embeds")),
    **dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask")),
    **dict.fromkeys(("latents", "image")),
}


def swap_scheduler(pipe: Any, name: str, **overrides: Any) -> Any:
    """Return a pipeline that shares the networks of `pipe` and samples with another scheduler.

    The noise law (betas, number of training time-steps, prediction type) is kept unless an
    override names it; `pipe` itself is not changed. DDIMPipeline and DDPMPipeline, which work
    with their own schedulers only, give an UnconditionalPipeline.

    Args:
        name: a key of `SCHEDULERS`; overrides: further settings (timestep_spacing="trailing").

    Raises:
        QuantempoError: unknown name or setting, or a model that this kind of scheduler cannot
            sample from (a flow-matching model, for one).
    """
    import diffusers

    if name not in SCHEDULERS:
        raise QuantempoError(
            f"unknown scheduler '{name}'{nearest(name, list(SCHEDULERS))} "
            f"(known: {', '.join(SCHEDULERS)})"
        )
    class_name, settings = SCHEDULERS[name]
    kind = getattr(diffusers, class_name)
    old = pipe.scheduler
    if kind not in old.compatibles:
        raise QuantempoError(
            f"the model of this {type(pipe).__name__} samples with {type(old).__name__}, which "
            f"cannot be replaced by {class_name}: their noise laws differ; keep its own scheduler"
        )
    known = [key for key in inspect.signature(kind.__init__).parameters if key != "self"]
    for key in overrides:
        if key not in known:
            raise QuantempoError(
                f"{class_name} has no setting '{key}'{nearest(key, known)} "
                f"(known: {', '.join(known)})"
            )
    law = {key: old.config[key] for key in _NOISE_LAW if key in old.config and key in known}
    scheduler = kind.from_config(old.config, **{**law, **settings, **overrides})
    # Some classes cannot follow every law (rescale_betas_zero_snr). 1e-6 passes over those that
    # move a last value of 0 to 2^-24.
    same = torch.allclose(scheduler.alphas_cumprod, old.alphas_cumprod, rtol=0, atol=1e-6)
    if not same and not set(overrides) & set(_NOISE_LAW):
        raise QuantempoError(
            f"{class_name} cannot follow the noise law this model was trained with "
            f"({type(old).__name__}: {law}); choose another scheduler"
        )
    if class_name != _PIXEL_PIPELINES.get(type(pipe).__name__, (class_name,))[0]:
        from quantempo.models.unconditional import UnconditionalPipeline

        swapped = UnconditionalPipeline(pipe.unet, scheduler)
        swapped.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
        return swapped
    # A shallow copy: the constructor of some pipelines edits the scheduler's settings.
    swapped = copy.copy(pipe)
    swapped.scheduler = scheduler
    return swapped


@contextmanager
def denoising_with(pipe: Any, denoiser: nn.Module) -> Iterator[None]:
    """Let a pipeline call another denoiser for a while."""
    name, before = denoiser_of(pipe)
    setattr(pipe, name, denoiser)
    try:
        yield
    finally:
        setattr(pipe, name, before)


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return class and settings of a scheduler as JSON types, without diffusers' own notes."""
    # A list of names among the private entries is in the order of a set.
    known = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return canonical({"class": type(scheduler).__name__, **known})


def schedule_times(pipe: Any) -> Tensor:
    """Return the times of the sampling run under way: (K,) float64, ascending, each once.

    To be asked while the pipeline runs, when it has chosen its schedule.
    """
    times = torch.as_tensor(pipe.scheduler.timesteps).detach().cpu().double()
    return torch.unique(times)


def run_pipeline(
    pipe: Any,
    seeds: Sequence[int],
    *,
    steps: int,
    batch_size: int = 16,
    on_batch: Callable[[int, np.ndarray], None] | None = None,
    progress: bool | None = None,
    **call_kwargs: Any,
) -> np.ndarray:
    """Make one image for each seed; image i depends on seeds[i] (and its prompt) only.

    Args:
        seeds: one seed an image; it drives x_T and the noise of the scheduler.
        batch_size: images in one call of the pipeline, of `steps` steps.
        on_batch: called with (index of the first image, (b, H, W, C) uint8) after every call.
        progress: draw a bar on stderr; None: only on a terminal.
        call_kwargs: further arguments of the pipeline. Arguments with one entry an image (prompt,
            class_labels, prompt_embeds, ...) give image i entry i modulo their length; a single
            string or number is used for all.

    Returns:
        (n, H, W, C) uint8, round(255 x) of the pipeline's images.

    Raises:
        QuantempoError: the pipeline needs an argument it was not given, does not know one, does
            not fit its scheduler, or produced NaN.

    Error: the batch size changes the order of float sums, so an image may differ by one level
    in a pixel between batch sizes; the noise is the same bit for bit.
    """
    if not len(seeds):
        raise QuantempoError("got no seeds; give at least one")
    batches = []
    # tqdm reads None as "only when stderr is a terminal".
    hidden = None if progress is None else not progress
    with tqdm(total=len(seeds), desc="sample", unit="image", disable=hidden, leave=False) as bar:
        for first in range(0, len(seeds), batch_size):
            batch = seeds[first : first + batch_size]
            images = call_pipeline(pipe, batch, first=first, steps=steps, **call_kwargs)
            if not np.isfinite(images).all():
                bad = [s for s, image in zip(batch, images, strict=True) if np.isnan(image).any()]
                raise QuantempoError(
                    f"{type(pipe).__name__} produced NaN for seeds {bad}; use a wider dtype, or "
                    "keep more layers in float"
                )
            batches.append((images * 255).round().astype(np.uint8))
            if on_batch is not None:
                on_batch(first, batches[-1])
            bar.update(len(batch))
    return np.concatenate(batches)


def call_pipeline(
    pipe: Any,
    seeds: Sequence[int],
    *,
    steps: int,
    first: int = 0,
    output_type: str = "np",
    **call_kwargs: Any,
) -> np.ndarray:
    """Call a pipeline once for a batch of images, with per-image noise and no progress bar.

    Arguments and errors as of `run_pipeline`; `first`, the index of the first image, picks its
    prompt or label; `output_type` "latent" spares a decoder where the pipeline has one. Returns the
    pipeline's images, for "np" (b, H, W, C) float32 in [0, 1].
    """
    known = inspect.signature(pipe.__call__).parameters
    given = {key: value for key, value in call_kwargs.items() if value is not None}
    _check_call(pipe, known, given)
    _check_ranges(pipe, steps, given)
    count = len(seeds)
    arguments = entries(given, range(first, first + count))
    if "batch_size" in known:
        arguments["batch_size"] = count
    # The stock pixel pipelines hand bfloat16 to numpy, which does not know it.
    kind = "pt" if type(pipe).__name__ in _PIXEL_PIPELINES else output_type
    noise = generators(seeds)
    with _quiet(pipe), scheduler_noise(pipe.scheduler, noise):
        images = pipe(
            generator=noise, num_inference_steps=steps, output_type=kind, **arguments
        ).images
    if kind == "pt":
        return images.permute(0, 2, 3, 1).float().cpu().numpy()
    return images


def _check_call(pipe: Any, known: Mapping[str, inspect.Parameter], given: dict[str, Any]) -> None:
    """Refuse a call that the pipeline could not make, or would make wrongly, and say why."""
    name = type(pipe).__name__
    scheduler = type(pipe.scheduler).__name__
    if scheduler not in _PIXEL_PIPELINES.get(name, (scheduler,)):
        raise QuantempoError(
            f"{name} does not run {scheduler} correctly; set the scheduler with "
            "quantempo.models.sampling.swap_scheduler, which gives a pipeline that does"
        )
    for key in ("generator", "num_inference_steps", "output_type"):
        if key not in known:
            raise QuantempoError(f"{name} takes no '{key}', so it cannot be run from seeds here")
    choices = [key for key in known if key not in ("args", "kwargs")]
    for key in given:
        if key not in choices:
            raise QuantempoError(
                f"{name} takes no argument '{key}'{nearest(key, choices)} "
                f"(known: {', '.join(choices)})"
            )
    needed = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if "prompt" in known and "prompt_embeds" not in given:
        needed.append("prompt")
    for key in needed:
        if key not in given:
            how = _PER_IMAGE.get(key) or f"it as {key}=..."
            article = "" if key.endswith("s") else "a "
            raise QuantempoError(f"{name} needs {article}{key}: pass {how}")
    if "batch_size" not in known and not any(key in given for key in _PER_IMAGE):
        raise QuantempoError(f"cannot tell {name} how many images to make; expected 'batch_size'")


def _check_ranges(pipe: Any, steps: int, given: dict[str, Any]) -> None:
    """Refuse more steps than the model has time-steps, and class labels it does not know."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise QuantempoError(f"got {steps} steps; this model has {most} time-steps, take fewer")
    config = getattr(denoiser_of(pipe)[1], "config", None)
    known = (getattr(config, name, None) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    classes = next(filter(None, known), None)
    for label in np.ravel(given.get("class_labels", [])).tolist():
        if classes and not 0 <= label < classes:
            raise QuantempoError(f"got class label {label}; this model has 0 to {classes - 1}")


def entries(call: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of a call for the images at some places of the whole set.

    Arguments with one entry an image are picked modulo their length; the others stay.
    """
    return {
        key: _picked(value, places) if key in _PER_IMAGE and value is not None else value
        for key, value in call.items()
    }


def _picked(value: Any, places: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(places) % len(value)]
    if isinstance(value, list | tuple | np.ndarray):
        if not len(value):
            raise QuantempoError("got an empty list of prompts or labels; give at least one")
        return [value[place % len(value)] for place in places]
    return [value] * len(places)


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Silence the pipeline's own progress bar for a while."""
    old = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(old or {}), "disable": True})
    try:
        yield
    finally:
        if old is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = old
