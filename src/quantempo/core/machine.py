"""Describe the machine a figure was measured on."""

import os
import platform
from typing import Any

import torch

__all__ = ["machine"]

_ISA = ("vnni", "bf16", "amx")


def machine() -> dict[str, Any]:
    """Describe the machine a figure was measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as stream:
            name = next(line.split(":")[1].strip() for line in stream if "model name" in line)
    except (OSError, StopIteration):
        pass
    flags = {key: bool(value) for key, value in torch.cpu.get_capabilities().items()}
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": sorted(k for k, on in flags.items() if on and any(w in k for w in _ISA)),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": platform.platform(terse=True),
    }
