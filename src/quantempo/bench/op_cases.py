"""The shapes on which kernels are timed, with their arguments and what they cost.

The shapes are those of real layers: a CIFAR-10 DDPM at batch 256, Stable Diffusion 1.5 at batch 8
and 2, the linear layers of DiT-XL/2, FLUX and SDXL. One copy of the arguments is one `make`: codes
and weights are random and cover their range, since zeros run faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantempo.kernels import layout, ops

__all__ = [
    "CONVOLUTIONS",
    "NORMS",
    "PRODUCTS",
    "ConvCase",
    "GemmCase",
    "NormCase",
    "codes_like",
    "image",
]

_ZERO = 77
_NORM_ZERO, _RAW_ZERO, _RAW_SCALE = 14, 128, 0.03
_BF16 = torch.bfloat16


def codes_like(shape: tuple[int, ...], device: torch.device, low: int = -128) -> Tensor:
    """Return random int8 in [low, 127]."""
    return torch.randint(low, 128, shape, dtype=torch.int8, device=device)


def image(x: Tensor) -> Tensor:
    """Return a (N, C, H, W) tensor in channels_last memory."""
    return x.contiguous(memory_format=torch.channels_last)


def _scale(count: int, device: torch.device) -> Tensor:
    return torch.rand(count, device=device) * 1e-3 + 1e-3


@dataclass(frozen=True)
class ConvCase:
    """A 3x3 convolution of stride 1 with bias, shift, residual and a bfloat16 result."""

    batch: int
    size: int
    inputs: int
    outputs: int

    op = "qconv2d"

    @property
    def name(self) -> str:
        """Batch, map and channels."""
        return f"N{self.batch} {self.size}x{self.size} {self.inputs}->{self.outputs}"

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * 9 * self.batch * self.size**2 * self.inputs * self.outputs

    @property
    def moved(self) -> float:
        """Bytes: codes and weights read, residual read, result written."""
        pixels = self.batch * self.size**2
        return pixels * (self.inputs + 4.0 * self.outputs) + 9.0 * self.inputs * self.outputs

    def make(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of one call, `dense` (O, C, 3, 3) among them for the checks."""
        n, s, c, o = self.batch, self.size, self.inputs, self.outputs
        weight = codes_like((o, c, 3, 3), device, -127)
        return {
            "codes": image(codes_like((n, c, s, s), device)),
            "dense": weight,
            "weight": layout.conv_weight(weight),
            "table": layout.border_table(weight, _ZERO),
            "act_scale": _scale(1, device),
            "weight_scale": _scale(o, device),
            "bucket": torch.zeros((), dtype=torch.int64, device=device),
            "bias": torch.randn(o, device=device),
            "shift": torch.randn(n, o, device=device).to(_BF16),
            "residual": image(torch.randn(n, o, s, s, device=device, dtype=_BF16)),
        }

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Return the result with the whole epilogue, bfloat16."""
        some = {key: value for key, value in given.items() if key != "dense"}
        return ops.qconv2d(**some, out_dtype=_BF16)

    def sums(self, given: dict[str, Tensor]) -> Tensor:
        """Return the integer sums, int32 (N, O, H, W)."""
        names = ("codes", "weight", "act_scale", "weight_scale", "table", "bucket")
        return ops.qconv2d(**{name: given[name] for name in names}, out_dtype=torch.int32)

    def reference(self, given: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Return the exact sums of some images in float64."""
        codes = given["codes"][rows].double() - (_ZERO - layout.OFFSET)
        return torch.nn.functional.conv2d(codes, given["dense"].double(), padding=1)

    def epilogue(self, given: dict[str, Tensor], rows: Tensor, sums: Tensor) -> Tensor:
        """Return what `run` rounds, in float64."""
        scale = (given["act_scale"] * given["weight_scale"]).double()[:, None, None]
        y = scale * sums + given["bias"].double()[:, None, None]
        return y + given["shift"][rows].double()[..., None, None] + given["residual"][rows].double()


@dataclass(frozen=True)
class GemmCase:
    """A linear layer of (rows, inner) by (columns, inner) with bias and a bfloat16 result."""

    rows: int
    columns: int
    inner: int

    op = "qgemm"

    @property
    def name(self) -> str:
        """M x N x K."""
        return f"{self.rows}x{self.columns}x{self.inner}"

    @property
    def operations(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.rows * self.columns * self.inner

    @property
    def moved(self) -> float:
        """Bytes: codes and weights read, result written."""
        return (self.rows + self.columns) * float(self.inner) + 2.0 * self.rows * self.columns

    def make(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of one call."""
        weight = codes_like((self.columns, self.inner), device, -127)
        return {
            "codes": codes_like((self.rows, self.inner), device),
            "weight": weight,
            "table": layout.row_table(weight, _ZERO),
            "act_scale": _scale(1, device),
            "weight_scale": _scale(self.columns, device),
            "bucket": torch.zeros((), dtype=torch.int64, device=device),
            "bias": torch.randn(self.columns, device=device),
        }

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Return the result with the whole epilogue, bfloat16."""
        return ops.qgemm(**given, out_dtype=_BF16)

    def sums(self, given: dict[str, Tensor]) -> Tensor:
        """Return the integer sums, int32 (M, N)."""
        some = {key: value for key, value in given.items() if key != "bias"}
        return ops.qgemm(**some, out_dtype=torch.int32)

    def reference(self, given: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Return the exact sums of some rows in float64."""
        codes = given["codes"][rows].double() - (_ZERO - layout.OFFSET)
        return codes @ given["weight"].double().t()

    def epilogue(self, given: dict[str, Tensor], rows: Tensor, sums: Tensor) -> Tensor:
        """Return what `run` rounds, in float64."""
        return (given["act_scale"] * given["weight_scale"]).double() * sums + given["bias"].double()


@dataclass(frozen=True)
class NormCase:
    """GroupNorm of 32 groups, SiLU and codes of a bfloat16 image, or of two side by side.

    With a second image the codes of both themselves are written too, as a shortcut needs them;
    `joined` puts all codes into one tensor, for the check.
    """

    batch: int
    size: int
    channels: int
    skip: int = 0
    joined: bool = False

    op = "gn_act_quant"
    groups = 32
    eps = 1e-5

    @property
    def name(self) -> str:
        """Batch, map and channels."""
        more = f"+{self.skip}" if self.skip else ""
        return f"N{self.batch} {self.size}x{self.size}x{self.channels}{more}"

    @property
    def operations(self) -> float:
        """None that tensor cores would do."""
        return 0.0

    @property
    def moved(self) -> float:
        """Bytes: every value read once and each of its codes written once."""
        values = float(self.batch) * self.size**2 * (self.channels + self.skip)
        return values * (4 if self.skip else 3)

    def make(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors of one call."""
        n, s = self.batch, self.size
        both = self.channels + self.skip
        given = {
            "x": image(torch.randn(n, self.channels, s, s, device=device, dtype=_BF16)),
            "gamma": torch.rand(both, device=device) + 0.5,
            "beta": torch.randn(both, device=device) * 0.3,
            "scale": torch.full((1,), 0.02, device=device),
            "bucket": torch.zeros((), dtype=torch.int64, device=device),
        }
        if self.skip:
            given["skip"] = image(torch.randn(n, self.skip, s, s, device=device, dtype=_BF16))
            given["raw_scales"] = torch.full((2, 1), _RAW_SCALE, device=device)
        return given

    def run(self, given: dict[str, Tensor]) -> Tensor:
        """Return the codes, with those of the images themselves beside them if there are two."""
        codes, *raw = ops.gn_act_quant(
            **given, groups=self.groups, eps=self.eps, silu=True, zero_point=_NORM_ZERO,
            raw_zero_points=(_RAW_ZERO, _RAW_ZERO) if self.skip else (),
        )  # fmt: skip
        return codes if not self.skip or not self.joined else torch.cat([codes, *raw], 1)

    def reference(self, given: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Return x / scale + z - 128 of some images in float64, before rounding and clamping."""
        parts = [given[name][rows].double() for name in ("x", "skip") if name in given]
        norm = torch.nn.functional.group_norm(
            torch.cat(parts, 1), self.groups, given["gamma"].double(), given["beta"].double(),
            self.eps,
        )  # fmt: skip
        a = torch.nn.functional.silu(norm) / given["scale"].double() + _NORM_ZERO
        raw = [part / _RAW_SCALE + _RAW_ZERO for part in parts] if self.skip else []
        return torch.cat([a, *raw], 1) - layout.OFFSET


CONVOLUTIONS = (
    ConvCase(256, 32, 128, 128),
    ConvCase(256, 16, 256, 256),
    ConvCase(256, 16, 512, 256),
    ConvCase(256, 8, 256, 256),
    ConvCase(8, 64, 320, 320),
    ConvCase(8, 32, 640, 640),
    ConvCase(8, 16, 1280, 1280),
    ConvCase(2, 64, 320, 320),
    ConvCase(2, 32, 640, 640),
)
PRODUCTS = (
    GemmCase(8192, 4608, 1152),
    GemmCase(4608, 12288, 3072),
    GemmCase(2048, 10240, 1280),
    GemmCase(8192, 1280, 1280),
)
NORMS = (
    NormCase(256, 32, 128),
    NormCase(256, 16, 256),
    NormCase(256, 32, 256, 128),
    NormCase(8, 64, 320),
)
