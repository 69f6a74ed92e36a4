"""Open networks larger than the memory: their tensors stay in the files of the checkpoint."""

import ctypes
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantempo.core.instance import put_buffer
from quantempo.core.paged import paged_tensors, small
from quantempo.errors import log
from quantempo.models.layers import DENOISERS

__all__ = ["paged_denoisers", "room"]

# M_MMAP_THRESHOLD of malloc.h (glibc).
_MMAP_THRESHOLD = -3


def room(device: str, root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return a third of the bytes that a GPU, or the control group of this process, has."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 3
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            memory = min(memory, int((root / name).read_text()))
    return memory // 3


def paged_denoisers(
    folder: Path, files: dict[str, list[Path]], dtype: torch.dtype, memory: int
) -> dict[str, nn.Module]:
    """Return the float denoisers of a folder that take more than `memory`, of paged tensors.

    files: of each component; a network whose files have other names than its class is left out.
    """
    found: dict[str, nn.Module] = {}
    for name, entry in json.loads((folder / "model_index.json").read_text()).items():
        if name not in DENOISERS or entry[0] != "diffusers" or not files.get(name):
            continue
        tensors = {k: v for file in files[name] for k, v in paged_tensors(file).items()}
        size = sum(value.numel() for value in tensors.values()) * dtype.itemsize
        if size > memory:
            network = _empty(folder / name, entry[1], dtype)
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


def _empty(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    import diffusers
    from accelerate import init_empty_weights

    config = getattr(diffusers, kind).load_config(folder)
    if "quantization_config" in config:
        return None
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.enter_context(init_empty_weights())
        torch.set_default_dtype(dtype)
        return getattr(diffusers, kind).from_config(config).eval()


def _fill(network: Any, tensors: dict[str, Any], dtype: torch.dtype) -> bool:
    """Put tensors of files into an empty network; return whether they are those it has."""
    exact = {*(network._keep_in_fp32_modules or ())}
    for name, empty in network.state_dict().items():
        if name not in tensors or tensors[name].shape != empty.shape:
            return False
        value, kept = tensors[name], torch.float32 if exact & {*name.split(".")} else dtype
        value = value.like(kept) if value.is_floating_point() else value
        put_buffer(network, name, value.load() if small(value) else value)
    return True
