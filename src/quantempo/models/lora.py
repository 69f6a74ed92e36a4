"""Read LoRA files, whatever their names of layers, and merge them into float networks."""

import json
import math
import re
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from quantempo.core import is_paged
from quantempo.errors import QuantempoError
from quantempo.models.layers import LAYERS, denoisers_of

__all__ = ["merge_lora", "read_lora"]

_PART = re.compile(r"(.+?)\.lora(?:_|\.|_linear_layer\.)(A|B|down|up)\.(?:default\.)?weight")
# Of text encoders in files of kohya, as diffusers leaves them.
_TEXT = re.compile(r"self_attn\.to_(q|k|v|out)_lora\.")
# What the converters of diffusers raise for a file that is none of theirs.
_ODD = (ValueError, LookupError, AttributeError, TypeError, RuntimeError)


def read_lora(pipe: Any, file: str | Path) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """Return (component, layer) -> down (r, I, ...) and up (O, r) times alpha / r of a file.

    Names are those of diffusers, PEFT or kohya, as the `lora_state_dict` of the pipeline knows
    them; one without a component is of the first denoiser. QuantempoError: not all of it fits.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft

    convert = getattr(type(pipe), "lora_state_dict", lambda tensors: tensors)
    how = {"return_alphas": True} if "return_alphas" in signature(convert).parameters else {}
    try:
        with safe_open(file, framework="pt") as stream:
            found: Any = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            settings = json.loads((stream.metadata() or {}).get("lora_adapter_metadata", "{}"))
        if not found or any("dora_scale" in name for name in found):
            raise ValueError("no tensors, or those of DoRA")
        found = convert(found, **how)
    except (SafetensorError, OSError, *_ODD) as error:
        text = f"{type(pipe).__name__} cannot read the LoRA {file}: {error}"
        raise QuantempoError(f"{text}; expected safetensors of diffusers, PEFT or kohya") from error
    tensors, alphas = (*found, None)[:2] if isinstance(found, tuple) else (found, None)
    every = {**tensors, **(alphas or {})}.items()
    named = {_TEXT.sub(r"self_attn.\1_proj.lora.", name): value for name, value in every}
    parts: dict[tuple[str, str], dict[str, Any]] = {}
    for name, value in convert_unet_state_dict_to_peft(named).items():
        match = _PART.fullmatch(name)
        if match is None and not name.endswith(".alpha"):
            raise QuantempoError(f"the LoRA {file} has '{name}'; expected down, up and alpha alone")
        part = {"down": "A", "up": "B"}.get(match[2], match[2]) if match else "alpha"
        place = _place(pipe, match[1] if match else name.removesuffix(".alpha").split(".lora")[0])
        parts.setdefault(place, {})[part] = value
    return {place: _pair(pipe, file, place, part, settings) for place, part in parts.items()}


def _place(pipe: Any, name: str) -> tuple[str, str]:
    """Return (component, layer) of a name."""
    component, _, layer = name.partition(".")
    if not isinstance(pipe.components.get(component), nn.Module):
        component, layer = next(iter(denoisers_of(pipe))), name
    # Text encoders of transformers 5 have lost a level.
    if not hasattr(pipe.components[component], "text_model"):
        layer = layer.removeprefix("text_model.")
    return component, layer


def _pair(
    pipe: Any, file: str | Path, place: tuple[str, str], part: dict[str, Any], known: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    component, name = place
    try:
        layer = pipe.components[component].get_submodule(name)
        shape = getattr(layer, "weight_shape", None) or layer.weight.shape
        down, up = part["A"].float(), part["B"].float().flatten(1)
        rank, down = len(down), down.reshape(len(down), *shape[1:])
        if up.shape != (shape[0], rank):
            raise ValueError(f"{tuple(up.shape)} is no ({shape[0]}, {rank})")
    except _ODD as error:
        text = f"the LoRA {file} does not fit '{name}' of the {component} ({error})"
        raise QuantempoError(f"{text}; it belongs to another model, or is no plain LoRA") from error
    patterns = known.get(f"{component}.alpha_pattern") or {}
    own = [v for key, v in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", name)]
    alpha = part.get("alpha", (*own, known.get(f"{component}.lora_alpha", rank))[0])
    power = 0.5 if known.get(f"{component}.use_rslora") else 1
    return down, up * (float(alpha) / math.pow(rank, power))


@torch.no_grad()
def merge_lora(pipe: Any, file: str | Path, scale: float) -> None:
    """Add scale * up @ down to the weights of a float pipeline; QuantempoError for a packed one."""
    for (component, name), (down, up) in read_lora(pipe, file).items():
        layer = pipe.components[component].get_submodule(name)
        if not isinstance(layer, LAYERS) or is_paged(pipe.components[component]):
            raise QuantempoError(
                f"cannot merge a LoRA into '{name}', which is packed or stays in its file; "
                "load it on the packed pipeline (quantempo.load_lora), or give more --memory"
            )
        delta = (up @ down.flatten(1)).reshape(layer.weight.shape) * scale
        layer.weight.copy_(layer.weight.float() + delta.to(layer.weight.device))
