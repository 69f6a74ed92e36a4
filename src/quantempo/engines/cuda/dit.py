"""Blocks of DiT, PixArt, Latte, Sana and Wan as few launches on a GPU, around int8 products.

Keys and values of a context are one product for all blocks, modulations of DiT are another.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import Prepared, last
from quantempo.engines.cuda.constants import FLOATS, constants_of
from quantempo.engines.cuda.joint import SharedModulations, Stream, add, attended, encode, modulated
from quantempo.engines.cuda.transformer import SharedContext
from quantempo.engines.cuda.unet import BLOCKS, GpuBlock
from quantempo.engines.fusion import Network
from quantempo.engines.per_forward import PerForward
from quantempo.kernels import ops
from quantempo.models.fusion_dit import ModulatedBlockParts, SanaBlockParts, WanBlockParts
from quantempo.models.fusion_transformer import TokenAttentionParts

__all__ = ["FusedModulatedBlock", "FusedSanaBlock"]


class _Cross(Prepared):
    """Attention of the tokens on a context."""

    def __init__(self, parts: TokenAttentionParts, contexts: SharedContext) -> None:
        self.parts, self.contexts = parts, contexts
        self.index = contexts.attentions.index(parts)

    def _prepare(self, device: torch.device) -> None:
        self.q, self.out = (constants_of(p, device) for p in (self.parts.q, self.parts.out))

    def heads(self, x: Tensor, context: Tensor) -> list[Tensor]:
        """Return q, k and v (B, T, heads, dim) of x (B, T, C) and its context."""
        parts, q = self.parts, self.q
        y = q.gemm(dtype=x.dtype, bias=q.bias, **encode(x, q, parts.norm))
        every = (y.view(*x.shape[:2], -1), *self.contexts(self.index, context, x.dtype))
        heads = [part.unflatten(2, (parts.heads, -1)) for part in every]
        return [_normed(heads[0], parts.norm_q), _normed(heads[1], parts.norm_k), heads[2]]


def _normed(x: Tensor, norm: Any) -> Tensor:
    """Return x (B, T, heads, dim) by an RMSNorm of all heads together, or None."""
    if norm is None:
        return x
    weight = None if norm.weight is None else norm.weight.to(x.dtype)
    whole = x.flatten(2)
    return F.rms_norm(whole, whole.shape[2:], weight, norm.eps).view(x.shape)


class _Embedding(Prepared, PerForward):
    """Modulations of blocks with equal embeddings of time and class, which is computed once."""

    def __init__(self, network: Network) -> None:
        norms = [parts.module.norm1 for parts in network.of(ModulatedBlockParts)]
        self.emb = norms[-1].emb
        layers = [norm.linear for norm in norms if _same(norm.emb, self.emb)]
        self.shared = SharedModulations(layers)
        super().__init__(len(self.shared.layers))

    def make(self, timestep: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, E)."""
        y: Tensor = self.emb(timestep, labels, hidden_dtype=dtype)
        return y


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules compute the same (synchronises)."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return str(one) == str(other) and all(torch.equal(*pair) for pair in pairs)


@BLOCKS.build(WanBlockParts)
@BLOCKS.build(ModulatedBlockParts)
class FusedModulatedBlock(GpuBlock):
    """Attention of the tokens, attention on the context where there is one, feed-forward layer."""

    def __init__(self, parts: ModulatedBlockParts, network: Network) -> None:
        super().__init__(parts, network)
        contexts = network.once(SharedContext.of)
        (self.stream,) = map(Stream, parts.streams)
        self.attentions = [_Cross(attention, contexts) for attention in parts.attentions]
        zero = not hasattr(parts.module, "scale_shift_table")
        self.time = network.once(_Embedding) if zero else None
        self.index = self.time.shared.index(parts.module.norm1.linear) if self.time else None

    def takes(self, x: Tensor, context: Any, mask: Any, rotary: Any, *time: Any) -> bool:
        """Return whether `run` can be given these."""
        known = x.dtype in FLOATS and x.ndim == 3 and self.parts.modulates(x, *time)
        known = known and isinstance(rotary, tuple | None)
        if not known or any(y.shape[:3] != (1, x.shape[1], 1) for y in rotary or ()):
            return False
        if not self.attentions:
            return True
        if not isinstance(context, Tensor) or context.ndim != 3 or len(context) != len(x):
            return False
        # The bias that models make of a mask.
        like = context[:, None, :, 0]
        bias = isinstance(mask, Tensor) and mask.shape == like.shape and mask.dtype == x.dtype
        return mask is None or bias

    def run(self, x: Tensor, context: Any, mask: Any, rotary: Any, *time: Any) -> Tensor:
        """Return (B, T, C); mask (B, 1, S) is added to the logits of the context."""
        self.here(x.device)
        x, stream, attend = x.contiguous(), self.stream, self.parts.attend
        given = self._modulation(x, *time).expand(len(x), -1).split(x.shape[2], 1)
        q, k, v = stream.before(x, given)
        heads = stream.parts.attentions[0]
        q, k = _normed(q, heads.norm_q), _normed(k, heads.norm_k)
        if rotary is not None:
            tables = [table[0, :, 0].float().contiguous() for table in rotary]
            pair, none = ([q.flatten(2)], [k.flatten(2)]), [None, None]
            q, k, _ = ops.join_heads(*pair, [], none, [-1.0, -1.0], tables, heads.heads)
        y = attended(heads, q, k, v, lambda *own: attend(*own, cross=False, mask=None))
        x = stream.add(x, [y.flatten(2)], given)
        for cross in self.attentions:
            y = attend(*cross.heads(x, context), cross=True, mask=mask).flatten(2)
            x = add(cross.out, [encode(y, cross.out)], None, x)
        return self._feed(x, given, *time)

    def _feed(self, x: Tensor, given: Any, timestep: Tensor, rest: Any) -> Tensor:
        return self.stream.feed(x, given)

    def _modulation(self, x: Tensor, timestep: Tensor, rest: Any) -> Tensor:
        # (B, 6 C), or (1, 6 C) where images have it in common; rest: their classes, if any.
        module, index = self.parts.module, self.index
        if self.time is None:
            return module.scale_shift_table.flatten().float() + timestep.reshape(len(x), -1)
        norm = module.norm1
        if index is not None:
            return self.time.shared(index, self.time.read(index, timestep, rest, rest, x.dtype))
        return modulated(norm.linear, norm.emb(timestep, rest, hidden_dtype=x.dtype))


@BLOCKS.build(SanaBlockParts)
class FusedSanaBlock(FusedModulatedBlock):
    """The same, whose feed-forward layer runs diffusers' convolution between its two products."""

    def _prepare(self, device: torch.device) -> None:
        layers = (self.parts.up, self.parts.down)
        self.up, self.down = (constants_of(layer, device).pixelwise() for layer in layers)

    def _feed(self, x: Tensor, given: Any, timestep: Tensor, rest: Any) -> Tensor:
        # `rest` is height and width of the image.
        (shift, scale, gate), up, down = given[3:6], self.up, self.down
        codes = encode(x, up, self.stream.parts.norm2, shift=shift, scale=scale)
        y = up.gemm(dtype=x.dtype, bias=up.bias, activation="silu", **codes)
        y = y.view(len(x), *rest, -1).permute(0, 3, 1, 2)
        value, other = last(self.parts.module.ff.conv_depth(y)).chunk(2, 1)
        y = (value * F.silu(other)).permute(0, 2, 3, 1).flatten(1, 2)
        return add(down, [encode(y, down)], gate, x)
