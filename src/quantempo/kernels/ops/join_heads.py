"""Queries, keys and values of one or two streams as one sequence, normalised and rotated."""

from typing import NamedTuple

import torch
from torch import Tensor

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.operator import operator

__all__ = ["Heads", "join_heads"]


class Heads(NamedTuple):
    """Write queries, keys and values of all streams where attention reads them, in one pass.

    n = round(x / sqrt(mean_d(x^2) + eps) weight[d]) of q and k, x where eps < 0; even d:
    y[d] = round(n[d] cos[t, d] - n[d + 1] sin[t, d])
    y[d + 1] = round(n[d + 1] cos[t, d + 1] + n[d] sin[t, d + 1]), n without rotary; v is copied

    Args:
        q, k, v: one or two streams (B, T_i, H D) of one float type: products, or columns of one.
            No v: the caller reads it where it is.
        weights, eps: for q and k of the first stream, then of the second; (D,) any float or None.
        rotary: cos and sin (T, D) float32, T = sum of T_i in the order of the streams, or nothing.
        heads: H; loads are of 16 bytes, and a head lies in one warp, for D = 8 i up to 256.
    Returns q, k and v, contiguous (B, T, H, D) of the type of q; v (0,) without one.
    Error: a GPU is within 2^-20 of what it rounds, so n may be its neighbour, and y as far off as
    neighbours n make it, and a rounding. A head whose squares exceed float32 is NaN there.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    weights: list[Tensor | None]
    eps: list[float]
    rotary: list[Tensor]
    heads: int

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        lengths, n = tuple(map(len, self[:6])), len(self.q)
        known = [(n, n, values, 2 * n, 2 * n, tables) for values in (0, n) for tables in (0, 2)]
        wanted = "n, n, n or 0, 2 n, 2 n, 2 or 0 where n is 1 or 2"
        checks.expect(n in (1, 2) and lengths in known, ", ".join(self._fields), lengths, wanted)
        like, heads = self.q[0], self.heads * (2 if self.rotary else 1)
        checks.member("q", like.dtype, checks.FLOATS)
        checks.expect(like.ndim == 3, "q", like.shape, "(B, T, H D)")
        count, _, width = like.shape
        fits, wanted = 0 < heads <= width, f"H of H D = {width}, D even with rotary"
        checks.expect(fits and width % heads == 0, "heads", self.heads, wanted)
        for name, parts in zip("qkv", self[:3], strict=True):
            for x, first in zip(parts, self.q, strict=False):
                checks.shaped(name, x, (count, *first.shape[1:2], width), (like.dtype,))
                if strides:
                    checks.dense(like.device, **{name: x[:1, :1]})
                    even = count == 1 or x.stride(0) == max(x.shape[1], 1) * x.stride(1)
                    wanted = "rows of one product, a multiple of 8 apart"
                    checks.expect(even and x.stride(1) % 8 == 0, name, [*x.stride()], wanted)
        tokens, dim = sum(x.shape[1] for x in self.q), width // self.heads
        for weight in self.weights:
            checks.shaped("weights", weight, (dim,), checks.FLOATS)
        for table in self.rotary:
            checks.shaped("rotary", table, (tokens, dim), (torch.float32,))
        for given in (*self.weights, *self.rotary) if strides else ():
            checks.dense(like.device, **{"weights or rotary": given})

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return room for the results."""
        count, _, width = self.q[0].shape
        shape = count, sum(x.shape[1] for x in self.q), self.heads, width // self.heads
        q, k, v = (self.q[0].new_empty(shape if x else 0) for x in (self.q, self.k, self.v))
        return q, k, v

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results by the formula of `join_heads`."""
        results = self.empty()
        for which, (y, parts) in enumerate(zip(results[:2], (self.q, self.k), strict=True)):
            every = [x.unflatten(2, y.shape[2:]).double() for x in parts]
            for i, x in enumerate(every):
                weight, eps = self.weights[2 * i + which], self.eps[2 * i + which]
                if eps >= 0:
                    n = x / torch.sqrt(x.square().mean(3, keepdim=True) + eps)
                    every[i] = (n if weight is None else n * weight.double()).to(y.dtype).double()
            x = torch.cat(every, 1)
            if self.rotary:
                cos, sin = (table.double()[:, None] for table in self.rotary)
                x = x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], 4).flatten(3) * sin
            y.copy_(x)
        if self.v:
            results[2].copy_(torch.cat(self.v, 1).view(results[2].shape))
        return results


join_heads = operator(tuple[Tensor, Tensor, Tensor], "join_heads")(Heads)
