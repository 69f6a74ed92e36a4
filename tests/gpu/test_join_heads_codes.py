"""Codes of joined heads: bit for bit those of `join_heads`, then `quantize_heads`."""

import itertools
from types import ModuleType

import pytest
import torch

from quantempo.kernels import ops
from quantempo.kernels.gpu import join_heads, join_heads_codes
from quantempo.kernels.gpu.attention import launch
from quantempo.kernels.ops.attention import coded, exact
from quantempo.kernels.ops.join_heads import CodedHeads, Heads
from tests.gpu import harness
from tests.gpu.test_join_heads import DEVICES, HALF, SHIPPED, made, recorded

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# The first has a block of both streams and one that is not full.
CASES = {
    "two streams": {"sizes": (100, 60), "b": 1, "dim": 128, "heads": 2},
    "one without values": {"sizes": (130,), "values": False, "dim": 64, "heads": 2, "wide": 24},
    "a whole block each": {"sizes": (128, 128), "b": 1, "dim": 64, "heads": 1, "dtype": HALF},
    "one norm is missing": {"sizes": (3, 7), "eps": -1.0, "dim": 72, "heads": 5, "b": 1},
    "joined only": {"sizes": (2, 140), "rotary": False, "eps": None, "heads": 1},
    "no text": {"sizes": (0, 4), "b": 3},
    "nothing": {"sizes": (0,)},
}


def modules(device: str) -> tuple[ModuleType, ...]:
    if device == "cuda":
        return join_heads_codes, join_heads, launch
    return (*map(harness.interpreted, ("join_heads_codes", "join_heads", "attention.launch")),)


def check(call: Heads, device: str) -> None:
    """Expect equal codes, scales and values, of definitions and of kernels."""
    fused, joined, attention = modules(device)
    for both in ((CodedHeads.exact, Heads.exact), (fused.launch, joined.launch)):
        q8, k8, v, q_scale, k_scale, over = both[0](CodedHeads(*call))
        q, k, values = both[1](call)
        steps = coded if both[1] == Heads.exact else attention.quantized
        wanted = steps(q, k) if q.numel() else (q8, k8, q_scale, k_scale, over)
        assert torch.equal(v, values) and not (over and q.numel())
        for x, y in zip((q8, k8, q_scale, k_scale), wanted, strict=False):
            assert x.stride() == y.stride() and torch.equal(x.nan_to_num(7), y.nan_to_num(7))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_two_passes(name: str, device: str) -> None:
    call = made(device, **CASES[name])
    CodedHeads(*call).check(strides=True)
    for x in (call.q[-1], call.k[-1]):
        x[:1, 1:2, 3], x[:1, 2:4] = torch.inf, 0
    check(call, device)


def test_definition_of_the_attention() -> None:
    call = made(sizes=(20, 130), dim=64)
    q, k, v = ops.join_heads(*call)
    assert torch.equal(ops.attention8(q, k, v), exact(q, k, v))
    q8, k8, own, *scales = ops.join_heads_codes(*call)
    assert torch.equal(ops.attention8(q8, k8, own, scales), exact(q, k, v))


@pytest.mark.parametrize("shape", SHIPPED[:3], ids=str)
def test_shipped_shapes_compile_without_spills(shape) -> None:
    binary = harness.compiled(recorded(*shape, early=True, module=join_heads_codes), 90)
    assert (binary.spills, binary.stack) == (0, 0) and "ACQBULK" in binary.sass
    # Two programs of 16 warps, or three of 8, run at a time; loads are of sixteen bytes.
    assert binary.registers <= (64 if shape[4] > 64 else 80)
    assert binary.count("LDG") == binary.count(r"LDG\.E\.128")


def test_batches_and_token_counts_share_a_binary() -> None:
    calls = itertools.product((1, 3), (1, 16, 77), (1, 1024, 4095))
    every = [recorded(*call, 24, 128, module=join_heads_codes) for call in calls]
    assert len({harness.variant(one) for one in every}) == 1


@pytest.mark.cuda(major=9)
@pytest.mark.parametrize("shape", SHIPPED[:3], ids=str)
def test_shipped_shapes_on_the_device(shape: tuple[int, ...]) -> None:
    b, text, image, heads, dim = shape
    call = made("cuda", (text, image) if text else (image,), b, heads, dim)
    check(call, "cuda")
    ops.attention8(*(y := ops.join_heads_codes(*call))[:3], y[3:])
    wanted = ops.attention8(*ops.join_heads(*call))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q8, k8, v, *scales = ops.join_heads_codes(*call)
        y = ops.attention8(q8, k8, v, scales)
    graph.replay()
    assert torch.equal(y, wanted)
