"""Contractions with seeded tensors, and their results in float64 from the formulas.

y = s_a[b] s_w[o] sum (q - z) w + sum_i s_i[b] s_wi[o] sum (q_i - z_i) w_i + bias + shift
y = act(y) + residual
"""

import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels import layout
from quantempo.kernels.gpu.contraction.tiles import Tile
from tests.gpu.layers import contraction

LAST = torch.channels_last
INT8 = torch.int8
BUCKETS = 3
# Float32 arithmetic on terms of one size; half a unit of the last place where y is narrower.
ERROR = {torch.float32: 2**-20, torch.float16: 2**-11 + 2**-20, torch.bfloat16: 2**-8 + 2**-20}
TIE = 4e-3
TILE = Tile(64, 64, 64, 4, 2)


@dataclasses.dataclass(frozen=True)
class Case:
    """One contraction; a shift is "full", "column" (a slice of a wider tensor) or "row" (1, O)."""

    n: int = 2
    c: int = 48
    h: int = 9
    w: int = 11
    o: int = 48
    kernel: int = 3
    stride: int = 1
    border: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right
    upsample: bool = False
    sides: tuple[int, ...] = ()
    buckets: int = BUCKETS
    mixed: bool = False
    out: torch.dtype = torch.float32
    requantize: bool = False
    bias: bool = True
    shift: str = "full"
    residual: torch.dtype | None = torch.float32
    activation: str = "none"
    tile: Tile | None = TILE
    zero: int = 37
    group: int = 0  # input channels that share a scale of packed 4-bit weights; 0: int8

    def size(self) -> tuple[int, int]:
        repeat, (top, bottom, left, right) = 2 if self.upsample else 1, self.border
        rows = (repeat * self.h + top + bottom - self.kernel) // self.stride + 1
        return rows, (repeat * self.w + left + right - self.kernel) // self.stride + 1


def packed(outs: int, taps: int, channels: int, group: int) -> tuple[Tensor, Tensor]:
    """Return int8 weights (O, P, C) on the grids of random groups, and the same ones packed."""
    g = torch.Generator().manual_seed(outs + channels)
    count = -(-channels // group)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=g, dtype=torch.int16)

    step, zero = draw(16, outs, taps, count) + 1, draw(16, outs, taps, count)
    steps, zeros = (v.repeat_interleave(group, -1)[..., :channels] for v in (step, zero))
    reach = 127 // steps
    units = (draw(16, outs, taps, channels) - zeros).maximum(-reach).minimum(reach)
    fields = ((step - 1) << 4 | zero).to(torch.uint8)
    made = layout.pack((units + zeros).to(torch.uint8), fields, group)
    return (units * steps).to(INT8), made


class Example:
    """The tensors of a case and its exact results, all on the CPU; `run` runs it anywhere."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.g = torch.Generator().manual_seed(5)
        n, o, size = case.n, case.o, case.size()
        self.codes = self.image(n, case.c, case.h, case.w)
        self.weight = self.integers(o, case.c, case.kernel, case.kernel)
        self.packed = layout.conv_weight(self.weight)
        if case.group:
            weight, self.packed = packed(o, case.kernel**2, case.c, case.group)
            self.weight = weight.unflatten(1, (case.kernel,) * 2).permute(0, 3, 1, 2)
        self.act_scale, self.weight_scale = self.rand(case.buckets), self.rand(o)
        self.bucket = torch.randint(0, BUCKETS, (n,) if case.mixed else (), generator=self.g)
        self.side_codes = [self.image(n, side, *size) for side in case.sides]
        self.side_weights = [self.integers(o, side) for side in case.sides]
        self.packed_sides = list(self.side_weights)
        if case.group and case.sides:
            # The first only: a second one, and one of another group, may stay as they are.
            weight, self.packed_sides[0] = packed(o, 1, case.sides[0], 48 - case.group)
            self.side_weights[0] = weight[:, 0]
        self.side_scales, self.side_weight_scale = self.rand(2, case.buckets), self.rand(o)
        self.side_zeros = [100, 201]
        # Of the size of the sums, so that every term counts.
        reach = case.kernel * case.c**0.5
        self.bias = self.randn(o) * reach if case.bias else None
        self.wide = self.randn(n, 2 * o + 7) * reach
        self.residual = None
        if case.residual is not None:
            rest = (self.randn(n, o, *size) * reach).to(case.residual)
            self.residual = rest.contiguous(memory_format=LAST)
        self.out_scale = self.rand(case.buckets) * reach * 2 if case.requantize else None

    def shift(self, device: str = "cpu") -> Tensor | None:
        """Return the shift (N, O) with the strides that the case asks for."""
        o, wide = self.case.o, self.wide.to(device)
        return {
            "none": None,
            "full": wide[:, :o].contiguous(),
            "column": wide[:, o + 3 : 2 * o + 3],
            "row": wide[:1, :o].expand(self.case.n, o),
        }[self.case.shift]

    def rand(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.g) + 0.2) * 0.02

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.g)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, generator=self.g, dtype=INT8)

    def image(self, *shape: int) -> Tensor:
        return self.integers(*shape).contiguous(memory_format=LAST)

    def centred(self, codes: Tensor, zero: int) -> Tensor:
        return codes.double() - (zero - layout.OFFSET)

    def sums(self) -> Tensor:
        """Return the sums over the taps inside the image, float64 (N, O, H', W')."""
        case, x = self.case, self.centred(self.codes, self.case.zero)
        if case.upsample:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        top, bottom, left, right = case.border
        x = F.pad(x, (left, right, top, bottom))
        return F.conv2d(x, self.weight.double(), stride=case.stride)

    def per_image(self, scales: Tensor) -> Tensor:
        """Return the scale of each image (N or 1, 1, 1, 1), float64."""
        entry = self.bucket if len(scales) > 1 else torch.zeros_like(self.bucket)
        return scales.double()[entry].reshape(-1, 1, 1, 1)

    def exact(self) -> Tensor:
        """Return y before it is cast or quantized, float64."""
        case, column = self.case, (-1, 1, 1)
        y = self.per_image(self.act_scale) * self.weight_scale.double().view(column) * self.sums()
        for i, (codes, weight) in enumerate(zip(self.side_codes, self.side_weights, strict=True)):
            x = self.centred(codes, self.side_zeros[i])
            part = torch.einsum("nchw,oc->nohw", x, weight.double())
            y = y + self.per_image(self.side_scales[i]) * self.side_weight_scale.view(column) * part
        if self.bias is not None:
            y = y + self.bias.double().view(column)
        shift = self.shift()
        if shift is not None:
            y = y + shift.double()[:, :, None, None]
        y = {"gelu": F.gelu, "silu": F.silu, "none": lambda v: v}[case.activation](y)
        return y if self.residual is None else y + self.residual.double()

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """Return what `layers.contraction` and `ops.qconv2d` both take, by name."""
        count = len(self.case.sides)
        known: dict[str, Any] = {
            "codes": self.codes, "weight": self.packed,
            "act_scale": self.act_scale, "weight_scale": self.weight_scale,
            "table": layout.border_table(self.weight, self.case.zero), "bucket": self.bucket,
            "bias": self.bias, "residual": self.residual, "out_scale": self.out_scale,
            "side_scales": None, "side_weight_scale": None, "side_table": None,
        }  # fmt: skip
        if count:
            tables = [
                layout.row_table(weight, zero)
                for weight, zero in zip(self.side_weights, self.side_zeros, strict=False)
            ]
            known |= {
                "side_scales": self.side_scales[:count].contiguous(),
                "side_weight_scale": self.side_weight_scale,
                "side_table": torch.stack(tables),
            }
        known = {name: x if x is None else x.to(device) for name, x in known.items()}
        return known | {
            "side_codes": [side.to(device) for side in self.side_codes],
            "side_weights": [weight.to(device) for weight in self.packed_sides],
            "shift": self.shift(device), "kernel": self.case.kernel, "stride": self.case.stride,
            "upsample": self.case.upsample, "out_zero": 70, "out_qmax": 255,
        }  # fmt: skip

    def run(self, launch: ModuleType, path: str, device: str = "cpu", sums: bool = False) -> Tensor:
        """Return y of `launch.run` with the tile of the case; `sums`: int32, nothing added."""
        case, known = self.case, self.arguments(device)
        dtype = INT8 if case.requantize else case.out
        if sums:
            dtype = torch.int32
            known |= dict.fromkeys(("bias", "shift", "residual", "out_scale"))
            known |= dict.fromkeys(("side_scales", "side_weight_scale", "side_table"))
            known |= {"side_codes": [], "side_weights": []}
        y = torch.empty((case.n, case.o, *case.size()), dtype=dtype, device=device)
        y = y.contiguous(memory_format=LAST)
        how = contraction(
            y=y, border=(case.border[0], case.border[2]),
            activation="none" if sums else case.activation, **known,
        )  # fmt: skip
        launch.run(**how, tile=case.tile, path=path)
        return y.cpu()

    def check(self, y: Tensor) -> None:
        """Assert that y is `exact`, rounded once to its type."""
        scale = self.per_image(self.out_scale) if self.out_scale is not None else None
        check_values(y, self.exact(), self.case.out, scale)


def check_values(y: Tensor, exact: Tensor, out: torch.dtype, scale: Tensor | None) -> None:
    """Assert that y is `exact` to within float32 arithmetic; codes to within ties."""
    if scale is None:
        assert y.dtype == out
        narrow = ERROR[out] - ERROR[torch.float32]
        bound = exact.abs() * narrow + exact.abs().max() * ERROR[torch.float32]
        assert ((y.double() - exact).abs() <= bound).all()
        return
    quotient = exact / scale
    assert y.dtype == INT8
    expected = (torch.round(quotient) + 70).clamp(0, 255) - 128
    wrong = y.double() != expected
    assert ((y.double() - expected).abs() <= 1).all()
    assert ((quotient - torch.floor(quotient) - 0.5).abs()[wrong] <= TIE).all()
    # Most codes are not at an end of the range: the test sees something.
    assert ((expected > -128) & (expected < 127)).double().mean() > 0.5
