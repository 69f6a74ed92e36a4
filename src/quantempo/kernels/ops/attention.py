"""Attention whose scores are sums of int8 products; its definition runs on any device."""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.norm_modulate_quant import SMALLEST_SCALE
from quantempo.kernels.ops.operator import operator

__all__ = [
    "BLOCK", "DIMS", "Attention", "attention8", "coded", "decoded", "exact", "room_for_codes",
    "supported",
]  # fmt: skip

# Keys that have four scales.
BLOCK = 128
# Values of a head, of which a GPU loads 64 or 128.
DIMS = range(40, 129, 8)


@functools.cache
def supported(device: torch.device, dim: int, dtype: torch.dtype) -> bool:
    """Return whether the operator runs on a GPU, for heads of `dim` values: on Hopper only."""
    if device.type != "cuda" or dim not in DIMS or dtype not in (torch.float16, torch.bfloat16):
        return False
    launch = importlib.import_module("quantempo.kernels.gpu.contraction.launch")
    return bool(launch.choose_path(device) == "hopper")


class Attention(NamedTuple):
    """One call of `attention8`."""

    q: Tensor
    k: Tensor
    v: Tensor
    scales: Sequence[Tensor] = ()

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        q, k, v, scales = self
        checks.member("v", v.dtype, checks.FLOATS)
        checks.expect(q.ndim == 4, "q", q.shape, "(B, T, H, D)")
        checks.expect(k.ndim == 4 and k.shape[1] > 0, "k", k.shape, "(B, S, H, D) with S > 0")
        shape = q.shape[0], k.shape[1], *q.shape[2:]
        codes = torch.int8 if scales else v.dtype
        for name, x, dtype in (("q", q, codes), ("k", k, codes), ("v", v, v.dtype)):
            checks.shaped(name, x, q.shape if name == "q" else shape, (dtype,))
            if strides:
                checks.dense(v.device, **{name: x[:1, :1, :1]})
                least = 16 if dtype == torch.int8 else 8
                far = [x.stride(i) % least for i in range(3) if x.shape[i] > 1]
                even = not any(far) and x.storage_offset() % least == 0
                wanted = f"images, tokens and heads that begin at multiples of {least} elements"
                checks.expect(even, name, f"strides {x.stride()} from {x.storage_offset()}", wanted)
        checks.expect(len(scales) in (0, 3), "scales", len(scales), "q_scale, k_scale and over")
        room = room_for_codes(v.new_empty(0, device="meta"), q.shape[1], shape)[2:]
        for x, like in zip(scales, room, strict=False):
            checks.shaped("scales", x, (*like.shape,), (like.dtype,))
            checks.dense(v.device, scales=x)

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.v.new_empty(self.q.shape)

    def exact(self) -> Tensor:
        """Return the result by the formula of `attention8`."""
        codes = (*self[:2], *self.scales) if self.scales else coded(self.q, self.k)
        return _attend(*decoded(*codes), self.v)


def room_for_codes(like: Tensor, queries: int, keys: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return room for q8, k8 and the scales of `attention8`; keys: their shape."""
    b, s, h, d = keys
    rows = [like.new_empty(b, n, h, -(-d // 16) * 16, dtype=torch.int8) for n in (queries, s)]
    sizes = (b, h, queries), (b, h, -(-s // BLOCK), 4)
    scales = [like.new_empty(size, dtype=torch.float32) for size in sizes]
    return *(x[..., :d] for x in rows), *scales, like.new_empty(1, dtype=torch.int32)


def _coded(x: Tensor, shared: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return codes, float64, and scales, float32; shared: axes of values that have one scale."""
    x = x.float()
    # Of float32 torch on a GPU multiplies by 1 / 127 instead.
    scale = (x.abs().amax(shared, keepdim=True).double() / 127).float().clamp(min=SMALLEST_SCALE)
    scale = scale.where(scale.isfinite(), torch.nan)
    # Rounded once, as by a fused multiply-add: ties are frequent in half precision.
    return (x.double() * scale.reciprocal().double()).round().nan_to_num(0), scale


def coded(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Return q8, k8, q_scale, k_scale and over of `attention8`."""
    room = room_for_codes(q, q.shape[1], k.shape)
    blocks = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK // 8, 4, 2))
    (q8, q_scale), (k8, k_scale) = _coded(q, (3,)), _coded(blocks, (2, 4, 6))
    q_scale, k_scale = q_scale[..., 0].transpose(1, 2), k_scale[:, :, 0, :, 0, :, 0]
    found = q8, k8.flatten(1, 4)[:, : k.shape[1]], q_scale, k_scale.permute(0, 3, 1, 2)
    for x, y in zip(room, (*found, torch.zeros(1)), strict=True):
        x.copy_(y)
    return room


def decoded(q8: Tensor, k8: Tensor, q_scale: Tensor, k_scale: Tensor, *_: Any) -> tuple[Any, Any]:
    """Return queries and keys as `attention8` sees them, float64."""
    t = torch.arange(k8.shape[1], device=k8.device)
    four = k_scale[:, :, t // BLOCK, t % 8 // 2]
    return tuple(x * y.double().mT[..., None] for x, y in ((q8, q_scale), (k8, four)))


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `attention8` by its formula in float64; any device, any D."""
    return Attention(q, k, v).exact()


def _attend(q8: Tensor, k8: Tensor, v: Tensor) -> Tensor:
    y = torch.empty(q8.shape, dtype=v.dtype, device=v.device)
    q8 = q8 / math.sqrt(max(q8.shape[3], 1))
    # A head at a time.
    for i in range(len(y)):
        for j in range(y.shape[2]):
            # Some queries at a time: of long sequences the weights alone are tens of gigabytes.
            for rows, asked in zip(y[i, :, j].split(1024), q8[i, :, j].split(1024), strict=True):
                rows.copy_((asked @ k8[i, :, j].T).softmax(1) @ v[i, :, j].double())
    return y


@operator(Tensor, "attention.launch")
def attention8(q: Tensor, k: Tensor, v: Tensor, scales: Sequence[Tensor] = ()) -> Attention:
    """Attend with int8 codes of queries and keys: y = softmax(s_q s_k (q8 . k8) / sqrt(D)) v.

    s_q[t]   = max |q[t, d]| / 127 over d: a scale for each query and head
    s_k[t]   = max |k[u, d]| / 127 over d and the u with u // 128 = t // 128 and
               u % 8 // 2 = t % 8 // 2: one for 32 of a block of 128 keys (fewer at the end)
    q8, k8   = rne(q / s_q), rne(k / s_k), int8; scales are at least 2^-126

    Args:
        q: (B, T, H, D) float; on a GPU float16 or bfloat16, D = 8 i from 40 to 128.
        k, v: (B, S, H, D) of that type; like q contiguous along D, heads, tokens and images at
            multiples of 8 elements (columns of a product, or heads before tokens, say).
        scales: those of q8 (B, H, T) and k8 (B, H, ceil(S / 128), 4), float32, and int32 (1,), zero
            (a GPU notes there that it computes anew), where q and k are int8 codes already, rows of
            16 i bytes: what `join_heads_codes` returns.

    Returns y, contiguous (B, T, H, D) of the type of v; ValueError too on a GPU for which
    `supported` is false.

    Values: a query that is not finite makes its own y NaN, a key that is not finite every y of its
        head. A value that is NaN makes its d NaN for every query of the head, an infinite one makes
        it infinite or NaN.

    Error: a GPU rounds the weights of a softmax to the type of v: 0.3 % of |y| for random values.
        Its weights are relative to the maximum of the first block read; where they exceed the type
        all is computed again, with running maxima.
    """
    return Attention(q, k, v, scales)
