"""One generator an image; wrap the step of a scheduler for a while."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Generator

from quantempo.errors import QuantempoError

__all__ = ["generators", "scheduler_noise", "wrapped_step"]


def generators(seeds: Sequence[int]) -> list[Generator]:
    """Return one generator for each seed below 2^63: a batch's split never changes an image.

    Source: EDM's StackedRandomGenerator (Karras et al. 2022, released code), the idea.
    """
    if beyond := [seed for seed in seeds if abs(seed) >= 2**63]:
        raise QuantempoError(f"got seed {beyond[0]}; expected one below 2**63")
    return [Generator().manual_seed(int(seed)) for seed in seeds]


@contextmanager
def wrapped_step(scheduler: Any, around: Callable[..., Any]) -> Iterator[None]:
    """Let `scheduler.step(...)` call `around(step, ...)` for a while."""
    step = scheduler.step

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(step, *args, **kwargs)

    with patch.object(scheduler, "step", wrapped):
        yield


@contextmanager
def scheduler_noise(scheduler: Any, noise: Sequence[Generator]) -> Iterator[None]:
    """Hand the generators, one a row, to `scheduler.step` where a pipeline (DiT's) does not."""
    if (
        not hasattr(scheduler, "step")
        or "generator" not in (signature := inspect.signature(scheduler.step)).parameters
    ):
        yield
        return

    def seeded(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        if bound.arguments.get("generator") is None:
            rows = bound.arguments["sample"].shape[0]
            bound.arguments["generator"] = [noise[i % len(noise)] for i in range(rows)]
        return step(*bound.args, **bound.kwargs)

    with wrapped_step(scheduler, seeded):
        yield
