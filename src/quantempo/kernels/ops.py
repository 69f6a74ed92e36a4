"""Three operators that a quantized U-Net needs on a GPU: one schema for CUDA, CPU and tracing (L0).

    gn_act_quant   codes of silu(GroupNorm(cat(x, skip)))       one pass instead of five
    qconv2d        integer convolution with its whole epilogue
    qgemm          the same for the rows of a linear layer

Images are logically (N, C, H, W) in channels_last memory. CODES: an unsigned code q in [0, qmax]
with zero point z is stored as int8 q' = q - 128; z is given unsigned. BUCKET: int64 () or (B,),
read on the device; image (or row) n uses entry bucket[n // (N / B)] of every (G,) table, and entry
0 if G = 1. Values are never read on the host, so one CUDA graph, and one trace of torch.compile,
serves every time-step.

CUDA runs the Triton kernels of `kernels.gpu`, a CPU the float64 definition in `kernels.ops_cpu`.
No operator has gradients.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantempo.kernels import ops_checks, ops_cpu

__all__ = ["gn_act_quant", "qconv2d", "qgemm", "reserve"]

_SCHEMAS = {
    "gn_act_quant": (
        "(Tensor x, Tensor? skip, Tensor? gamma, Tensor? beta, int groups, float eps, bool silu, "
        "Tensor? scale, int zero_point, int qmax, Tensor bucket, Tensor? raw_scales, "
        "int[] raw_zero_points, int raw_qmax) -> (Tensor, Tensor, Tensor)"
    ),
    "qconv2d": (
        "(Tensor codes, Tensor weight, Tensor act_scale, Tensor weight_scale, Tensor table, "
        "Tensor bucket, Tensor? bias, Tensor? shift, Tensor? residual, Tensor[] side_codes, "
        "Tensor[] side_weights, Tensor? side_scales, Tensor? side_weight_scale, "
        "Tensor? side_table, int kernel, int stride, int[] border, bool upsample, "
        "ScalarType out_dtype, Tensor? out_scale, int out_zero, int out_qmax) -> Tensor"
    ),
    "qgemm": (
        "(Tensor codes, Tensor weight, Tensor act_scale, Tensor weight_scale, Tensor table, "
        "Tensor bucket, Tensor? bias, Tensor? residual, str activation, ScalarType out_dtype, "
        "Tensor? out_scale, int out_zero, int out_qmax) -> Tensor"
    ),
}


def _tags() -> tuple[torch.Tag, ...]:
    """Return the tags that keep a compiler from changing the strides of the inputs."""
    names = ("pt2_compliant_tag", "needs_exact_strides", "needs_fixed_stride_order")
    found = [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]
    # One layout tag at most: exact strides where this torch has it.
    return tuple(found[:2])


@functools.cache
def _launcher(name: str) -> Callable[..., Any]:
    """Return the Triton launcher of an operator; imported at the first call on a GPU."""
    launch: Callable[..., Any] = importlib.import_module(f"quantempo.kernels.gpu.{name}").launch
    return launch


def _image(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def _norm_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    ops_checks.check_norm(*args, strides=False)
    x, skip, scale, raw_scales = args[0], args[1], args[7], args[11]
    count, channels, height, width = x.shape
    both = channels if skip is None else channels + skip.shape[1]
    kind = x.dtype if scale is None else torch.int8
    codes = torch.empty(0, dtype=kind, device=x.device)
    if args[2] is not None or args[6] or scale is not None:
        codes = _image((count, both, height, width), kind, x.device)
    raws = [
        torch.empty(0, dtype=torch.int8, device=x.device)
        if raw_scales is None or part is None
        else _image(part.shape, torch.int8, x.device)
        for part in (x, skip)
    ]
    return codes, raws[0], raws[1]


def _convolution_fake(*args: Any) -> Tensor:
    shape = ops_checks.check_convolution(*args, strides=False)
    codes, out_dtype, out_scale = args[0], args[18], args[19]
    return _image(shape, out_dtype if out_scale is None else codes.dtype, codes.device)


def _gemm_fake(*args: Any) -> Tensor:
    shape = ops_checks.check_gemm(*args, strides=False)
    codes, out_dtype, out_scale = args[0], args[9], args[10]
    return codes.new_empty(shape, dtype=out_dtype if out_scale is None else codes.dtype)


def _register(
    name: str, check: Callable[..., Any], on_cpu: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    def cpu(*args: Any) -> Any:
        check(*args, strides=True)
        # No gradients: not those that its torch functions happen to have either.
        with torch.no_grad():
            return on_cpu(*args)

    def cuda(*args: Any) -> Any:
        check(*args, strides=True)
        device = args[0].device
        if device.index == torch.cuda.current_device():
            return _launcher(name)(*args)
        # Triton launches on the current device.
        with torch.cuda.device(device):
            return _launcher(name)(*args)

    _library.define(name + _SCHEMAS[name], tags=_tags())
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"quantempo::{name}", fake, lib=_library)


_library = torch.library.Library("quantempo", "DEF")
_register("gn_act_quant", ops_checks.check_norm, ops_cpu.gn_act_quant, _norm_fake)
_register("qconv2d", ops_checks.check_convolution, ops_cpu.qconv2d, _convolution_fake)
_register("qgemm", ops_checks.check_gemm, ops_cpu.qgemm, _gemm_fake)

_gn_act_quant = torch.ops.quantempo.gn_act_quant.default
_qconv2d = torch.ops.quantempo.qconv2d.default
_qgemm = torch.ops.quantempo.qgemm.default


def reserve(device: torch.device) -> None:
    """Make what the operators keep on a GPU between calls, before a graph is recorded there."""
    if device.type == "cuda":
        importlib.import_module("quantempo.kernels.gpu.contraction.launch").reserve(device)


def gn_act_quant(
    x: Tensor,
    skip: Tensor | None = None,
    *,
    bucket: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    silu: bool = False,
    scale: Tensor | None = None,
    zero_point: int = 0,
    qmax: int = 255,
    raw_scales: Tensor | None = None,
    raw_zero_points: Sequence[int] = (),
    raw_qmax: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise torch.cat([x, skip], 1) by groups, apply SiLU and quantize, in one pass.

    v = (x - mean) / sqrt(var + eps) gamma + beta;  a = v / (1 + exp(-v)) if `silu` else v
    q = clamp(rne(a (1 / scale)) + z, 0, qmax), stored q - 128

    Args:
        x: (N, C1, H, W) float16, bfloat16 or float32, channels_last; `skip`: (N, C2, H, W), alike.
        bucket: see the module.
        gamma, beta: (C1 + C2,) float32; None: no normalisation, `groups` and `eps` are not used.
        scale: (G,) float32; None: no quantization, the first result has the dtype of x.
        raw_scales: (S, G) float32 to get the codes of x itself (row 0) and of `skip` itself (last
            row), with `raw_zero_points` (S of them) and `raw_qmax`; None for neither.

    Returns:
        codes (N, C1 + C2, H, W), codes of x, codes of `skip`; channels_last, or empty (0,).

    Raises:
        ValueError: on shapes, types or strides other than these.

    Error: statistics are float32 on a GPU, so codes there differ by at most 1 from the CPU's; so do
        those of x and `skip` themselves, where a quotient is next to a tie.
    """
    return _gn_act_quant(
        x, skip, gamma, beta, groups, eps, silu, scale, zero_point, qmax, bucket,
        raw_scales, list(raw_zero_points), raw_qmax,
    )  # fmt: skip


def qconv2d(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    *,
    bucket: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    side_codes: Sequence[Tensor] = (),
    side_weights: Sequence[Tensor] = (),
    side_scales: Tensor | None = None,
    side_weight_scale: Tensor | None = None,
    side_table: Tensor | None = None,
    kernel: int = 3,
    stride: int = 1,
    border: Sequence[int] | None = None,
    upsample: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    out_scale: Tensor | None = None,
    out_zero: int = 0,
    out_qmax: int = 255,
) -> Tensor:
    """Convolve codes with integer weights, outside the image with the zero point, and rescale.

    y = s_a s_w[o] (sum q' w - t[o]) + sum_i s_i[b] s_side[o] (sum q'_i w_i - t_i[o])
        + bias[o] + shift[n, o] + residual         t[o]: see `layout.border_table`

    Args:
        codes: (N, C, H, W) int8, channels_last; C and O are multiples of 16.
        weight: (O, kernel^2, C) int8, contiguous: `layout.conv_weight`.
        act_scale, weight_scale: (G,) and (O,) float32.
        table: int32 (16, O): `layout.border_table`.
        bucket: see the module.
        bias: (O,) float32; `shift`: (N, O) any float, a column slice of a larger matrix or one row
            expanded to N will do; `residual`: (N, O, H', W') any float, channels_last.
        side_codes: up to two (N, C_i, H', W') that pass through 1x1 weights `side_weights`
            (O, C_i), with `side_scales` (S, G), `side_weight_scale` (O,) and `side_table` (S, O)
            made of `layout.row_table`.
        kernel, stride: 1 or 3; 1 or 2.
        border: padding (top, bottom, left, right), each 0 or 1, and 0 for a 1x1 kernel; None: 1 for
            a 3x3 kernel.
        upsample: repeat every pixel 2x2 first; the larger image is never made.
        out_dtype: float16, bfloat16, float32, or int32 for the integer sums alone.
        out_scale: (G,) float32 to get codes of y, with `out_zero` and `out_qmax`, instead.

    Returns:
        (N, O, H', W'), channels_last; H' = (H + top + bottom - kernel) // stride + 1, with 2 H for
        H if `upsample`.

    Raises:
        ValueError: on shapes, types or strides other than these.

    Error: the integer sums are exact; the epilogue is float32 on a GPU and is rounded once to the
        type of the result.
    """
    sides = [kernel // 2] * 4 if border is None else list(border)
    return _qconv2d(
        codes, weight, act_scale, weight_scale, table, bucket, bias, shift, residual,
        list(side_codes), list(side_weights), side_scales, side_weight_scale, side_table,
        kernel, stride, sides, upsample, out_dtype, out_scale, out_zero, out_qmax,
    )  # fmt: skip


def qgemm(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    *,
    bucket: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.bfloat16,
    out_scale: Tensor | None = None,
    out_zero: int = 0,
    out_qmax: int = 255,
) -> Tensor:
    """Multiply rows of codes by an integer weight and rescale.

    y = act(s_a s_w[o] (sum_k q' w - table[o]) + bias[o]) + residual

    Args:
        codes: (M, K) int8, contiguous; K and O are multiples of 16.
        weight: (O, K) int8, contiguous.
        act_scale, weight_scale: (G,) and (O,) float32.
        table: int32 (O,): `layout.row_table`.
        bucket: see the module; row m uses entry m // (M / B).
        bias: (O,) float32; `residual`: (M, O) any float, contiguous.
        activation: "none", "gelu" (by erf), "silu", or "geglu": columns j of the first half times
            gelu of columns O / 2 + j, no residual, O a multiple of 32.
        out_dtype, out_scale, out_zero, out_qmax: as in `qconv2d`.

    Returns:
        (M, O), (M, O / 2) of "geglu".

    Raises:
        ValueError: on shapes, types or strides other than these.

    Error: as `qconv2d`.
    """
    return _qgemm(
        codes, weight, act_scale, weight_scale, table, bucket, bias, residual, activation,
        out_dtype, out_scale, out_zero, out_qmax,
    )  # fmt: skip
