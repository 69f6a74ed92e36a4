"""From a packed denoiser to an OpenVINO graph with the same integers and scales.

The denoiser is traced once; every integer layer becomes one node of its own, which is then spelled
out for OpenVINO's low-precision transformations:

    x * (s_ref / s[bucket]) -> FakeQuantize(constant range of s_ref, z)
      -> Convolution or MatMul with int8 constants * s_w -> * (s[bucket] / s_ref) + bias

Quantizers with a range that changes at run time would leave int8 behind; a multiplication before a
constant one does not. It needs one zero point for all buckets of a layer; with one bucket nothing
is multiplied. The scale of a token is worked out in the graph; s_ref is 1 then. A grid of fewer
bits is the lower part of 256 levels. Imported only once OpenVINO is known to be installed.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from quantempo.core.instance import keep
from quantempo.engines.base import out_shape
from quantempo.engines.simulated import float32_copy
from quantempo.quantized import CLOCK_NAME, QConv2d, QLayer, quantized_layers, weight_only_layers

__all__ = ["build_graph", "constant", "wrong_sums"]

_OP = "packed_layer"
# 8 bits; low-precision transformations know no other number.
_LEVELS = 256
_TINY = float(np.finfo(np.float32).tiny)
_LIBRARY = torch.library.Library("quantempo", "FRAGMENT")
_LIBRARY.define(f"{_OP}(Tensor x, Tensor bucket, int index, int[] shape) -> Tensor")
# Tracing needs the shape of the output, not its values.
_LIBRARY.impl(_OP, lambda x, bucket, index, shape: x.new_zeros(shape), "CPU")


@dataclass(frozen=True)
class _LayerCall:
    """One use of an integer layer in the forward pass; shape: of its input."""

    name: str
    layer: QLayer
    shape: tuple[int, ...]


def constant(value: Any, dtype: Any = np.float32) -> ov.Node:
    """Return a constant node."""
    return ops.constant(np.asarray(value, dtype))


def build_graph(
    denoiser: nn.Module, run: Callable[..., Any], inputs: Sequence[Tensor], inner: bool = False
) -> tuple[ov.Model, list[_LayerCall]]:
    """Trace `run(copy, *inputs[1:])` on a copy of the denoiser; return its graph, integer layers.

    inputs: the bucket, int64 (1,) or (B,), then the tensors; floating ones float32. inner: make the
    results of the integer layers outputs too, after those of `run`. The node that does the sums of
    layer `name` and segment i is called "name/i".
    """
    calls: list[_LayerCall] = []
    # The trace would hold the casts of an autocast around it, which OpenVINO does not know.
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        program = _Program(float32_copy(denoiser), run)
        for name, layer in list(quantized_layers(program.denoiser)):
            program.denoiser.set_submodule(name, _Recorder(name, layer, calls))
        for alone in weight_only_layers(program.denoiser):
            alone.unpack()
        with warnings.catch_warnings():
            # Values that the network turns into Python numbers are constants for fixed shapes.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(program, tuple(inputs), strict=False, check_trace=False)
        frontend = FrontEndManager().load_by_framework("pytorch")
        converter = _LayerConverter(calls, inputs[0].shape[0])
        frontend.add_extension(ConversionExtension(f"quantempo::{_OP}", converter))
        decoder = TorchScriptPythonDecoder(traced, example_input=tuple(inputs))
        graph = frontend.convert(frontend.load(decoder))
    if inner:
        graph.add_outputs([converter.results[i] for i in range(len(calls))])
    # Torch keeps the classes of a trace with all their constants for good.
    del traced, decoder, program
    torch._C._jit_clear_class_registry()
    torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()
    torch.jit._state._clear_class_state()
    for parameter, example in zip(graph.get_parameters(), inputs, strict=True):
        parameter.set_partial_shape(ov.PartialShape(list(example.shape)))
        parameter.set_element_type(ov.Type(example.numpy().dtype))
    graph.validate_nodes_and_infer_types()
    apply_moc_transformations(graph, cf=False)
    # Only now: what removes an operation that does nothing gives its name to the one before it.
    for name, node in converter.sums.items():
        node.set_friendly_name(name)
    return graph, calls


@functools.cache
def wrong_sums() -> str | None:
    """Put the largest terms through an int8 kernel of this CPU; return what went wrong, or None."""
    # CPUs without VNNI add pairs of products in 16 bits, which saturates: 255 * 127 * 2 > 32767.
    # 255 * 127 * 288 < 2^24: exact in float32 as well.
    expected = 255.0 * 127 * 32 * 3 * 3
    x = ops.parameter([1, 32, 4, 4], np.float32)
    ends = [constant(v) for v in (0.0, 255.0, 0.0, 255.0)]
    codes = ops.fake_quantize(x, *ends, _LEVELS).output(0)
    integers = constant(np.full((32, 32, 3, 3), 127), np.int8)
    weight = ops.multiply(ops.convert(integers, "f32"), constant(np.ones((32, 1, 1, 1))))
    y = ops.convolution(codes, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([ops.result(y)], [x])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = min(compiled([np.full((1, 32, 4, 4), 255.0, np.float32)])[0].flat, key=abs)
    kinds = (node.get_rt_info() for node in compiled.get_runtime_model().get_ops())
    kernel = next(info for info in kinds if info["layerType"].astype(str) == "Convolution")
    precision = kernel["runtimePrecision"].astype(str)
    if precision not in ("u8", "i8"):
        return f"OpenVINO computes int8 layers in {precision} on this CPU"
    if found != expected:
        return f"its int8 sums saturate on this CPU ({found:.0f} instead of {expected:.0f})"
    return None


class _Program(nn.Module):
    """Make `run` a module, so that tracing finds the parameters of the denoiser."""

    def __init__(self, denoiser: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.denoiser, self.run = denoiser, run

    def forward(self, bucket: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.denoiser.get_submodule(CLOCK_NAME).call.bucket = bucket
        return tuple(self.run(self.denoiser, *tensors))


class _Recorder(nn.Module):
    """Stand where an integer layer stands while tracing: one opaque node, and a line in `calls`."""

    def __init__(self, name: str, layer: QLayer, calls: list[_LayerCall]) -> None:
        super().__init__()
        # Not a child: tracing reads every attribute of a module, also costly properties.
        keep(self, "layer", layer)
        self.name, self.calls = name, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.run(self._node, x)

    def _node(self, x: Tensor) -> Tensor:
        self.calls.append(_LayerCall(self.name, self.layer, tuple(map(int, x.shape))))
        op = getattr(torch.ops.quantempo, _OP)
        shape = out_shape(self.layer, x)
        return op(x, self.layer.clock.bucket, len(self.calls) - 1, shape)


@dataclass
class _LayerConverter:
    """Spell out the nodes of integer layers, whose `index` points into `calls`."""

    calls: list[_LayerCall]
    # 1 when the whole batch is in one bucket, else B.
    rows: int
    # Layers that read the same tensor on the same grid (q, k, v) share one quantizer.
    shared: dict[Any, ov.Output] = field(default_factory=dict)
    # The convolution or matmul of each "layer name/segment".
    sums: dict[str, ov.Node] = field(default_factory=dict)
    # What each call of a layer returns.
    results: dict[int, ov.Output] = field(default_factory=dict)

    def __call__(self, context: Any) -> list[ov.Output]:
        x, bucket = context.get_input(0), context.get_input(1)
        place = int(np.reshape(context.get_values_from_const_input(2), ()))
        call = self.calls[place]
        layer = call.layer
        axis = 1 if isinstance(layer, QConv2d) else len(call.shape) - 1
        bias_shape = [1 if i != axis else -1 for i in range(len(call.shape))]
        bias = None if layer.bias is None else _numpy(layer.bias).reshape(bias_shape)
        terms, start = [], 0
        for i, width in enumerate(layer.segments):
            part = _part(x, call, axis, start, width)
            codes = self._quantized(call, i, bucket, part)
            y = self._sum(call, i, codes, slice(start, start + width))
            start += width
            back = self._table(call, i, bucket, part, inverse=False)
            joined = len(layer.segments) == 1 and isinstance(layer, QConv2d)
            if back is not None and bias is not None and joined:
                # A constant bias right behind a convolution is free, and keeps the (constant)
                # scale of its sums there too: (y + b) r + b (1 - r) = y r + b.
                scales = _numpy(layer.act_scale[0])
                rest = (1 - scales / np.float32(_reference(layer, 0))).reshape(-1, 1, 1, 1)
                y, bias = ops.add(y, constant(bias)), self._lookup(call, bias * rest, bucket)
            terms.append(y if back is None else ops.multiply(y, back))
        if bias is not None:
            terms.append(bias if isinstance(bias, ov.Node) else constant(bias))
        self.results[place] = functools.reduce(ops.add, terms).output(0)
        return [self.results[place]]

    def _quantized(self, call: _LayerCall, i: int, bucket: ov.Output, x: ov.Output) -> ov.Output:
        """Return the tensor on its grid (still float): s_ref * (clamp(round(x/s) + z) - z)."""
        layer = call.layer
        scale, zero = _reference(layer, i), int(layer.act_zero_point[i])
        node = x.get_node()
        scales = _numpy(layer.act_scale[i]).tobytes()
        key = (node.get_name(), x.get_index(), zero, layer.act_qmax, scales)
        if key not in self.shared:
            to = self._table(call, i, bucket, x, inverse=True)
            scaled = x if to is None else ops.multiply(x, to)
            low, high = constant(-zero * scale), constant((_LEVELS - 1 - zero) * scale)
            if layer.act_qmax < _LEVELS - 1:
                # Of its own: low-precision transformations know quantizers of 256 levels only.
                scaled = ops.clamp(scaled, -zero * scale, (layer.act_qmax - zero) * scale)
            self.shared[key] = ops.fake_quantize(scaled, low, high, low, high, _LEVELS).output(0)
        return self.shared[key]

    def _sum(self, call: _LayerCall, i: int, codes: ov.Output, columns: slice) -> ov.Node:
        layer = call.layer
        weight = layer.weight_codes
        cut = weight if len(layer.segments) == 1 else weight[:, columns]
        integers = np.ascontiguousarray(_numpy(cut))
        scale = _numpy(layer.weight_scale).reshape(-1, *[1] * (integers.ndim - 1))
        if isinstance(layer, QConv2d) and layer.groups > 1:
            # (groups, O / groups, ...)
            integers = integers.reshape(layer.groups, -1, *integers.shape[1:])
            scale = scale.reshape(layer.groups, -1, *scale.shape[1:])
        weight = ops.multiply(ops.convert(constant(integers, np.int8), "f32"), constant(scale))
        if isinstance(layer, QConv2d):
            convolution = ops.convolution if layer.groups == 1 else ops.group_convolution
            pads, strides = list(layer.padding), list(layer.stride)
            y = convolution(codes, weight, strides, pads, pads, list(layer.dilation))
        else:
            y = ops.matmul(codes, weight, False, True)
        self.sums[f"{call.name}/{i}"] = y
        return y

    def _table(
        self, call: _LayerCall, i: int, bucket: ov.Output, x: ov.Output, *, inverse: bool
    ) -> ov.Node | None:
        """Return s_ref / s (inverse) or s / s_ref, s of a bucket or token; None with one bucket."""
        if call.layer.dynamic:
            return _token_scale(call.layer, x, inverse)
        scales = _numpy(call.layer.act_scale[i])
        if len(scales) == 1:
            return None
        reference = np.float32(_reference(call.layer, i))
        values = reference / scales if inverse else scales / reference
        return self._lookup(call, values.reshape(-1, *[1] * (len(call.shape) - 1)), bucket)

    def _lookup(self, call: _LayerCall, values: np.ndarray, bucket: ov.Output) -> ov.Node:
        index: Any = bucket
        if self.rows > 1 and call.shape[0] != self.rows:
            # Row i of the batch stands for `repeat` rows of this layer's input.
            repeat = call.shape[0] // self.rows
            places = np.repeat(np.arange(self.rows), repeat)
            index = ops.gather(bucket, constant(places, np.int64), constant(0, np.int64))
        return ops.gather(constant(values), index, constant(0, np.int64))


def _part(x: ov.Output, call: _LayerCall, axis: int, start: int, width: int) -> ov.Output:
    if len(call.layer.segments) == 1:
        return x
    ends = ([start], [start + width], [1], [axis])
    return ops.slice(x, *(constant(v, np.int64) for v in ends)).output(0)


def _reference(layer: QLayer, segment: int) -> float:
    """Return the scale of the constant quantizer, the largest of all buckets."""
    return 1.0 if layer.dynamic else float(layer.act_scale[segment].max())


def _token_scale(layer: QLayer, x: ov.Output, inverse: bool) -> ov.Node:
    """Return what `core.token_scale` does, or its inverse."""
    top = layer.act_qmax - layer.act_format.symmetric_zero_point
    peak = ops.reduce_max(ops.abs(x), constant(-1, np.int64), keep_dims=True)
    scale = ops.maximum(ops.divide(peak, constant(float(top))), constant(_TINY))
    return ops.divide(constant(1.0), scale) if inverse else scale


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
