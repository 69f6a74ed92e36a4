"""The contraction on a GPU at the sizes of real networks: exact integers, the same every time."""

import dataclasses
import itertools

import pytest
import torch

from quantempo.kernels.gpu.contraction import launch
from quantempo.kernels.gpu.contraction.tiles import Tile, choose_tile, multiprocessors
from tests.gpu import layers as use
from tests.gpu.cases import check_values

RUNS = 20

pytestmark = pytest.mark.cuda


def listed() -> list[tuple[str, use.Layer]]:
    """Return (path, layer): every way of Hopper, a covering choice of the others."""
    chosen = {
        "hopper": [*use.ways("hopper", 90)],
        "pointers": [*use.covering("pointers", 80), *use.covering("pointers", 90)],
    }
    return [
        (path, layer)
        for path, pairs in chosen.items()
        for layer in dict.fromkeys(layer for layer, _ in pairs)
    ]


def skip_unless(path: str) -> None:
    if path == "hopper" and launch.choose_path(torch.device("cuda")) != "hopper":
        pytest.skip("needs Hopper")


def counters_are_zero() -> bool:
    return not any(bool(counters.any()) for counters in launch._counters.values())


@pytest.mark.parametrize(("path", "layer"), listed())
def test_sums_are_exact(path, layer):
    skip_unless(path)
    known = use.tensors(layer, "cuda")
    exact = use.expected_sums(layer, known)
    got = use.call(launch, layer, known, path, None, torch.int32)
    assert torch.equal(got.long(), exact)
    assert counters_are_zero()


@pytest.mark.parametrize(("path", "layer"), listed())
def test_runs_agree_in_every_bit(path, layer):
    skip_unless(path)
    known = use.tensors(layer, "cuda")
    exact = use.expected(known, use.expected_sums(layer, known))
    first = use.call(launch, layer, known, path, None)
    scale = known["out_scale"][0].double() if layer.requantize else None
    check_values(first, exact, first.dtype, scale)
    del exact
    for _ in range(RUNS - 1):
        again = use.call(launch, layer, known, path, None)
        # Of floats the bits: -0 equals 0.
        kind = first.dtype if layer.requantize else torch.int16
        assert torch.equal(again.view(kind), first.view(kind))
        del again
    assert counters_are_zero()


# Halved by columns, by images, by rows; none a multiple of the tile.
LOADED = {
    "rows of a product": use.Layer(333, 256, 1, 144, kernel=0),
    "small images": use.Layer(5, 128, 8, 144),
    "large images": use.Layer(3, 64, 20, 272),
    "beside a shortcut": use.Layer(3, 128, 16, 144, sides=(64,)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOADED)
def test_residuals_loaded_as_a_step(name, dtype):
    skip_unless("hopper")
    layer = LOADED[name]
    known = use.tensors(layer, "cuda")
    if "residual" not in known:
        shape = (layer.images, layer.out_size, layer.out_size, layer.outs)
        known["residual"] = torch.randn(shape, device="cuda").permute(0, 3, 1, 2)
    known["residual"] = known["residual"].to(dtype)
    exact = use.expected(known, use.expected_sums(layer, known))
    # Two sums in registers need twice the threads.
    tile = Tile(128, 128, 128, 8, 3, programs=1) if layer.sides else Tile(128, 128, 128, 4, 3)
    y = use.call(launch, layer, known, "hopper", tile, dtype)
    check_values(y, exact, dtype, None)


# Images that no box divides, channels that no step divides, boxes of a tile's every shape.
SHARED = {
    "odd images": (use.Layer(3, 80, 20, 144), Tile(128, 128, 128, 4, 3, taps=True)),
    "few rows": (use.Layer(2, 64, 11, 272), Tile(128, 64, 128, 4, 4, taps=True)),
    "steps of 64": (use.Layer(2, 320, 33, 320), Tile(128, 256, 64, 8, 8, programs=1, taps=True)),
    "split": (use.Layer(2, 256, 16, 144), Tile(128, 64, 128, 4, 4, 2, taps=True)),
    "mixed times": (use.Layer(5, 96, 24, 144, mixed=True), Tile(128, 128, 128, 4, 3, taps=True)),
}


@pytest.mark.parametrize("name", SHARED)
def test_input_reuse_along_kernel_rows(name):
    skip_unless("hopper")
    layer, tile = SHARED[name]
    known = use.tensors(layer, "cuda")
    sums = use.expected_sums(layer, known)
    assert torch.equal(use.call(launch, layer, known, "hopper", tile, torch.int32).long(), sums)
    exact = use.expected(known, sums)
    check_values(use.call(launch, layer, known, "hopper", tile), exact, torch.float16, None)
    assert counters_are_zero()


@pytest.mark.parametrize("splits", [2, 5, 8])
@pytest.mark.parametrize("path", launch.PATHS)
@pytest.mark.parametrize("sides", [(), (256,), (256, 128)])
def test_splitting_leaves_the_sums(path, splits, sides):
    skip_unless(path)
    layer = use.Layer(4, 256, 8, 256, sides=sides)
    known = use.tensors(layer, "cuda")
    exact = use.expected_sums(layer, known)
    tile = choose_tile(layer.problem(), path, multiprocessors(torch.device("cuda")))
    # No stage waits for a load that a share of the steps does not make.
    tile = dataclasses.replace(tile, splits=splits, stages=2)
    assert torch.equal(use.call(launch, layer, known, path, tile, torch.int32).long(), exact)
    whole = use.call(launch, layer, known, path, dataclasses.replace(tile, splits=1), torch.float32)
    parts = use.call(launch, layer, known, path, tile, torch.float32)
    assert (parts - whole).abs().max() <= 2**-20 * whole.abs().max()
    assert counters_are_zero()


@pytest.mark.parametrize("path", launch.PATHS)
def test_streams_have_counters_of_their_own(path):
    # Two split launches that overlap in time must not count each other's programs.
    skip_unless(path)
    layer = use.Layer(1, 512, 8, 256)
    known = use.tensors(layer, "cuda")
    exact = use.expected_sums(layer, known)
    tile = choose_tile(layer.problem(), path, use.PROCESSORS[90])
    tile = dataclasses.replace(tile, splits=4, stages=2)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _, stream in itertools.product(range(RUNS), streams):
        with torch.cuda.stream(stream):
            results.append(use.call(launch, layer, known, path, tile, torch.int32))
    torch.cuda.synchronize()
    for result in results:
        assert torch.equal(result.long(), exact)


@pytest.mark.parametrize("path", launch.PATHS)
def test_a_recorded_graph_computes_the_same(path):
    skip_unless(path)
    layer = use.Layer(2, 256, 16, 256, sides=(128,))
    known = use.tensors(layer, "cuda")
    tile: Tile = choose_tile(layer.problem(), path, multiprocessors(torch.device("cuda")))
    tile = dataclasses.replace(tile, splits=3, stages=2)
    first = use.call(launch, layer, known, path, tile)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        use.call(launch, layer, known, path, tile)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            again = use.call(launch, layer, known, path, tile)
    for _ in range(RUNS):
        again.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(again, first)
