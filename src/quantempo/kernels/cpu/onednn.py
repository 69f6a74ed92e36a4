"""Int8 convolution and linear through the oneDNN operators that ship in torch.

    y = scale * weight_scale[o] * (sum_k q_a q_w - z * sum_k q_w) + bias[o]

Thin wrappers on tensors. The operators are not public API of torch, so they are looked up by name
and compared with float64 once; `missing()` says what is wrong. Activations are uint8:
signed ones run a reference kernel thousands of times slower.
"""

import functools
import platform
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Int8Conv2d", "Int8Linear", "capabilities", "has", "missing", "native_bfloat16", "quantize",
]  # fmt: skip

_OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")


def quantize(x: Tensor, scale: float, zero_point: int, qmax: int = 255) -> Tensor:
    """Return clamp(round(x / scale) + zero_point, 0, qmax), uint8, shape and layout of x."""
    codes = x.float() / scale
    return codes.round_().add_(zero_point).clamp_(0, qmax).to(torch.uint8)


class Int8Conv2d:
    """A convolution; weight int8 (O, C / groups, kh, kw); weight_scale float32 (O,).

    Calls raise RuntimeError for shapes that oneDNN cannot take.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0), dilation: tuple[int, int] = (1, 1), groups: int = 1,
    ) -> None:  # fmt: skip
        self.weight, self.weight_scale = weight, weight_scale.float()
        self._geometry = (list(stride), list(padding), list(dilation), groups)
        self._zeros = torch.zeros(len(weight_scale), dtype=torch.int32)
        # With the shape it is for, exchanged together: other threads may have other shapes.
        self._packed: tuple[Any, Any] = ((), None)

    def __call__(
        self, x: Tensor, scale: float, zero_point: int, bias: Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:  # fmt: skip
        """Return y (B, O, H', W'), channels_last, float32 or bfloat16; padding pads the zero point.

        x: uint8 (B, C, H, W); bias: float32 (O,).
        """
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        shape, packed = self._packed
        if shape != x.shape[2:]:
            # Packed without the shape, some kernels re-order the weight at every call.
            how = (self.weight_scale, 1.0, zero_point, *self._geometry, list(x.shape))
            packed = torch.ops.onednn.qconv_prepack(self.weight, *how)
            self._packed = x.shape[2:], packed
        return torch.ops.onednn.qconv_pointwise(
            x, scale, zero_point, packed, self.weight_scale, self._zeros, bias,
            *self._geometry, 1.0, 0, dtype, "none", [], "",
        )  # fmt: skip


class Int8Linear:
    """A linear layer: weight (O, K) int8; weight_scale (O,) float32."""

    def __init__(self, weight: Tensor, weight_scale: Tensor) -> None:
        self.weight, self.weight_scale = weight, weight_scale.float()
        self._zeros = torch.zeros(len(weight_scale), dtype=torch.int32)
        self._packed: Tensor | None = None

    def __call__(
        self, x: Tensor, scale: float, zero_point: int, bias: Tensor | None,
        dtype: torch.dtype = torch.float32, *, add: Tensor | None = None,
        into: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return y (R, O), plus `add` (R, O) of the same dtype; or add y to `into` in place.

        x: uint8 (R, K), contiguous; bias: float32 (O,); dtype: float32 or bfloat16.
        """
        if self._packed is None:
            self._packed = torch.ops.onednn.qlinear_prepack(self.weight, list(x.shape))
        fixed = (self._packed, self.weight_scale, self._zeros)
        if add is None and into is None:
            return torch.ops.onednn.qlinear_pointwise(
                x, scale, zero_point, *fixed, bias, 1.0, 0, dtype, "none", [], ""
            )
        other, kind = (add, "add") if into is None else (into, "sum")
        return torch.ops.onednn.qlinear_pointwise.binary(
            x, scale, zero_point, *fixed, other, bias,
            1.0, 0, dtype, 1.0, 0, kind, 1.0, "none", [], "",
        )  # fmt: skip


def capabilities() -> dict[str, Any]:
    """Return which sets of instructions the CPU has; torch 2.9 does not say."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    with open("/proc/cpuinfo") as stream:
        return dict.fromkeys(next(line for line in stream if "flags" in line).split()[2:], True)


def has(*names: str) -> bool:
    """Return whether the CPU has one of these sets of instructions."""
    return any(map(capabilities().get, names))


def native_bfloat16() -> bool:
    """Return whether the CPU multiplies bfloat16; others emulate it, slower than float32."""
    return has("avx512_bf16", "amx_bf16")


@functools.cache
def missing() -> str | None:
    """Return why the int8 kernels cannot be used here (one clause), or None.

    One small convolution and one linear layer, of sums that CPUs without VNNI saturate, are tried.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch was built without oneDNN"
    if not all(hasattr(torch.ops.onednn, name) for name in _OPERATORS):
        return f"torch {torch.__version__} no longer has the int8 oneDNN operators it relies on"
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"its int8 kernels are made for x86-64, this is {platform.machine()}"
    if not has("avx512_vnni", "avx_vnni"):
        return (
            "this CPU has no VNNI instructions, so sums of 8-bit products would saturate; "
            "use the simulated or the openvino engine"
        )
    try:
        return _self_test()
    except Exception as error:  # Not public operators: they may take other arguments some day.
        return f"its self-test failed: {next(iter(str(error).splitlines()), type(error).__name__)}"


def _self_test() -> str | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(250, 256, (1, 32, 5, 5), generator=generator, dtype=torch.uint8)
    # Of one sign and large, so that two products need more than 16 bits.
    weight = torch.randint(120, 128, (16, 32, 3, 3), generator=generator, dtype=torch.int8)
    weight[::2] *= -1
    one = torch.ones(16)
    y = Int8Conv2d(weight, one, padding=(1, 1))(x, 1.0, 7, None)
    away = y - F.conv2d(x.double() - 7, weight.double(), padding=1)
    rows = x.permute(0, 2, 3, 1).reshape(25, 32)
    flat = weight[:, :, 1, 1].contiguous()
    y_rows = Int8Linear(flat, one)(rows.contiguous(), 1.0, 7, None)
    away_rows = y_rows - F.linear(rows.double() - 7, flat.double())
    off = max(int(difference.abs().max()) for difference in (away, away_rows))
    if off == 0:
        return None
    return (
        f"its self-test failed, sums are off by up to {off} (saturated by kernels without VNNI? "
        "see ONEDNN_MAX_CPU_ISA); use the simulated or the openvino engine"
    )
