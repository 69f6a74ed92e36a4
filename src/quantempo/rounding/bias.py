"""Make the mean output of every layer that of the float layer.

    bias[o] += mean over rows and positions of (y_float - y_quantized)[o]

Layer by layer in order of execution, behind everything that is quantized before it. Source: Nagel
et al. 2019, "Data-free quantization", section 4.2 in its empirical form.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.quantized import QConv2d
from quantempo.rounding.record import BlockRun

__all__ = ["correct_bias"]

log = logging.getLogger("quantempo")


@torch.no_grad()
def correct_bias(block: BlockRun) -> dict[str, Tensor]:
    """Change the biases of a block's layers in place and return them, (O,) float32 each.

    A layer without a bias is left alone and logged.

    Error: means are float64 sums of float32 outputs; equal to the float ones up to float32
    rounding of the outputs, on the recorded rows.
    """
    wanted = _float_means(block)
    result = {}
    for name, layer in block.twins.items():
        if layer.bias is None:
            log.info("bias: %s has none, its mean output stays as it is", name)
            continue
        sums, count = None, 0
        for x in block.layer_inputs(name):
            total, terms = _sums(layer, layer(x))
            sums, count = total if sums is None else sums + total, count + terms
        assert sums is not None
        layer.bias += (wanted[name] - sums / count).float()
        result[name] = layer.bias.clone()
    return result


def _float_means(block: BlockRun) -> dict[str, Tensor]:
    """Return (O,) float64 mean output of each float layer, in one pass over the rows."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for name, layer in block.floats.items():

        def see(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            total, terms = _sums(module, output)
            sums[name] = sums[name] + total if name in sums else total
            counts[name] = counts.get(name, 0) + terms

        handles.append(layer.register_forward_hook(see))
    try:
        for index in block.batches():
            block.run(index, exact=True)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def _sums(layer: nn.Module, output: Tensor) -> tuple[Tensor, int]:
    """Return (O,) float64 sums over rows and positions, and how many terms each has."""
    axis = 1 if isinstance(layer, nn.Conv2d | QConv2d) else output.ndim - 1
    others = [i for i in range(output.ndim) if i != axis]
    return output.double().sum(others), output.numel() // output.shape[axis]
