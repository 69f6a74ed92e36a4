"""The norm whose programs meet, on a GPU: against float64, three launches, graphs and streams."""

import pytest
import torch
from torch import Tensor

from quantempo.kernels.gpu import gn_act_quant
from quantempo.kernels.gpu.contraction import launch as launches_of
from quantempo.kernels.gpu.group_norm.plan import CooperativePlan, make_cooperative_plan
from tests.gpu.test_gn_act_quant import Case, check
from tests.gpu.test_norm_cooperative import CASES, launch

RUNS = 20

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.cuda]


ON_DEVICE = [
    (2, 64, 320, 0), (2, 64, 320, 320), (2, 64, 640, 320), (2, 32, 640, 0), (2, 32, 1280, 640),
    (1, 63, 320, 0),
]  # fmt: skip


def sized(shape: tuple[int, int, int, int]) -> Case:
    n, side, c1, c2 = shape
    rows = 2 if c2 else 1
    return Case(
        n=n, h=side, w=side, c1=c1, c2=c2, groups=32, dtype=torch.float16, raw_rows=rows,
        buckets=4, bucket_batch=n,
    )  # fmt: skip


def skip_unless_held(case: Case) -> None:
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    if make_cooperative_plan(case.n, case.h * case.w, case.c1 + case.c2, 32, processors) is None:
        pytest.skip("the registers of this GPU do not hold it")


def counters_are_zero() -> bool:
    every = launches_of._counters.values()
    return not any(bool(counters.any()) for counters in every if counters.device.type == "cuda")


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_float64(name: str) -> None:
    check(CASES[name], launch, "cuda")
    assert counters_are_zero()


@pytest.mark.parametrize("shape", ON_DEVICE, ids=str)
def test_runs_agree_in_every_bit_and_with_three_launches(shape) -> None:
    case = sized(shape)
    skip_unless_held(case)
    call = case.call("cuda")
    check(case, launch, "cuda")
    first = launch(call)
    several = gn_act_quant.launch(call, path="triton")
    for ours, theirs in zip(first, several, strict=True):
        off = (ours.int() - theirs.int()).abs()
        # Chance of a quotient so near a tie that float32 sums in another order matter: 1e-3.
        assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() < 1e-3)
    for _ in range(RUNS - 1):
        assert same(launch(call), first)
    assert counters_are_zero()


def test_it_is_the_default_in_place_of_three_launches() -> None:
    case = sized(ON_DEVICE[0])
    skip_unless_held(case)
    call = case.call("cuda")
    chosen = gn_act_quant._choose(call.images, 32, None)
    assert isinstance(chosen, CooperativePlan)
    assert same(gn_act_quant.launch(call), launch(call))


@pytest.mark.parametrize("shape", [ON_DEVICE[0], ON_DEVICE[2]], ids=str)
def test_a_recorded_graph_computes_the_same(shape) -> None:
    case = sized(shape)
    skip_unless_held(case)
    call = case.call("cuda")
    first = launch(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # Two that follow each other share counters.
            launch(call)
            again = launch(call)
    for _ in range(RUNS):
        for result in again:
            result.fill_(77)
        graph.replay()
        torch.cuda.synchronize()
        assert same(again, first)
    assert counters_are_zero()


def test_streams_do_not_wait_for_each_other_for_ever() -> None:
    # Launches that overlap in time, each of which fills the GPU.
    case = sized(ON_DEVICE[2])
    skip_unless_held(case)
    call = case.call("cuda")
    first = launch(call)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(RUNS):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(launch(call))
    torch.cuda.synchronize()
    assert all(same(result, first) for result in results)
    assert counters_are_zero()
