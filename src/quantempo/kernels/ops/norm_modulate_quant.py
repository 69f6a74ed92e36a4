"""Normalization over channels, modulation and quantization of tokens in one pass."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.operator import entries, operator, to_codes

__all__ = ["MOST_CHANNELS", "SMALLEST_SCALE", "Tokens", "norm_modulate_quant"]

MOST_CHANNELS = 5 << 12
# The smallest normal float32: rows of zeros have it, and so have those that only a subnormal fits.
SMALLEST_SCALE = 2.0**-126


@dataclass
class Tokens:
    """Normalise tokens over their channels, modulate and quantize them, in one pass.

    v = (x - mean) / sqrt(var + eps) of "layer", x / sqrt(mean(x^2) + eps) of "rms", x of "none"
    v = (v weight[c] + bias[c]) (1 + scale[b, c]) + shift[b, c]
    q = clamp(rne(v (1 / act_scale)) + z, 0, qmax), stored q - 128; without an act_scale
    row_scale[m] = max(max_c |v[m, c]| / 127, 2^-126), q = rne(v (1 / row_scale)), stored as it is

    Args:
        x: (B, T, C) float16, bfloat16 or float32, C a multiple of 16 up to 20480, the channels of a
            token contiguous; images and tokens may lie apart.
        bucket: see `kernels.ops`; of images, for act_scale.
        norm: "layer", "rms" or "none", which leaves x.
        weight, bias: (C,) any float; None: 1 and 0.
        scale, shift: (B, C) any float, rows may lie apart: chunks of one modulation product.
        act_scale: (G,) float32, with `zero_point` and `qmax`; None: a scale for each token, for
            `qgemm` with the zero point 128.
    Returns codes (B T, C) int8 and row_scale (B T,) float32, or (0,) with an act_scale. A token
    with a NaN or an infinity has the row_scale NaN and codes 0, whose products are NaN.
    Error: statistics are float32 on a GPU, so codes there differ by at most 1 from the CPU's, and
    what has squares beyond float32 is as an infinity is.
    """

    x: Tensor
    _: KW_ONLY
    bucket: Tensor
    norm: str = "layer"
    weight: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    eps: float = 1e-6
    act_scale: Tensor | None = None
    zero_point: int = 128
    qmax: int = 255

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        x = self.x
        checks.expect(x.ndim == 3, "x", x.shape, "(B, T, C)")
        checks.member("x", x.dtype, checks.FLOATS)
        checks.member("norm", self.norm, ("layer", "rms", "none"))
        count, _, channels = x.shape
        fits = channels % 16 == 0 and 0 < channels <= MOST_CHANNELS
        checks.expect(fits, "x", x.shape, f"C a multiple of 16 up to {MOST_CHANNELS}")
        checks.shaped("weight", self.weight, (channels,), checks.FLOATS)
        checks.shaped("bias", self.bias, (channels,), checks.FLOATS)
        checks.shaped("scale", self.scale, (count, channels), checks.FLOATS)
        checks.shaped("shift", self.shift, (count, channels), checks.FLOATS)
        checks.bucket(self.bucket, count)
        checks.table("act_scale", self.act_scale)
        checks.grid("zero_point", self.zero_point, self.qmax)
        if strides:
            # Rows may lie apart.
            rows = {"x": x[:1, :1], "scale": self.scale, "shift": self.shift}
            checks.dense(
                x.device, weight=self.weight, bias=self.bias, act_scale=self.act_scale,
                bucket=self.bucket, **{name: v if v is None else v[:1] for name, v in rows.items()},
            )  # fmt: skip

    def empty(self) -> tuple[Tensor, Tensor]:
        """Return room for the results; there are no scales of rows with an act_scale."""
        x, rows = self.x, self.x.shape[0] * self.x.shape[1]
        codes = x.new_empty((rows, x.shape[2]), dtype=torch.int8)
        count = rows if self.act_scale is None else 0
        return codes, x.new_empty(count, dtype=torch.float32)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return the results by the formula of `norm_modulate_quant`."""
        v = self.x.double()
        if self.norm != "none":
            centred = v - v.mean(2, keepdim=True) if self.norm == "layer" else v
            v = centred / torch.sqrt(centred.square().mean(2, keepdim=True) + self.eps)
        if self.weight is not None:
            v = v * self.weight.double()
        if self.bias is not None:
            v = v + self.bias.double()
        if self.scale is not None:
            v = v * (1 + self.scale.double()[:, None])
        if self.shift is not None:
            v = v + self.shift.double()[:, None]
        codes, row_scale = self.empty()
        if self.act_scale is not None:
            scale = entries(self.act_scale, self.bucket, len(v)).reshape(-1, 1, 1)
            return to_codes(v, scale, self.zero_point, self.qmax).reshape(codes.shape), row_scale
        v = v.float().reshape(codes.shape)
        # Of float32 torch on a GPU multiplies by 1 / 127 instead.
        row_scale = (v.abs().amax(1).double() / 127).float().clamp(min=SMALLEST_SCALE)
        # A NaN is its row's largest value.
        finite = row_scale.isfinite()
        row_scale = row_scale.where(finite, torch.nan)
        codes = to_codes(v.where(finite[:, None], 0), row_scale.where(finite, 1)[:, None], 128, 255)
        return codes, row_scale


norm_modulate_quant = operator(tuple[Tensor, Tensor], "norm_modulate_quant")(Tokens)
