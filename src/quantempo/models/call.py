"""Call a diffusers pipeline once: its arguments, what it hands back, its errors in a sentence."""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.registry import check_known

__all__ = [
    *("PIXEL_PIPELINES", "call_pipeline", "check_arguments", "generators", "images_a_call"),
    *(
        "kind_of",
        "own_guidance",
        "sample_rate",
        "scheduler_noise",
        "unusual_settings",
        "wrapped_step",
    ),
]

# Schedulers the stock pixel pipelines run correctly, their own first (the one they give all
# arguments of); others need UnconditionalPipeline.
PIXEL_PIPELINES = {
    "DDIMPipeline": ("DDIMScheduler",),
    "DDPMPipeline": ("DDPMScheduler", "DDIMScheduler"),
}

# Arguments with one entry an image, whole names; all others are passed as they are. The kind says
# what is one entry: a string or number; a row of a tensor; a picture; the frames of a film.
PER_IMAGE = {
    "text": r"((negative|source|target|content|task)_)?prompt(_[2-4])?|class_labels|lyrics"
    r"|transcription|(source|target)_subject_category",
    # That of Llama has its layers first.
    "rows": r"((negative|pooled|generated)_)*prompt_(embeds|attention_mask)(_(?!llama)\w+)?"
    r"|(\w+_)?latents|(negative_)?image_embed(s|dings)|controlnet_pooled_projections"
    r"|((negative|encoder|text)_)*attention_mask|(negative_)?encoder_hidden_states"
    r"|initial_audio_waveforms",
    "image": r"(\w+_)?(image|hint)|((control|image)_)?mask|depth_map|image_reference"
    r"|(input_)?images",
    "film": r"(\w+_)?video|conditioning_frames",
}
# How the command line gives them, where it has an option of its own.
_OPTIONS = {"prompt": "--prompts FILE", "class_labels": "--class-labels"}
_SEVERAL = "ask for more images (--images); prompts go round"
_RESERVED = {
    "num_inference_steps": "give the number of steps (steps=, --steps)",
    "generator": "images are made from seeds (seeds=, --seed)",
    "batch_size": "give the number of images (--images)",
    **dict.fromkeys(("output_type", "return_dict"), "it is chosen for each stage"),
    **{f"num_{what}_per_prompt": _SEVERAL for what in ("images", "videos", "waveforms")},
}
# A list of images is several references for one image there.
_REFERENCES = re.compile("Flux2|QwenImage(EditPlus|Layered)|BriaFibo2|GlmImage|JoyImage|Omni")
# Fields of outputs that are pictures in [0, 1], one of them or a film.
_PICTURES = ("images", "image", "frames", "videos", "video", "rgb")
_LATENT = re.compile(r"output_type\W+(?:==|!=|in|not in)\W[^\n]*latent")


def kind_of(name: str) -> str | None:
    """Return the kind of an argument with one entry an image, None for all others."""
    return next((kind for kind, law in PER_IMAGE.items() if re.fullmatch(law, name)), None)


def call_pipeline(
    pipe: Any, seeds: Sequence[int], *, steps: int, first: int = 0,
    places: Sequence[int] | None = None, output_type: str = "np", **call: Any,
) -> np.ndarray:  # fmt: skip
    """Call a pipeline once for a batch of images, with per-image noise and no progress bar.

    Arguments as of `sampling.run_pipeline`; `places` in the whole set (None: `first` and on) pick
    entries. output_type: "latent" spares a decoder where possible; "np": pictures (b, H, W, C) or
    films (b, F, H, W, C) in [0, 1]; "uint8": the same rounded; both any other output as it is.
    """
    known = inspect.signature(pipe.__call__).parameters
    check_arguments(pipe, call)
    _check_call(pipe, known, call)
    _check_ranges(pipe, steps, call)
    places, count = range(first, first + len(seeds)) if places is None else places, {}
    if len(seeds) > images_a_call(pipe, call, len(seeds)):
        # Images of the same entries can still be made at once.
        count = {key: len(seeds) for key in known if re.fullmatch(r"num_\w+_per_prompt", key)}
        if len(set(places)) > 1 or not count:
            raise QuantempoError(f"{type(pipe).__name__} takes these arguments one image at a time")
        places = places[:1]
    arguments = {key: _entries(pipe, key, value, places) for key, value in call.items()} | count
    for key, value in arguments.items():
        wanted = str(known[key].annotation).lower()
        if isinstance(value, list) and "tuple[" in wanted and "list[" not in wanted:
            # TOML has no tuples, and pipelines add them to others.
            arguments[key] = tuple(value)
    # Pipelines leave tensors that are given where they are.
    here = functools.partial(Tensor.to, device=getattr(pipe, "_execution_device", None))
    arguments = pytree.tree_map_only(Tensor, here, arguments)
    if "batch_size" in known:
        arguments["batch_size"] = len(seeds)
    form = "latent" if output_type == "latent" and _LATENT.search(_source(pipe)) else "np"
    # The stock pixel pipelines hand bfloat16 to numpy, which does not know it.
    form = "pt" if type(pipe).__name__ in PIXEL_PIPELINES else form
    # Some know arrays alone (DanceDiffusion).
    arguments |= {"output_type": form} if "output_type" in known else {}
    noise = generators(seeds)
    with _quiet(pipe), scheduler_noise(pipe.scheduler, noise), _explained(pipe, known, call):
        output = pipe(generator=noise, num_inference_steps=steps, **arguments)
    name = next(iter(output)) if isinstance(output, Mapping) else "images"
    made = _array(output[name] if isinstance(output, Mapping) else output[0])
    made = np.moveaxis(made, -3, -1) if form == "pt" else made
    if output_type != "uint8":
        return made
    if not np.isfinite(made).all():
        bad = [seed for seed, one in zip(seeds, made, strict=True) if not np.isfinite(one).all()]
        text = f"{type(pipe).__name__} produced NaN for seeds {bad}"
        raise QuantempoError(f"{text}; use a wider dtype, or keep more layers in float")
    return (made * 255).round().astype(np.uint8) if name in _PICTURES else made


def _array(made: Any) -> np.ndarray:
    if isinstance(made, list | tuple):
        return np.stack([_array(entry) for entry in made])
    return made.detach().float().cpu().numpy() if isinstance(made, Tensor) else np.asarray(made)


def _source(pipe: Any, name: str = "__call__") -> str:
    try:
        return inspect.getsource(getattr(type(pipe), name))
    except (AttributeError, OSError):
        # Without such a method, or typed into an interpreter.
        return ""


def images_a_call(pipe: Any, call: Mapping[str, Any], most: int) -> int:
    """Return how many images one call may make: 1 where a list would be references, or frames."""
    given = {key for key, value in call.items() if value is not None}
    images = {key for key in given if kind_of(key) in ("image", "film")}
    # LTX, CogVideoX and HunyuanVideo encode picture i for film i, and know no other way.
    first = hasattr(pipe, "video_processor") and "image[i]" not in _source(pipe, "prepare_latents")
    one = first or _REFERENCES.match(type(pipe).__name__)
    return 1 if (one and images) or any("ip_adapter" in key for key in given) else most


def sample_rate(pipe: Any) -> int | None:
    """Return the samples a second of a pipeline's audio, None if it makes none."""
    for part in pipe.components.values():
        config = getattr(part, "config", None)
        for name in ("sampling_rate", "sample_rate"):
            if isinstance(rate := getattr(config, name, None), int):
                return rate
    return None


def unusual_settings(pipe: Any, call: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings of a call that differ from the pipeline's own: name -> (given, own)."""
    known = inspect.signature(pipe.__call__).parameters
    kinds = int | float | str | list | tuple
    plain = {k: v for k, v in call.items() if isinstance(v, kinds) and not kind_of(k)}
    own = {key: known[key].default for key in plain if key in known}
    return {key: (plain[key], own[key]) for key in own if plain[key] != own[key]}


def own_guidance(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scales of guidance that a call leaves to the pipeline: name -> its own value."""
    known, names = inspect.signature(pipe.__call__).parameters, ("guidance_scale", "true_cfg_scale")
    return {key: known[key].default for key in names if key in known and key not in call}


def check_arguments(pipe: Any, call: Mapping[str, Any]) -> None:
    """Raise QuantempoError for arguments that are unknown to the pipeline, or decided here."""
    name, known = type(pipe).__name__, inspect.signature(pipe.__call__).parameters
    choices = [key for key in known if key not in ("args", "kwargs") and key not in _RESERVED]
    for key, value in call.items():
        if key in _RESERVED and not (key.endswith("_per_prompt") and str(value) in ("1", "None")):
            raise QuantempoError(f"'{key}' cannot be given in the call of {name}: {_RESERVED[key]}")
        if key not in known:
            check_known([key], choices, f"{name} takes no argument")
    one = {key for key in ("height", "width") if call.get(key) is not None}
    if len(one) == 1 and "not height or not width" in _source(pipe):
        other = ({"height", "width"} - one).pop()
        raise QuantempoError(f"{name} ignores {one.pop()} without {other}; give both")


def _check_call(pipe: Any, known: Mapping[str, inspect.Parameter], call: Mapping[str, Any]) -> None:
    """Refuse a call that the pipeline could not make, or would make wrongly, and say why."""
    name = type(pipe).__name__
    scheduler = type(pipe.scheduler).__name__
    if scheduler not in PIXEL_PIPELINES.get(name, (scheduler,)):
        raise QuantempoError(
            f"{name} does not run {scheduler} correctly; set the scheduler with "
            "quantempo.models.sampling.swap_scheduler, which gives a pipeline that does"
        )
    for key in ("generator", "num_inference_steps"):
        if key not in known:
            raise QuantempoError(f"{name} takes no '{key}', so it cannot be run from seeds here")
    given = {key for key, value in call.items() if value is not None}
    plain = [(k, p) for k, p in known.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    needed = [key for key, p in plain if p.default is p.empty and key not in _RESERVED]
    if "prompt" in known and not any(kind_of(key) == "rows" and "embed" in key for key in given):
        needed.append("prompt")
    for key in needed:
        if key not in call or (key == "prompt" and key not in given):
            how = f"{_OPTIONS[key]} (prompt=...)" if key in _OPTIONS else _how(key)
            what = key if key.endswith("s") else f"a {key}"
            raise QuantempoError(f"{name} needs {what}: pass {how}")
    if "batch_size" not in known and not any(map(kind_of, given)):
        raise QuantempoError(f"cannot tell {name} how many images to make; expected 'batch_size'")


def _how(key: str) -> str:
    """Return how to give an argument."""
    value = "FILE" if kind_of(key) in ("image", "film", "rows") else "VALUE"
    return f"--set {key}={value} (call={{'{key}': ...}} in Python)"


def _check_ranges(pipe: Any, steps: int, call: Mapping[str, Any]) -> None:
    """Refuse more steps than the model has time-steps, and class labels it does not know."""
    most = getattr(pipe.scheduler.config, "num_train_timesteps", None)
    if most is not None and steps > most:
        raise QuantempoError(f"got {steps} steps; this model has {most} time-steps, take fewer")
    config = getattr(denoiser_of(pipe)[1], "config", None)
    known = (getattr(config, name, None) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    classes = next(filter(None, known), None)
    labels = call.get("class_labels")
    for label in np.ravel([] if labels is None else labels).tolist():
        if classes and not (isinstance(label, int) and 0 <= label < classes):
            raise QuantempoError(f"got class label {label}; this model has 0 to {classes - 1}")


def _entries(pipe: Any, key: str, value: Any, places: Sequence[int]) -> Any:
    """Return an argument for the images at some places: its entries, modulo their number."""
    kind = kind_of(key)
    # Several control networks take a list of their own; several adapters too.
    several = type(getattr(pipe, "controlnet", None)).__name__.startswith("Multi")
    nets = several and key in ("image", "control_image", "conditioning_frames")
    own = isinstance(value, list) and (nets or key.endswith("ip_adapter_image_embeds"))
    plain = value is None or (kind != "text" and isinstance(value, bool | int | float | str))
    if kind is None or plain or own:
        return value
    if isinstance(value, np.ndarray) and kind == "text":
        value = value.tolist()
    listed, tensor = isinstance(value, list | tuple), isinstance(value, Tensor | np.ndarray)
    if (listed or (tensor and value.ndim)) and not len(value):
        raise QuantempoError(f"got an empty '{key}'; give at least one entry")
    if tensor and value.ndim >= {"image": 4, "film": 5}.get(kind, 1):
        return value[np.asarray(places) % len(value)]
    if listed and kind == "film":
        # A list of pictures is one film.
        listed = isinstance(value[0], list | tuple) or getattr(value[0], "ndim", 0) >= 4
    found = [value[place % len(value)] if listed else value for place in places]
    return found[0] if kind in ("image", "film") and len(found) == 1 else found


@contextmanager
def _explained(
    pipe: Any, known: Mapping[str, inspect.Parameter], call: Mapping[str, Any]
) -> Iterator[None]:
    """Turn an error of diffusers or transformers into a sentence that says what to give."""
    try:
        yield
    except QuantempoError:
        raise
    except Exception as error:
        names = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
        known_to = [re.match("quantempo|diffusers|transformers", n) for n in names if n != __name__]
        if [match[0] for match in known_to if match][-1:] == ["quantempo"]:
            # A bug of ours, below the pipeline.
            raise
        text = " ".join(str(error).split())
        named = [key for key in known if re.search(rf"\b{key}\b", text) and key not in _RESERVED]
        if not any(kind_of(key) == "image" for key in call):
            named += [key for key in known if kind_of(key) == "image" and "adapter" not in key]
        absent = [key for key in named if call.get(key) is None]
        advice = f"give {_how(absent[0])}" if absent else f"check {', '.join(named or call)}"
        raise QuantempoError(
            f"{type(pipe).__name__} failed with the arguments ({', '.join(call)}): "
            f"{type(error).__name__}: {text[:300]}; {advice}"
        ) from error


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Silence the progress bars of a pipeline, and of pipelines it is made of, for a while."""
    parts = [part for part in vars(pipe).values() if hasattr(part, "set_progress_bar_config")]
    with ExitStack() as stack:
        for part in (pipe, *parts):
            quiet = {**vars(part).get("_progress_bar_config", {}), "disable": True}
            stack.enter_context(patch.object(part, "_progress_bar_config", quiet, create=True))
        yield


def generators(seeds: Sequence[int]) -> list[Generator]:
    """Return one generator for each seed below 2^63: a batch's split never changes an image.

    Source: EDM's StackedRandomGenerator (Karras et al. 2022, released code), the idea.
    """
    if beyond := [seed for seed in seeds if abs(seed) >= 2**63]:
        raise QuantempoError(f"got seed {beyond[0]}; expected one below 2**63")
    return [Generator().manual_seed(int(seed)) for seed in seeds]


@contextmanager
def wrapped_step(scheduler: Any, around: Callable[..., Any]) -> Iterator[None]:
    """Let `scheduler.step(...)` call `around(step, ...)` for a while."""
    step = scheduler.step

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(step, *args, **kwargs)

    with patch.object(scheduler, "step", wrapped):
        yield


@contextmanager
def scheduler_noise(scheduler: Any, noise: Sequence[Generator]) -> Iterator[None]:
    """Hand the generators, one a row, to `scheduler.step` where a pipeline (DiT's) does not."""
    if (
        not hasattr(scheduler, "step")
        or "generator" not in (signature := inspect.signature(scheduler.step)).parameters
    ):
        yield
        return

    def seeded(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("generator") is None:
            rows = bound.arguments["sample"].shape[0]
            bound.arguments["generator"] = [noise[i % len(noise)] for i in range(rows)]
        return step(*bound.args, **bound.kwargs)

    with wrapped_step(scheduler, seeded):
        yield
