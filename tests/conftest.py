"""One thread a test process: tiny tensors lose more to waiting threads than they gain."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
