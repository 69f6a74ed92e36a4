"""Count the multiply-accumulates of a denoiser's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["ATTENTION_MATMULS", "count_macs"]

# The entry of `count_macs` that holds the matrix products between activations.
ATTENTION_MATMULS = "(attention matmuls)"


class _ActivationMatmuls(TorchDispatchMode):
    """Sum the MACs of products of two activations: batched matmuls and fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            query, key = args[0], args[1]
            self.macs += 2 * query.numel() * key.shape[-2]
        elif name in ("bmm", "baddbmm"):
            left, right = args[-2:]
            self.macs += left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_macs(denoiser: nn.Module, call: Callable[[], Any], batch: int) -> dict[str, int]:
    """Return MACs per sample by layer name, and of attention under `ATTENTION_MATMULS`.

    Args:
        denoiser: a float denoiser.
        call: runs one forward of it.
        batch: samples in that forward.
    """
    macs: dict[str, int] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Any = layer.weight
            macs[name] = macs.get(name, 0) + output.numel() * (weight[0].numel()) // batch

        return hook

    layers = [
        (name, layer)
        for name, layer in denoiser.named_modules()
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    ]
    handles = [layer.register_forward_hook(record(name)) for name, layer in layers]
    try:
        with _ActivationMatmuls() as attention:
            call()
    finally:
        for handle in handles:
            handle.remove()
    macs[ATTENTION_MATMULS] = attention.macs // batch
    return macs
