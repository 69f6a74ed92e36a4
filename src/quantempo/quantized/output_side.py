"""Quantizers on the outputs of layers, as the released PTQ4DM graph had them.

There the weights are quantized per channel, and the *output* of every Conv2d and Linear is put on
one 8-bit grid; the projections of attention, written as Conv1d, stay in float, and so does the
output of the last layer. Inputs of layers, residual sums and norms are float numbers. Such a graph
cannot run in integers: what a layer multiplies is the float result of a norm and a SiLU behind the
quantizer. It exists here only to measure what it costs beside quantized inputs, and it is not
packed.

Source: 42Shawn/PTQ4DM, QDrop/quant/quant_layer.py, the order of weight, convolution, quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION
from quantempo.errors import QuantempoError
from quantempo.models.layers import Site

__all__ = ["OutputQuantizer", "install_output_side", "output_side_layers"]

_NAME = "quantempo_output"


class OutputQuantizer(nn.Module):
    """Fake-quantize a layer's output to unsigned 8 bits: scale () float32, zero_point () int32.

    x_hat = scale * (clamp(round(x / scale) + zero_point, 0, 255) - zero_point)
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().float().clone())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid, same shape and dtype; error <= scale / 2 inside the range."""
        # Not `fake_quantize`: its checks would wait for the device once a layer and step.
        codes = torch.round(x.float() / self.scale) + self.zero_point
        codes = codes.clamp(ACTIVATION.qmin, ACTIVATION.qmax)
        return ((codes - self.zero_point) * self.scale).to(x.dtype)


def output_side_layers(sites: Sequence[Site]) -> tuple[list[str], list[str]]:
    """Return (layers with quantized weights, layers with a quantized output), in module order.

    Every Conv2d and Linear but the projections of attention; of these, all outputs but that of the
    last layer.
    """
    weights = [
        site
        for site in sites
        if isinstance(site.layer, nn.Conv2d | nn.Linear) and site.role != "attention"
    ]
    return [s.name for s in weights], [s.name for s in weights if s.role != "output"]


@torch.no_grad()
def install_output_side(
    denoiser: nn.Module,
    weights: Mapping[str, Tensor],
    grids: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """Replace weights by their quantized values and put the outputs of layers on 8-bit grids.

    Args:
        denoiser: float, changed in place; the quantizers become children of their layers and move
            with them.
        weights: layer name -> dequantized weight (O, ...).
        grids: layer name -> (scale (), zero_point ()) of its output.

    Raises:
        QuantempoError: a name that is no Conv2d or Linear, a weight of another shape, a grid that
            is not one positive finite scale and a zero point in [0, 255], or a denoiser that has
            output quantizers already. Nothing is changed then.
    """
    layers = {name: _layer(denoiser, name) for name in {**weights, **grids}}
    for name, weight in weights.items():
        if weight.shape != layers[name].weight.shape:
            raise QuantempoError(
                f"got a weight of shape {tuple(weight.shape)} for {name}; expected "
                f"{tuple(layers[name].weight.shape)}"
            )
    for name, (scale, zero_point) in grids.items():
        _check_grid(name, scale, zero_point)
        if hasattr(layers[name], _NAME):
            raise QuantempoError(f"{name} has an output quantizer already; start from the float")
    for name, weight in weights.items():
        layers[name].weight.copy_(weight)
    for name, (scale, zero_point) in grids.items():
        layer = layers[name]
        quantizer = OutputQuantizer(scale, zero_point).to(layer.weight.device)
        layer.add_module(_NAME, quantizer)
        layer.register_forward_hook(_put_on_grid)


def _put_on_grid(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return layer.get_submodule(_NAME)(output)


def _layer(denoiser: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    found = dict(denoiser.named_modules()).get(name)
    if not isinstance(found, nn.Conv2d | nn.Linear):
        raise QuantempoError(
            f"'{name}' is no float Conv2d or Linear of this {type(denoiser).__name__}; expected "
            "names from output_side_layers"
        )
    return found


def _check_grid(name: str, scale: Tensor, zero_point: Tensor) -> None:
    one = scale.numel() == zero_point.numel() == 1 and scale.ndim == zero_point.ndim == 0
    if not one or not 0 < float(scale) < float("inf"):
        raise QuantempoError(
            f"got scale {scale.tolist()} and zero point {zero_point.tolist()} for the output of "
            f"{name}; expected one positive finite scale () and one zero point ()"
        )
    if not ACTIVATION.qmin <= int(zero_point) <= ACTIVATION.qmax:
        raise QuantempoError(
            f"got zero point {int(zero_point)} for the output of {name}; expected 0 to 255"
        )
