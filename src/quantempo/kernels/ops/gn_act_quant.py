"""GroupNorm, SiLU and quantization in one pass: signature, checks, exact definition."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from quantempo.kernels.ops import checks
from quantempo.kernels.ops.operator import channels_last, entries, image, operator, to_codes

__all__ = ["Normalization", "gn_act_quant"]


@dataclass
class Normalization:
    """Normalise torch.cat([x, skip], 1) by groups, apply SiLU and quantize, in one pass.

    v = (x - mean) / sqrt(var + eps) gamma + beta;  a = v / (1 + exp(-v)) if `silu` else v
    q = clamp(rne(a (1 / scale)) + z, 0, qmax), stored q - 128

    Args:
        x: (N, C1, H, W) float16, bfloat16 or float32, channels_last; `skip`: (N, C2, H, W), alike.
        bucket: see `kernels.ops`.
        gamma, beta: (C1 + C2,) float32; None: no normalisation, `groups` and `eps` are not used.
        scale: (G,) float32; None: no quantization, the first result has the dtype of x.
        raw_scales: (S, G) float32 to get the codes of x itself (row 0) and of `skip` itself (last
            row), with `raw_zero_points` (S of them) and `raw_qmax`; None for neither.
    Returns codes (N, C1 + C2, H, W), codes of x, codes of `skip`; channels_last, or empty (0,).
    Error: statistics are float32 on a GPU, so codes there differ by at most 1 from the CPU's; so do
    those of x and `skip` themselves, where a quotient is next to a tie. Squares fit for all float16
    values; others have to be within 2^63 / sqrt(n) of 0, n the values of a group: beyond, v = beta.
    """

    x: Tensor
    skip: Tensor | None = None
    _: KW_ONLY
    bucket: Tensor
    gamma: Tensor | None = None
    beta: Tensor | None = None
    groups: int = 1
    eps: float = 1e-5
    silu: bool = False
    scale: Tensor | None = None
    zero_point: int = 0
    qmax: int = 255
    raw_scales: Tensor | None = None
    raw_zero_points: Sequence[int] = ()
    raw_qmax: int = 255

    @property
    def images(self) -> tuple[Tensor, ...]:
        """X and, if there is one, skip."""
        return (self.x,) if self.skip is None else (self.x, self.skip)

    @property
    def channels(self) -> int:
        """Channels of all images."""
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])

    def check(self, strides: bool) -> None:
        """Check shapes and types, with `strides` memory and devices too."""
        x, skip, gamma, raws = self.x, self.skip, self.gamma, self.raw_scales
        checks.expect(x.ndim == 4, "x", x.shape, "(N, C, H, W)")
        checks.member("x", x.dtype, checks.FLOATS)
        count, _, height, width = x.shape
        if skip is not None:
            own = skip.shape[1] if skip.ndim == 4 else 0
            checks.shaped("skip", skip, (count, own, height, width), (x.dtype,))
        channels = self.channels
        both = (gamma is None) == (self.beta is None)
        checks.expect(both, "gamma and beta", "one of them", "both or neither")
        checks.shaped("gamma", gamma, (channels,), (torch.float32,))
        checks.shaped("beta", self.beta, (channels,), (torch.float32,))
        divides = gamma is None or (self.groups > 0 and channels % self.groups == 0)
        checks.expect(divides, "groups", self.groups, f"a divisor of the {channels} channels")
        checks.bucket(self.bucket, count)
        checks.table("scale", self.scale)
        checks.grid("zero_point", self.zero_point, self.qmax)
        if raws is not None:
            rows, parts = raws.shape[0], len(self.images)
            fits = raws.ndim == 2 and raws.dtype == torch.float32 and 1 <= rows <= parts
            wanted = f"float32 (S, G) with S in 1..{parts}"
            checks.expect(fits, "raw_scales", checks.kind(raws), wanted)
            points, found = "raw_zero_points", len(self.raw_zero_points)
            checks.expect(found == rows, points, f"{found} of them", f"one a row, {rows}")
            for zero in self.raw_zero_points:
                checks.grid(points, zero, self.raw_qmax)
        if strides:
            checks.last(x.device, x=x, skip=skip)
            checks.dense(
                x.device, gamma=gamma, beta=self.beta, scale=self.scale, bucket=self.bucket,
                raw_scales=raws,
            )  # fmt: skip

    def empty(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return room for the results; those not asked for have shape (0,)."""
        x, dtype = self.x, self.x.dtype if self.scale is None else torch.int8
        codes = torch.empty(0, dtype=dtype, device=x.device)
        if self.gamma is not None or self.silu or self.scale is not None:
            shape = (x.shape[0], self.channels, *x.shape[2:])
            codes = image(shape, dtype, x.device)
        raws = [
            torch.empty(0, dtype=torch.int8, device=x.device)
            if self.raw_scales is None or part is None
            else image(part.shape, torch.int8, x.device)
            for part in (x, self.skip)
        ]
        return codes, raws[0], raws[1]

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the results by the formula of `gn_act_quant`."""
        codes, *raws = self.empty()
        if self.raw_scales is not None:
            for i, part in enumerate(self.images):
                row = min(i, len(self.raw_scales) - 1)
                zero = self.raw_zero_points[row]
                raws[i] = self._codes(part, self.raw_scales[row], zero, self.raw_qmax)
        value = torch.cat(self.images, 1).double()
        if self.gamma is not None and self.beta is not None and value.numel():
            # (N, groups, elements)
            grouped = value.reshape(len(value), self.groups, -1)
            var, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
            value = ((grouped - mean) / torch.sqrt(var + self.eps)).reshape(value.shape)
            gamma, beta = (v.double().reshape(1, -1, 1, 1) for v in (self.gamma, self.beta))
            value = value * gamma + beta
        if self.silu:
            value = value / (1 + torch.exp(-value))
        if self.scale is not None:
            codes = self._codes(value, self.scale, self.zero_point, self.qmax)
        elif codes.ndim == 4:
            codes = channels_last(value.to(codes.dtype))
        return codes, raws[0], raws[1]

    def _codes(self, value: Tensor, table: Tensor, zero: int, qmax: int) -> Tensor:
        scale = entries(table, self.bucket, len(value)).reshape(-1, 1, 1, 1)
        return channels_last(to_codes(value, scale, zero, qmax))


gn_act_quant = operator(tuple[Tensor, Tensor, Tensor], "gn_act_quant")(Normalization)
