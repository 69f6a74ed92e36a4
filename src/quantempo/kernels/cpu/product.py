"""Int8 convolution and linear: what oneDNN computes, bit for bit, without its fixed cost.

    y = scale * weight_scale[o] * (sum_k q_a q_w - z * sum_k q_w) + bias[o] + add + edge

oneDNN describes, looks up and checks a primitive at every call, 40 to 55 us; here one call of C
with an address for each tensor is made. Weights of 4 bits are unpacked at every call into one
buffer a thread.
"""

import ctypes
import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.cpu import fused
from quantempo.kernels.cpu.packed import BLOCK, Packed

__all__ = ["Product"]

# Products about 5 microseconds long.
_PARALLEL_FROM = 1 << 21


class _Layer(ctypes.Structure):
    _fields_ = fused.fields("void_p places scale; int64 size pixels taps inputs outs")


class Product:
    """weight: int8 (O, K) or (O, C, kh, kw), or `Packed`; weight_scale float32 (O,)."""

    def __init__(
        self, weight: Tensor | Packed, weight_scale: Tensor, kernel: tuple[int, ...] = (1, 1),
        stride: tuple[int, ...] = (1, 1), padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
    ) -> None:  # fmt: skip
        self.weight, self.scale = weight, weight_scale.float().contiguous()
        self.how, self.taps, self.outs = (
            (kernel, stride, padding, dilation),
            math.prod(kernel),
            len(self.scale),
        )
        codes = weight if isinstance(weight, Tensor) else weight.dense()
        self.inputs, self.sums = codes.shape[1], codes.flatten(1).sum(1)
        if isinstance(weight, Tensor):
            self.weight = _ordered(weight.reshape(self.outs, self.inputs, self.taps))
        # With the size it is for, exchanged together: other threads may have other sizes.
        self._sized: tuple[Any, ...] = (None,)

    def __call__(
        self, x: Tensor, scale: float, zero_point: int, bias: Tensor | None,
        dtype: torch.dtype = torch.float32, *, add: Tensor | None = None,
        into: Tensor | None = None, edge: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return y like `add`, float32 or bfloat16; or add it to `into`, in place.

        x: uint8 (R, K), or (B, C, H, W), padded by the zero point; bias float32 (O,); edge: see
        `Library.add`. Of images each sum is rounded to dtype, of rows the last one.
        """
        library = fused.load()
        assert library is not None
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        if self._sized[0] != x.shape[2:]:
            self._sized = self._plan(x.shape[2:])
        _, layer, size, _ = self._sized
        x = x.contiguous(memory_format=layout)
        other = add if into is None else into
        shape = (len(x), self.outs, *size)
        y = torch.empty(shape, dtype=dtype, memory_format=layout) if into is None else into
        for tensor in (y,) if other is None else (y, other):
            if tensor.shape != shape or tensor.dtype != dtype or x.shape[1] != self.inputs:
                raise ValueError(f"got {tensor.dtype} {tuple(tensor.shape)} for {dtype} {shape}")
            if not tensor.is_contiguous(memory_format=layout):
                raise ValueError(f"got strides {tensor.stride()}; expected a dense tensor")
        start = outside = None
        if zero_point:
            start = (self.sums * -zero_point).to(torch.int32)
            outside = torch.full((self.inputs,), zero_point, dtype=torch.uint8)
        address = (
            self.weight.data_ptr() if isinstance(self.weight, Tensor) else self.weight.unpacked()
        )
        work = y.numel() * self.taps * self.inputs
        library.product(
            ctypes.byref(layer), x.data_ptr(), address, len(x),
            *(None if tensor is None else tensor.data_ptr() for tensor in (outside, start)),
            fused.floats("bias", bias, (self.outs,)), fused.floats("edge", edge, (16, self.outs)),
            None if other is None else other.data_ptr(), y.data_ptr(), scale,
            dtype == torch.bfloat16, torch.get_num_threads() if work > _PARALLEL_FROM else 1,
        )  # fmt: skip
        return y

    def _plan(self, size: torch.Size) -> tuple[Any, ...]:
        """Return the size, C's record for it, the size of the output, and what must stay alive."""
        table, after = _places(tuple(size), *self.how) if size else (None, ())
        numbers = math.prod(size), math.prod(after), self.taps, self.inputs, self.outs
        layer = _Layer(None if table is None else table.data_ptr(), self.scale.data_ptr(), *numbers)
        return size, layer, after, table


def _ordered(codes: Tensor) -> Tensor:
    """Return int8 (O / 64, P, C / 4, 64, 4) of codes (O, C, P), zeros where there are none."""
    padded = F.pad(codes, (0, 0, 0, -codes.shape[1] % 4, 0, -len(codes) % BLOCK))
    blocks = padded.unflatten(1, (-1, 4)).unflatten(0, (-1, BLOCK))
    return blocks.permute(0, 4, 2, 1, 3).contiguous()


@functools.lru_cache(64)
def _places(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...],
) -> tuple[Tensor, tuple[int, ...]]:  # fmt: skip
    """Return `layer_t.places` of a convolution, int32 (P + 2, H' W'), and (H', W')."""
    how = zip(size, kernel, stride, padding, dilation, strict=True)
    # Rows and columns that each tap reads, (kernel, output).
    read = [
        torch.arange(k)[:, None] * d - p + torch.arange((n + 2 * p - d * (k - 1) - 1) // s + 1) * s
        for n, k, s, p, d in how
    ]
    rows, columns = read[0][:, None, :, None], read[1][None, :, None, :]
    outside = (rows < 0) | (rows >= size[0]) | (columns < 0) | (columns >= size[1])
    places = (rows * size[1] + columns).masked_fill(outside, -1).flatten(2).flatten(0, 1)
    after = (read[0].shape[1], read[1].shape[1])
    i, j = (torch.arange(n) for n in after)
    edges = [(at == 0) + 2 * (at == n - 1) for at, n in zip((i, j), after, strict=True)]
    mask = (edges[0][:, None] + 4 * edges[1]).flatten()
    # Pixels that lack the same taps lie together: what lies outside is left out.
    order = ((places < 0) * 2.0 ** torch.arange(len(places))[:, None]).sum(0).argsort(stable=True)
    table = torch.cat([places[:, order], order[None], mask[order][None]])
    return table.to(torch.int32).contiguous(), after
