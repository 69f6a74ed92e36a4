"""Layers of float inputs whose weights are int8: linear ones of blocks, and any of a component."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from quantempo.core import WEIGHT
from quantempo.core.paged import loaded
from quantempo.quantized.layers import StoredLinear

__all__ = ["WeightOnlyLinear", "store_int8"]


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of a float32 weight (O, ...) and the scale (O,) of each output channel."""
    least = torch.finfo(torch.float32).tiny
    scale = (weight.flatten(1).abs().amax(1) / WEIGHT.qmax).clamp_min(least)
    steps = scale.view(-1, *[1] * (weight.ndim - 1))
    return (weight / steps).round().to(WEIGHT.storage), scale


class _Dequantized(nn.Module):
    def __init__(self, scale: Tensor, weight: Tensor) -> None:
        super().__init__()
        # As integers, which no change of a network's type rounds; its type is that of `like`.
        self.register_buffer("scale", scale.view(torch.int32))
        self.register_buffer("like", weight.new_zeros(1))

    def forward(self, codes: Tensor) -> Tensor:
        scale: Any = self.scale.view(torch.float32).view(-1, *[1] * (codes.ndim - 1))
        return (codes.float() * scale).to(self.like.dtype)


@torch.no_grad()
def store_int8(layer: nn.Module) -> None:
    """Store the weight of a convolution or Linear as int8, in place; it is float when asked for."""
    weight: Any = layer.weight
    codes, scale = _codes(loaded(weight.detach()).float())
    del layer.weight
    layer.register_buffer("weight", codes)
    register_parametrization(layer, "weight", _Dequantized(scale, weight.detach()), unsafe=True)


class WeightOnlyLinear(StoredLinear):
    """Linear layer whose weight is int8 codes, with a scale an output channel, in memory too.

    For the modulations of blocks: wide layers of one row a step, which cost what their weights
    weigh. An engine may set `kernel`, see `ops.weight_only_linear`.

    Error: |W - W_hat| <= scale[o] / 2, scale[o] = max_k |W[o, k]| / 127.
    """

    weight_int: Tensor
    weight_scale: Tensor
    kernel: Callable[..., Tensor] | None = None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        codes = torch.empty_like(layer.weight, dtype=WEIGHT.storage, requires_grad=False)
        self.register_buffer("weight_int", codes)
        self.register_buffer("weight_scale", torch.empty_like(codes[:, 0], dtype=torch.float32))

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight, float32 (made anew at each access)."""
        return self.weight_int.float().mul_(self.weight_scale[:, None])

    def _round(self, weight: Tensor) -> None:
        self.weight_int, self.weight_scale = _codes(weight)

    def _run(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return super()._run(x)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = self.kernel(rows, self.weight_int, self.weight_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine set."""
        return {**self.__dict__, "kernel": None}
