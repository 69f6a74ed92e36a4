"""Linear layers of float inputs, computed in float32, whose weights are int8."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import WEIGHT
from quantempo.quantized.layers import StoredLinear

__all__ = ["WeightOnlyLinear"]


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
        least = torch.finfo(torch.float32).tiny
        self.weight_scale = (weight.abs().amax(1) / WEIGHT.qmax).clamp_min(least)
        self.weight_int = WEIGHT.encode((weight / self.weight_scale[:, None]).round().int())

    def _run(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return super()._run(x)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = self.kernel(rows, self.weight_int, self.weight_scale, self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine set."""
        return {**self.__dict__, "kernel": None}
