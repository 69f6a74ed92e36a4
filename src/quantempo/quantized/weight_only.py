"""Layers of float inputs, weights integers: linear ones of blocks, and any of a component."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from quantempo.core import WEIGHT, GroupFormat, loaded, weight_format
from quantempo.quantized.layers import StoredLinear
from quantempo.scales import search_groups

__all__ = ["WeightOnlyLinear", "row_codes", "store_int8"]


def row_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
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
    codes, scale = row_codes(loaded(weight.detach()).float())
    del layer.weight
    layer.register_buffer("weight", codes)
    register_parametrization(layer, "weight", _Dequantized(scale, weight.detach()), unsafe=True)


class WeightOnlyLinear(StoredLinear):
    """Linear layer whose weight is int8 codes, with a scale an output channel, in memory too.

    For modulations of blocks: wide layers of one row a step. With `group` the codes are packed, see
    `GroupFormat`; buffers are named as those of `QLayer`; `kernel`: see `ops.weight_only_linear`.
    Error: |W - W_hat| <= scale[o] / 2, scale[o] = max_k |W[o, k]| / 127, without groups.
    """

    weight_int: Tensor
    weight_group: Tensor | None
    weight_scale: Tensor
    kernel: Callable[..., Tensor] | None = None

    def __init__(self, layer: nn.Linear, weight_bits: int = 8, group: int = 0) -> None:
        super().__init__(layer)
        self.weight_format = spec = weight_format(weight_bits, group)
        self.weight_shape = shape = (self.out_features, self.in_features)
        scale = torch.empty(shape[0], dtype=torch.float32, device=layer.weight.device)
        groups = spec.group_shape(shape)
        codes = scale.new_empty(spec.stored_shape(shape), dtype=spec.storage)
        self.register_buffer("weight_int", codes)
        self.register_buffer("weight_group", groups and scale.new_empty(groups, dtype=torch.uint8))
        self.register_buffer("weight_scale", scale)

    @property
    def weight_codes(self) -> Tensor:
        """Return the integer weight, int8 (O, K); of a packed one a new tensor at each access."""
        return self.weight_format.decode(self.weight_int, self.weight_shape, self.weight_group)

    @property
    def weight(self) -> Tensor:
        """Return the dequantized weight, float32 (made anew at each access)."""
        return self.weight_codes.float().mul_(self.weight_scale[:, None])

    def unpack(self) -> None:
        """Hold the same codes a byte each."""
        self.weight_int, self.weight_group = self.weight_codes, None
        self.weight_format = WEIGHT

    def _round(self, weight: Tensor, *codes: Tensor) -> None:
        spec = self.weight_format
        if not codes and isinstance(spec, GroupFormat):
            weight = loaded(weight).float()
            scale, groups = search_groups(weight, spec)
            codes = spec.grid(weight.shape, groups).round(weight / scale[:, None]), scale, groups
        codes = codes or row_codes(loaded(weight).float())
        stored, self.weight_scale, *more = (loaded(v).to(self.weight_int.device) for v in codes)
        self.weight_group = more[0] if more else None
        self.weight_int = spec.encode(stored.int(), self.weight_group)

    def _run(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return super()._run(x)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = self.kernel(rows, self.weight_int, self.weight_scale, self.bias, self.weight_group)
        return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine set."""
        return {**self.__dict__, "kernel": None}
