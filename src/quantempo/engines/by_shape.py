"""Two engines on one denoiser: each call runs on the one that is faster for its shape."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantempo.core.instance import own_forward
from quantempo.errors import QuantempoError
from quantempo.models.layers import bind_inputs

__all__ = ["ByShape"]

log = logging.getLogger("quantempo")


class ByShape:
    """The forward of a denoiser that chooses at the first call of each shape of its inputs.

    last: name of the engine that ran last.

    Args:
        base: name of the engine that is attached to its layers.
        rival, run: the other one and its forward.
        few: rows up to which the other one is the faster; with more, both are timed.
    """

    def __init__(
        self, denoiser: nn.Module, base: str, rival: str, run: Callable[..., Any], few: int
    ) -> None:
        self.denoiser, self.base, self.rival, self.run, self.few = denoiser, base, rival, run, few
        self.last, self.chosen, self.lock = base, dict[Any, str](), threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        if torch.compiler.is_compiling():
            return self._on(self.base, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        key = (*((x.shape, x.dtype) for x in tensors), torch.get_num_threads())
        with self.lock:
            if key not in self.chosen:
                shape = tuple(bind_inputs(self.denoiser, args, kwargs).sample.shape)
                self.chosen[key], why = self._choose(shape[0], args, kwargs)
                log.info("engine %s for inputs %s: %s", self.chosen[key], shape, why)
        self.last = self.chosen[key]
        return self._on(self.last, args, kwargs)

    def _on(self, name: str, args: Any, kwargs: Any) -> Any:
        if name == self.base:
            return type(self.denoiser).forward(self.denoiser, *args, **kwargs)
        return self.run(*args, **kwargs)

    def _choose(self, rows: int, args: Any, kwargs: Any) -> tuple[str, str]:
        """Return the engine for calls like this one, and why."""
        try:
            self._on(self.rival, args, kwargs)
        except QuantempoError as error:
            return self.base, str(error)
        if own_forward(self.denoiser).active is not self:
            # It was wrong, and has been replaced.
            return self.base, f"{self.rival} is wrong"
        if rows <= self.few:
            return self.rival, f"faster up to {self.few} rows"
        self._on(self.base, args, kwargs)
        best = {self.base: float("inf"), self.rival: float("inf")}
        # In turns, each twice.
        for name in (*best, *best):
            start = time.perf_counter()
            self._on(name, args, kwargs)
            best[name] = min(best[name], time.perf_counter() - start)
        times = (f"{name} {1e3 * seconds:.1f} ms" for name, seconds in best.items())
        return min(best, key=best.__getitem__), ", ".join(times)
