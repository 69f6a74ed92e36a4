"""The two products inside attention on 8-bit integers.

    k' = k - mean over tokens of k          (adds a constant to a row of scores: softmax ignores it)
    scores = s_q s_k sum_c q8 k8            q8, k8 in [-127, 127], a scale for each sample and head
    p = exp(scores + mask - row maximum)    p8 = round(255 p)
    y = s_v[c] sum_j p8 v8 / sum_j p8       v8 in [-127, 127], a scale for each channel

Scales are taken from the tensors themselves at every call. The weights p8 are those of the row
before it is divided by its sum: their largest is always 255, however many tokens share the row, and
divided by the sum of the codes they add up to one.

Source: SageAttention (Zhang et al. 2024) for the mean of k and the division at the end; one scale
for a head instead of a block of tokens, v by channel, are choices for kernels of plain int8.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.errors import QuantempoError
from quantempo.models.attention import ProductsProcessor, attention_blocks, set_products

__all__ = [
    "INT8_ATTENTION",
    "Int8Attention",
    "install_int8_attention",
    "int8_attention",
    "int8_attention_blocks",
    "restore_int8_attention",
]

log = logging.getLogger("quantempo")

# How an engine says that it can.
INT8_ATTENTION = "8-bit attention"

# Integers up to here, and sums of them, are exact in float32.
_EXACT = 2**24
_TINY = torch.finfo(torch.float32).tiny


@dataclass
class Int8Attention:
    """Say which attention blocks run in integers.

    names: those that do; left: name -> reason of those that stay in floating point; cosines:
    name -> the smallest cosine between integer and float output of a sample that was seen.
    """

    names: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


def int8_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(d) + mask) v with both products of integers; float32.

    The products are float matmuls of integers whose sums are exact, on any device: below 2^24 in
    float32 (TF32 holds the factors, its sums are float32), cut in runs of tokens where they might
    not be; a head wider than 1040 takes float64.

    Args:
        q: (B, H, L, d) floating. k, v: (B, H, S, d).
        mask: added to the scores, broadcasts to (B, H, L, S); None for none.

    Error: of a score at most d (s_q |k'| + s_k |q| + s_q s_k / 2) / 2 in the largest entries, which
    the exponential turns into a factor; of a weight half a code; of v half a code.
    """
    q8, s_q = _codes(q.float() / math.sqrt(q.shape[-1]), (-2, -1))
    k8, s_k = _codes(k.float() - k.float().mean(-2, keepdim=True), (-2, -1))
    v8, s_v = _codes(v.float(), (-2,))
    wide = torch.float32 if q.shape[-1] * 127 * 127 < _EXACT else torch.float64
    scores = (q8.to(wide) @ k8.to(wide).transpose(-2, -1)).float() * (s_q * s_k)
    if mask is not None:
        scores = scores + mask
    scores = scores - scores.amax(-1, keepdim=True)
    p8 = scores.exp_().mul_(255).round_()
    total = p8.sum(-1, keepdim=True, dtype=torch.float64)
    return (_weighted_sums(p8, v8) / total).float() * s_v


def _codes(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (codes as float32, scale), one scale for all of `dims`."""
    scale = (x.abs().amax(dims, keepdim=True) / 127).clamp_min(_TINY)
    return torch.round(x / scale), scale


def _weighted_sums(p8: Tensor, v8: Tensor) -> Tensor:
    """Return sum_j p8 v8, float64, exact: runs of tokens whose sums stay below 2^24."""
    run = (_EXACT - 1) // (255 * 127)
    parts = zip(p8.split(run, -1), v8.split(run, -2), strict=True)
    sums = [(p @ v).double() for p, v in parts]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def int8_attention_blocks(denoiser: nn.Module) -> list[str]:
    """Return the names of the blocks whose products are integers."""
    return [name for name, block in attention_blocks(denoiser) if _products(block) is _PRODUCTS]


def restore_int8_attention(denoiser: nn.Module, names: Iterable[str]) -> None:
    """Make the products of the named blocks integers (loading); attach an engine afterwards.

    Raises:
        QuantempoError: a name that is no plain attention block of this model.
    """
    blocks = dict(attention_blocks(denoiser))
    for name in names:
        if name not in blocks:
            raise QuantempoError(
                f"the checkpoint names an attention block '{name}' that this model does not have, "
                "or that runs another processor; it belongs to another model"
            )
        set_products(blocks[name], _PRODUCTS)


@torch.no_grad()
def install_int8_attention(
    denoiser: nn.Module, calls: Iterable[Callable[[], Any]], min_cosine: float = 0.999
) -> Int8Attention:
    """Make the products inside attention integers wherever that changes little; say where.

    Every call is run once with the float products; each block computes both and compares them. A
    block stays in floating point, logged and listed, if the cosine between both outputs of some
    sample is below `min_cosine`, if a value is not finite, or if no call reached it.

    Args:
        denoiser: float, or quantized with no engine attached that fuses its blocks.
        calls: each runs the denoiser on calibration inputs.
        min_cosine: in [0, 1].

    Raises:
        QuantempoError: a block is fused, and would go on without looking at its products.
    """
    blocks, watched = dict(attention_blocks(denoiser)), {}
    for name, block in blocks.items():
        if "forward" in block.__dict__:
            raise QuantempoError(f"attention block '{name}' is fused; detach the engine first")
        watched[name] = _Watch()
        set_products(block, watched[name])
    try:
        for call in calls:
            call()
    finally:
        for block in blocks.values():
            set_products(block, None)
    result = Int8Attention()
    for name, watch in watched.items():
        reason = watch.refusal(min_cosine)
        result.cosines |= {name: watch.cosine} if watch.seen else {}
        if reason is None:
            result.names.append(name)
            set_products(blocks[name], _PRODUCTS)
        else:
            result.left[name] = reason
            log.warning("attention of %s stays in floating point: %s", name, reason)
    log.info("attention: %d blocks in 8 bits, %d left", len(result.names), len(result.left))
    return result


class _Int8Products:
    """`int8_attention` as something that survives a deep copy as itself."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return int8_attention(q, k, v, mask)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Int8Products:
        return self


_PRODUCTS = _Int8Products()


class _Watch:
    """Compute both products, pass on the float one, remember the worst cosine."""

    def __init__(self) -> None:
        self.cosine, self.finite, self.seen = 1.0, True, False

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        ours = int8_attention(q, k, v, mask)
        pair = exact.double().flatten(1), ours.double().flatten(1)
        self.finite &= all(bool(y.isfinite().all()) for y in pair)
        self.cosine = min(self.cosine, float(F.cosine_similarity(*pair, dim=1).min()))
        self.seen = True
        return exact

    def refusal(self, min_cosine: float) -> str | None:
        if not self.seen:
            return "no calibration call reached it"
        if not self.finite:
            return "a value in it is not finite"
        # Written so that NaN is refused as well.
        if not self.cosine >= min_cosine:
            return f"the cosine to its float output is {self.cosine:.5f}, below {min_cosine:g}"
        return None


def _products(block: Any) -> Any:
    processor = block.processor
    return processor.products if isinstance(processor, ProductsProcessor) else None
