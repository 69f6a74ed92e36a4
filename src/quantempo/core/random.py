"""One random generator an image: image i depends on seed i only."""

from collections.abc import Iterable

import torch

from quantempo.errors import QuantempoError

__all__ = ["generators"]


def generators(seeds: Iterable[int], device: str | torch.device = "cpu") -> list[torch.Generator]:
    """Return one generator for each seed, so that a batch's split never changes an image.

    Source: EDM's StackedRandomGenerator (Karras et al. 2022, released code), the idea.

    Raises:
        QuantempoError: a seed of more than 63 bits.
    """
    numbers = [int(seed) for seed in seeds]
    if beyond := [seed for seed in numbers if abs(seed) >= 2**63]:
        raise QuantempoError(f"got seed {beyond[0]}; expected one below 2**63")
    return [torch.Generator(device).manual_seed(seed) for seed in numbers]
