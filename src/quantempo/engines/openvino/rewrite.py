"""Make the float parts of a denoiser's OpenVINO graph cheap around int8 layers.

OpenVINO's own graph spends as long between the integer layers of a U-Net as in them: a group norm
wants planar tensors, convolutions channels-last ones: two changes of layout and several passes.
Every rewrite is an identity in exact arithmetic, of operators. Imported only if there is OpenVINO.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from torch import Tensor, nn

from quantempo.engines.openvino.graph import build_graph, constant
from quantempo.models.layers import timestep_place

__all__ = ["rewrite", "timed_graph"]

_CONVOLUTIONS = ("Convolution", "GroupConvolution")


def timed_graph(
    denoiser: nn.Module, run: Callable[..., Any], inputs: dict[str, Tensor], outputs: list[str]
) -> ov.Model:
    """Return the graph of a `run` that sets the clock from its own inputs, which have names."""
    t = inputs[timestep_place(denoiser)[0]]
    bucket = torch.zeros(t.numel(), dtype=torch.int64)
    graph, _ = build_graph(denoiser, run, [bucket, *inputs.values()])
    # The bucket comes from t.
    graph.remove_parameter(graph.get_parameters()[0])
    rewrite(graph, bfloat16_attention=False)
    for ports, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for port, name in zip(ports, names, strict=True):
            port.tensor.set_names({name})
    return graph


def rewrite(graph: ov.Model, *, bfloat16_attention: bool) -> None:
    """Rewrite a graph with fixed shapes in place.

    Error: a group norm loses about log2(1 + mean^2 / var) of its 24 bits, of single channels before
    anything is added (E[x^2] - E[x]^2 cancels); bfloat16 attention rounds q, k, v, p to 8 bits.
    """
    _read_parts_of_concatenations(graph)
    _GroupNorms(graph).rewrite()
    _quantize_before_moving(graph)
    if bfloat16_attention:
        _attention_in_bfloat16(graph)
    graph.validate_nodes_and_infer_types()


def _nodes(graph: ov.Model, kind: str) -> list[ov.Node]:
    return [node for node in graph.get_ordered_ops() if node.get_type_name() == kind]


def _kind(value: ov.Output) -> str:
    return value.get_node().get_type_name()


def _values(value: ov.Output) -> np.ndarray | None:
    """Return the values of a constant (also of a converted one), else None."""
    node = value.get_node()
    while node.get_type_name() in ("Convert", "Reshape", "Unsqueeze"):
        node = node.input_value(0).get_node()
    return node.data.reshape(-1) if node.get_type_name() == "Constant" else None


def _read_parts_of_concatenations(graph: ov.Model) -> None:
    """Replace a slice that is exactly one input of a concatenation by that input."""
    for node in _nodes(graph, "Slice"):
        source = node.input_value(0)
        if _kind(source) != "Concat":
            continue
        # begin, end, step, axis
        values = [_values(node.input_value(i)) for i in range(1, node.get_input_size())]
        ends = [int(value[0]) for value in values if value is not None and len(value) == 1]
        joined = source.get_node()
        axis = joined.get_attributes()["axis"] % len(source.get_shape())
        start = 0
        for part in joined.input_values():
            stop = start + part.get_shape()[axis]
            if ends == [start, stop, 1, axis]:
                node.output(0).replace(part)
            start = stop


class _Scaled(NamedTuple):
    """x = source * factor + shift; these two (1 or B, 1 or C, 1, 1), or None where nothing is."""

    source: ov.Output
    factor: ov.Output | None
    shift: ov.Output | None


@dataclass
class _GroupNorms:
    """Turn group norms into moments per channel and one elementwise a[b, c] x + b[b, c].

    The means of x and x^2 per channel are plain reductions in any layout; what was added or
    multiplied per channel just before (time embedding, bias, scale of the time bucket) goes into
    the moments and into a and b, and costs no pass over the tensor either.
    """

    graph: ov.Model
    moments: dict[tuple[str, int], tuple[ov.Output, ov.Output]] = field(default_factory=dict)

    def rewrite(self) -> None:
        for norm in _nodes(self.graph, "GroupNormalization"):
            x = _before_flattening(norm.input_value(0))
            weight, bias = (_values(norm.input_value(i)) for i in (1, 2))
            if x is None or weight is None or bias is None:
                continue
            how, shape = norm.get_attributes(), list(norm.get_output_shape(0))
            y = self._normalised(x, weight, bias, int(how["num_groups"]), float(how["epsilon"]))
            if len(shape) != 4:
                y = ops.reshape(y, constant(shape, np.int64), False)
            y.set_friendly_name(norm.get_friendly_name())
            norm.output(0).replace(y.output(0))

    def _normalised(
        self, x: ov.Output, weight: np.ndarray, bias: np.ndarray, groups: int, eps: float
    ) -> ov.Node:
        batch, channels = list(x.get_shape())[:2]
        scaled = _peel(x)
        shape = constant([batch, groups, channels // groups], np.int64)
        own_mean, own_variance = (ops.reshape(v, shape, False) for v in self._moments(scaled))
        # Variances add up: within the channels of a group, and between them.
        mean = _mean(own_mean, 2)
        between = ops.subtract(own_mean, mean)
        variance = _mean(ops.add(own_variance, ops.multiply(between, between)), 2)
        inverse = ops.power(ops.add(variance, constant(eps)), constant(-0.5))
        a = ops.multiply(inverse, constant(weight.reshape(1, groups, -1)))
        b = ops.subtract(constant(bias.reshape(1, groups, -1)), ops.multiply(mean, a))
        full = constant([batch, channels, 1, 1], np.int64)
        a, b = ops.reshape(a, full, False), ops.reshape(b, full, False)
        if scaled.shift is not None:
            b = ops.add(b, ops.multiply(a, scaled.shift))
        if scaled.factor is not None:
            a = ops.multiply(a, scaled.factor)
        return ops.add(ops.multiply(scaled.source, a), b)

    def _moments(self, x: _Scaled) -> tuple[ov.Output, ov.Output]:
        """Return the mean and the variance per row and channel, (B, C, 1, 1)."""
        key = (x.source.get_node().get_name(), x.source.get_index())
        if key not in self.moments:
            length = ops.reduce_l2(x.source, constant([2, 3], np.int64), True)
            per_pixel = constant(1.0 / np.prod(list(x.source.get_shape())[2:]))
            mean = _mean(x.source, 2, 3)
            square = ops.multiply(ops.multiply(length, length), per_pixel)
            # Rounding can make a variance of nearly nothing negative.
            variance = ops.relu(ops.subtract(square, ops.multiply(mean, mean)))
            self.moments[key] = mean.output(0), variance.output(0)
        mean, variance = self.moments[key]
        if x.factor is not None:
            mean = ops.multiply(mean, x.factor).output(0)
            variance = ops.multiply(variance, ops.multiply(x.factor, x.factor)).output(0)
        if x.shift is not None:
            mean = ops.add(mean, x.shift).output(0)
        return mean, variance


def _mean(x: ov.Output, *axes: int) -> ov.Node:
    return ops.reduce_mean(x, constant(axes, np.int64), True)


def _before_flattening(x: ov.Output) -> ov.Output | None:
    """Return x (B, C, H, W), also if it was flattened to (B, C, H * W) just before; else None."""
    shape = list(x.get_shape())
    if len(shape) == 3 and _kind(x) == "Reshape":
        x = x.get_node().input_value(0)
        source = list(x.get_shape())
        if len(source) == 4 and source[:2] == shape[:2]:
            shape = source
    return x if len(shape) == 4 else None


def _peel(x: ov.Output) -> _Scaled:
    """Undo additions and multiplications of one value per channel that only x reads."""
    shape = list(x.get_shape())
    factor = shift = None
    while len(x.get_target_inputs()) == 1 and _kind(x) in ("Add", "Multiply"):
        node = x.get_node()
        row = next((i for i in (0, 1) if _is_row(node.input_value(i), shape)), None)
        if row is None or list(node.input_value(1 - row).get_shape()) != shape:
            break
        value, x_next = node.input_value(row), node.input_value(1 - row)
        if _kind(value) == "Constant" and _kind(x_next) in _CONVOLUTIONS:
            # The bias of a convolution is added by its kernel.
            break
        if _kind(x) == "Multiply":
            factor = value if factor is None else ops.multiply(factor, value).output(0)
        else:
            value = value if factor is None else ops.multiply(factor, value).output(0)
            shift = value if shift is None else ops.add(shift, value).output(0)
        x = x_next
    return _Scaled(x, factor, shift)


def _is_row(value: ov.Output, shape: list[int]) -> bool:
    """Return whether a value broadcasts over the pixels of a tensor (B, C, H, W)."""
    own = list(value.get_shape())
    fits = all(n in (1, full) for n, full in zip(own, shape, strict=False))
    return len(own) == 4 and own[2:] == [1, 1] and fits


def _quantize_before_moving(graph: ov.Model) -> None:
    """Exchange quantizers with the reshapes and transposes before them: bytes move, not floats."""
    for node in _nodes(graph, "FakeQuantize"):
        if any(list(node.get_input_shape(i)) not in ([], [1]) for i in range(1, 5)):
            continue
        x, times, limits = node.input_value(0), None, None
        if _kind(x) == "Clamp" and len(x.get_target_inputs()) == 1:
            # The largest code of a grid below 8 bits; exchanged as well, like the scale below.
            limits, x = x.get_node().get_attributes(), x.get_node().input_value(0)
        if _kind(x) == "Multiply" and len(x.get_target_inputs()) == 1:
            # The scale of the time bucket, (1 or B, 1, ...); exchanged as well.
            inner = x.get_node()
            if list(inner.get_input_shape(1))[1:] == [1] * (len(x.get_shape()) - 1):
                x, times = inner.input_value(0), inner.input_value(1)
        moves = []
        while _kind(x) in ("Reshape", "Transpose") and len(x.get_target_inputs()) == 1:
            batch = x.get_shape()[0] == x.get_node().get_input_shape(0)[0]
            if times is not None and not batch:
                break
            moves.append(x.get_node())
            x = moves[-1].input_value(0)
        if not moves:
            continue
        y = x
        if times is not None:
            rows = constant([times.get_shape()[0], *[1] * (len(x.get_shape()) - 1)], np.int64)
            y = ops.multiply(y, ops.reshape(times, rows, False)).output(0)
        if limits is not None:
            y = ops.clamp(y, limits["min"], limits["max"]).output(0)
        ranges = [node.input_value(i) for i in range(1, 5)]
        y = ops.fake_quantize(y, *ranges, 256).output(0)
        for move in reversed(moves):
            order = move.input_value(1)
            if move.get_type_name() == "Transpose":
                y = ops.transpose(y, order).output(0)
            else:
                y = ops.reshape(y, order, move.get_attributes()["special_zero"]).output(0)
        node.output(0).replace(y)


def _attention_in_bfloat16(graph: ov.Model) -> None:
    for node in _nodes(graph, "ScaledDotProductAttention"):
        shape = node.get_output_partial_shape(0)
        if shape.is_dynamic or shape[-3] == shape[-2]:
            # OpenVINO (2026.4) mixes the two up if q comes as (B, queries, heads, C): 5 to 20 dB.
            continue
        inputs = [
            ops.convert(value, "bf16") if value.get_element_type() == ov.Type.f32 else value
            for value in node.input_values()
        ]
        causal = bool(node.get_attributes().get("causal", False))
        y = ops.scaled_dot_product_attention(*inputs, causal=causal)
        node.output(0).replace(ops.convert(y, "f32").output(0))
