"""Cache of one forward: what several blocks read, computed by the first, freed after the last."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from quantempo.core.instance import PerThread
from quantempo.engines.fusion import LORA, Network
from quantempo.models.fusion_unet import ResnetParts

__all__ = ["PerForward", "TimeShifts", "float_rows"]


class _Traced:
    def __init__(self, **first: Any) -> None:
        self.__dict__.update(first)


class PerForward:
    """A value made of one input, of which each of `readers` reads its part.

    It is kept for the inputs (the same tensors, unchanged since); the clock's bucket is another
    tensor in each forward. Inside a compiled network, and of inference tensors, changes cannot be
    seen: there a second read of one reader makes the value anew.
    """

    def __init__(self, readers: int) -> None:
        self._all = (1 << readers) - 1
        empty = {"unread": 0, **dict.fromkeys(("given", "version", "now", "value"))}
        self._kept, self._traced = PerThread(**empty), _Traced(**empty)

    def read(self, reader: int, given: Tensor, now: Tensor | None = None, *how: Any) -> Any:
        """Return make(given, *how), made now unless known; now: another input, the clock's bucket.

        It is given where the same input may be read at several times.
        """
        inputs = [x for x in (given, now) if x is not None]
        hidden = torch.compiler.is_compiling() or any(x.is_inference() for x in inputs)
        version = None if hidden else [x._version for x in inputs]
        # A compiler loses what is set for a thread.
        kept: Any = self._traced if torch.compiler.is_compiling() else self._kept
        bit = 1 << reader
        value = kept.value
        known = kept.given is given and kept.version == version and kept.now is now
        if value is None or not known or (version is None and not kept.unread & bit):
            value = self.make(given, *how)
            kept.value, kept.given, kept.version, kept.now = value, given, version, now
            kept.unread = self._all
        kept.unread &= ~bit
        if not kept.unread:
            kept.given = kept.now = kept.value = None
        return value

    def make(self, *args: Any, **kwargs: Any) -> Any:
        """Return the value of an input."""
        raise NotImplementedError


def float_rows(layers: list[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weights and the biases of float layers (C_i, E) as one layer (sum C_i, E)."""
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    return torch.cat(weights), torch.cat([layer.bias.detach().to(dtype) for layer in layers])


class TimeShifts(PerForward):
    """What the time embedding adds to each residual block, of all blocks in one matmul."""

    @classmethod
    def of(cls, network: Network) -> Self:
        """Return those of all residual blocks that read a float layer."""
        layers = [parts.time for parts in network.of(ResnetParts)]
        plain = [i for i in layers if isinstance(i, nn.Linear) and not hasattr(i, LORA)]
        return cls([i for i in plain if i.bias is not None])

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(len(layers))
        # Float ones (C_i, E) with `weight` and `bias`, applied to silu(temb).
        self.layers = layers
        self._sizes = sizes = [len(layer.bias) for layer in layers]
        self._start = [sum(sizes[:i]) for i in range(len(sizes) + 1)]

    def index(self, layer: Any) -> int | None:
        """Return the place of a layer, None of one that is not among them."""
        return next((i for i, known in enumerate(self.layers) if known is layer), None)

    def __call__(self, index: int, temb: Tensor) -> Tensor:
        """Return (B, C_index), rows not contiguous; temb (B, E), made anew in each forward."""
        value: Tensor = self.read(index, temb)
        return value[:, self._start[index] : self._start[index + 1]]
