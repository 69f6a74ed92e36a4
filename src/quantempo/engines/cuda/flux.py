"""Blocks of FLUX as few launches on a GPU, around int8 products.

The modulations of all blocks are one product a forward. Text and image are one sequence from the
first attention on; between single blocks they stay one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import Prepared
from quantempo.engines.cuda.constants import (
    FLOATS,
    ActivationGrid,
    LayerConstants,
    constant,
    constants_of,
)
from quantempo.engines.cuda.per_forward import SharedShifts
from quantempo.engines.cuda.unet import BLOCKS, GpuBlock
from quantempo.engines.fusion import Network
from quantempo.kernels import ops
from quantempo.models.fusion_flux import (
    FluxDoubleParts,
    FluxSingleParts,
    ProjectionParts,
    StreamParts,
)

__all__ = ["FusedFluxDouble", "FusedFluxSingle", "SharedModulations"]


class SharedModulations(SharedShifts):
    """Shifts, scales and gates of all blocks."""

    @classmethod
    def of(cls, network: Network) -> SharedModulations:
        """Return those of all blocks that read a float layer."""
        layers = [s.modulation for parts in network.of(FluxDoubleParts) for s in parts.streams]
        layers += [parts.modulation for parts in network.of(FluxSingleParts)]
        return cls([i for i in layers if isinstance(i, nn.Linear) and i.bias is not None])


class _Modulation:
    """Shift, scale, gate, ... of one layer."""

    def __init__(self, layer: nn.Module, network: Network) -> None:
        self.layer, self.shared = layer, network.once(SharedModulations.of)
        self.index = self.shared.index(layer)

    def __call__(self, temb: Tensor, batch: int, parts: int) -> tuple[Tensor, ...]:
        """Return `parts` tensors (B, C), rows not contiguous."""
        index = self.index
        y = self.layer(F.silu(temb)) if index is None else self.shared(index, temb)
        return y.expand(batch, -1).chunk(parts, 1)


class _Norm:
    """norm(x) (1 + scale) + shift as codes."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.how = {"norm": "layer", "eps": norm.eps} | {
            name: None if value is None else constant(value)
            for name, value in (("weight", norm.weight), ("bias", norm.bias))
        }

    def __call__(self, x: Tensor, shift: Tensor, scale: Tensor, grid: ActivationGrid) -> Tensor:
        """Return (B T, C) int8 of x (B, T, C)."""
        return _codes(x, grid, shift=shift, scale=scale, **self.how)


def _codes(x: Tensor, grid: ActivationGrid, norm: str = "none", **how: Any) -> Tensor:
    """Return (B T, C) int8 of x (B, T, C), images and tokens of which may lie apart."""
    how |= {"act_scale": grid.scale, "zero_point": grid.zero_point, "qmax": grid.qmax}
    return ops.norm_modulate_quant(x, bucket=grid.clock.bucket, norm=norm, **how)[0]


class _Projections(Prepared):
    """Queries, keys and values of one stream."""

    def __init__(self, parts: ProjectionParts) -> None:
        self.parts = parts
        self.dim = parts.norm_q.normalized_shape[0]

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        layers = [constants_of(layer, device) for layer in (parts.q, parts.k, parts.v)]
        self.layers = LayerConstants.together(layers)
        norms = [(norm, norm.weight) for norm in (parts.norm_q, parts.norm_k)]
        self.norms = [
            (norm.eps, {d: None if w is None else constant(w.to(d)) for d in FLOATS})
            for norm, w in norms
        ]

    def __call__(self, every: list[Tensor], x: Tensor) -> list[Tensor]:
        """Return q, k and v (B, T, heads, dim) of the codes for each layer; x (B, T, C) is like."""
        found: list[Tensor] = []
        for layer, codes in zip(self.layers, every, strict=True):
            y = layer.gemm(codes, x.dtype, bias=layer.bias)
            shape = (*x.shape[:2], -1, self.parts.q.out_features // self.dim, self.dim)
            found += y.view(shape).unbind(2)
        for i, (eps, weights) in enumerate(self.norms):
            found[i] = F.rms_norm(found[i], (self.dim,), weights[x.dtype], eps)
        return found


def _rotated(x: Tensor, rotary: Any) -> Tensor:
    """Return x (B, T, heads, dim) with each pair of values turned by its angle."""
    if rotary is None:
        return x
    cos, sin = (value[:, None] for value in rotary)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], -1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def _add(layer: LayerConstants, every: list[Tensor], gate: Tensor, x: Tensor) -> Tensor:
    """Return x + gate layer(codes), (B, T, C), of the codes (B T, K_i) of each segment."""
    y = x.float()
    for i, codes in enumerate(every):
        bias = None if i else layer.bias
        product = layer.gemm(codes, torch.float32, i, bias=bias).view(x.shape)
        y = y + gate[:, None].float() * product
    return y.to(x.dtype)


def _finite(x: Tensor) -> Tensor:
    """Return what the class makes of values that float16 cannot hold."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class _Flux(GpuBlock):
    """A block that is called with tokens (B, T, C) and returns (text, tokens)."""

    def takes(self, x: Tensor, text: Any, temb: Any, rotary: Any) -> bool:
        """Return whether `run` can be given these."""
        if not isinstance(text, Tensor) or not isinstance(temb, Tensor):
            return False
        alike = x.ndim == text.ndim == 3 and x.dtype == text.dtype and len(x) == len(text)
        if not alike or x.dtype not in FLOATS or temb.ndim != 2 or len(temb) not in (1, len(x)):
            return False
        tokens = x.shape[1] + text.shape[1]
        return rotary is None or (
            isinstance(rotary, tuple)
            and all(value.ndim == 2 and len(value) == tokens for value in rotary)
        )


class _Stream(Prepared):
    """What a double block does to one stream, before and after the attention."""

    def __init__(self, parts: StreamParts, network: Network) -> None:
        self.parts, self.projections = parts, _Projections(parts)
        self.modulation = _Modulation(parts.modulation, network)

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.projections.prepare(device)
        self.norm1, self.norm2 = _Norm(parts.norm1), _Norm(parts.norm2)
        self.out, self.up, self.down = (
            constants_of(layer, device) for layer in (parts.out, parts.up, parts.down)
        )

    def before(self, x: Tensor, shift: Tensor, scale: Tensor) -> list[Tensor]:
        """Return q, k and v (B, T, heads, dim)."""
        layers = self.projections.layers
        every = [self.norm1(x, shift, scale, layer.grids[0]) for layer in layers]
        return self.projections(every, x)

    def after(self, x: Tensor, y: Tensor, gate: Tensor, *rest: Tensor) -> Tensor:
        """Return the stream (B, T, C); y alike, of the attention."""
        up, down, (shift, scale, last_gate) = self.up, self.down, rest
        x = _add(self.out, [_codes(y, self.out.grids[0])], gate, x)
        codes = self.norm2(x, shift, scale, up.grids[0])
        y = F.gelu(up.gemm(codes, x.dtype, bias=up.bias), approximate="tanh")
        codes = _codes(y.view(*x.shape[:2], -1), down.grids[0])
        return _add(down, [codes], last_gate, x)


@BLOCKS.build(FluxDoubleParts)
class FusedFluxDouble(_Flux):
    """Text and image: projections and feed-forward layers of their own, one attention."""

    def __init__(self, parts: FluxDoubleParts, network: Network) -> None:
        super().__init__(parts, network)
        self.streams = [_Stream(stream, network) for stream in parts.streams]

    def _prepare(self, device: torch.device) -> None:
        for stream in self.streams:
            stream.prepare(device)
            stream.modulation.shared.here(device)

    def run(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return (text, tokens of the image)."""
        self.here(x.device)
        both = [text.contiguous(), x.contiguous()]
        given = [s.modulation(temb, len(x), 6) for s in self.streams]
        heads = [s.before(y, *g[:2]) for s, y, g in zip(self.streams, both, given, strict=True)]
        q, k, v = (torch.cat(parts, 1) for parts in zip(*heads, strict=True))
        y = self.parts.attend(_rotated(q, rotary), _rotated(k, rotary), v).flatten(2)
        parts = y.split([text.shape[1], x.shape[1]], 1)
        text, x = (
            stream.after(old, new, *g[2:])
            for stream, old, new, g in zip(self.streams, both, parts, given, strict=True)
        )
        return _finite(text), x


@BLOCKS.build(FluxSingleParts)
class FusedFluxSingle(_Flux):
    """Attention and feed-forward layer side by side, their outputs added by one layer."""

    def __init__(self, parts: FluxSingleParts, network: Network) -> None:
        super().__init__(parts, network)
        self.projections = _Projections(parts.projections[0])
        self.modulation = _Modulation(parts.modulation, network)

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.projections.prepare(device)
        self.modulation.shared.here(device)
        self.norm = _Norm(parts.norm)
        self.up, self.out = constants_of(parts.up, device), constants_of(parts.out, device)
        self.together = self.up.reads_the_same(self.projections.layers[-1])

    def run(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return (text, tokens of the image), parts of one tensor."""
        self.here(x.device)
        tokens = [text.shape[1], x.shape[1]]
        x, up, grids = _joined(text, x), self.up, self.out.grids
        shift, scale, gate = self.modulation(temb, len(x), 3)
        layers = self.projections.layers
        every = [self.norm(x, shift, scale, layer.grids[0]) for layer in layers]
        q, k, v = self.projections(every, x)
        codes = every[-1] if self.together else self.norm(x, shift, scale, up.grids[0])
        hidden = F.gelu(up.gemm(codes, x.dtype, bias=up.bias), approximate="tanh")
        hidden = _codes(hidden.view(*x.shape[:2], -1), grids[-1])
        y = self.parts.attend(_rotated(q, rotary), _rotated(k, rotary), v).flatten(2)
        halves = [_codes(y, grids[0]), hidden]
        if len(grids) == 1:
            halves = [torch.cat(halves, 1)]
        text, x = _finite(_add(self.out, halves, gate, x)).split(tokens, 1)
        return text, x


def _joined(text: Tensor, x: Tensor) -> Tensor:
    """Return torch.cat([text, x], 1), without a copy if a single block has returned them.

    A compiler sees by itself that a split tensor is put together again.
    """
    if not torch.compiler.is_compiling():
        (batch, tokens, width), shape = text.shape, (len(x), text.shape[1] + x.shape[1], x.shape[2])
        steps = (shape[1] * width, width, 1)
        one = text.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        after = x.storage_offset() == text.storage_offset() + tokens * width
        strided = all(batch == 1 or y.stride(0) == steps[0] for y in (text, x))
        if one and after and strided and text.stride()[1:] == x.stride()[1:] == steps[1:]:
            return text.as_strided(shape, steps)
    return torch.cat([text, x], 1)
