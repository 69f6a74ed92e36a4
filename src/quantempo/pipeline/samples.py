"""Sample from a model into a folder, named by seed: PNG, or GIF or WAV beside exact numbers."""

import hashlib
import wave
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from quantempo.core import ranks
from quantempo.engines.lora import load_lora
from quantempo.engines.select import attach, attached
from quantempo.errors import QuantempoError, log
from quantempo.models.call import check_arguments, sample_rate, unusual_settings
from quantempo.models.layers import denoisers_of
from quantempo.models.load import check_device, configs_of, load_pipeline, named_lora
from quantempo.models.lora import merge_lora
from quantempo.models.sampling import run_pipeline, scheduler_settings, swap_scheduler
from quantempo.pipeline.arguments import kept_arguments, read_settings
from quantempo.quantized import find_clock
from quantempo.run_folder import RunFolder, atomic_path, hash_of

__all__ = ["as_traced", "engine_of", "open_model", "sample"]

_HASH = "sha256"


def open_model(
    path: str | Path, *, engine: str = "auto", packed: str = "keep", scheduler: str | None = None,
    device: str = "cpu", memory: int | str | None = None, lora: Sequence[str] = (), **loading: Any,
) -> Any:  # fmt: skip
    """Load a float or packed pipeline, ready to sample; a packed one with an engine attached.

    lora: "FILE:0.8", beside the layers of a packed one. `loading`, `memory`, errors: see
    `load_pipeline` and `attach`; also an engine asked of a float model.
    """
    check_device(device)
    if memory is not None and not device.startswith("cuda"):
        raise QuantempoError(f"memory is that of a GPU, and the device is {device}; give cuda")
    pipe = load_pipeline(path, **loading)
    pipe = swap_scheduler(pipe, scheduler) if scheduler else pipe
    networks = [part for part in denoisers_of(pipe).values() if find_clock(part) is not None]
    if not networks and (engine, packed, memory) != ("auto", "keep", None):
        raise QuantempoError(f"'{path}' is a float model; leave out --engine, --packed, --memory")
    if memory is None:
        pipe.to(device)
    # What is streamed goes to torch's current GPU.
    with nullcontext() if memory is None else torch.cuda.device(device):
        for part in networks:
            attach(part, engine, packed, memory=memory)
    if memory is not None:
        # The rest: what is streamed stays.
        pipe.to(device)
    for i, entry in enumerate(map(named_lora, lora)):
        load: Any = partial(load_lora, name=str(i)) if networks else merge_lora
        load(pipe, entry["file"], entry["scale"])
    return pipe


def engine_of(pipe: Any) -> str:
    """Return the engine that runs the packed networks of a pipeline, or "float"."""
    return next(filter(None, map(attached, denoisers_of(pipe).values())), "float")


def sample(
    pipe: Any, folder: str | Path, seeds: Sequence[int], *, steps: int, batch_size: int = 16,
    call: dict[str, Any] | None = None, identity: str = "", force: bool = False,
) -> np.ndarray:  # fmt: skip
    """Write one sample a seed (its name) and return them all, as `run_pipeline` does.

    A picture is a PNG, a film a GIF, audio a WAV; all but pictures are kept exactly in SEED.npy.
    What the same model and settings (`settings.json`) made is kept: a killed run resumes. An engine
    compiles for `batch_size`; `identity`: what else decides the images (hash of the model); `force`
    throws away those of other settings.
    Raises QuantempoError: the folder holds something else, or see `run_pipeline`.
    """
    out, call = RunFolder(folder), as_traced(pipe, kept_arguments(call or {}))
    check_arguments(pipe, call)
    settings = _settings(pipe, identity, steps, call)
    ours = _is_ours(out, settings, force)
    made: dict[int, Any] = {seed: ours and _read(_file(out, seed)) for seed in seeds}
    todo = [seed for seed, image in made.items() if not isinstance(image, np.ndarray)]

    @cache
    def begin() -> None:
        # All have looked, and what they were asked for can be made: else the folder stays.
        ranks.told(None, "sample")
        if not (ours or ranks.rank()):
            for kind in ("png", "gif", "wav", "npy"):
                for old in out.path.glob(f"*.{kind}"):
                    old.unlink()
            out.write_json("settings.json", settings)
        ranks.told(None)

    def write(first: int, images: np.ndarray) -> None:
        begin()
        for seed, image in zip(todo[first : first + len(images)], images, strict=True):
            _write(out, seed, image, sample_rate(pipe))

    if todo:
        # Prompts and labels go by position in the whole list, whatever is left to do.
        where = {seed: place for place, seed in reversed([*enumerate(seeds)])}
        places = [where[seed] for seed in todo]
        how: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "places": places}
        made |= zip(todo, run_pipeline(pipe, todo, on_batch=write, **how, **call), strict=True)
    # Of one layout, which the last digits of scores follow.
    return np.ascontiguousarray(np.stack([made[seed] for seed in seeds]))


def as_traced(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Return a call over the settings a packed pipeline was traced with; say where it differs."""
    traced = read_settings(pipe.config.get("_name_or_path") or "")
    if traced is None:
        return call
    whole = {**traced, **call}
    # What was not given in the trace counts as the pipeline's own value.
    then, now = unusual_settings(pipe, traced), unusual_settings(pipe, whole)
    for key in sorted(then.keys() | now.keys()):
        was, own = then[key] if key in then else now[key][::-1]
        if key not in call:
            log.info("%s %s, as traced (%s's own: %s)", key, was, type(pipe).__name__, own)
        elif call[key] != was:
            log.warning("%s %s here, but %s when the model was traced", key, call[key], was)
    return whole


def _settings(pipe: Any, identity: str, steps: int, call: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the images of a folder, apart from their seeds."""
    return {
        "model": identity,
        "engine": engine_of(pipe),
        "scheduler": type(pipe.scheduler).__name__,
        "steps": steps,
        "call": hash_of(call),
        "configs": hash_of([scheduler_settings(pipe.scheduler), configs_of(pipe)]),
    }


def _is_ours(out: RunFolder, settings: dict[str, Any], force: bool) -> bool:
    """Return whether the folder holds images of these settings; refuse one with something else."""
    # First: another process may begin just now.
    other = out.foreign()
    if out.has("settings.json"):
        if out.read_json("settings.json") == settings:
            return True
        if not force:
            text = f"{out.path} holds images of another model or other settings"
            raise QuantempoError(f"{text}; choose another folder, or --force to replace them")
    elif other:
        raise QuantempoError(f"{out.path} is not empty; choose another folder for the images")
    return False


def _file(out: RunFolder, seed: int) -> Path:
    """Return the file that holds a sample exactly: SEED.npy, or SEED.png of a picture."""
    numbers = out / f"{seed}.npy"
    return numbers if numbers.exists() else out / f"{seed}.png"


def _write(out: RunFolder, seed: int, value: np.ndarray, rate: int | None) -> None:
    """Write one sample; a film and audio first as something to look at or to listen to."""
    film = value.dtype == np.uint8 and value.ndim == 4
    if value.dtype == np.uint8:
        parts = value if film else value[None]
        frames = [Image.fromarray(f.squeeze(-1) if f.shape[-1] == 1 else f) for f in parts]
        kind, note = "gif" if film else "png", PngInfo()
        note.add_text(_HASH, _digest(seed, value))
        # 8 frames a second, whatever the model was trained for.
        how: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 125}
        with atomic_path(out / f"{seed}.{kind}") as temporary:
            frames[0].save(temporary, kind, **(how if film else {"pnginfo": note}))
    elif rate is not None and value.ndim <= 2:
        # 16 bits, one column a channel.
        levels = (np.clip(np.atleast_2d(value), -1, 1) * 32767).round().astype("<i2").T
        with atomic_path(out / f"{seed}.wav") as temporary, wave.open(str(temporary), "wb") as wav:
            wav.setnchannels(levels.shape[1])
            wav.setsampwidth(2)
            wav.setframerate(rate)
            wav.writeframes(levels.tobytes())
    if film or value.dtype != np.uint8:
        with atomic_path(out / f"{seed}.npy") as temporary, temporary.open("wb") as stream:
            np.save(stream, value, allow_pickle=False)
            # Behind the array, where no reader looks.
            stream.write(bytes.fromhex(_digest(seed, value)))


def _read(path: Path) -> np.ndarray | None:
    """Return the sample in a file, or None if there is none that is whole and of this seed."""
    try:
        if path.suffix == ".npy":
            image, known = np.load(path, allow_pickle=False), path.read_bytes()[-32:].hex()
        else:
            with Image.open(path) as file:
                image, known = np.asarray(file), file.info.get(_HASH)
            image = image[..., None] if image.ndim == 2 else image
    except (OSError, SyntaxError, ValueError, EOFError):
        return None
    return image if known == _digest(path.stem, image) else None


def _digest(seed: object, image: np.ndarray) -> str:
    return hashlib.sha256(f"{seed} {image.shape}".encode() + image.tobytes()).hexdigest()
