"""Streams of heads normalised, rotated and joined: interpreted against float64, as machine code."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from quantempo.kernels.gpu import join_heads as kernel
from quantempo.kernels.ops.join_heads import Heads
from tests.gpu import harness

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def made(
    device: str = "cpu", sizes: tuple[int, ...] = (3, 7), b: int = 2, heads: int = 3, dim: int = 40,
    dtype=BRAIN, weights=BRAIN, eps: float | None = 1e-6, rotary: bool = True, values: bool = True,
    wide: int = 0,
) -> Heads:  # fmt: skip
    """Return a call; eps: the first, None for no norms; wide: columns of a product before q."""
    g, norms = torch.Generator().manual_seed(11), 2 * len(sizes)

    def randn(*shape: int, dtype=FLOAT) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype).to(device)

    rows = [randn(b, t, wide + 3 * heads * dim, dtype=dtype)[..., wide:] for t in sizes]
    q, k, v = ([*parts] for parts in zip(*(x.chunk(3, 2) for x in rows), strict=True))
    given = [None, *(randn(dim, dtype=weights) + 1 for _ in range(norms - 1))]
    every = [-1.0] * norms if eps is None else [eps, 1e-5, 1e-4, 1e-3][:norms]
    tables = [randn(sum(sizes), dim) for _ in range(2)] if rotary else []
    return Heads(q, k, v if values else [], given, every, tables, heads)


def exact(call: Heads, which: int) -> tuple[Tensor, Tensor]:
    """Return q or k in float64 before the last rounding, and by how much float32 may miss it."""
    parts = []
    for i, x in enumerate((call.q, call.k)[which]):
        y, j = x.double().unflatten(2, (call.heads, -1)), 2 * i + which
        if call.eps[j] >= 0:
            y = y * (y.square().mean(3, keepdim=True) + call.eps[j]) ** -0.5
            y = y if call.weights[j] is None else y * call.weights[j].double()
        parts.append(y.to(x.dtype).double())
    n = torch.cat(parts, 1)
    # A value may be its neighbour, which is no farther than this.
    slack = torch.finfo(call.q[0].dtype).eps * n.abs() * (call.eps[1] >= 0)
    if call.rotary:
        cos, sin = (table.double()[:, None] for table in call.rotary)
        slack = slack * cos.abs() + slack.unflatten(3, (-1, 2)).flip(4).flatten(3) * sin.abs()
        signs = torch.tensor([-1.0, 1.0], device=n.device).repeat(n.shape[3] // 2)
        n = n * cos + n.unflatten(3, (-1, 2)).flip(4).flatten(3) * sin * signs
    return n, slack


CASES = {
    "two streams": {},
    "one": {"sizes": (9,), "heads": 2, "dim": 128, "wide": 16},
    "one norm is missing": {"eps": -1.0},
    "one without values": {"sizes": (5,), "values": False, "dim": 64, "dtype": HALF},
    "joined only": {"rotary": False, "eps": None, "dim": 72, "heads": 5},
    "float": {"dtype": FLOAT, "weights": HALF, "dim": 256},
    "many programs": {"sizes": (77, 130), "b": 3, "heads": 4, "dim": 16, "dtype": HALF},
    "one token each": {"sizes": (1, 1), "b": 3, "dim": 48, "wide": 24},
    "not eights": {"dim": 2, "heads": 4},
    "wide": {"dim": 1160, "heads": 1, "dtype": HALF},
    "no text": {"sizes": (0, 4)},
    "nothing": {"sizes": (0,)},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_float64(name: str, device: str) -> None:
    module = harness.interpreted("join_heads") if device == "cpu" else kernel
    call = made(device, **CASES[name])
    call.check(strides=True)
    # Chance that 2^-20 decides a rounding: 2^-19 over the distance of neighbours, 2^-8 or 2^-11.
    share = 1 if call.q[0].dtype == FLOAT else 0.01
    for launch, wrong in ((Heads.exact, 0), (module.launch, share)):
        *found, values = launch(call)
        for which, y in enumerate(found):
            truth, slack = exact(call, which)
            assert y.shape == truth.shape and y.is_contiguous() and y.dtype == call.q[0].dtype
            room = slack + torch.finfo(y.dtype).eps * (truth.abs() + slack) + 1e-6
            assert ((y.double() - truth).abs() <= room).all()
            assert (y != truth.to(y.dtype)).sum() <= wrong * y.numel()
        assert torch.equal(values, torch.cat(call.v, 1).view(y.shape) if call.v else values[:0])


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("launch", ["definition", *DEVICES])
def test_heads_that_are_not_finite_are_nan_alone(launch: str) -> None:
    q = torch.ones(1, 5, 16, device="cuda" if launch == "cuda" else "cpu")
    q[0, 0, 3], q[0, 1, 8], q[0, 2, 2], q[0, 3, 1] = torch.nan, torch.inf, -torch.inf, 3e38
    module = harness.interpreted("join_heads") if launch == "cpu" else kernel
    run = Heads.exact if launch == "definition" else module.launch
    bad = run(Heads([q], [q], [], [None] * 2, [1e-6] * 2, [], 2))[0].isnan().any(3)
    # The squares of the last only float64 can hold.
    assert bad[0].tolist() == [[1, 0], [0, 1], [1, 0], [run is not Heads.exact, 0], [0, 0]]


# (images, text, image, heads, dim): FLUX double and single, SD3.5-large, DiT's and small heads.
SHIPPED = [
    (1, 512, 4096, 24, 128), (1, 0, 4608, 24, 128), (2, 333, 4096, 38, 64), (2, 77, 1024, 16, 72),
    (2, 8, 4096, 8, 40), (1, 16, 1024, 8, 256),
]  # fmt: skip


def recorded(b, text, image, heads, dim, dtype=BRAIN, early=False, rotary=True) -> harness.Launch:
    def empty(*shape: int, dtype=FLOAT) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = [size for size in (text, image) if size]
    q, k, v = ([empty(b, t, 3, heads * dim, dtype=dtype)[:, :, i] for t in sizes] for i in range(3))
    norms, tables = 2 * len(sizes), [empty(text + image, dim)] * (2 * rotary)
    weights = [empty(dim, dtype=dtype)] * norms
    with harness.recorded(kernel) as launches:
        kernel.launch(Heads(q, k, v if text else [], weights, [1e-6] * norms, tables, heads))
    return dataclasses.replace(launches[0], kwargs=launches[0].kwargs | {"EARLY": early})


COMPILED = [
    *((90, shape, {"early": True}) for shape in SHIPPED), *((80, x, {}) for x in SHIPPED[:2]),
    *((89, x, {}) for x in SHIPPED[:2]), (90, SHIPPED[2], {"rotary": False}),
    (90, SHIPPED[0], {"dtype": FLOAT}),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "shape", "how"), COMPILED, ids=str)
def test_shipped_shapes_compile_without_spills(arch: int, shape, how) -> None:
    binary = harness.compiled(recorded(*shape, **how), arch)
    assert (binary.spills, binary.stack) == (0, 0) and binary.registers <= 64
    # Everything comes and leaves sixteen bytes at a time, once, and no thread needs another's.
    (streams, values), size = (2, 3) if shape[1] else (1, 2), 2 if "dtype" in how else 1
    loads = streams * ((values + 2) * size + 4 * how.get("rotary", True))
    for name, count in (("LDG", loads), ("STG", streams * values * size)):
        assert binary.count(name) == binary.count(rf"{name}\.E\.128") == count
    assert binary.shared == 0 and ("ACQBULK" in binary.sass) == how.get("early", False)


def test_batches_and_token_counts_share_a_binary() -> None:
    calls = itertools.product((1, 3), (1, 16, 77), (1, 1024, 4095))
    assert len({harness.variant(recorded(*call, 24, 128)) for call in calls}) == 1
