"""Open a diffusers pipeline from disk, and say plainly what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of

__all__ = ["check_device", "check_finite", "load_pipeline", "model_digest"]

# What diffusers raises for a checkpoint that is broken or needs a package that is not there.
_BROKEN = (OSError, SafetensorError, ValueError, RuntimeError, ImportError, EOFError)
# Also for names and values in its JSON files; from our own code they are bugs.
_ODD = (AttributeError, TypeError, LookupError)
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)[.-]")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_pipeline(source: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return the diffusers pipeline of a folder (or a hub name), without progress bars.

    Weights are read from safetensors files alone.

    Raises:
        QuantempoError: no such folder, not a diffusers pipeline, a damaged file, a checkpoint
            that does not fit its config.
    """
    folder = Path(source)
    if folder.exists():
        _check_folder(folder)
    elif not _HUB_NAME.fullmatch(str(source)):
        raise QuantempoError(f"no folder '{source}'; expected a diffusers pipeline folder")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        # Never a pickled .bin, which runs code.
        how: dict[str, Any] = {"variant": _variant(folder), "use_safetensors": True}
        pipe = DiffusionPipeline.from_pretrained(str(source), dtype=dtype, **how)
    except QuantempoError:
        raise
    except (*_BROKEN, *_ODD) as error:
        if isinstance(error, _ODD) and _is_ours(error):
            raise
        first = " ".join(str(error).split())[:300]
        hint = "check the folder" if folder.exists() else "no such folder, and the hub has none"
        raise QuantempoError(f"cannot load '{source}' ({hint}): {first}") from error
    if folder.exists():
        _check_complete(folder, pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_ours(error: Exception) -> bool:
    """Return whether an error went through another module of this package (the plug-in)."""
    names = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith("quantempo.") and name != __name__ for name in names)


def _check_complete(folder: Path, pipe: Any) -> None:
    """Refuse a denoiser with tensors that no file holds: diffusers fills them with random numbers.

    Counted, not compared by name, since diffusers renames tensors of old checkpoints.
    """
    component, denoiser = denoiser_of(pipe)
    names: set[str] = set()
    for file in (folder / component).glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            names |= set(stream.keys())
    missing = len(denoiser.state_dict()) - len(names)
    if names and missing > 0:
        raise QuantempoError(
            f"{folder / component} lacks {missing} of the network's tensors; the checkpoint is "
            "incomplete: fetch it again"
        )


def _variant(folder: Path) -> str | None:
    """Return "fp16" (or another) when the folder holds weights of that variant only."""
    names = [file.name for file in folder.glob("*/*.safetensors")]
    variants = {match[1] for name in names if (match := _VARIANT.search(name))}
    plain = [name for name in names if not _VARIANT.search(name)]
    return variants.pop() if len(variants) == 1 and not plain else None


def _check_folder(folder: Path) -> None:
    """Refuse what diffusers would explain badly: other folders, broken JSON, torn safetensors."""
    index = folder / "model_index.json"
    if not index.is_file():
        part = " (this is one component of a pipeline: give the folder above it)"
        hint = part if (folder / "config.json").is_file() else ""
        raise QuantempoError(
            f"'{folder}' is not a diffusers pipeline: it has no model_index.json{hint}"
        )
    for file in sorted(folder.rglob("*.json")):
        try:
            json.loads(file.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise QuantempoError(f"{file} is not valid JSON ({error}); fetch it again") from error
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stream:
                stream.keys()
        except (SafetensorError, OSError, ValueError) as error:
            raise QuantempoError(
                f"{file} is damaged or truncated ({error}); fetch or save it again"
            ) from error


def check_device(device: str) -> None:
    """Raise QuantempoError unless torch can put a tensor on the device."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise QuantempoError(f"cannot use --device {device}: {first}") from error


def check_finite(module: nn.Module) -> None:
    """Raise QuantempoError naming the first parameter that holds NaN or infinity."""
    for name, value in module.named_parameters():
        if not bool(torch.isfinite(value).all()):
            hint = "the checkpoint is broken, train or convert it again"
            raise QuantempoError(f"weight '{name}' holds NaN or infinity; {hint}")


def model_digest(module: nn.Module) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
