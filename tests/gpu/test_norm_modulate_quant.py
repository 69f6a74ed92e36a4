"""Tokens normalised, modulated and quantized: interpreted against float64, and as machine code.

Codes may differ by 1 from the float64 ones where the float64 quotient lies within TIE of a tie.
"""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from quantempo.kernels import ops
from quantempo.kernels.gpu import norm_modulate_quant as kernel
from quantempo.kernels.ops.norm_modulate_quant import Tokens
from tests.gpu import harness
from tests.gpu.layers import PROCESSORS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

TIE = 1e-3
HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One call; wide: how much wider the tensors are of which x, scale and shift are slices."""

    b: int = 2
    t: int = 7
    c: int = 48
    norm: str = "layer"
    affine: bool = False
    modulate: str = "both"  # or "scale", "shift", "none"
    dtype: torch.dtype = BRAIN
    modulation: torch.dtype = BRAIN
    static: bool = False
    buckets: int = 1
    mixed: bool = False
    zero_point: int = 70
    qmax: int = 255
    wide: int = 0
    offset: float = 0.5

    def call(self, device: str = "cpu") -> Tokens:
        g = torch.Generator().manual_seed(11)
        b, t, c, more = self.b, self.t, self.c, self.wide

        def randn(*shape: int, dtype: torch.dtype = FLOAT) -> Tensor:
            return torch.randn(shape, generator=g).to(dtype).to(device)

        x = (randn(b, t + more, c + more) * 2 + self.offset).to(self.dtype)[:, :t, more:]
        rows = randn(b, 2 * c + more, dtype=self.modulation)
        scale, shift = rows[:, :c], rows[:, c : 2 * c]
        weight, bias = (randn(c) + 1, randn(c, dtype=HALF)) if self.affine else (None, None)
        steps = (torch.rand(self.buckets, generator=g) * 0.02 + 0.01).to(device)
        index = torch.randint(0, self.buckets, (b,) if self.mixed else (), generator=g).to(device)
        return ops.norm_modulate_quant.__wrapped__(
            x, bucket=index, norm=self.norm, weight=weight, bias=bias,
            scale=scale if self.modulate in ("both", "scale") else None,
            shift=shift if self.modulate in ("both", "shift") else None, eps=1e-5,
            act_scale=steps if self.static else None, zero_point=self.zero_point, qmax=self.qmax,
        )  # fmt: skip


def exact(call: Tokens) -> Tensor:
    """Return v in float64, from the formulas, (B T, C)."""
    v = call.x.double()
    if call.norm == "layer":
        v = v - v.mean(2, keepdim=True)
    if call.norm != "none":
        v = v / (v.square().mean(2, keepdim=True) + call.eps).sqrt()
    v = v if call.weight is None else v * call.weight.double() + call.bias.double()
    v = v if call.scale is None else v * (1 + call.scale.double())[:, None]
    v = v if call.shift is None else v + call.shift.double()[:, None]
    return v.flatten(0, 1)


def check(call: Tokens, launch) -> int:
    """Run a call, assert its results, return how many codes differ from the float64 ones."""
    codes, row_scale = launch(call)
    v, rows = exact(call), call.x.shape[0] * call.x.shape[1]
    assert codes.dtype == torch.int8 and codes.is_contiguous()
    assert codes.shape == (rows, call.x.shape[2])
    if call.act_scale is None:
        assert row_scale.shape == (rows,)
        wanted = v.abs().amax(1) / 127
        assert ((row_scale - wanted).abs() <= 2e-5 * wanted).all()
        quotient, low, high, zero = v / row_scale.double()[:, None], -127, 127, 0
    else:
        assert row_scale.shape == (0,)
        index = call.bucket.expand(len(call.x)) if call.bucket.ndim == 0 else call.bucket
        steps = call.act_scale[index if len(call.act_scale) > 1 else 0 * index]
        quotient = v / steps.double().repeat_interleave(call.x.shape[1])[:, None]
        low, high, zero = -128, call.qmax - 128, call.zero_point - 128
    expected = (torch.round(quotient) + zero).clamp(low, high)
    wrong = codes.double() != expected
    assert ((codes.double() - expected).abs() <= 1).all()
    from_tie = (quotient - torch.floor(quotient) - 0.5).abs()
    assert (from_tie[wrong] <= TIE).all(), from_tie[wrong].max()
    return int(wrong.sum())


CASES = {
    "a scale a token": Case(),
    "one token": Case(b=1, t=1, c=16),
    "static": Case(static=True, buckets=4),
    "four bits": Case(static=True, qmax=15, zero_point=3, mixed=True),
    "buckets": Case(b=3, static=True, buckets=4, mixed=True),
    "rms": Case(norm="rms", c=1152, t=3),
    "affine": Case(affine=True, modulate="scale", c=320, norm="rms"),
    "shift alone": Case(modulate="shift", norm="rms"),
    "quantized only": Case(norm="none", modulate="none", dtype=HALF),
    "modulated only": Case(norm="none", c=80),
    "slices": Case(wide=8, c=160, static=True),
    "slices that start anywhere": Case(wide=3, dtype=FLOAT),
    "half and float": Case(dtype=HALF, modulation=FLOAT, c=640),
    "float": Case(dtype=FLOAT, c=1280, t=2),
    "no padding": Case(b=1, t=3, c=3072),
    "large": Case(b=1, t=2, c=8208),
    "in turns": Case(t=23, c=1152),
    "in turns, rows": Case(b=3, t=43, c=640, static=True, buckets=4, mixed=True),
    "no token": Case(t=0),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_float64(name: str, device: str, monkeypatch) -> None:
    module = harness.interpreted("norm_modulate_quant") if device == "cpu" else kernel
    monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    call = CASES[name].call(device)
    call.check(strides=True)
    assert check(call, Tokens.exact) == 0
    # Chance of a quotient so near a tie is 2 TIE.
    assert check(call, module.launch) <= 0.01 * call.x.numel()
    if name == "quantized only":
        # One division: the same one on any device.
        assert torch.equal(module.launch(call)[1], call.exact()[1])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("launch", ["definition", *DEVICES])
def test_rows_without_a_largest_value(launch) -> None:
    x = torch.zeros(1, 7, 64)
    x[0, 1, 5], x[0, 2, 5], x[0, 3, 5], x[0, 5, 5] = torch.inf, torch.nan, 3e38, 1e-40
    x[0, 4] = torch.arange(64) / 2
    x[0, 6, 3:5] = torch.tensor([torch.nan, -torch.inf])
    device = "cuda" if launch == "cuda" else "cpu"
    run = {
        "definition": Tokens.exact, "cuda": kernel.launch,
        "cpu": harness.interpreted("norm_modulate_quant").launch,
    }[launch]  # fmt: skip

    def rows(norm: str) -> tuple[Tensor, Tensor]:
        given = {"bucket": torch.tensor(0, device=device), "norm": norm}
        codes, scale = run(ops.norm_modulate_quant.__wrapped__(x.to(device), **given))
        return codes.cpu(), scale.cpu()

    codes, scale = rows("none")
    # Zeros, and what is nearer to them than the smallest normal number.
    assert scale[0] == scale[5] == 2**-126 and not codes[[0, 5]].any()
    # No row that holds a NaN or an infinity becomes a plausible one.
    assert scale[[1, 2, 6]].isnan().all() and not codes[[1, 2, 6]].any()
    assert codes[3, 5] == 127 and scale[3] == torch.tensor(3e38) / 127
    reciprocal = 1 / (torch.tensor(31.5) / 127)
    assert torch.equal(codes[4].float(), torch.round(x[0, 4] * reciprocal))
    for norm in ("layer", "rms"):
        codes, scale = rows(norm)
        assert scale[[1, 2, 6]].isnan().all() and not codes[[1, 2, 6]].any()
        assert scale[[0, 4]].isfinite().all() and not codes[0].any()
        assert codes[3, 5] == 127 if run is Tokens.exact else scale[3].isnan()


def test_variance_survives_a_mean_a_thousand_times_larger() -> None:
    call = Case(dtype=FLOAT, offset=2000.0, modulate="none", c=320, static=True).call()
    codes, _ = harness.interpreted("norm_modulate_quant").launch(call)
    expected = (torch.round(exact(call) / call.act_scale.double()) + 70).clamp(0, 255) - 128
    assert ((codes - expected).abs() <= 1).all() and (codes != expected).double().mean() < 0.02


# --- machine code --------------------------------------------------------------------------------

# (images, tokens, channels): FLUX, DiT-XL/2, PixArt, SD3.5-large, Wan 1.3B, small, MLPs of FLUX.
SHIPPED = [
    (1, 4608, 3072), (32, 256, 1152), (2, 4096, 2432), (1, 14040, 1536), (4, 64, 256),
    (1, 4608, 12288), (1, 512, 20480),
]  # fmt: skip


def recorded(
    b: int, t: int, c: int, norm: str = "layer", dtype=BRAIN, static: bool = False,
    affine: bool = False, zero_point: int = 128, early: bool = False,
) -> harness.Launch:  # fmt: skip
    def empty(*shape: int, dtype=FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows, weight = empty(b, 6 * c, dtype=dtype), empty(c) if affine else None
    call = Tokens(
        empty(b, t, c, dtype=dtype), bucket=empty(dtype=torch.int64), norm=norm, weight=weight,
        bias=weight, scale=None if affine else rows[:, :c], zero_point=zero_point,
        shift=None if affine else rows[:, c : 2 * c], act_scale=empty(8) if static else None,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, harness.recorded(kernel) as launches:
        patch.setattr(kernel, "multiprocessors", lambda device: PROCESSORS[90])
        kernel.launch(call)
    (only,) = launches
    return dataclasses.replace(only, kwargs=only.kwargs | {"EARLY": early})


COMPILED = [
    *((90, shape, {"early": True}) for shape in SHIPPED),
    *((arch, shape, {"static": arch == 80}) for arch in (80, 89) for shape in SHIPPED[:2]),
    (90, SHIPPED[1], {"norm": "rms", "static": True}),
    *((90, shape, {}) for shape in ((2, 77, 1152), (1, 512, 3072))),
    (90, SHIPPED[3], {"dtype": FLOAT}),
    (90, SHIPPED[2], {"affine": True}),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "shape", "how"), COMPILED, ids=str)
def test_shipped_shapes_compile_without_spills(arch: int, shape, how) -> None:
    binary = harness.compiled(launch := recorded(*shape, **how), arch)
    assert (binary.spills, binary.stack) == (0, 0)
    # Programs that compute in turns run all at once.
    _, rows, warps = kernel.tiles(shape[2])
    loop, pieces = launch.kwargs["LOOP"], -(-shape[2] // launch.kwargs["WIDTH"])
    threads = 32 * warps * -(-launch.grid[0] // PROCESSORS[90]) if loop else 512
    assert -(-binary.registers // 8) * 8 * threads <= 1 << 16
    # x and two of C come eight or four values at a time, all of them; codes leave so too.
    eight = launch.kwargs["WIDTH"] * rows == 256 * warps
    wide = {"dtype": 6, "affine": 5}
    loads = pieces * max((wide.get(name, 3) for name in how), default=3)
    assert binary.count(r"LDG\.E\.128" if eight else r"LDG\.E\.64") >= loads
    # Of a row with its own scale zeros are a store too, instead of a selection of each code.
    stores = pieces * (1 if how.get("static") else 2)
    own = not how.get("static") and not eight
    assert binary.count(r"STG\.E\.64" if eight else r"STG\.E ") == stores + own
    assert binary.count(r"STG\.E\.(?:U8|U16)") == 0
    # Shared memory holds what the warps of a row have to tell each other, not a tile.
    assert binary.shared <= 64 and ("ACQBULK" in binary.sass) == how.get("early", False)


def test_batches_token_counts_and_zero_points_share_two_binaries() -> None:
    calls = itertools.product((1, 3), (16, 77, 512, 4608, 4609), (0, 128))
    variants = {
        harness.variant(recorded(b, t, 3072, zero_point=z, static=True)) for b, t, z in calls
    }
    # One token a program, and several.
    assert len(variants) == 2
