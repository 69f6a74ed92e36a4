"""Attention whose scores are sums of int8 products; its definition runs on any device."""

import functools
import importlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.norm_modulate_quant import SMALLEST_SCALE
from quantempo.kernels.ops.operator import operator

__all__ = ["BLOCK", "DIMS", "Attention", "attention8", "decoded_keys", "exact", "supported"]

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

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        q, k = self.q, self.k
        checks.member("q", q.dtype, checks.FLOATS)
        checks.expect(q.ndim == 4, "q", q.shape, "(B, T, H, D)")
        checks.expect(k.ndim == 4 and k.shape[1] > 0, "k", k.shape, "(B, S, H, D) with S > 0")
        for name, x in zip("kv", self[1:], strict=True):
            checks.shaped(name, x, (q.shape[0], k.shape[1], *q.shape[2:]), (q.dtype,))
        for name, x in self._asdict().items() if strides else ():
            checks.dense(q.device, **{name: x[:1, :1, :1]})
            far = [x.stride(i) % 8 for i in range(3) if x.shape[i] > 1]
            even = not any(far) and x.storage_offset() % 8 == 0
            wanted = "images, tokens and heads that begin at multiples of 8 elements"
            checks.expect(even, name, f"strides {x.stride()} from {x.storage_offset()}", wanted)

    def empty(self) -> Tensor:
        """Return room for the result."""
        return self.q.new_empty(self.q.shape)

    def exact(self) -> Tensor:
        """Return the result by the formula of `attention8`."""
        return exact(*self)


def _decoded(x: Tensor, shared: tuple[int, ...]) -> Tensor:
    """Return codes times scales, float64; shared: axes of the values that have one scale."""
    x = x.float()
    # Of float32 torch on a GPU multiplies by 1 / 127 instead.
    scale = (x.abs().amax(shared, keepdim=True).double() / 127).float().clamp(min=SMALLEST_SCALE)
    scale = scale.where(scale.isfinite(), torch.nan)
    # Rounded once, as by a fused multiply-add: ties are frequent in half precision.
    return (x.double() * scale.reciprocal().double()).round() * scale.double()


def decoded_keys(k: Tensor) -> Tensor:
    """Return the keys (B, S, H, D) as `attention8` sees them, float64."""
    blocks = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK // 8, 4, 2))
    return _decoded(blocks, (2, 4, 6)).flatten(1, 4)[:, : k.shape[1]]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `attention8` by its formula in float64, a head at a time; any device, any D."""
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q8, k8 = _decoded(q, (3,)) / math.sqrt(max(q.shape[3], 1)), decoded_keys(k)
    for i in range(q.shape[0]):
        for j in range(q.shape[2]):
            # Some queries at a time: of long sequences the weights alone are tens of gigabytes.
            for rows, asked in zip(y[i, :, j].split(1024), q8[i, :, j].split(1024), strict=True):
                rows.copy_((asked @ k8[i, :, j].T).softmax(1) @ v[i, :, j].double())
    return y


@operator(Tensor, "attention.launch")
def attention8(q: Tensor, k: Tensor, v: Tensor) -> Attention:
    """Attend with int8 codes of queries and keys: y = softmax(s_q s_k (q8 . k8) / sqrt(D)) v.

    s_q[t]   = max |q[t, d]| / 127 over d: a scale for each query and head
    s_k[t]   = max |k[u, d]| / 127 over d and the u with u // 128 = t // 128 and
               u % 8 // 2 = t % 8 // 2: one for 32 of a block of 128 keys (fewer at the end)
    q8, k8   = rne(q / s_q), rne(k / s_k), int8; scales are at least 2^-126

    Args:
        q: (B, T, H, D) float; on a GPU float16 or bfloat16, D = 8 i from 40 to 128.
        k, v: (B, S, H, D) of that type; like q contiguous along D, heads, tokens and images at
            multiples of 8 elements (columns of a product, or heads before tokens, say).
    Returns y, contiguous (B, T, H, D) of the type of q; ValueError too on a GPU for which
    `supported` is false.
    Values: a query that is not finite makes its own y NaN, a key that is not finite every y of its
        head. A value that is NaN makes its d NaN for every query of the head, an infinite one makes
        it infinite or NaN.
    Error: a GPU rounds the weights of a softmax to the type of v: 0.3 % of |y| for random values.
        Its weights are relative to the maximum of the first block read; where they exceed the type
        all is computed again, with running maxima.
    """
    return Attention(q, k, v)
