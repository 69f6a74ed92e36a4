"""Whether kernels are put in place while the one before them ends.

Programmatic dependent launch, from compute capability 9.0 on: a kernel launched so begins when all
programs of the one before it have begun or ended, sets up what does not depend on it, and waits for
it (`griddepcontrol.wait`) before it reads or writes anything else. In a CUDA graph too.
"""

from __future__ import annotations

import functools

import torch

__all__ = ["early"]


@functools.cache
def early(device: torch.device) -> bool:
    """Return whether kernels on this device are launched early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
