"""The shapes on which kernels are timed, with their arguments, costs, truth and rivals.

Those of a CIFAR-10 DDPM at batch 256, Stable Diffusion 1.5 at batch 8 and 2, SDXL at batch 8, rows
of DiT-XL/2, FLUX and SDXL. Codes and weights are random and cover their range: zeros run faster.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantempo.bench.forwards import Call
from quantempo.engines.base import last
from quantempo.kernels import layout, ops
from quantempo.kernels.ops.attention import exact as exact_attention

__all__ = ["CASES", "PRODUCTS", "Case", "attention", "conv", "gemm", "joint", "norm", "tokens"]

_ZERO = 77
_NORM_ZERO, _RAW_ZERO, _RAW_SCALE = 14, 128, 0.03
_GROUPS, _EPS = 32, 1e-5
_BF16 = torch.bfloat16

Given = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operator on one shape.

    operations: multiplications and additions; moved: every byte read or written once; make:
    arguments of one call, and what checks need beside them; run: the call that is timed; whole: all
    that it writes as one tensor; reference: of some rows in float64, the sums, or without `sums`
    the codes before rounding, or some multiple of the floats; sums: int32, as the kernel has them;
    epilogue: what `run` rounds, in float64, from the sums; rivals: name -> maker of a call of a
    library on arguments of its own, without an epilogue.
    """

    op: str
    name: str
    operations: float
    moved: float
    make: Callable[[torch.device], Given]
    run: Callable[[Given], Tensor]
    whole: Callable[[Given], Tensor]
    reference: Callable[[Given, Tensor], Tensor]
    sums: Callable[[Given], Tensor] | None = None
    epilogue: Callable[[Given, Tensor, Tensor], Tensor] | None = None
    rivals: dict[str, Callable[[torch.device], Call]] = field(default_factory=dict)


def _codes(shape: tuple[int, ...], device: torch.device, low: int = -128) -> Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8, device=device)


def _floats(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=_BF16)


def _terms(channels: int, device: torch.device) -> Given:
    """Return the scales and the bias of a product."""
    scales = (torch.rand(count, device=device) * 1e-3 + 1e-3 for count in (1, channels))
    return {
        **dict(zip(("act_scale", "weight_scale"), scales, strict=True)),
        "bucket": torch.zeros((), dtype=torch.int64, device=device),
        "bias": torch.randn(channels, device=device),
    }


def conv(n: int, s: int, c: int, o: int) -> Case:
    """Return a 3x3 convolution of N maps S x S, with bias, shift, residual, a bfloat16 result."""

    def make(device: torch.device) -> Given:
        weight = _codes((o, c, 3, 3), device, -127)
        return {
            "codes": last(_codes((n, c, s, s), device)),
            "dense": weight,
            "weight": layout.conv_weight(weight),
            "table": layout.border_table(weight, _ZERO),
            **_terms(o, device),
            "shift": _floats(n, o, device=device),
            "residual": last(_floats(n, o, s, s, device=device)),
        }

    def run(given: Given) -> Tensor:
        some = {key: value for key, value in given.items() if key != "dense"}
        return ops.qconv2d(**some, out_dtype=_BF16)

    def sums(given: Given) -> Tensor:
        names = ("codes", "weight", "act_scale", "weight_scale", "table", "bucket")
        return ops.qconv2d(**{name: given[name] for name in names}, out_dtype=torch.int32)

    def reference(given: Given, rows: Tensor) -> Tensor:
        codes = given["codes"][rows].double() - (_ZERO - layout.OFFSET)
        return F.conv2d(codes, given["dense"].double(), padding=1)

    def epilogue(given: Given, rows: Tensor, sums: Tensor) -> Tensor:
        scale = (given["act_scale"] * given["weight_scale"]).double()[:, None, None]
        y = scale * sums + given["bias"].double()[:, None, None]
        return y + given["shift"][rows].double()[..., None, None] + given["residual"][rows].double()

    def bf16(device: torch.device) -> Call:
        x, weight = (last(_floats(*to, device=device)) for to in ((n, c, s, s), (o, c, 3, 3)))
        return lambda: F.conv2d(x, weight, padding=1)

    pixels = n * s**2
    moved = pixels * (c + 4.0 * o) + 9.0 * c * o
    return Case("qconv2d", f"N{n} {s}x{s} {c}->{o}", 18.0 * pixels * c * o, moved, make, run, run,
                reference, sums, epilogue, {"bf16": bf16})  # fmt: skip


def gemm(m: int, n: int, k: int, block: bool = False) -> Case:
    """Return (M, K) rows by (N, K) weights, bias; block: with scales of rows, gate and residual."""

    def make(device: torch.device) -> Given:
        weight = _codes((n, k), device, -127)
        given = {
            "codes": _codes((m, k), device),
            "weight": weight,
            "table": layout.row_table(weight, _ZERO),
            **_terms(n, device),
        }
        if block:
            given["act_scale"] = torch.rand(m, device=device) * 1e-3 + 1e-3
            given["gate"] = _floats(1, n, device=device)
            given["residual"] = _floats(m, n, device=device)
        return given

    def run(given: Given) -> Tensor:
        return ops.qgemm(**given, rows=block, out_dtype=_BF16)

    def sums(given: Given) -> Tensor:
        added = ("bias", "gate", "residual")
        some = {key: value for key, value in given.items() if key not in added}
        return ops.qgemm(**some, rows=block, out_dtype=torch.int32)

    def reference(given: Given, rows: Tensor) -> Tensor:
        codes = given["codes"][rows].double() - (_ZERO - layout.OFFSET)
        return codes @ given["weight"].double().t()

    def epilogue(given: Given, rows: Tensor, sums: Tensor) -> Tensor:
        own = given["act_scale"][rows, None] if block else given["act_scale"]
        y = (own * given["weight_scale"]).double() * sums + given["bias"].double()
        return y * given["gate"].double() + given["residual"][rows].double() if block else y

    def bf16(device: torch.device) -> Call:
        x, weight = (_floats(rows, k, device=device) for rows in (m, n))
        return lambda: F.linear(x, weight)

    def int8(device: torch.device) -> Call:
        x, weight = (_codes((rows, k), device) for rows in (m, n))
        return lambda: torch._int_mm(x, weight.t())

    def fp8(device: torch.device) -> Call:
        x, weight = (_floats(rows, k, device=device).to(torch.float8_e4m3fn) for rows in (m, n))
        left, right = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
        return lambda: torch._scaled_mm(x, weight.t(), left, right, out_dtype=_BF16)

    moved = (m + n) * float(k) + (4.0 if block else 2.0) * m * n
    name = f"{m}x{n}x{k}" + " gated" * block
    return Case("qgemm", name, 2.0 * m * n * k, moved, make, run, run, reference, sums,
                epilogue, {"bf16": bf16, "_int_mm": int8, "fp8 rowwise": fp8})  # fmt: skip


def norm(n: int, s: int, c: int, skip: int = 0) -> Case:
    """Return GroupNorm, SiLU, codes of N bfloat16 images; with skip, of two and their own too."""

    def make(device: torch.device) -> Given:
        given = {
            "x": last(_floats(n, c, s, s, device=device)),
            "gamma": torch.rand(c + skip, device=device) + 0.5,
            "beta": torch.randn(c + skip, device=device) * 0.3,
            "scale": torch.full((1,), 0.02, device=device),
            "bucket": torch.zeros((), dtype=torch.int64, device=device),
        }
        if skip:
            given["skip"] = last(_floats(n, skip, s, s, device=device))
            given["raw_scales"] = torch.full((2, 1), _RAW_SCALE, device=device)
        return given

    def both(given: Given) -> tuple[Tensor, ...]:
        return ops.gn_act_quant(
            **given, groups=_GROUPS, eps=_EPS, silu=True, zero_point=_NORM_ZERO,
            raw_zero_points=(_RAW_ZERO, _RAW_ZERO) if skip else (),
        )  # fmt: skip

    def reference(given: Given, rows: Tensor) -> Tensor:
        parts = [given[name][rows].double() for name in ("x", "skip") if name in given]
        weights = given["gamma"].double(), given["beta"].double()
        y = F.silu(F.group_norm(torch.cat(parts, 1), _GROUPS, *weights, _EPS))
        raw = [part / _RAW_SCALE + _RAW_ZERO for part in parts] if skip else []
        return torch.cat([y / given["scale"].double() + _NORM_ZERO, *raw], 1) - layout.OFFSET

    name = f"N{n} {s}x{s}x{c}" + (f"+{skip}" if skip else "")
    moved = float(n) * s**2 * (c + skip) * (4 if skip else 3)
    return Case("gn_act_quant", name, 0.0, moved, make, lambda given: both(given)[0],
                lambda given: torch.cat(both(given), 1), reference)  # fmt: skip


def tokens(b: int, t: int, c: int, static: bool = False) -> Case:
    """Return LayerNorm, modulation and codes of (B, T, C) bfloat16 tokens, a scale each or one."""

    def make(device: torch.device) -> Given:
        rows = _floats(b, 6 * c, device=device)
        given = {
            "x": _floats(b, t, c, device=device) + 0.5, "scale": rows[:, :c],
            "shift": rows[:, c : 2 * c],
            "bucket": torch.zeros((), dtype=torch.int64, device=device),
        }  # fmt: skip
        return given | ({"act_scale": torch.full((1,), 0.03, device=device)} if static else {})

    def run(given: Given) -> Tensor:
        return ops.norm_modulate_quant(**given)[0]

    def reference(given: Given, rows: Tensor) -> Tensor:
        scale, shift = (given[name].double()[rows // t] for name in ("scale", "shift"))
        v = F.layer_norm(given["x"].flatten(0, 1)[rows].double(), (c,), eps=1e-6)
        v = v * (1 + scale) + shift
        own = given["act_scale"].double() if static else v.abs().amax(1, keepdim=True) / 127
        return v / own

    name = f"{b}x{t}x{c}" + (" static" if static else "")
    moved = 3.0 * b * t * c + 4.0 * b * (c + (0 if static else t))
    return Case("norm_modulate_quant", name, 0.0, moved, make, run, run, reference,
                rivals={"copy": partial(_copy, moved)})  # fmt: skip


def joint(text: int, image: int, heads: int, dim: int) -> Case:
    """Return bfloat16 q, k and v of two streams, q and k normalised and rotated, all joined."""
    tokens, width = text + image, heads * dim

    def make(device: torch.device) -> Given:
        angles = _floats(tokens, dim, device=device).float()
        x = _floats(1, tokens, 3 * width, device=device)
        return {"x": x, "cos": angles.cos(), "sin": angles.sin()}

    def every(given: Given) -> tuple[Tensor, ...]:
        x, cos, sin = given.values()
        streams = (part.chunk(3, 2) for part in x.split([text, image], 1))
        q, k, v = ([*parts] for parts in zip(*streams, strict=True))
        return ops.join_heads(q, k, v, [cos[0]] * 4, [1e-6] * 4, [cos, sin], heads)

    def reference(given: Given, rows: Tensor) -> Tensor:
        x, cos, sin = (value.double() for value in given.values())
        x = x[0, rows].unflatten(1, (3, heads, dim))
        n = F.rms_norm(x[:, :2], (dim,), cos[0], eps=1e-6)
        turned = torch.stack([-n[..., 1::2], n[..., ::2]], -1).flatten(-2)
        n = n * cos[rows, None, None] + turned * sin[rows, None, None]
        return 8 * torch.cat([n, x[:, 2:]], 1).flatten(1)

    moved = 12.0 * tokens * width + 8.0 * tokens * dim
    return Case("join_heads", f"({text}+{image})x{heads}x{dim}", 0.0, moved, make,
                lambda given: every(given)[0], lambda given: 8 * torch.cat(every(given), 2)
                .flatten(2)[0], reference, rivals={"copy": partial(_copy, moved)})  # fmt: skip


def attention(tokens: int, heads: int, dim: int) -> Case:
    """Return attention of one image's bfloat16 heads, queries and keys in 8 bits."""

    def make(device: torch.device) -> Given:
        return {name: _floats(1, tokens, heads, dim, device=device) for name in "qkv"}

    def cudnn(device: torch.device) -> Call:
        given = [x.transpose(1, 2) for x in make(device).values()]
        attend = sdpa_kernel(SDPBackend.CUDNN_ATTENTION)(F.scaled_dot_product_attention)
        return lambda: attend(*given)

    def reference(given: Given, rows: Tensor) -> Tensor:
        q, k, v = given.values()
        return 500 * exact_attention(q[:, rows].double(), k, v)[0].flatten(1)

    return Case("attention8", f"1x{tokens}x{heads}x{dim}", 4.0 * tokens**2 * heads * dim,
                8.0 * tokens * heads * dim, make, lambda given: ops.attention8(**given),
                lambda given: 500 * ops.attention8(**given)[0].flatten(1).float(), reference,
                rivals={"cuDNN": cudnn})  # fmt: skip


def _copy(moved: float, device: torch.device) -> Call:
    source, target = (_codes((int(moved) // 2,), device) for _ in range(2))
    return lambda: target.copy_(source)


PRODUCTS = (
    gemm(8192, 4608, 1152), gemm(4608, 12288, 3072), gemm(2048, 10240, 1280),
    gemm(8192, 1280, 1280),
)  # fmt: skip
CASES = (
    conv(256, 32, 128, 128), conv(256, 16, 256, 256), conv(256, 16, 512, 256),
    conv(256, 8, 256, 256), conv(8, 64, 320, 320), conv(8, 32, 640, 640), conv(8, 16, 1280, 1280),
    conv(2, 64, 320, 320), conv(2, 32, 640, 640), conv(8, 128, 320, 320), *PRODUCTS,
    norm(256, 32, 128), norm(256, 16, 256), norm(256, 32, 256, 128), norm(8, 64, 320),
    tokens(1, 4608, 3072), tokens(32, 256, 1152, static=True), gemm(4608, 3072, 12288, block=True),
    joint(512, 4096, 24, 128), attention(4608, 24, 128),
)  # fmt: skip
