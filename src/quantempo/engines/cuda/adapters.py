"""LoRAs inside the products of a GPU: an integer layer of few outputs, and a side of float16."""

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from quantempo.core import weight_format
from quantempo.engines.fusion import LORA
from quantempo.quantized import QLayer

__all__ = ["Adapters"]


class Adapters:
    """The branches of layers that read the same codes and are one product, as one.

        h[r] = scale[r] s_a s_r[r] (sum_k q[k] A[r, k] - t[r])    y = product(q) + h up^T

    A is int8, a scale a row, h and up float16. make: returns the constants of a layer.
    """

    def __init__(self, layers: list[QLayer], make: Callable[[QLayer], Any]) -> None:
        self.layers, self.make = layers, make
        self.branches: list[Any] = [getattr(layer, LORA, None) for layer in layers]
        self.down, self.up = self._made()
        torch._dynamo.mark_static_address(self.up)
        for branch in filter(None, self.branches):
            branch.users.setdefault(branch, WeakSet()).add(self)

    def _made(self) -> tuple[Any, Tensor]:
        every = [branch for branch in self.branches if branch]
        down, scale = torch.cat([b.down for b in every]), torch.cat([b.scale for b in every])
        pairs = zip(self.layers, self.branches, strict=True)
        ups = [b.up if b else down.new_empty(layer.weight_shape[0], 0) for layer, b in pairs]
        down, up = down.float(), torch.block_diag(*ups).float()
        # No value of up is above 1: those of h are as large as what they add.
        size, step = up.abs().amax(0), down.flatten(1).abs().amax(1) / 127
        codes = down / step.clamp(min=2**-126).view(-1, *[1] * (down.ndim - 1))
        low = copy.copy(self.layers[0])
        low._modules, low.weight_shape, low.weight_format = {}, tuple(down.shape), weight_format(8)
        own = {"weight_int": codes.round().to(torch.int8), "weight_scale": step * size * scale}
        low._buffers = low._buffers | own | {"weight_group": None, "bias": None}
        return self.make(low), (up / size.clamp(min=2**-126)).half()

    @torch.no_grad()
    def fill(self) -> None:
        """Take over what the branches hold now, in place."""
        old, new = ([up, *down.tensors] for down, up in ((self.down, self.up), self._made()))
        for value, other in zip(old, new, strict=True):
            value.copy_(other)

    def beside(
        self, whole: Any, codes: Tensor, part: int, how: dict[str, Any], rows: Tensor | None = None
    ) -> dict[str, Any]:
        """Return the arguments `how` of the product of a segment's codes with one side more."""
        down, weights = self.down, how.get("side_weights", [])
        known = ("kernel", "stride", "border", "upsample")
        own: dict[str, Any] = {name: how[name] for name in known if name in how}
        # Sides may be segments of the layer, or another layer.
        if whole.sides is not None and weights is whole.sides.weights:
            own |= down.sides.arguments(how["side_codes"]) | {"side_scales": how["side_scales"]}
        own |= {} if rows is None else {"rows": rows}
        h = (down.conv if codes.ndim == 4 else down.gemm)(codes, torch.float16, part, **own)
        sides = {"side_codes": [*how.get("side_codes", []), h], "side_weights": [*weights, self.up]}
        return how | sides
