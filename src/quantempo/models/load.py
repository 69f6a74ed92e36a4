"""Open a diffusers pipeline from disk, and say plainly what is wrong with it."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quantempo.core import is_paged
from quantempo.core.machine import parse_bytes
from quantempo.errors import QuantempoError, log
from quantempo.models.large import page_back, paged_networks
from quantempo.models.layers import DENOISERS, denoisers_of
from quantempo.models.lora import merge_lora
from quantempo.registry import check_known

__all__ = [
    "check_device", "check_finite", "check_pipeline", "component_copies", "configs_of", "fetched",
    "load_pipeline", "model_digest", "named_lora", "other_networks",
    "release_others",
]  # fmt: skip

# What diffusers raises for a checkpoint that is broken or needs a package that is not there.
_BROKEN = (OSError, SafetensorError, ValueError, RuntimeError, ImportError, EOFError)
# Also for names and values in its JSON files; from our own code they are bugs.
_ODD = (AttributeError, TypeError, LookupError)
_SHARD = r"(-\d+-of-\d+)?"
_WEIGHTS = re.compile(rf"(diffusion_pytorch_)?model{_SHARD}(\.([\w-]+?))?{_SHARD}\.safetensors")
# Weights of any kind, and their indexes.
_HEAVY = re.compile(r"\.((safetensors|bin|pth?|ckpt|msgpack|h5|onnx)$|index\.)")
_LORA = re.compile(r"(^|[._])lora[._]")
# A tensor that packed networks have.
_CLOCK = "quantempo_clock.bucket_of"
_COUNT, _MOST = re.compile("layers|blocks|depth|num_train_timesteps"), 100_000
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(
    source: str | Path, dtype: torch.dtype | str = torch.float32, *, variant: str | None = None,
    revision: str | None = None, memory: int | str | None = None, lora: Any = (),
) -> Any:  # fmt: skip
    """Return the diffusers pipeline of a folder (or a hub name), without progress bars.

    Weights are read from safetensors files alone. variant: ("fp16", "ema") of components that have
    it; None: the plain one, or the only one. memory: bytes beyond which a network of a folder stays
    in its files, see `core.paged`. lora: files to merge, see `named_lora`.
    Raises QuantempoError: no such folder, not a diffusers pipeline, a damaged file, a checkpoint
    that does not fit its config, layers of a LoRA among its weights.
    """
    if isinstance(dtype, str):
        check_known([dtype], _DTYPES, "unknown dtype")
        dtype = _DTYPES[dtype]
    folder, paged = fetched(source, variant, revision), dict[str, nn.Module]()
    variant = _check_folder(folder, variant)
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    try:
        # Never a pickled .bin, which runs code.
        how: dict[str, Any] = {"variant": variant, "use_safetensors": True}
        if memory is not None:
            files = {part.name: _used(part, variant) for part in folder.iterdir()}
            paged = paged_networks(folder, files, dtype, parse_bytes(memory))
        pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, **paged, **how)
    except QuantempoError:
        raise
    except (*_BROKEN, *_ODD) as error:
        if isinstance(error, _ODD) and _is_ours(error):
            raise
        first = " ".join(str(error).split())[:300]
        raise QuantempoError(f"cannot load '{source}' (check the folder): {first}") from error
    for component, denoiser in denoisers_of(pipe).items():
        # A quantized one was, and what it has of older files may be more tensors than theirs.
        if getattr(denoiser, "hf_quantizer", None) is None:
            _check_complete(folder, variant, component, denoiser)
    if type(getattr(pipe, "vae", None)).__name__ == "AutoencoderKLAllegro":
        # It works in tiles only, which no folder says.
        pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    for entry in map(named_lora, lora):
        merge_lora(pipe, entry["file"], entry["scale"])
    return pipe


def release_others(pipe: Any, folder: Path, variant: str | None) -> None:
    """Leave networks of a pipeline that do not denoise, text encoders, to their files."""
    variant = _check_folder(folder, variant)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name not in DENOISERS and (folder / name).is_dir():
            page_back(part, _used(folder / name, variant))


def other_networks(pipe: Any, given: str | Sequence[str]) -> list[str]:
    """Return some names of networks that do not denoise; QuantempoError for others."""
    names = given.split(",") * bool(given) if isinstance(given, str) else given
    names = list(dict.fromkeys(map(str.strip, names)))
    parts = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    check_known(names, sorted(parts - {*denoisers_of(pipe)}), "also names")
    return names


def fetched(source: str | Path, variant: str | None = None, revision: str | None = None) -> Path:
    """Return the folder of a pipeline; that of a hub name is in the cache, fetched if need be."""
    if os.path.exists(source):
        return Path(source)
    if not _HUB_NAME.fullmatch(str(source)):
        raise QuantempoError(f"no folder '{source}'; expected a diffusers pipeline folder")
    from diffusers import DiffusionPipeline

    how: dict[str, Any] = {"variant": variant, "revision": revision, "use_safetensors": True}
    try:
        return Path(DiffusionPipeline.download(str(source), **how))
    except _BROKEN as error:
        text = f"cannot fetch '{source}' (no such folder, and the hub has none)"
        raise QuantempoError(f"{text}: {' '.join(str(error).split())[:300]}") from error


def named_lora(given: Any) -> dict[str, Any]:
    """Return {"file", "scale", "sha256"} of "FILE:0.8", "FILE" or what this returned before."""
    if isinstance(given, str):
        match: Any = re.fullmatch(r"(?s)(.*?)(?::([-+.\d]+))?", given)
        given = {"file": match[1], "scale": match[2] or 1.0}
    try:
        scale, digest = float(given["scale"]), hashlib.sha256(Path(given["file"]).read_bytes())
    except (OSError, ValueError) as error:
        text = f"got the LoRA '{given['file']}' with scale {given['scale']} ({error})"
        raise QuantempoError(f"{text}; expected a safetensors FILE or FILE:0.8") from error
    found = {"file": str(Path(given["file"]).resolve()), "scale": scale}
    if given.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise QuantempoError(f"the LoRA {found['file']} has changed since; choose another --run")
    return found | {"sha256": digest.hexdigest()}


def check_pipeline(pipe: Any) -> Any:
    """Return a pipeline in memory; refuse what is none, holds a LoRA, or is not float32."""
    if not hasattr(pipe, "components") or not hasattr(pipe, "save_pretrained"):
        text = f"got a {type(pipe).__name__} as source"
        raise QuantempoError(f"{text}; expected a diffusers pipeline or its folder")
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _refuse_lora(f"the {name} of this {type(pipe).__name__}", part.state_dict())
    _unhook(pipe)
    networks = denoisers_of(pipe).items()
    for name, p in ((name, p) for name, network in networks for p in network.parameters()):
        if p.is_meta:
            raise QuantempoError(f"the {name} is offloaded to disk; expected its values in memory")
        if p.is_floating_point() and p.dtype != torch.float32:
            hint = "expected torch.float32: pipe.to(torch.float32)"
            raise QuantempoError(f"the {name} of the pipeline is {p.dtype}; {hint}")
    return pipe


def _unhook(pipe: Any) -> None:
    """Remove what moves parts of networks between devices, and say so."""
    from accelerate.hooks import remove_hook_from_module

    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    modules: list[Any] = [module for network in networks for module in network.modules()]
    known = (getattr(module, "_diffusers_hook", None) for module in modules)
    groups = [hooks for hooks in known if hooks is not None and "group_offloading" in hooks.hooks]
    if groups or any(hasattr(module, "_hf_hook") for module in modules):
        text = "hooks that offload this %s are removed; quantize its folder to spare memory"
        log.warning(text, type(pipe).__name__)
        for hooks in groups:
            hooks.remove_hook("group_offloading", recurse=False)
        for network in networks:
            remove_hook_from_module(network, recurse=True)
        pipe.remove_all_hooks()
        pipe.reset_device_map()


def _refuse_lora(where: str, names: Iterable[str]) -> None:
    """Refuse parameters of a LoRA: they are no part of the network that is quantized."""
    if found := next((name for name in names if _LORA.search(name)), None):
        raise QuantempoError(
            f"{where} holds a LoRA ('{found}'); merge it into the weights first: "
            "pipe.fuse_lora(); pipe.unload_lora_weights(), then quantize or save the pipeline"
        )


def _is_ours(error: Exception) -> bool:
    """Return whether an error went through another module of this package (the plug-in)."""
    names = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
    ours = (name for name in names if name.startswith("quantempo."))
    return any(not name.startswith(f"{__package__}.") for name in ours)


def _check_complete(folder: Path, variant: str | None, component: str, denoiser: nn.Module) -> None:
    """Refuse a denoiser with more tensors than its files: diffusers fills in random numbers."""
    names = {name for f in _used(folder / component, variant) for name in _names(f)}
    state = denoiser.state_dict()
    missing = max(len(state) - len(names), sum(value.is_meta for value in state.values()))
    if names and missing > 0:
        text = f"{folder / component} lacks {missing} of the network's tensors"
        raise QuantempoError(f"{text}; the checkpoint is incomplete: fetch it again")


def _weights(component: Path) -> dict[str | None, list[Path]]:
    """Return variant (None: plain) -> the files of it that diffusers would read."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(component.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match[4], []).append(file)
    return found


def _used(component: Path, variant: str | None) -> list[Path]:
    """Return the files that diffusers would read."""
    files = _weights(component)
    return files.get(variant) or files.get(None, [])


def component_copies(
    folder: Path, variant: str | None, merged: Any = None
) -> dict[str, Callable[[str], None]]:
    """Return what copies each component of a pipeline's folder to another one, byte for byte.

    Files of the variant that `load_pipeline` reads get the names of plain ones. merged: the
    pipeline, if networks of it may hold a LoRA: those that are in memory are left out.
    """
    variant, parts = _check_folder(folder, variant), getattr(merged, "components", {})
    own = {n for n, p in parts.items() if isinstance(p, nn.Module) and not is_paged(p)}
    return {
        p.name: partial(_copy, p, variant)
        for p in folder.iterdir()
        if p.is_dir() and p.name not in own
    }


def _copy(component: Path, variant: str | None, to: str) -> None:
    used, end = _used(component, variant), f".{variant}"
    index = f"{end}.json" if used and end in used[0].name else "safetensors.index.json"
    for file in filter(Path.is_file, component.rglob("*")):
        target = Path(to) / file.relative_to(component)
        plain = target.with_name(file.name.replace(end, ""))
        target.parent.mkdir(parents=True, exist_ok=True)
        if file in used:
            shutil.copyfile(file, plain)
        elif used and ".safetensors.index." in file.name and file.name.endswith(index):
            plain.write_text(file.read_text().replace(end, ""))
        elif not (used and _HEAVY.search(file.name)):
            shutil.copyfile(file, target)


def _names(file: Path) -> list[str]:
    """Return the names of the tensors of a file, which must be whole."""
    try:
        with safe_open(file, framework="pt") as stream:
            return list(stream.keys())
    except (SafetensorError, OSError, ValueError) as error:
        text = f"{file} is damaged or truncated ({error}); fetch or save it again"
        raise QuantempoError(text) from error


def _check_folder(folder: Path, variant: str | None) -> str | None:
    """Return the variant to load; refuse what diffusers would read, and explain badly."""
    index = folder / "model_index.json"
    if not index.is_file():
        above = " (this is one component of a pipeline: give the folder above it)"
        hint = above if (folder / "config.json").is_file() else ""
        raise QuantempoError(f"'{folder}' is not a diffusers pipeline: no model_index.json{hint}")
    parts = [folder / name for name in _read_json(index) if (folder / name).is_dir()]
    options: list[set[str]] = []
    for part in parts:
        for name in ("config.json", "scheduler_config.json", "preprocessor_config.json"):
            if (part / name).is_file():
                _read_json(part / name)
        files = _weights(part)
        used = _used(part, variant)
        for file in used:
            names = _names(file)
            _refuse_lora(str(file), names)
            if _CLOCK in names:
                _check_packed(part / "config.json")
        if files and not used:
            options.append({name for name in files if name})
    if not options or variant is not None:
        return variant
    if len(common := set.intersection(*options)) == 1:
        return _check_folder(folder, common.pop())
    text = f"'{folder}' has weights of the variants {', '.join(sorted(set.union(*options)))} only"
    raise QuantempoError(f"{text}; choose one: --variant NAME")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (RecursionError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        hint = "save it as UTF-8 without a byte order mark" if "BOM" in str(error) else (
            "fetch it again")  # fmt: skip
        raise QuantempoError(f"{file} is not valid JSON ({error}); {hint}") from error
    if not isinstance(values, dict):
        raise QuantempoError(f"{file} is a {type(values).__name__}; expected names and values")
    # Numbers of layers or time-steps that nothing has, before any is made.
    for key, value in values.items():
        if _COUNT.search(key) and isinstance(value, int) and value > _MOST:
            raise QuantempoError(f"{file} says {key} = {value}; expected at most {_MOST}")
    return values


def _check_packed(file: Path) -> None:
    """Refuse a packed network unless its settings, and those beside it, are as they were saved."""
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    config = _read_json(file) if file.is_file() else {}
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        text = f"{file} has no quantization_config, its network is packed"
        raise QuantempoError(f"{text}; fetch or save it again")
    known: Any = AUTO_QUANTIZATION_CONFIG_MAPPING["quantempo"]
    found = known.from_dict(settings)
    found.check_network(config)
    known.check_files(file.parents[1], ".json")


def check_device(device: str) -> None:
    """Raise QuantempoError unless torch can put a tensor on the device, a CPU or a CUDA GPU."""
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise QuantempoError(f"cannot use --device {device}; expected cpu or cuda")
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


def configs_of(pipe: Any) -> dict[str, dict[str, Any]]:
    """Return the configuration of each network of a pipeline, without paths and versions."""
    found = {}
    for name, part in pipe.components.items():
        config = getattr(part, "config", {}) if isinstance(part, nn.Module) else {}
        config = config.to_dict() if hasattr(config, "to_dict") else config
        kept = {k: v for k, v in config.items() if not k.startswith("_") and "version" not in k}
        kept.pop("quantization_config", None)
        found[name] = json.loads(json.dumps(kept, default=str))
    return found
