"""Checks of arguments: one ValueError sentence for anything that was not expected.

They look at shapes, types, strides and devices only, never at values: nothing here waits for a GPU.
"""

import math

import torch
from torch import Tensor

from quantempo.kernels.layout import groups_of, packed_width

__all__ = [
    "FLOATS", "INT8", "apart", "bucket", "dense", "expect", "grid", "kind", "last", "member",
    "shaped", "sixteen", "table", "weighted",
]  # fmt: skip

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INT8 = (torch.int8,)


def expect(fine: bool, name: str, got: object, wanted: str) -> None:
    """Raise unless `fine`."""
    if not fine:
        got = tuple(got) if isinstance(got, (torch.Size, list)) else got
        raise ValueError(f"{name}: got {got}; expected {wanted}")


def kind(tensor: Tensor) -> str:
    """Return type and shape as text."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def member(name: str, value: object, known: tuple[object, ...]) -> None:
    """Expect one of `known`."""
    if value not in known:
        raise ValueError(f"{name}: got {value}; expected one of {', '.join(map(str, known))}")


def shaped(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Expect no tensor, or one of a shape and of one of `dtypes`."""
    if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: got {kind(tensor)}; expected {names} {tuple(shape)}")


def weighted(
    name: str, weight: Tensor, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...] = INT8
) -> None:
    """Expect an int8 weight (O, [P,] C), or one of `layout.pack`; or a plain one of `kinds`."""
    size = math.prod(shape[1:-1]), shape[-1]
    if weight.dtype == torch.uint8 and weight.ndim == 2 and kinds is INT8:
        groups = 4 if groups_of(weight, *size) == 4 else 2
        shaped(name, weight, (shape[0], packed_width(*size, groups)), (torch.uint8,))
    else:
        shaped(name, weight, shape, kinds)


def table(name: str, tensor: Tensor | None) -> None:
    """Expect no tensor, or float32 (G,)."""
    if tensor is not None and (tensor.ndim != 1 or tensor.dtype != torch.float32):
        raise ValueError(f"{name}: got {kind(tensor)}; expected float32 (G,), one entry a bucket")


def bucket(tensor: Tensor, count: int) -> None:
    """Expect int64 () or (B,) where B divides the number of images or rows."""
    size = tensor.shape[0] if tensor.ndim else 1
    if tensor.dtype != torch.int64 or tensor.ndim > 1 or size == 0 or count % size != 0:
        wanted = f"int64 () or (B,) where B divides the {count} images or rows"
        raise ValueError(f"bucket: got {kind(tensor)}; expected {wanted}")


def sixteen(channels: int, features: int) -> None:
    """Expect multiples of 16: the least that a tensor-core copy moves."""
    if channels % 16 != 0 or features % 16 != 0:
        text = f"got {channels} inputs and {features} outputs"
        raise ValueError(f"{text}; expected multiples of 16, leave this layer in float")


def grid(name: str, zero: int, qmax: int) -> None:
    """Expect 0 <= zero <= qmax <= 255."""
    if not 0 <= zero <= qmax <= 255:
        raise ValueError(f"{name}: got {zero} on a grid to {qmax}; expected 0 <= z <= qmax <= 255")


def last(device: torch.device, **images: Tensor | None) -> None:
    """Expect channels_last memory on a device."""
    wanted = "channels_last, use .contiguous(memory_format=torch.channels_last)"
    _placed(device, images, torch.channels_last, wanted)


def dense(device: torch.device, **tensors: Tensor | None) -> None:
    """Expect contiguous memory on a device."""
    _placed(device, tensors, torch.contiguous_format, "it contiguous")


def apart(device: torch.device, name: str, matrix: Tensor) -> None:
    """Expect contiguous rows on a device, a multiple of 16 bytes apart; packed ones: not apart."""
    packed = matrix.dtype == torch.uint8
    dense(device, **{name: matrix if packed else matrix[:1]})
    wanted = "rows a multiple of 16 apart"
    expect(packed or matrix.stride(0) % 16 == 0, name, f"strides {matrix.stride()}", wanted)


def _placed(
    device: torch.device, given: dict[str, Tensor | None], memory: torch.memory_format, wanted: str
) -> None:
    for name, x in given.items():
        if x is not None and not x.is_contiguous(memory_format=memory):
            raise ValueError(f"{name}: got strides {x.stride()}; expected {wanted}")
        if x is not None and x.device != device:
            raise ValueError(f"{name}: got one on {x.device}; expected it on {device}")
