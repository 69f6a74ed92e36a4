"""One random generator an image: image i depends on seed i only."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["generators"]


def generators(seeds: Iterable[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """Return one generator for each seed, so that a batch's split never changes an image.

    Source: EDM's StackedRandomGenerator (Karras et al. 2022, released code), the idea.
    """
    return [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
