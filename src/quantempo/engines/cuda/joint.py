"""Blocks of FLUX, Qwen-Image and SD3 as few launches on a GPU, around int8 products.

The modulations of all blocks are one product a forward. Text and image are one sequence in each
attention; between single blocks of FLUX they stay one tensor.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import Prepared
from quantempo.engines.cuda.constants import FLOATS, LayerConstants, alone, constant, constants_of
from quantempo.engines.cuda.unet import BLOCKS, GpuBlock
from quantempo.engines.fusion import LORA, Network
from quantempo.engines.per_forward import TimeShifts
from quantempo.kernels import ops
from quantempo.models.fusion_joint import (
    FluxDoubleParts,
    FluxSingleParts,
    JointBlockParts,
    JointParts,
    QwenParts,
    StreamParts,
)
from quantempo.models.fusion_transformer import AttentionParts
from quantempo.quantized import WeightOnlyLinear
from quantempo.quantized.attention import eight_bit

__all__ = [
    "FusedDouble", "FusedFluxSingle", "SharedModulations", "Stream", "add", "attended", "encode",
    "joined", "modulated",
]  # fmt: skip

# Codes of one segment as `LayerConstants.gemm` reads them: "codes", and "rows" of scales by token.
Codes = dict[str, Any]


class SharedModulations(Prepared, TimeShifts):
    """Shifts, scales and gates of all blocks, in float32."""

    def __init__(self, layers: list[Any]) -> None:
        codes = [i for i in layers if isinstance(i, WeightOnlyLinear) and not hasattr(i, LORA)]
        codes = [i for i in codes if i.bias is not None]
        super().__init__([i for i in codes if i.weight_format == codes[0].weight_format])

    @classmethod
    def of(cls, network: Network) -> "SharedModulations":
        """Return those of the blocks of FLUX and SD3."""
        return cls([layer for parts in network.of(JointParts) for layer in parts.modulations])

    def _prepare(self, device: torch.device) -> None:
        if not self.layers:
            return
        self.joined = list[Tensor | None]()
        for name in ("weight_int", "weight_scale", "bias", "weight_group"):
            parts = [getattr(layer, name) for layer in self.layers]
            joined = None if parts[0] is None else constant(torch.cat(parts))
            self.joined.append(joined)
            if joined is not None and not joined.is_floating_point():
                for part, rows in zip(parts, joined.split(self._sizes), strict=True):
                    # One copy in memory serves both.
                    part.data = alone(rows)

    def make(self, given: Tensor) -> Tensor:
        """Return (B, sum C_i) of temb (B, E)."""
        self.here(given.device)
        return ops.weight_only_linear(F.silu(given.float()).contiguous(), *self.joined)


def modulated(layer: Any, temb: Tensor) -> Any:
    """Return layer(silu(temb)); of integer weights in float32, as `SharedModulations` does."""
    if not isinstance(layer, WeightOnlyLinear):
        return layer(F.silu(temb))
    with torch.autocast(temb.device.type, enabled=False):
        return layer(F.silu(temb.float()))


class _Modulation(Prepared):
    """Shifts, scales and gates of one layer."""

    def __init__(self, layer: nn.Module, network: Network) -> None:
        self.layer, self.shared = layer, network.once(SharedModulations.of)
        self.index = self.shared.index(layer)

    def __call__(self, temb: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return all of them, (B, C) each, rows not contiguous, for x (B, T, C)."""
        index = self.index
        y = modulated(self.layer, temb) if index is None else self.shared(index, temb)
        return y.expand(len(x), -1).split(x.shape[2], 1)


def encode(x: Tensor, layer: LayerConstants, norm: Any = None, part: int = 0, **how: Any) -> Codes:
    """Return the codes (B T, C) of norm(x) (1 + scale) + shift for a segment of a layer.

    x (B, T, C), images and tokens of which may lie apart; how: scale and shift (B, C), if any.
    """
    how |= {"norm": "none"} if norm is None else {"norm": "layer", "eps": norm.eps}
    how |= {} if norm is None else {name: v.detach() for name, v in norm.named_parameters()}
    grid, dynamic = layer.grids[part], layer.layer.dynamic
    if not dynamic:
        how |= {"act_scale": grid.scale, "zero_point": grid.zero_point, "qmax": grid.qmax}
    codes, rows = ops.norm_modulate_quant(x, bucket=grid.clock.bucket, **how)
    return {"codes": codes, "rows": rows} if dynamic else {"codes": codes}


def _hidden(up: LayerConstants, codes: Codes, x: Tensor, reader: LayerConstants) -> Codes:
    """Return gelu_tanh(up(codes)) as codes of the last segment of `reader`; x (B, T, C) is like."""
    how = {"dtype": x.dtype, "bias": up.bias, "activation": "gelu_tanh", **codes}
    if not reader.layer.dynamic:
        return {"codes": up.gemm(grid=reader.grids[-1], **how)}
    return encode(up.gemm(**how).view(*x.shape[:2], -1), reader, part=-1)


def add(layer: LayerConstants, every: list[Codes], gate: Tensor | None, x: Tensor) -> Tensor:
    """Return x + gate layer(codes), (B, T, C), of the codes of each segment."""
    first, *others = every
    how: dict[str, Any] = {"bias": layer.bias, "gate": gate, "residual": x.flatten(0, 1), **first}
    if others:
        assert layer.sides is not None
        how |= layer.sides.arguments([other["codes"] for other in others])
        if layer.layer.dynamic:
            how["side_scales"] = torch.stack([other["rows"] for other in others])
    return layer.gemm(dtype=x.dtype, **how).view(x.shape)


class _Projections(Prepared):
    """Queries, keys and values of one stream."""

    def __init__(self, parts: AttentionParts) -> None:
        self.parts = parts

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        layers = [constants_of(layer, device) for layer in (parts.q, parts.k, parts.v)]
        self.layers = LayerConstants.together(layers)

    def __call__(self, every: list[Codes], x: Tensor) -> list[Tensor]:
        """Return q, k and v (B, T, heads, dim) of the codes for each layer; x (B, T, C) is like."""
        found: list[Tensor] = []
        heads, dim = self.parts.heads, self.parts.q.out_features // self.parts.heads
        for layer, codes in zip(self.layers, every, strict=True):
            y = layer.gemm(dtype=x.dtype, bias=layer.bias, **codes)
            found += y.view(*x.shape[:2], -1, heads, dim).unbind(2)
        return found


def attended(parts: AttentionParts, q: Tensor, k: Tensor, v: Tensor, otherwise: Any) -> Any:
    """Return the attention (B, T, heads, dim): in 8 bits if chosen, else of `otherwise`."""
    return (ops.attention8 if eight_bit(parts.module, q, k) else otherwise)(q, k, v)


def _attended(parts: JointParts, streams: Any, every: Any, rotary: Any = None) -> Tensor:
    """Return the attention (B, T, C) of one sequence; every: q, k and v of each stream."""
    norms = [norm for s in streams for norm in (s.norm_q, s.norm_k)]
    q, k, v = ([x.flatten(2) for x in heads] for heads in zip(*every, strict=True))
    weights = [n if n is None or n.weight is None else n.weight.detach() for n in norms]
    least, heads = torch.finfo(q[0].dtype).eps, streams[0].heads
    eps = [-1.0 if n is None else least if n.eps is None else n.eps for n in norms]
    tables = [y.to(q[0].device, torch.float32).contiguous() for y in rotary or ()]
    # Values of one stream are read where their product has written them.
    asked, keys, own = ops.join_heads(q, k, v if v[1:] else [], weights, eps, tables, heads)
    return attended(streams[0], asked, keys, own if v[1:] else every[0][2], parts.attend).flatten(2)


def _finite(x: Tensor) -> Tensor:
    """Return what the class makes of values that float16 cannot hold."""
    return x.clamp(-65504, 65504) if x.dtype == torch.float16 else x


class _Joint(GpuBlock):
    """A block that is called with tokens (B, T, C) and returns (text, tokens)."""

    def __init__(self, parts: Any, network: Network) -> None:
        super().__init__(parts, network)
        self.modulations = [_Modulation(layer, network) for layer in parts.modulations]

    def takes(self, x: Tensor, text: Any, temb: Any, rotary: Any) -> bool:
        """Return whether `run` can be given these."""
        if not isinstance(text, Tensor) or not isinstance(temb, Tensor) or x.dtype not in FLOATS:
            return False
        alike = x.ndim == text.ndim == 3 and x.dtype == text.dtype and len(x) == len(text)
        known = alike and temb.ndim == 2 and len(temb) in (1, len(x))
        known = known and isinstance(rotary, tuple | None)
        tokens = x.shape[1] + text.shape[1]
        return known and all(y.ndim == 2 and len(y) == tokens for y in rotary or ())


class Stream(Prepared):
    """What a block does to one stream; given: its modulation, (B, C) each, as in `StreamParts`."""

    def __init__(self, parts: StreamParts) -> None:
        self.parts = parts
        self.projections = [_Projections(attention) for attention in parts.attentions]

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        layers = [*(attention.out for attention in parts.attentions), parts.up, parts.down]
        found: list[Any] = [layer and constants_of(layer, device) for layer in layers]
        *self.outs, self.up, self.down = found

    def before(self, x: Tensor, given: tuple[Tensor, ...], index: int = 0) -> list[Tensor]:
        """Return q, k and v (B, T, heads, dim) of an attention."""
        # Of a stream that ends, AdaLayerNormContinuous has the scale first.
        shift, scale = given[::-1] if len(given) == 2 else given[6 * index : 6 * index + 2]
        how, projections = {"shift": shift, "scale": scale}, self.projections[index]
        every = [encode(x, layer, self.parts.norm1, **how) for layer in projections.layers]
        return projections(every, x)

    def add(self, x: Tensor, every: list[Tensor], given: tuple[Tensor, ...]) -> Tensor:
        """Return the stream with what each attention gave, all (B, T, C)."""
        for out, y, gate in zip(self.outs, every, given[2::6], strict=True):
            x = add(out, [encode(y, out)], gate, x)
        return x

    def feed(self, x: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """Return the stream with its feed-forward layer, (B, T, C)."""
        shift, scale, gate = given[3:6]
        codes = encode(x, self.up, self.parts.norm2, shift=shift, scale=scale)
        return add(self.down, [_hidden(self.up, codes, x, self.down)], gate, x)


@BLOCKS.build(QwenParts)
@BLOCKS.build(FluxDoubleParts)
@BLOCKS.build(JointBlockParts)
class FusedDouble(_Joint):
    """Text and image: projections and feed-forward layers of their own, one attention."""

    def __init__(self, parts: FluxDoubleParts | JointBlockParts, network: Network) -> None:
        super().__init__(parts, network)
        self.streams = [Stream(stream) for stream in parts.streams]

    def run(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Any, ...]:
        """Return (text, tokens of the image), None for a text that ends."""
        self.here(x.device)
        both = [text.contiguous(), x.contiguous()]
        given = [m(temb, y) for m, y in zip(self.modulations, both, strict=True)]
        heads = [s.before(*pair) for s, *pair in zip(self.streams, both, given, strict=True)]
        y = _attended(self.parts, [s.parts.attentions[0] for s in self.streams], heads, rotary)
        parts = y.split([text.shape[1], x.shape[1]], 1)
        every = zip(self.streams, both, parts, given, self.parts.clips, strict=True)
        return tuple(self._after(*group) for group in every)

    def _after(self, stream: Stream, x: Tensor, y: Tensor, given: Any, clips: bool) -> Any:
        if stream.up is None:
            return None
        own = enumerate(stream.parts.attentions[1:], 1)
        every = [_attended(self.parts, [a], [stream.before(x, given, i)]) for i, a in own]
        x = stream.feed(stream.add(x, [y, *every], given), given)
        return _finite(x) if clips else x


@BLOCKS.build(FluxSingleParts)
class FusedFluxSingle(_Joint):
    """Attention and feed-forward layer side by side, their outputs added by one layer."""

    def __init__(self, parts: FluxSingleParts, network: Network) -> None:
        super().__init__(parts, network)
        self.projections = _Projections(parts.projections[0])

    def _prepare(self, device: torch.device) -> None:
        parts = self.parts
        self.up, self.out = constants_of(parts.up, device), constants_of(parts.out, device)
        self.together = self.up.reads_the_same(self.projections.layers[-1])

    def run(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """Return (text, tokens of the image), parts of one tensor."""
        self.here(x.device)
        tokens = [text.shape[1], x.shape[1]]
        x, up, out = joined(text, x), self.up, self.out
        shift, scale, gate = self.modulations[0](temb, x)
        how = {"norm": self.parts.norm, "shift": shift, "scale": scale}
        every = [encode(x, layer, **how) for layer in self.projections.layers]
        heads = [self.projections(every, x)]
        codes = every[-1] if self.together else encode(x, up, **how)
        hidden = _hidden(up, codes, x, out)
        y = _attended(self.parts, [self.parts.projections[0]], heads, rotary)
        text, x = _finite(add(out, [encode(y, out), hidden], gate, x)).split(tokens, 1)
        return text, x


def joined(text: Tensor, x: Tensor) -> Tensor:
    """Return torch.cat([text, x], 1), without a copy if a single block has returned them."""
    if not torch.compiler.is_compiling():
        (batch, tokens, width), shape = text.shape, (len(x), text.shape[1] + x.shape[1], x.shape[2])
        steps = (shape[1] * width, width, 1)
        one = text.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        after = x.storage_offset() == text.storage_offset() + tokens * width
        strided = all(batch == 1 or y.stride(0) == steps[0] for y in (text, x))
        if one and after and strided and text.stride()[1:] == x.stride()[1:] == steps[1:]:
            return text.as_strided(shape, steps)
    return torch.cat([text, x], 1)
