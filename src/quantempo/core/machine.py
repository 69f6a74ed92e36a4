"""Describe the machine a figure was measured on."""

import ctypes
import os
import platform
import re
from typing import Any

import torch

from quantempo.errors import QuantempoError

__all__ = ["machine", "parse_bytes", "trim"]

_ISA = ("vnni", "bf16", "amx")


def parse_bytes(text: str | int) -> int:
    """Return the bytes of "12GB"; QuantempoError for anything else."""
    match = re.fullmatch(r"(\d+(\.\d+)?) ?([MGT])i?B?", str(text), re.IGNORECASE)
    size = float(match[1]) * 1000 ** (2 + "MGT".index(match[3].upper())) if match else text
    if not (isinstance(size, int | float) and 0 <= size < 2**63):
        raise QuantempoError(f"got memory {text}; expected a number of bytes like 12GB or 500MB")
    return int(size)


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> dict[str, Any]:
    """Describe the machine a figure was measured on."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as stream:
            name = next(line.split(":")[1].strip() for line in stream if "model name" in line)
    except (OSError, StopIteration):
        pass
    flags = {
        key: bool(value) for key, value in getattr(torch.cpu, "get_capabilities", dict)().items()
    }
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": sorted(k for k, on in flags.items() if on and any(w in k for w in _ISA)),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "system": platform.platform(terse=True),
    }
