"""8-bit attention: its definition, codes interpreted, machine code, and on a GPU of Hopper.

Gluon kernels cannot be interpreted: without a GPU only the codes are computed by the kernel.
"""

import itertools

import pytest
import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels import ops
from quantempo.kernels.gpu.attention import launch
from quantempo.kernels.ops.attention import Attention, decoded_keys, exact, supported
from tests.gpu import harness

HALF, BRAIN = torch.float16, torch.bfloat16
needs_hopper = pytest.mark.cuda(major=9)


def made(b: int, t: int, s: int, h: int, d: int, dtype=BRAIN, device: str = "cpu") -> Attention:
    """Return a call: heads of k before its tokens, v columns of a product."""
    g = torch.Generator().manual_seed(t)
    shapes = (b, t, h, d), (b, h, s, d), (b, s, 2 * h, d)
    q, k, v = (torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes)
    return Attention(q, k.transpose(1, 2), v[:, :, h:])


def away(y: Tensor, call: Attention) -> float:
    """Return the relative error of y in per cent of the definition without its rounding."""
    wanted = exact(*(x.double() for x in call))
    return float(100 * (y - wanted).norm() / wanted.norm())


def test_definition() -> None:
    call = made(2, 9, 300, 2, 64, torch.float32)
    k = decoded_keys(call.k)
    for block, group in itertools.product(range(3), range(4)):
        of = [t for t in range(300) if t // 128 == block and t % 8 // 2 == group]
        for i, h in itertools.product(range(2), repeat=2):
            scale = call.k[i, of, h].abs().max().double() / 127
            wanted = (call.k[i, of, h].double() / scale).round() * scale
            torch.testing.assert_close(k[i, of, h], wanted, rtol=1e-6, atol=0)
    y = ops.attention8(*call)
    assert torch.equal(y, exact(*call)) and y.is_contiguous() and y.dtype == torch.float32
    real = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in call)).transpose(1, 2)
    assert 0.002 < (y - real).norm() / real.norm() < 0.015
    # One key has all the weight, none of what is rounded.
    one = Attention(call.q, call.k[:, :1], call.v[:, :1])
    assert torch.equal(ops.attention8(*one), one.v.expand_as(y))


def test_where_it_is_supported() -> None:
    assert not supported(torch.device("cpu"), 64, BRAIN)
    assert not any(supported(torch.device("cuda"), d, BRAIN) for d in (32, 68, 136))
    assert not supported(torch.device("cuda"), 64, torch.float32)


def spoil(call: Attention) -> None:
    """Make values not finite: of queries of head 1, a key of head 2, a value of head 0."""
    call.q[0, 1, 1, 3], call.q[0, 2, 1, 5] = torch.nan, torch.inf
    call.k[0, 130, 2, 3] = -torch.inf
    call.v[0, 7, 0, 9] = torch.nan


def check_spoilt(y: Tensor) -> None:
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[0, 1:3, 1] = bad[0, :, 2] = bad[0, :, 0, 9] = True
    assert torch.equal(y.isnan(), bad)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(("d", "dtype"), [(64, HALF), (128, BRAIN), (88, BRAIN), (40, HALF)])
def test_codes_interpreted(d: int, dtype: torch.dtype) -> None:
    call = made(2, 77, 300, 3, d, dtype)
    spoil(call)
    check_spoilt(ops.attention8(*call))
    call.q[1, 5], call.k[1, 128:] = 0, 0
    q, k = call.q, call.k
    rows = [torch.full((*x.shape[:3], -(-d // 16) * 16), 99, dtype=torch.int8) for x in (q, k)]
    q8, k8 = (x[..., :d] for x in rows)
    q_scale, k_scale, over = torch.empty(2, 3, 77), torch.empty(2, 3, 3, 4), torch.ones(1).int()
    apart = [x.stride(i) // 8 for x in (q, k) for i in range(3)]
    kernel = harness.interpreted("attention.launch").quantize_heads
    kernel[(24,)](q, k, over, q8, k8, q_scale, k_scale, 77, 300, 3, *apart, D=d, BLOCK=128)
    t = torch.arange(300)
    of_keys = k_scale[:, :, t // 128, t % 8 // 2]
    found = [x * s.transpose(1, 2)[..., None].double() for x, s in ((q8, q_scale), (k8, of_keys))]
    assert over == 0 and all((x[..., d:] != 99).all() for x in rows)
    # The interpreter rounds twice, a GPU once: codes next to a tie move by 1.
    same = torch.isclose(found[1], decoded_keys(k), rtol=0, atol=0, equal_nan=True)
    assert 1 - same.double().mean() < 2e-3
    assert torch.equal(found[0].isnan().any(3).nonzero(), torch.tensor([[0, 1, 1], [0, 2, 1]]))
    for x, y, scale in zip((q, k), found, (q_scale, of_keys), strict=True):
        error = (y - x).abs() / scale.transpose(1, 2)[..., None]
        assert error.nan_to_num(0, posinf=0).max() <= 0.5 + 1e-4


def recorded(b, t, s, h, d, dtype=BRAIN) -> list[harness.Launch]:
    with harness.recorded(launch) as launches:
        launch.run(Attention(*(x.to("meta") for x in made(b, t, s, h, d, dtype))), 132)
    return launches


@pytest.mark.parametrize("d", [64, 40])
def test_shares_are_joined(d: int) -> None:
    g, y = torch.Generator().manual_seed(d), torch.full((1, 201, 1, d), 7.0)
    s, v = torch.randn(256, 3, 128, generator=g) * 9, torch.randn(3, 128, d, generator=g)
    part, rows = torch.full((3, 2, 128, 64), torch.nan), torch.full((3, 2, 2, 128), torch.nan)
    # Two tiles of three blocks: the second of three programs has one block of each.
    for c, slot, tile, of in ((0, 0, 0, [0, 1]), (1, 0, 0, [2]), (1, 1, 1, [0]), (2, 0, 1, [1, 2])):
        few = s[tile * 128 :, of][:128].flatten(1)
        m = rows[c, slot, 0] = few.amax(1)
        p = (few - m[:, None]).exp2()
        rows[c, slot, 1], part[c, slot, :, :d] = p.sum(1), p @ v[of].flatten(0, 1)
    kernel = harness.interpreted("attention.launch").join_shares
    kernel[(2, 8)](part, rows, y, 3, 0, 6, 3, 200, 1, D=d, ROWS=16)
    p = s[:200].flatten(1).double().exp2()
    wanted = F.pad(p @ v.flatten(0, 1).double() / p.sum(1)[:, None], (0, 0, 0, 1), value=7.0)
    torch.testing.assert_close(y[0, :, 0].double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d", "dtype"), [(64, HALF), (128, BRAIN), (72, BRAIN), (40, HALF)])
def test_it_compiles_without_spills(d: int, dtype: torch.dtype) -> None:
    launches = recorded(1, 300, 260, 45, d, dtype)
    names = [x.kernel.fn.__name__ for x in launches]
    assert names == ["quantize_heads", "attend", "attend", "join_shares"]
    for one, name in zip(launches, names, strict=True):
        binary = harness.compiled(one, 90, messages=name == "attend")
        assert (binary.spills, binary.stack) == (0, 0)
        if name == "quantize_heads":
            assert binary.count(r"LDG\.E\.128") == triton.next_power_of_2(d) // 16
        if name == "attend":
            assert "Compiling entry" in binary.messages
            assert not any(text in binary.messages for text in ("serialized", "C75"))
            assert binary.registers <= 168 and binary.shared <= 227 * 1024
            # A wait before the first tile, two a block, two a tile, of each warpgroup.
            assert binary.count(r"WARPGROUP\.DEPBAR") == 10
            assert binary.count("UTMALDG") == 4 + (d > 64) and binary.count("LDSM") == 0


def test_token_counts_share_binaries() -> None:
    calls = [(1, 300, 260, 45), (2, 77, 1, 16), (3, 4096, 4608, 24)]
    every = [launch for call in calls for launch in recorded(*call, 64)]
    assert len({harness.variant(one) for one in every}) == 4


SHAPES = ((2, 77, 77, 3), (1, 300, 1000, 2), (2, 1000, 300, 3), (1, 128, 64, 1), (1, 1, 1, 1),
          (1, 2500, 514, 11))  # fmt: skip


@needs_hopper
@pytest.mark.parametrize(("d", "dtype"), itertools.product((40, 64, 72, 104, 128), (HALF, BRAIN)))
def test_kernel_agrees_with_float64(d: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        call = made(*shape, d, dtype, "cuda")
        first = ops.attention8(*call)
        # Weights are rounded to 2^-9 of their size or less, y once more.
        assert away(first, call) < 0.5, shape
        assert first.is_contiguous()
        assert all(torch.equal(ops.attention8(*call), first) for _ in range(3)), shape
        # Keys far above those of the first block that is read, the last: all is done again.
        call.k[:, :-130] *= 60 if dtype == BRAIN else 20
        assert away(ops.attention8(*call), call) < 0.5, shape


@needs_hopper
def test_graphs_and_values_that_are_not_finite() -> None:
    call = made(1, 300, 300, 3, 64, device="cuda")
    ops.attention8(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.attention8(*call)
    spoil(call)
    graph.replay()
    check_spoilt(y)
    with pytest.raises(ValueError, match="expected float16 or bfloat16, D = 8 i from 40"):
        ops.attention8(*(x.float() for x in call))
