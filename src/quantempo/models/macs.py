"""Count the multiply-accumulates of a denoiser's forward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["ATTENTION_MATMULS", "count_macs"]

# The entry of `count_macs` that holds the matrix products between activations.
ATTENTION_MATMULS = "(attention matmuls)"
_PRODUCTS = ("bmm", "baddbmm", "scaled_dot_product")


_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# The fused attention of the CPU, which torch's counter does not know, by the shapes of q, k and v.
_MORE: dict[Any, Any] = {_FUSED: lambda *shapes, **_: sdpa_flop_count(*shapes[:3])}


@torch.no_grad()
def count_macs(denoiser: nn.Module, call: Callable[[], Any], batch: int) -> dict[str, int]:
    """Return MACs a sample by layer name, and of attention, of a forward `call` of `batch`."""
    counter = FlopCounterMode(display=False, custom_mapping=_MORE)
    with counter:
        call()
    flops, root = counter.get_flop_counts(), type(denoiser).__name__

    def products(where: str) -> int:
        """Return the FLOPs of batched products; those inside a layer are the layer's."""
        return sum(n for op, n in flops[where].items() if any(p in str(op) for p in _PRODUCTS))

    macs, attention = {}, products("Global")
    for name, layer in denoiser.named_modules():
        where = f"{root}.{name}"
        if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and where in flops:
            macs[name] = sum(flops[where].values()) // (2 * batch)
            attention -= products(where)
    return {**macs, ATTENTION_MATMULS: attention // (2 * batch)}
