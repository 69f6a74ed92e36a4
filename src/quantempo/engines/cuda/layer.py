"""Int8 layers on a GPU through the operators of `kernels.ops`.

Eagerly a layer is two launches: quantize, multiply. Inside a compiled network its input is
quantized by plain operations, which the compiler joins with what comes before: the same integers.
"""

import importlib.util
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from quantempo.engines.base import BACKENDS, TARGET, Backend, Kernel, channel_dim, warn_once
from quantempo.engines.cuda.constants import (
    ALIGNED,
    FLOATS,
    LayerConstants,
    quantize,
    quantize_rows,
    quantize_tokens,
)
from quantempo.errors import QuantempoError
from quantempo.models.fusion import no
from quantempo.quantized import QConv2d, QLayer

__all__: list[str] = []

_CAPABILITY = (8, 0)
# The first with all that the kernels import; 3.6 is what they were measured with.
_TRITON = (3, 4)
_SLOW = (
    "engine triton is attached and the model is on a CPU: the exact definition of its operators "
    "runs, which is slow; attach an engine for CPUs"
)


class _Kernel(Kernel):
    """A layer of several segments is one launch where it is linear or a 1x1 convolution (the others
    are shortcut operands of the first), else one launch for each segment, added up in float32.
    """

    backend = "triton"
    constants: LayerConstants

    def _prepare(self, device: torch.device) -> None:
        if self.layer.weight_scale.device != device:
            text = f"got an input on {device} for a layer on {self.layer.weight_scale.device}"
            raise QuantempoError(f"{text}; move the model")
        if device.type == "cpu" and TARGET.get() is None:
            warn_once(_SLOW)
        self.constants = LayerConstants(self.layer)

    def __call__(self, x: Tensor) -> Tensor:
        self.here(x.device)
        layer, constants = self.layer, self.constants
        dtype = x.dtype if x.dtype in FLOATS else torch.float32
        image = isinstance(layer, QConv2d)
        parts = zip(x.split(layer.segments, channel_dim(layer)), constants.grids, strict=True)
        how: dict[str, Any] = constants.shape if image else {}
        # Of each segment: what `gemm` is told of its rows.
        rows: list[dict[str, Any]] = [{}] * len(layer.segments)
        if layer.dynamic:
            pairs = [quantize_tokens(*pair) for pair in parts]
            codes, rows = [pair[0] for pair in pairs], [{"rows": pair[1]} for pair in pairs]
        else:
            codes = [(quantize if image else quantize_rows)(part, grid) for part, grid in parts]
        if constants.sides is not None and not layer.dynamic:
            how |= constants.sides.arguments(codes[1:])
            codes = codes[:1]
        run = constants.conv if image else constants.gemm
        y: Tensor | None = None
        for i, main in enumerate(codes[:-1]):
            y = run(main, torch.float32, i, residual=y, **rows[i], **how)
        how |= rows[len(codes) - 1]
        y = run(codes[-1], dtype, len(codes) - 1, residual=y, bias=constants.bias, **how)
        return (y if image else y.reshape(*x.shape[:-1], y.shape[-1])).to(x.dtype)


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    found = metadata.version("triton")
    if tuple(int(part) for part in found.split(".")[:2]) < _TRITON:
        return f"triton {found} is installed; {_TRITON[0]}.{_TRITON[1]} is needed"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < _CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}; 8.0 is needed"
    return None


def _refuses(layer: QLayer) -> str | None:
    out = layer.weight_shape[0]
    for channels in (*layer.segments, out):
        if channels % ALIGNED:
            what = "output" if channels == out else "input"
            return f"{channels} {what} channels are no multiple of {ALIGNED}"
    if not isinstance(layer, QConv2d):
        return None
    kernel, most = "x".join(map(str, layer.kernel_size)), layer.kernel_size[0] // 2
    pad = layer.padding
    return no(
        (kernel in ("1x1", "3x3"), f"its kernel is {kernel}; 1x1 and 3x3 can be run"),
        (layer.groups == 1, f"it has {layer.groups} groups; 1 can be run"),
        (layer.dilation == (1, 1), f"its dilation is {layer.dilation}; 1 can be run"),
        (layer.stride in ((1, 1), (2, 2)), f"its stride is {layer.stride}; 1 and 2 can be run"),
        (max(pad) <= most, f"its border is {pad} pixels; at most {most} can be run"),
    )


BACKENDS.register("triton")(Backend("triton", _Kernel, _missing, _refuses))
