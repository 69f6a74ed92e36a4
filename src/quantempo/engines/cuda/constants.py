"""Integer layers as constants of the GPU operators, and quantization of their inputs.

Everything that does not change between calls is made once for a device, outside of any trace, and
kept as plain tensors: a compiler and a CUDA graph see constants at fixed addresses.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import GroupFormat, activation_format, token_scale
from quantempo.engines.base import TARGET, last, rows_of
from quantempo.engines.cuda.adapters import Adapters
from quantempo.engines.fusion import LORA
from quantempo.errors import QuantempoError
from quantempo.kernels import layout, ops
from quantempo.kernels.ops.norm_modulate_quant import MOST_CHANNELS
from quantempo.kernels.ops.operator import to_codes
from quantempo.quantized import QConv2d, QLayer, StepClock

__all__ = [
    "ActivationGrid", "FloatSides", "LayerConstants", "Norm", "Sides", "alone", "quantize",
    "quantize_rows", "quantize_tokens",
]  # fmt: skip

# Channels must come in multiples of this: 16 bytes, what a tensor-core copy moves at least.
ALIGNED = 16
# Shortcut operands of one convolution.
MOST_SIDES = 2
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def constant(value: Tensor, apart: bool = False) -> Tensor:
    """Return a tensor, detached, that compiled code may take to stay; contiguous unless `apart`."""
    value = value.detach() if apart else value.detach().contiguous()
    # Else each replay of a graph that a compiler recorded would copy it, as it copies inputs.
    torch._dynamo.mark_static_address(value)
    return value


def alone(part: Tensor) -> Tensor:
    """Return contiguous rows of a tensor, in its memory; copies and files of them lack the rest."""
    begin, like = part.storage_offset() * part.itemsize, part.new_empty(0)
    own = part.untyped_storage()[begin : begin + part.nbytes]
    return like.set_(own, 0, part.shape, part.stride())  # type: ignore[call-overload, no-any-return]


class ActivationGrid:
    """An activation grid: scale and inverse float32 (G,); zero_point, qmax of unsigned codes."""

    def __init__(self, clock: StepClock, scale: Tensor, zero_point: int, qmax: int) -> None:
        self.clock, self.zero_point, self.qmax = clock, zero_point, qmax
        self.scale = constant(scale.clone())
        self.inverse = constant(self.scale.reciprocal())

    def traced(self, x: Tensor) -> Tensor:
        """Return the int8 codes of x in operations that a compiler joins with those before."""
        codes = torch.round(x.float() * self.clock.rows(self.inverse, x)) + self.zero_point
        return (codes.clamp(0, self.qmax) - layout.OFFSET).to(torch.int8)


def quantize(x: Tensor, grid: ActivationGrid) -> Tensor:
    """Return int8 codes (B, C, H, W), channels_last: clamp(rne(x (1 / s)) + z, 0, qmax) - 128.

    x: any layout; traced, on a GPU, they may differ by 1 where the quotient is next to a tie.
    """
    if torch.compiler.is_compiling():
        return last(grid.traced(x))
    x = last(x if x.dtype in FLOATS else x.float())
    codes, _, _ = ops.gn_act_quant(
        x, bucket=grid.clock.bucket, scale=grid.scale, zero_point=grid.zero_point, qmax=grid.qmax
    )
    return codes


def quantize_rows(x: Tensor, grid: ActivationGrid) -> Tensor:
    """Return int8 codes (M, K), contiguous, of x (..., K) floating; see `quantize`."""
    width = x.shape[-1]
    if torch.compiler.is_compiling():
        return grid.traced(x).reshape(-1, width).contiguous()
    # As images one pixel wide, so that rows find their time bucket: (B, K, rows, 1).
    images = x.reshape(1 if x.ndim == 1 else x.shape[0], -1, 1, width).permute(0, 3, 1, 2)
    return rows_of(quantize(images, grid))


def quantize_tokens(x: Tensor, grid: ActivationGrid) -> tuple[Tensor, Tensor]:
    """Return codes as `quantize_rows` does, and the scale of each row, (M,) float32."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    one_pass = grid.qmax == 255 and rows.shape[1] <= MOST_CHANNELS and x.dtype in FLOATS
    if one_pass and not torch.compiler.is_compiling():
        bucket = grid.clock.now.reshape(-1)[0]
        return ops.norm_modulate_quant(rows[None], bucket=bucket, norm="none")
    scale = token_scale(rows, activation_format(grid.qmax.bit_length()))
    return to_codes(rows, scale, grid.zero_point, grid.qmax), scale[:, 0]


class Norm:
    """An affine group normalisation; gamma, beta float32 (C,)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.gamma, self.beta = constant(norm.weight.float()), constant(norm.bias.float())

    def __call__(
        self, x: Tensor, skip: Tensor | None = None, *, bucket: Tensor, silu: bool,
        grid: ActivationGrid | None = None, sides: "Sides | None" = None,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Return the codes (floats without a grid) of the normalised torch.cat([x, skip], 1).

        And the codes of x and skip themselves, as `sides` reads them. All (B, C, H, W).
        """
        how: dict[str, Any] = {}
        if grid is not None:
            how = {"scale": grid.scale, "zero_point": grid.zero_point, "qmax": grid.qmax}
        if sides is not None:
            how["raw_scales"] = sides.scales
            how |= {"raw_zero_points": sides.zero_points, "raw_qmax": sides.qmax}
        how |= {"gamma": self.gamma, "beta": self.beta, "groups": self.groups, "eps": self.eps}
        y, *raws = ops.gn_act_quant(x, skip, bucket=bucket, silu=silu, **how)
        return y, raws[: 0 if sides is None else len(sides.weights)]


def _packed(layer: QLayer, widths: tuple[int, ...]) -> list[Tensor]:
    """Return the weight of each part of a layer's input by `layout.pack`, none if it stays int8.

    It is int8 where asked for, but on Hopper, with a stride, or where two parts share a group.
    """
    from quantempo.kernels.gpu.contraction.launch import choose_path

    spec, (codes, groups) = layer.weight_format, layer.stored.values()
    far = getattr(layer, "stride", (1, 1)) != (1, 1)
    if not isinstance(spec, GroupFormat) or far or any(w % spec.group for w in widths[:-1]):
        return []
    device = TARGET.get() or codes.device
    if layer.unpack or (device.type != "cpu" and choose_path(device) != "hopper"):
        return []
    q = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)[..., : sum(widths)]
    sizes = [-(-width // spec.group) for width in widths]
    parts = zip(q.split(widths, -1), groups.split(sizes, -1), strict=True)
    return [constant(layout.pack(*part, spec.group)) for part in parts]


class Sides:
    """A 1x1 convolution (linear layer) of one or two images, added to the sums of another one.

    widths: channels of each image; skip: images at the front that are not part of it.
    """

    def __init__(self, layer: QLayer, widths: tuple[int, ...], skip: int = 0) -> None:
        rows = [min(i, len(layer.segments) - 1) for i in range(len(widths))][skip:]
        zero_points: list[int] = layer.act_zero_point.tolist()
        self.zero_points = [zero_points[row] for row in rows]
        self.qmax, self.scales = layer.act_qmax, constant(layer.act_scale[rows])
        parts = layer.weight_codes.flatten(1).split(widths, 1)[skip:]
        packed = _packed(layer, widths)[skip:]
        self.weights = packed or [constant(part, apart=True) for part in parts]
        tables = [layout.row_table(*pair) for pair in zip(parts, self.zero_points, strict=True)]
        self.table = constant(torch.stack(tables))
        self.weight_scale = constant(layer.weight_scale)

    def codes_of(self, x: Tensor, skip: Tensor | None, bucket: Tensor) -> list[Tensor]:
        """Return the codes of the images alone, as `Norm` returns them beside its own."""
        _, *raws = ops.gn_act_quant(
            x, skip, bucket=bucket, raw_scales=self.scales, raw_zero_points=self.zero_points,
            raw_qmax=self.qmax,
        )  # fmt: skip
        return raws[: len(self.weights)]

    def arguments(self, codes: list[Tensor]) -> dict[str, Any]:
        """Return what `ops.qconv2d` is given of the codes (B, C_i, H, W) of each image."""
        return {
            "side_codes": codes,
            "side_weights": self.weights,
            "side_scales": self.scales,
            "side_weight_scale": self.weight_scale,
            "side_table": self.table,
        }


class FloatSides:
    """A 1x1 convolution left in float, of one or two images of `widths` channels; no bias."""

    def __init__(self, layer: nn.Conv2d, widths: tuple[int, ...]) -> None:
        parts = layer.weight.detach().flatten(1).split(widths, 1)
        self.weights = {kind: [constant(part.to(kind)) for part in parts] for kind in FLOATS}

    def __call__(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """Return (B, O, H, W), channels_last, in the type of x; both channels_last."""
        first, *others = self.weights[x.dtype]
        rows = rows_of(x) @ first.t()
        for weight in others:
            assert skip is not None
            rows = torch.addmm(rows, rows_of(skip), weight.t())
        batch, _, height, width = x.shape
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


class LayerConstants:
    """What the operators are given of one layer, an operand for each segment of its input.

    weights: int8 (O, taps, C_i), (O, K_i), or packed; tables: int32 (16, O) or (O,); weight_scale,
    bias: float32 (O,); sides: all segments but the first, of a 1x1 convolution of several, or None.
    """

    def __init__(self, layer: QLayer) -> None:
        self.layer = layer
        if layer.weight_scale.device.type == "meta":
            raise QuantempoError("got a layer without data; load its weights, then attach")
        zero_points: list[int] = layer.act_zero_point.tolist()
        self.grids = [
            ActivationGrid(layer.clock, scale, zero, layer.act_qmax)
            for scale, zero in zip(layer.act_scale, zero_points, strict=True)
        ]
        codes = layer.weight_codes
        width = layer.segments if len(layer.segments) > 1 else (codes.shape[1],)
        parts, packed = codes.split(width, 1), _packed(layer, width)
        if isinstance(layer, QConv2d):
            self.weights = packed or [constant(layout.conv_weight(part)) for part in parts]
            tables = [layout.border_table(*pair) for pair in zip(parts, zero_points, strict=True)]
            if len(parts) == 1 and layer.kernel_size != (1, 1) and not packed:
                # One copy in memory serves both: the layer's own is now a view of ours.
                shape = (len(codes), *layer.kernel_size, -1)
                layer.relayout(self.weights[0].view(shape).permute(0, 3, 1, 2))
        else:
            self.weights = packed or [constant(part, apart=True) for part in parts]
            tables = [layout.row_table(*pair) for pair in zip(parts, zero_points, strict=True)]
        self.tables = [constant(table) for table in tables]
        self.weight_scale = constant(layer.weight_scale)
        self.bias = None if layer.bias is None else constant(layer.bias)
        self.sides: Sides | None = None
        self.adapters: Adapters | None = None
        plain = not isinstance(layer, QConv2d) or layer.kernel_size == layer.stride == (1, 1)
        if plain and 1 < len(parts) <= 1 + MOST_SIDES:
            self.sides = Sides(layer, layer.segments, skip=1)
            self.sides.weights = packed[1:] or self.sides.weights
        if LORA in layer._modules and (self.sides is None or len(parts) <= MOST_SIDES):
            self.adapters = Adapters([layer], LayerConstants)
        if packed or (layer.unpack and layer.weight_group is not None):
            layer.set_aside()

    @property
    def tensors(self) -> list[Tensor]:
        """Return all that the weight decides."""
        sides = self.sides
        more = [] if sides is None else [*sides.weights, sides.table, sides.weight_scale]
        return [*self.weights, *self.tables, self.weight_scale, *more]

    @property
    def shape(self) -> dict[str, Any]:
        """What `conv` has to know of a convolution's own kernel, stride and border."""
        layer = self.layer
        assert isinstance(layer, QConv2d)
        (top, left), kernel = layer.padding, layer.kernel_size[0]
        return {"kernel": kernel, "stride": layer.stride[0], "border": (top, top, left, left)}

    @classmethod
    def joined(cls, layers: list["LayerConstants"]) -> "LayerConstants":
        """Return linear layers that read the same codes as one, their outputs side by side."""
        whole = copy.copy(layers[0])
        weight = constant(torch.cat([o.weights[0] for o in layers]))
        parts = weight.split([len(o.weight_scale) for o in layers])
        for layer, part in zip(layers, parts, strict=True):
            # One copy in memory serves both: the layer's own is now a view of ours.
            layer.weights = [constant(part)]
            if part.dtype == torch.int8:
                layer.layer.relayout(alone(layer.weights[0]))
        biases = [torch.zeros_like(o.weight_scale) if o.bias is None else o.bias for o in layers]
        none = all(o.bias is None for o in layers)
        whole.weights, whole.bias = [weight], None if none else constant(torch.cat(biases))
        whole.tables = [constant(torch.cat([o.tables[0] for o in layers]))]
        whole.weight_scale = constant(torch.cat([o.weight_scale for o in layers]))
        branches = any(o.adapters for o in layers)
        whole.adapters = Adapters([o.layer for o in layers], cls) if branches else None
        return whole

    def reads_the_same(self, other: "LayerConstants") -> bool:
        """Return whether another layer, of one segment too, takes the same codes (synchronises)."""
        mine, grid = self.grids[0], other.grids[0]
        same_width = self.weights[0].shape[-1] == other.weights[0].shape[-1]
        alike = mine.zero_point == grid.zero_point and mine.qmax == grid.qmax
        return same_width and alike and torch.equal(mine.scale, grid.scale)

    @classmethod
    def together(cls, layers: list["LayerConstants"]) -> list["LayerConstants"]:
        """Return linear layers that read the same input, joined if they share its codes."""
        alike = all(layers[0].reads_the_same(layer) for layer in layers[1:])
        return [cls.joined(layers)] if alike else layers

    def pixelwise(self) -> "LayerConstants":
        """Return a layer, linear or 1x1 of one segment, as the linear one of a pixel; no copy."""
        if not isinstance(self.layer, QConv2d):
            return self
        rows = copy.copy(self)
        rows.weights = [constant(self.weights[0].flatten(1))]
        # Every pixel is inside the image, where the first row of the table holds.
        rows.tables = [constant(self.tables[0][0])]
        if rows.adapters is not None:
            rows.adapters = copy.copy(rows.adapters)
            rows.adapters.down = rows.adapters.down.pixelwise()
        return rows

    def read(self, x: Tensor) -> dict[str, Any]:
        """Return x (..., K) as `gemm` reads its first segment: codes, and rows if by token."""
        grid = self.grids[0]
        made = quantize_tokens(x, grid) if self.layer.dynamic else (quantize_rows(x, grid),)
        return dict(zip(("codes", "rows"), made, strict=False))

    def conv(self, codes: Tensor, dtype: torch.dtype, part: int = 0, **how: Any) -> Tensor:
        """Return the convolution of one segment's codes, (B, O, H', W'); how: of `ops.qconv2d`."""
        if self.adapters is not None:
            how = self.adapters.beside(self, codes, part, how)
        return ops.qconv2d(
            codes, *self._of(part), out_dtype=dtype, bucket=self.layer.clock.bucket, **how
        )

    def gemm(
        self, codes: Tensor, dtype: torch.dtype, part: int = 0, grid: ActivationGrid | None = None,
        rows: Tensor | None = None, **how: Any,
    ) -> Tensor:  # fmt: skip
        """Return the product (M, O) of a segment's codes (M, K_i), or its int8 codes on `grid`.

        rows: (M,) float32, the scale of each row where it is that of a token.
        """
        if self.adapters is not None:
            how = self.adapters.beside(self, codes, part, how, rows)
        if grid is not None:
            how |= {"out_scale": grid.scale, "out_zero": grid.zero_point, "out_qmax": grid.qmax}
        weight, scale, *rest = self._of(part)
        if rows is not None:
            scale, how = rows, how | {"rows": True}
        clock = self.layer.clock
        # Without codes out no row asks for its time, which may be another than its image's.
        bucket = clock.now.reshape(-1)[0] if rows is not None and grid is None else clock.bucket
        return ops.qgemm(codes, weight, scale, *rest, out_dtype=dtype, bucket=bucket, **how)

    def _of(self, part: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.weights[part], self.grids[part].scale, self.weight_scale, self.tables[part]


def constants_of(layer: Any, device: torch.device) -> LayerConstants:
    """Return the constants of an integer layer, those that its own kernel uses."""
    layer.kernel.here(device)
    found: LayerConstants = layer.kernel.constants
    return found
