"""From a packed denoiser to an ONNX graph with the same integers, scales and sums.

    QuantizeLinear(x, scale[bucket(t)], z) -> ConvInteger or MatMulInteger, int32
      -> Cast to float -> * scale[bucket(t)] s_w -> + bias

The tables of scales and the map from t to a time bucket are part of the graph, whose inputs are
those of the network; the scale of a token is worked out in it. Imported only with `onnx` installed.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from quantempo.engines.base import channel_dim, out_shape
from quantempo.engines.simulated import float32_copy
from quantempo.quantized import QConv2d, QLayer, quantized_layers, weight_only_layers

__all__ = ["onnx_program"]

OPSET = 21
# uint8 code of the weight 0 in convolutions, whose kernels in onnxruntime know no int8 weights.
_MIDDLE = 128


def onnx_program(
    denoiser: nn.Module, run: Callable[..., Any], inputs: Sequence[Tensor], **names: Any
) -> Any:
    """Return the `torch.onnx.ONNXProgram` of `run(copy, *inputs)` on a copy of the denoiser."""
    program = _Program(float32_copy(denoiser), run).eval()
    for _, layer in quantized_layers(program.denoiser):
        layer.kernel = functools.partial(_run, layer, _weights(layer))
    for alone in weight_only_layers(program.denoiser):
        alone.unpack()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return torch.onnx.export(
            program, tuple(inputs), dynamo=True, opset_version=OPSET, verbose=False, **names
        )


class _Program(nn.Module):
    def __init__(self, denoiser: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.denoiser, self.run = denoiser, run

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(self.denoiser, *tensors))


def _weights(layer: QLayer) -> list[Tensor]:
    """Return the integers of each segment, as the operators take them."""
    codes = layer.weight_codes
    if isinstance(layer, QConv2d):
        codes = (codes.int() + _MIDDLE).to(torch.uint8)
    parts = codes.split(layer.segments, 1) if len(layer.segments) > 1 else [codes]
    return [p.contiguous() if p.ndim == 4 else p.t().contiguous() for p in parts]


def _run(layer: QLayer, weights: list[Tensor], x: Tensor) -> Tensor:
    axis, terms = channel_dim(layer), []
    rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
    parts = x.split(layer.segments, axis) if len(weights) > 1 else [x]
    for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        scale, zero = layer.scale_now(i, part), layer.act_zero_point[i].to(torch.uint8)
        sums = _sums(layer, _quantized(layer, part, scale, zero), zero, weight)
        weight_scale = layer.weight_scale.reshape(rows)
        # onnxruntime 1.32 would fuse a product of scales with rows as if it were one number.
        y = (
            sums.float() * weight_scale * scale
            if scale.ndim
            else sums.float() * (scale * weight_scale)
        )
        terms.append(y)
    y = functools.reduce(torch.add, terms)
    return y if layer.bias is None else y + layer.bias.reshape(rows)


def _quantized(layer: QLayer, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the codes of a segment, uint8."""
    shape = x.shape
    if scale.ndim:
        # Of each row of a batch or each token: along the first axis.
        x, scale = x.reshape(scale.numel(), -1), scale.reshape(-1)
        zero = zero.expand(len(scale))
    kind: Any = {"dtype": torch.uint8, "shape": x.shape}
    q = symbolic("QuantizeLinear", (x, scale, zero), {"axis": 0}, **kind)
    return (q if layer.act_qmax == 255 else q.clamp(max=layer.act_qmax)).reshape(shape)


def _sums(layer: QLayer, codes: Tensor, zero: Tensor, weight: Tensor) -> Tensor:
    """Return sum_k (q_a - z) q_w, int32."""
    if not isinstance(layer, QConv2d):
        shape = (*codes.shape[:-1], weight.shape[1])
        return symbolic("MatMulInteger", (codes, weight, zero), dtype=torch.int32, shape=shape)
    how = {
        "pads": [*layer.padding, *layer.padding], "strides": list(layer.stride),
        "dilations": list(layer.dilation), "group": layer.groups,
    }  # fmt: skip
    given = (codes, weight, zero, torch.tensor(_MIDDLE, dtype=torch.uint8))
    return symbolic("ConvInteger", given, how, dtype=torch.int32, shape=out_shape(layer, codes))
