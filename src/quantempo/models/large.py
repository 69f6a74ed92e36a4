"""Open networks larger than the memory: their tensors stay in the files of the checkpoint."""

import ctypes
import importlib
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantempo.core.instance import put_buffer
from quantempo.core.paged import Paged, paged_tensors, small
from quantempo.errors import log

__all__ = ["page_back", "paged_networks", "room"]

# M_MMAP_THRESHOLD of malloc.h (glibc).
_MMAP_THRESHOLD = -3
# Bytes from which a network that is done with is worth freeing.
_WORTH = 2**30


def room(device: str, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return a third of the bytes that a GPU, or the control group of this process, has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            memory = min(memory, int((root / name).read_text()))
    return memory // 3


def paged_networks(
    folder: Path, files: dict[str, list[Path]], dtype: torch.dtype, memory: int
) -> dict[str, nn.Module]:
    """Return the float networks of a folder that take more than `memory`, of paged tensors.

    files: of each component; a network whose files have other names than its class is left out.
    """
    found: dict[str, nn.Module] = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if not files.get(name) or entry[0] not in ("diffusers", "transformers"):
            continue
        tensors = _tensors(files[name])
        size = sum(value.numel() for value in tensors.values()) * dtype.itemsize
        if size > memory:
            network = _empty(folder / name, entry[0], entry[1], dtype)
            if network is not None and _fill(network, tensors, dtype):
                found[name] = network
                text = "%s takes %.1f GB, more than --memory %.1f: read from its files, slower"
                log.info(text, name, size / 1e9, memory / 1e9)
                # Give back what is freed at once: holes between small blocks would add up.
                with suppress(AttributeError, OSError):
                    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)
            else:
                log.warning("%s is packed or of an old version: it is loaded whole", folder / name)
    return found


@torch.no_grad()
def page_back(network: nn.Module, files: list[Path]) -> None:
    """Free the tensors of a large network that are those of its files, and read them from there."""
    state = network.state_dict()
    if sum(value.nbytes for value in state.values()) >= _WORTH:
        for name, place in _places(network, _tensors(files)).items():
            value = state.pop(name)
            paged = place.like(value.dtype, value.device)
            if not (small(value) or isinstance(value, Paged)) and torch.equal(value, paged):
                put_buffer(network, name, paged)
        state, value = {}, torch.empty(0)
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _tensors(files: list[Path]) -> dict[str, Paged]:
    return {name: value for file in files for name, value in paged_tensors(file).items()}


def _empty(folder: Path, library: str, kind: str, dtype: torch.dtype) -> Any:
    from accelerate import init_empty_weights

    made, diffusers = getattr(importlib.import_module(library), kind), library == "diffusers"
    if not (diffusers or getattr(made, "config_class", None)):
        # One of those that choose another class.
        return None
    config = made.load_config(folder) if diffusers else made.config_class.from_pretrained(folder)
    if "quantization_config" in (config if diffusers else config.to_dict()):
        return None
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.enter_context(init_empty_weights())
        torch.set_default_dtype(dtype)
        # transformers notes the type in the settings, which a run is known by.
        network = made.from_config(config) if diffusers else made._from_config(config, dtype=dtype)
    getattr(network, "tie_weights", int)()
    return network.eval()


def _fill(network: Any, tensors: dict[str, Paged], dtype: torch.dtype) -> bool:
    """Put tensors of files into an empty network; return whether they are those it has."""
    strict = dtype == torch.bfloat16 and hasattr(network, "_keep_in_fp32_modules_strict")
    exact = getattr(network, "_keep_in_fp32_modules" + "_strict" * strict, None) or ()
    found = _places(network, tensors)
    for name, value in found.items():
        kept = torch.float32 if {*exact} & {*name.split(".")} else dtype
        value = value.like(kept) if value.is_floating_point() else value
        put_buffer(network, name, value.load() if small(value) else value)
    return found.keys() == network.state_dict().keys()


def _places(network: nn.Module, tensors: dict[str, Paged]) -> dict[str, Paged]:
    """Return the tensors of files that are called as those of a network, or as ones tied to them.

    But for a prefix, one for all, which transformers takes off or puts before.
    """
    # By how much longer a name in the files is, and that of the network.
    found = dict[tuple[str, str], dict[str, Paged]]()
    every = dict(network.named_parameters(remove_duplicate=False))
    for name, value in network.state_dict().items():
        for own in [name, *(n for n, p in every.items() if p is every.get(name))]:
            for n, place in tensors.items():
                key = n[: max(0, len(n) - len(own))], own[: max(0, len(own) - len(n))]
                if key[0] + own == key[1] + n and place.shape == value.shape:
                    found.setdefault(key, {}).setdefault(name, place)
    return max(found.values(), key=len, default={})
