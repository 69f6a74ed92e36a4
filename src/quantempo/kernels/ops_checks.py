"""What the GPU operators accept: one ValueError sentence for anything else.

They look at shapes, types, strides and devices only, never at values: nothing here waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantempo.kernels import layout

__all__ = ["check_convolution", "check_gemm", "check_norm"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INT8 = (torch.int8,)
ACTIVATIONS = ("none", "gelu", "silu", "geglu")


def check_norm(
    x: Tensor,
    skip: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    scale: Tensor | None,
    zero_point: int,
    qmax: int,
    bucket: Tensor,
    raw_scales: Tensor | None,
    raw_zero_points: list[int],
    raw_qmax: int,
    *,
    strides: bool,
) -> None:
    """Check the arguments of gn_act_quant.

    Args:
        strides: check memory layouts and devices too; those of fake tensors are not final.
    """
    _expect(x.ndim == 4, "x", x.shape, "(N, C, H, W)")
    _member("x", x.dtype, _FLOATS)
    count, channels, height, width = x.shape
    if skip is not None:
        channels = channels + (skip.shape[1] if skip.ndim == 4 else 0)
        _shaped("skip", skip, (count, channels - x.shape[1], height, width), (x.dtype,))
    _expect((gamma is None) == (beta is None), "gamma and beta", "one of them", "both or neither")
    if gamma is not None and beta is not None:
        _shaped("gamma", gamma, (channels,), (torch.float32,))
        _shaped("beta", beta, (channels,), (torch.float32,))
        divides = groups > 0 and channels % groups == 0
        _expect(divides, "groups", groups, f"a divisor of the {channels} channels")
    _bucket(bucket, count)
    _table("scale", scale)
    _grid("zero_point", zero_point, qmax)
    if raw_scales is not None:
        rows, parts = raw_scales.shape[0], 1 if skip is None else 2
        fits = raw_scales.ndim == 2 and raw_scales.dtype == torch.float32 and 1 <= rows <= parts
        _expect(fits, "raw_scales", _kind(raw_scales), f"float32 (S, G) with S in 1..{parts}")
        found = len(raw_zero_points)
        _expect(found == rows, "raw_zero_points", f"{found} of them", f"one a row, {rows}")
        for zero in raw_zero_points:
            _grid("raw_zero_points", zero, raw_qmax)
    if strides:
        _last(x.device, x=x, skip=skip)
        _dense(x.device, gamma=gamma, beta=beta, scale=scale, bucket=bucket, raw_scales=raw_scales)


def check_convolution(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    bucket: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    side_codes: list[Tensor],
    side_weights: list[Tensor],
    side_scales: Tensor | None,
    side_weight_scale: Tensor | None,
    side_table: Tensor | None,
    kernel: int,
    stride: int,
    border: list[int],
    upsample: bool,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero: int,
    out_qmax: int,
    *,
    strides: bool,
) -> tuple[int, int, int, int]:
    """Check the arguments of qconv2d and return the shape of its result; see `check_norm`."""
    _expect(codes.ndim == 4, "codes", codes.shape, "(N, C, H, W)")
    _member("codes", codes.dtype, _INT8)
    _member("kernel", kernel, (1, 3))
    _member("stride", stride, (1, 2))
    _expect(stride == 1 or not upsample, "stride", stride, "1 with upsample")
    pads = len(border) == 4 and all(pad in (0, 1) for pad in border)
    _expect(pads, "border", border, "(top, bottom, left, right), each 0 or 1")
    _expect(kernel == 3 or not any(border), "border", border, "zeros for a 1x1 kernel")
    count, channels, height, width = codes.shape
    features = weight.shape[0]
    _sixteen(channels, features)
    _shaped("weight", weight, (features, kernel * kernel, channels), _INT8)
    rows, columns = layout.output_size(height, width, kernel, stride, border, upsample)
    shape = (count, features, rows, columns)
    _expect(rows >= 0 and columns >= 0, "codes", codes.shape, "an image no smaller than the kernel")
    _bucket(bucket, count)
    _scales(act_scale, weight_scale, bias, features)
    _shaped("table", table, (16, features), (torch.int32,))
    _shaped("shift", shift, (count, features), _FLOATS)
    _shaped("residual", residual, shape, _FLOATS)
    _sides(side_codes, side_weights, side_scales, side_weight_scale, side_table, shape)
    _output(out_dtype, out_scale, out_zero, out_qmax)
    if strides:
        device = codes.device
        _last(device, codes=codes, residual=residual)
        for part, side_weight in zip(side_codes, side_weights, strict=True):
            _last(device, side_codes=part)
            _dense(device, side_weights=side_weight)
        _dense(device, weight=weight, act_scale=act_scale, weight_scale=weight_scale, table=table)
        _dense(device, bucket=bucket, bias=bias, out_scale=out_scale)
        if shift is not None:
            _dense(device, shift=shift[:1])
        if side_codes:
            _dense(device, side_scales=side_scales, side_weight_scale=side_weight_scale)
            _dense(device, side_table=side_table)
    return shape


def check_gemm(
    codes: Tensor,
    weight: Tensor,
    act_scale: Tensor,
    weight_scale: Tensor,
    table: Tensor,
    bucket: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    out_scale: Tensor | None,
    out_zero: int,
    out_qmax: int,
    *,
    strides: bool,
) -> tuple[int, int]:
    """Check the arguments of qgemm and return the shape of its result; see `check_norm`."""
    _expect(codes.ndim == 2, "codes", codes.shape, "(M, K)")
    _member("codes", codes.dtype, _INT8)
    _member("activation", activation, ACTIVATIONS)
    count, width = codes.shape
    features = weight.shape[0]
    _sixteen(width, features)
    _shaped("weight", weight, (features, width), _INT8)
    _bucket(bucket, count)
    _scales(act_scale, weight_scale, bias, features)
    _shaped("table", table, (features,), (torch.int32,))
    gated = activation == "geglu"
    if gated:
        _expect(features % 32 == 0, "weight", weight.shape, "a multiple of 32 rows for geglu")
        _expect(residual is None, "residual", "one", "none with geglu")
        _expect(out_dtype != torch.int32, "out_dtype", out_dtype, "a float type with geglu")
        features //= 2
    _shaped("residual", residual, (count, features), _FLOATS)
    _output(out_dtype, out_scale, out_zero, out_qmax)
    if strides:
        device = codes.device
        _dense(device, codes=codes, weight=weight, act_scale=act_scale, weight_scale=weight_scale)
        _dense(device, table=table, bucket=bucket, bias=bias, out_scale=out_scale)
        _dense(device, residual=residual)
    return count, features


def _expect(fine: bool, name: str, got: object, wanted: str) -> None:
    if not fine:
        got = tuple(got) if isinstance(got, (torch.Size, list)) else got
        raise ValueError(f"{name}: got {got}; expected {wanted}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _member(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value}; expected one of {', '.join(map(str, known))}")


def _shaped(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got {_kind(tensor)}; expected {names} {tuple(shape)}")


def _table(name: str, table: Tensor | None) -> None:
    if table is not None and (table.ndim != 1 or table.dtype != torch.float32):
        raise ValueError(f"{name}: got {_kind(table)}; expected float32 (G,), one entry a bucket")


def _bucket(bucket: Tensor, count: int) -> None:
    size = bucket.shape[0] if bucket.ndim else 1
    if bucket.dtype != torch.int64 or bucket.ndim > 1 or size == 0 or count % size != 0:
        wanted = f"int64 () or (B,) where B divides the {count} images or rows"
        raise ValueError(f"bucket: got {_kind(bucket)}; expected {wanted}")


def _sixteen(channels: int, features: int) -> None:
    if channels % 16 != 0 or features % 16 != 0:
        raise ValueError(
            f"got {channels} inputs and {features} outputs; expected multiples of 16, "
            "leave this layer in float"
        )


def _scales(act_scale: Tensor, weight_scale: Tensor, bias: Tensor | None, features: int) -> None:
    _table("act_scale", act_scale)
    _shaped("weight_scale", weight_scale, (features,), (torch.float32,))
    _shaped("bias", bias, (features,), (torch.float32,))


def _sides(
    codes: list[Tensor],
    weights: list[Tensor],
    scales: Tensor | None,
    weight_scale: Tensor | None,
    table: Tensor | None,
    shape: tuple[int, int, int, int],
) -> None:
    count, features, rows, columns = shape
    parts = len(codes)
    _expect(parts <= 2, "side_codes", f"{parts} tensors", "at most 2")
    _expect(len(weights) == parts, "side_weights", f"{len(weights)} tensors", f"{parts}")
    given = [tensor is not None for tensor in (scales, weight_scale, table)]
    wanted = "all three with side_codes, none of them without"
    _expect(given == [parts > 0] * 3, "side_scales, side_weight_scale, side_table", given, wanted)
    if scales is None:
        return
    fits = scales.ndim == 2 and scales.shape[0] == parts and scales.dtype == torch.float32
    _expect(fits, "side_scales", _kind(scales), f"float32 ({parts}, G)")
    _shaped("side_weight_scale", weight_scale, (features,), (torch.float32,))
    _shaped("side_table", table, (parts, features), (torch.int32,))
    for part, weight in zip(codes, weights, strict=True):
        channels = part.shape[1]
        _sixteen(channels, features)
        _shaped("side_codes", part, (count, channels, rows, columns), _INT8)
        _shaped("side_weights", weight, (features, channels), _INT8)


def _output(dtype: torch.dtype, scale: Tensor | None, zero: int, qmax: int) -> None:
    _member("out_dtype", dtype, (*_FLOATS, torch.int32))
    fine = dtype != torch.int32 or scale is None
    _expect(fine, "out_dtype", dtype, "a float type with out_scale")
    _table("out_scale", scale)
    _grid("out_zero", zero, qmax)


def _grid(name: str, zero: int, qmax: int) -> None:
    if not 0 <= zero <= qmax <= 255:
        raise ValueError(f"{name}: got {zero} on a grid to {qmax}; expected 0 <= z <= qmax <= 255")


def _last(device: torch.device, **images: Tensor | None) -> None:
    for name, x in images.items():
        if x is None:
            continue
        if not x.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(
                f"{name}: got strides {x.stride()}; expected channels_last, "
                "use .contiguous(memory_format=torch.channels_last)"
            )
        _placed(name, x, device)


def _dense(device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            continue
        if not x.is_contiguous():
            raise ValueError(f"{name}: got strides {x.stride()}; expected it contiguous")
        _placed(name, x, device)


def _placed(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name}: got one on {x.device}; expected it on {device}")
