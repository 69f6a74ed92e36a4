"""Linear layers of float inputs, computed in float32, whose weights are stored in fewer bits."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from quantempo.core import WEIGHT
from quantempo.errors import QuantempoError

__all__ = ["Float16Linear", "StoredLinear", "WeightOnlyLinear"]


class StoredLinear(nn.Module):
    """An empty copy of a float linear layer, on its device, until it is filled."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        bias = None if layer.bias is None else torch.empty_like(layer.bias, dtype=torch.float32)
        self.register_buffer("bias", bias)

    def fill(self, layer: nn.Linear) -> Self:
        """Round the weight of a float layer, copy its bias."""
        self._round(layer.weight.detach().float())
        if layer.bias is not None:
            self.bias = layer.bias.detach().float()
        return self

    def _round(self, weight: Tensor) -> None:
        raise NotImplementedError


class Float16Linear(StoredLinear, nn.Linear):
    """Linear layer computed in float32 whose weight is stored in float16, in files.

    For the layers of the time embedding, which act on t alone. Weight and bias are float32: a
    network loaded in another dtype computes t as exactly. The weight is a parameter, for who asks
    `next(part.parameters()).dtype`. `state_dict` has it in float16 where that loses nothing.

    Error: |W - W_hat| <= 2^-11 |W| for |W| >= 2^-14, else 2^-25.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        weight = torch.empty_like(layer.weight, dtype=torch.float32)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def _round(self, weight: Tensor) -> None:
        self.weight = nn.Parameter(weight.half().float(), requires_grad=False)
        if not bool(self.weight.isfinite().all()):
            raise QuantempoError(
                "a weight of the time embedding is beyond 65504, the largest float16; keep the "
                "layer in float32 (layers.exclude)"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        half = self.weight.half()
        # Weights of 12 bits, from checkpoints of format 2, may need all of float32.
        if half.is_meta or torch.equal(half.float(), self.weight.float()):
            destination[f"{prefix}weight"] = half

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].float()
            # An engine may hold it in float16.
            self.weight.data = self.weight.data.float()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b, computed in float32, in the dtype of x; x (..., in_features)."""
        y = nn.functional.linear(input.float(), self.weight.float(), self.bias)
        return y.to(input.dtype)


class WeightOnlyLinear(StoredLinear):
    """The same whose weight is int8 codes, with a scale an output channel, in memory too.

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

    def forward(self, input: Tensor) -> Tensor:
        """Return x W^T + b, computed in float32, in the dtype of x; x (..., in_features)."""
        bias = None if self.bias is None else self.bias.float()
        if self.kernel is None:
            return nn.functional.linear(input.float(), self.weight, bias).to(input.dtype)
        rows = input.reshape(-1, self.in_features).contiguous()
        y = self.kernel(rows, self.weight_int, self.weight_scale.float(), bias)
        return y.view(*input.shape[:-1], -1)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what an engine set."""
        return {**self.__dict__, "kernel": None}
