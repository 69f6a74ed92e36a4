"""Quantizers on the outputs of layers, as the released PTQ4DM graph had them.

There the weights are quantized per channel, and the *output* of every Conv2d and Linear is put on
one 8-bit grid; the projections of attention, written as Conv1d, stay in float, and so does the
output of the last layer. Such a graph cannot run in integers: what a layer multiplies is the float
result of a norm and a SiLU behind the quantizer.

Source: 42Shawn/PTQ4DM, QDrop/quant/quant_layer.py, the order of weight, convolution, quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.models.layers import Site
from studies.ptq4dm.sampler_tensors import to_grid

__all__ = ["install_output_side", "output_side_layers"]


def output_side_layers(layers: Sequence[Site]) -> tuple[list[str], list[str]]:
    """Return (layers with quantized weights, layers with a quantized output), in module order.

    Every Conv2d and Linear but the projections of attention; of these, all outputs but that of the
    last layer.
    """
    weights = [layer for layer in layers if layer.role != "attention"]
    return [w.name for w in weights], [w.name for w in weights if w.role != "output"]


@torch.no_grad()
def install_output_side(
    denoiser: nn.Module, weights: Mapping[str, Tensor], grids: Mapping[str, tuple[Tensor, Tensor]]
) -> None:
    """Replace weights by their quantized values and put the outputs of layers on 8-bit grids.

    x_hat = scale * (clamp(round(x / scale) + zero_point, 0, 255) - zero_point)

    denoiser: float, changed in place; weights: layer name -> dequantized weight (O, ...); grids:
    layer name -> (scale (), zero_point ()) of its output.
    """
    for name, weight in weights.items():
        layer: Any = denoiser.get_submodule(name)
        layer.weight.copy_(weight)
    for name, grid in grids.items():
        layer = denoiser.get_submodule(name)
        scale, zero = (part.to(layer.weight.device) for part in grid)
        layer.register_forward_hook(lambda _, args, y, own=(scale, zero): to_grid(y, own))
