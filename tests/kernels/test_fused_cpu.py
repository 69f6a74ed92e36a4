"""The compiled passes against torch in float64, and how they are built and loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from quantempo.core import ACTIVATION, token_scale
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.kernels.cpu.fused import Norm, Part
from tests.kernels import reference

LIBRARY = fused_cpu.load()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=str(fused_cpu.missing()))
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def parallel_at_any_size(monkeypatch, poisoned_memory):
    monkeypatch.setattr(fused_cpu, "_PARALLEL_FROM", 0)


def image(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    # A mean far from zero: a variance taken as E[x^2] - E[x]^2 would lose digits.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 30
    return x.to(dtype).contiguous(memory_format=LAST)


def group_norm(channels: int, groups: int, seed: int = 1) -> Norm:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(channels, generator=generator) + 0.5
    return Norm(groups, weight, torch.randn(channels, generator=generator), 0.05)


def expected_float(x: torch.Tensor, norm: Norm, silu: bool, shift: torch.Tensor | None = None):
    x = x.double()
    if shift is not None:
        x = x + shift.double()[:, :, None, None]
    y = F.group_norm(x, norm.groups, norm.weight.double(), norm.bias.double(), norm.eps)
    return F.silu(y) if silu else y


SHAPES = [
    # batch, channels, groups, height, width: full and partial vectors, few and many samples
    (2, 32, 32, 4, 4),
    (1, 3, 1, 5, 7),
    (3, 17, 17, 3, 1),
    (1, 48, 16, 7, 5),
    (4, 384, 32, 8, 8),
    (5, 20, 2, 1, 1),
]


@pytest.mark.parametrize(("batch", "channels", "groups", "height", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_group_norm_in_float(batch, channels, groups, height, width, dtype, silu, threads):
    x, norm = image(batch, channels, height, width, dtype=dtype), group_norm(channels, groups)
    shift = torch.randn(batch, channels, generator=torch.Generator().manual_seed(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, raws = LIBRARY.group_norm([Part(x)], norm, silu=silu, grid=None, shift=shift)
    finally:
        torch.set_num_threads(before)
    expected = expected_float(x, norm, silu, shift)
    assert y.dtype == torch.float32
    assert raws == []
    # One input has about 30 / 2 standard deviations of mean: its rounding is 15 * 2^-24 of them.
    # A single pixel or two amplify that (their variance is small): 1e-4 covers both.
    assert (y - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)
    if height * width >= 16:
        assert (y - expected).norm() <= 4e-6 * expected.norm()


@pytest.mark.parametrize(("batch", "channels", "groups", "height", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [False, True])
def test_group_norm_to_codes(batch, channels, groups, height, width, dtype, silu):
    x, norm = image(batch, channels, height, width, dtype=dtype), group_norm(channels, groups)
    codes, _ = LIBRARY.group_norm([Part(x)], norm, silu=silu, grid=(0.02, 14, 255))
    assert codes.is_contiguous(memory_format=LAST)
    expected = reference.quantize(expected_float(x, norm, silu), 0.02, 14)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() <= 1e-2


def edge_rows(channels: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(16, channels, generator=torch.Generator().manual_seed(seed))


def expected_edge(x: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Add the row of `edge` that each pixel's place asks for, one pixel at a time."""
    y = x.double()
    height, width = x.shape[2:]
    for i in range(height):
        for j in range(width):
            mask = (i == 0) + 2 * (i == height - 1) + 4 * (j == 0) + 8 * (j == width - 1)
            if mask:
                y[:, :, i, j] += edge[mask]
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 16, 33])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (2, 2), (5, 4)])
@pytest.mark.parametrize("other", [False, True])
def test_add(dtype, channels, size, other):
    x, edge = image(2, channels, *size, dtype=dtype), edge_rows(channels)
    y = image(2, channels, *size, dtype=dtype, seed=7) if other else None
    expected = expected_edge(x, edge) + (0 if y is None else y.double())
    got = LIBRARY.add(x.clone(), y, edge)
    # One rounding of the sum; with `y` another for the border.
    unit = 2.0**-24 if dtype == torch.float32 else 2.0**-8
    assert (got.double() - expected).abs().max() <= 2 * unit * expected.abs().max()
    plain = x if y is None else x + y
    assert torch.equal(LIBRARY.add(x.clone(), y, None), plain)
    with pytest.raises(ValueError, match="channels_last"):
        LIBRARY.add(torch.zeros(1, 4, 3, 3), None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 16, 30])
def test_two_parts_are_one_tensor(dtype, split):
    x, norm = image(3, 48, 5, 6, dtype=dtype), group_norm(48, 16)
    whole, _ = LIBRARY.group_norm([Part(x)], norm, silu=True, grid=(0.03, 9, 255))
    grids = [(0.3, 20, 255), (0.4, 0, 63)]
    halves = [x[:, :split], x[:, split:]]
    for form in (halves, [half.contiguous(memory_format=LAST) for half in halves]):
        parts = [Part(half, grid) for half, grid in zip(form, grids, strict=True)]
        codes, raws = LIBRARY.group_norm(parts, norm, silu=True, grid=(0.03, 9, 255))
        assert torch.equal(codes, whole)
        for raw, half, grid in zip(raws, halves, grids, strict=True):
            assert torch.equal(raw, reference.quantize(half, *grid))


def test_a_shift_may_be_shared_by_all_samples():
    x, norm = image(2, 32, 4, 4), group_norm(32, 8)
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    how = {"silu": True, "grid": (0.02, 9, 255)}
    shared, _ = LIBRARY.group_norm([Part(x)], norm, **how, shift=row.expand(2, -1))
    own, _ = LIBRARY.group_norm([Part(x)], norm, **how, shift=row.repeat(2, 1))
    assert torch.equal(shared, own)


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("border", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 3)])
def test_quantize_is_exact(channels, dtype, repeat, border):
    shape = (2, channels, 5, 7)
    halves = torch.arange(2 * channels * 35).reshape(shape) % 255 - 127 + 0.5
    # A power of two: real ties. The others: quotients that float32 rounds to a tie or just not.
    for scale, zero in ((0.25, 131), (0.0125, 131), (0.0371, 3)):
        x = (halves * scale).to(dtype).contiguous(memory_format=LAST)
        got = LIBRARY.quantize(x, scale, zero, 255, border, repeat)
        inner = reference.quantize(x, scale, zero)
        inner = inner.repeat_interleave(repeat, 2).repeat_interleave(repeat, 3)
        top, bottom, left, right = border
        expected = F.pad(inner.int(), (left, right, top, bottom), value=zero)
        assert torch.equal(got.int(), expected)


def test_quantize_reads_channel_slices_and_clamps():
    x = image(2, 40, 3, 4)
    assert torch.equal(LIBRARY.quantize(x[:, 3:25], 0.2, 7), reference.quantize(x[:, 3:25], 0.2, 7))
    with pytest.raises(ValueError, match="channels_last"):
        LIBRARY.quantize(x.contiguous(), 0.2, 7)
    with pytest.raises(TypeError, match="float16"):
        LIBRARY.quantize(x.half(), 0.2, 7)
    extremes = torch.tensor([1e30, -1e30, float("inf"), -float("inf"), 0.5, 1.5, -0.5])
    codes = LIBRARY.quantize(extremes.reshape(1, 7, 1, 1), 1.0, 100).flatten()
    assert codes.tolist() == [255, 0, 255, 0, 100, 102, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("zero", "qmax"), [(0, 15), (7, 15), (15, 15), (20, 63), (1, 3), (90, 127)]
)
def test_no_code_is_above_the_largest(dtype, zero, qmax):
    # 27 channels: whole vectors and a rest. Far outside the grid on both sides.
    x, grid = (image(2, 27, 5, 6, dtype=dtype) - 30) * 4, (0.11, zero, qmax)
    x = x.contiguous(memory_format=LAST)
    wanted = reference.quantize(x, *grid)
    assert (int(wanted.min()), int(wanted.max())) == (0, qmax)
    assert torch.equal(LIBRARY.quantize(x, *grid), wanted)
    assert torch.equal(onednn.quantize(x, *grid), wanted)
    bordered = LIBRARY.quantize(x, *grid, border=(1, 0, 2, 1), repeat=2)
    assert (bordered[:, :, 0] == zero).all() and int(bordered.max()) == qmax
    rows = x.permute(0, 2, 3, 1).reshape(-1, 27)
    assert torch.equal(LIBRARY.quantize_rows(rows, *grid), reference.quantize(rows, *grid))
    # Both codes of a norm: its own, and the raw ones of its input.
    norm, own = group_norm(27, 9), (0.02, zero, qmax)
    codes, (raw,) = LIBRARY.group_norm([Part(x, grid)], norm, silu=False, grid=own)
    assert torch.equal(raw, wanted)
    expected = reference.quantize(expected_float(x, norm, False), *own)
    assert (int(codes.min()), int(codes.max())) == (0, qmax)
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).float().mean() <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantize_rows(dtype):
    x = image(6, 37, 1, 1, dtype=dtype).reshape(6, 37)
    for rows in (x, x[:, 5:30], x[::2], x.t().contiguous().t()):
        assert torch.equal(LIBRARY.quantize_rows(rows, 0.11, 5), reference.quantize(rows, 0.11, 5))
        # Of each row, measured on the way.
        found, scale = torch.empty(len(rows), 1), token_scale(rows, ACTIVATION)
        codes = LIBRARY.quantize_rows(rows, 0.0, 128, 255, found)
        assert torch.equal(found, scale)
        assert torch.equal(codes, onednn.quantize(rows / scale, 1.0, 128))


def test_silu_over_its_whole_range():
    # With two samples of opposite sign the norm is the identity: gamma and beta give the argument.
    values = torch.cat([torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 95)])
    x = torch.stack([torch.ones(64), -torch.ones(64)], 1).reshape(1, 64, 1, 2)
    x = x.contiguous(memory_format=LAST)
    for chunk in values.reshape(-1, 64):
        norm = Norm(64, torch.zeros(64), chunk.contiguous(), 1e-5)
        y, _ = LIBRARY.group_norm([Part(x)], norm, silu=True, grid=None)
        expected = F.silu(chunk.double())
        error = (y[0, :, 0, 0] - expected).abs()
        # The polynomial, and the exponent x log2(e) rounded to float32.
        relative = 1e-6 + chunk.abs().double() * 2.0**-23
        assert (error <= relative * expected.abs() + 1e-30).all()


def test_the_avx2_code_gives_the_same_codes(tmp_path, monkeypatch):
    flags = [flag for flag in fused_cpu._FLAGS if flag != "-march=native"]
    monkeypatch.setattr(fused_cpu, "_FLAGS", (*flags, "-mavx2", "-mfma"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    narrow = fused_cpu._cached("gcc")
    for dtype in (torch.float32, torch.bfloat16):
        x, norm = image(2, 27, 5, 6, dtype=dtype), group_norm(27, 9)
        raw = (0.3, 20, 255)
        a, (raw_a,) = LIBRARY.group_norm([Part(x, raw)], norm, silu=True, grid=(0.02, 9, 255))
        b, (raw_b,) = narrow.group_norm([Part(x, raw)], norm, silu=True, grid=(0.02, 9, 255))
        assert (a.int() - b.int()).abs().max() <= 1
        assert torch.equal(raw_a, raw_b)
        for grid in ((0.3, 20, 255), (0.3, 20, 31), (0.3, 0, 3)):
            assert torch.equal(narrow.quantize(x, *grid), reference.quantize(x, *grid))


def test_one_openmp_runtime_is_shared_with_torch():
    LIBRARY.quantize(image(1, 16, 4, 4), 0.1, 3)
    maps = Path("/proc/self/maps").read_text().splitlines()
    names = {line.split()[-1] for line in maps if "/" in line}
    runtimes = {n for n in names if any(k in Path(n).name for k in ("gomp", "iomp", "libomp"))}
    assert len(runtimes) == 1, runtimes


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return the path of a library compiled into a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused_cpu._cached("gcc")
    (path,) = (tmp_path / "quantempo").iterdir()
    fused_cpu._load.cache_clear()
    yield path
    fused_cpu._load.cache_clear()


# Loads, and says that its structures have the right size, but has nothing else.
STUB = f"int quantempo_layout(void) {{ return {LIBRARY and LIBRARY.layout}; }}"


def plant(path: Path) -> None:
    """Put a library that is not ours in the place of the compiled one."""
    path.unlink()
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=STUB, text=True, check=True)


def test_the_cache_is_reused(cache):
    stamp = cache.stat().st_mtime_ns
    fused_cpu._cached("gcc")
    assert cache.stat().st_mtime_ns == stamp
    assert cache.stat().st_mode & 0o777 == 0o700


def replace(path: Path, code: bytes) -> None:
    """Put other bytes in its place, in another file: this process has mapped the old one."""
    path.unlink()
    path.write_bytes(code)
    path.chmod(0o700)


@pytest.mark.parametrize("damage", ["no library", "planted", "cut"])
def test_a_damaged_library_is_built_again(cache, damage):
    size = cache.stat().st_size
    if damage == "planted":
        plant(cache)
    else:
        # Of the first page alone the loader maps more, and a process dies of it.
        replace(cache, cache.read_bytes()[:4096] if damage == "cut" else b"no library")
    assert fused_cpu.missing() is None
    assert cache.stat().st_size == size
    assert torch.equal(
        fused_cpu.load().quantize(image(1, 3, 2, 2), 0.5, 3),
        reference.quantize(image(1, 3, 2, 2), 0.5, 3),
    )
    assert list(cache.parent.iterdir()) == [cache]


def test_what_others_could_have_written_is_not_loaded(cache):
    plant(cache)
    cache.chmod(0o722)
    loaded = cache.stat().st_ino
    assert fused_cpu.missing() is None
    assert cache.stat().st_ino != loaded
    fused_cpu._load.cache_clear()
    cache.parent.chmod(0o777)
    assert "other users can write to" in fused_cpu.missing()
    assert fused_cpu.load() is None


def test_whatever_fails_is_a_reason(monkeypatch):
    def fail(compiler):
        raise RuntimeError("something else")

    monkeypatch.setattr(fused_cpu, "_cached", fail)
    fused_cpu._load.cache_clear()
    try:
        assert fused_cpu.missing() is not None
    finally:
        fused_cpu._load.cache_clear()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [("", "no C compiler"), ("#!/bin/sh\necho bad option >&2\nexit 1\n", "bad option")],
    ids=["none", "broken"],
)
def test_without_a_compiler_it_says_so(tmp_path, compiler, said):
    tools = tmp_path / "bin"
    tools.mkdir()
    if compiler:
        (tools / "gcc").write_text(compiler)
        (tools / "gcc").chmod(0o755)
    code = "from quantempo.kernels.cpu import fused\nprint(fused.load(), fused.missing())"
    where = {"PATH": str(tools), "XDG_CACHE_HOME": str(tmp_path)}
    environment = {**os.environ, **where, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("None")
    assert said in done.stdout
