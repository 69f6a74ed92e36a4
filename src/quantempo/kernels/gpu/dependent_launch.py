"""Programmatic dependent launch: kernels start while the one before them ends.

From compute capability 9.0 on, in a CUDA graph too; they set up what does not depend on it.
"""

import functools

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["early", "wait_for_predecessor"]


@functools.cache
def early(device: torch.device) -> bool:
    """Return whether kernels on this device are launched as dependents."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def wait_for_predecessor():
    """Wait for the kernel before, touch nothing of its sooner, and let the one after it start."""
    gdc_wait()
    gdc_launch_dependents()
