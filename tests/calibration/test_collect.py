"""Statistics of layer inputs, against the inputs themselves kept whole in float64."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from quantempo.calibration.dataset import MemorySet, TraceSet
from quantempo.calibration.statistics import collect_statistics, time_bin_edges
from quantempo.models.load import load_pipeline
from quantempo.quantized import StepClock, Times
from quantempo.recipe import Recipe
from quantempo.scales import search_scales
from tests.packed import packed

NAMES = {
    "mid_block.resnets.0.conv1": (),
    "mid_block.attentions.0.to_q": (),
    "up_blocks.1.resnets.0.conv_shortcut": (32, 16),
}
BINS = 5


class Kept:
    """Every input of the named layers, by time-step, from a run of its own."""

    def __init__(self, net: torch.nn.Module, data: TraceSet) -> None:
        self.inputs: dict[tuple[str, int], dict[int, list[Tensor]]] = defaultdict(dict)
        handles = [
            net.get_submodule(name).register_forward_pre_hook(self.hook(name, parts))
            for name, parts in NAMES.items()
        ]
        for row in range(len(data)):
            # One row at a time: nothing to say about batching.
            batch = data.rows(torch.tensor([row]))
            self.t = int(batch.t)
            with torch.no_grad():
                data.replay(net, batch)
        for handle in handles:
            handle.remove()

    def hook(self, name: str, parts: tuple[int, ...]) -> Any:
        def see(layer: Any, args: tuple[Tensor, ...]) -> None:
            for i, part in enumerate(args[0].split(parts, 1) if parts else (args[0],)):
                self.keep((name, i), part)

        return see

    def keep(self, key: tuple[str, int], value: Tensor) -> None:
        self.inputs[key].setdefault(self.t, []).append(value.flatten().double())

    def of_bin(self, key: tuple[str, int], low: float, high: float) -> Tensor:
        found = [v for t, vs in self.inputs[key].items() if low <= t < high for v in vs]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


@pytest.fixture(scope="module")
def collected() -> tuple[dict[str, Any], Kept, Tensor]:
    run = packed("unconditional").run
    data = TraceSet(run / "trace")
    net = load_pipeline(packed("unconditional").source).unet
    edges = time_bin_edges(Times(1000), BINS)
    found = collect_statistics(net, NAMES, data, bins=BINS)
    assert torch.equal(found["time_bin_edges"], edges)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    return found, Kept(net, data), edges


def test_edges_cut_time_evenly() -> None:
    assert time_bin_edges(Times(1000), 4).tolist() == [0, 250, 500, 750, 1000]
    assert time_bin_edges(Times(31, clean=True), 4).tolist() == [0, 1, 11, 21, 31]


def test_ranges_are_those_of_the_inputs_in_each_bin(collected: Any) -> None:
    found, kept, edges = collected
    seen = 0
    for (name, segment), _ in kept.inputs.items():
        ranges = found[f"{name}.range"]
        for k in range(BINS):
            values = kept.of_bin((name, segment), float(edges[k]), float(edges[k + 1]))
            if not len(values):
                continue
            seen += 1
            got = ranges[segment, k].double()
            wanted = torch.stack([values.min(), values.max()])
            # A batch sums in another order than a single row: float32 noise of the layers before.
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    # Three layers, one with two segments; four rows of at least two times.
    assert seen >= 4 * 2


def test_histograms_count_every_element_once_in_its_bin(collected: Any) -> None:
    found, kept, edges = collected
    for (name, segment), _ in kept.inputs.items():
        hist = found[f"{name}.hist"][segment].double()
        low, high = found[f"{name}.edges"][segment].tolist()
        for k in range(BINS):
            values = kept.of_bin((name, segment), float(edges[k]), float(edges[k + 1]))
            assert int(hist[k].sum()) == len(values), (name, k)
            if not len(values):
                continue
            centers = low + (torch.arange(hist.shape[1]) + 0.5) * (high - low) / hist.shape[1]
            mean = float((hist[k] * centers).sum() / hist[k].sum())
            # A value is at most half a bin from the centre it is counted at.
            assert abs(mean - float(values.mean())) <= (high - low) / hist.shape[1]


class Linear(torch.nn.Module):
    """A denoiser of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample)


def test_segments_of_a_linear_layer_are_of_its_last_axis() -> None:
    net = Linear()
    net.layer = torch.nn.Linear(3, 1)
    x = torch.arange(12.0).view(2, 2, 3)
    found = collect_statistics(net, {"layer": (1, 2)}, MemorySet(x, torch.zeros(2)), bins=1)
    assert found["layer.range"][:, 0].tolist() == [[0, 9], [1, 11]]


@pytest.mark.parametrize("how", ["tiled", "shared", "frames"])
def test_rows_that_are_not_the_samples_one_by_one_are_of_no_time(how: str) -> None:
    class Net(Linear):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            shared = torch.linspace(1, 9, 8)[:, None]
            frames = sample.repeat_interleave(2, 0)
            rows = {"tiled": sample.repeat(2, 1), "shared": shared, "frames": frames}[how]
            return sample + self.layer(rows).mean()

    data = MemorySet(torch.tensor([[1.0], [2.0], [3.0], [9.0]]), torch.tensor([0.0, 1, 2, 3]))
    found = collect_statistics(Net(), {"layer": ()}, data, bins=4)
    counts, ranges = found["layer.hist"][0].sum(1).tolist(), found["layer.range"][0]
    assert counts == ([2, 2, 2, 2] if how == "frames" else [8, 0, 0, 0])
    assert ranges[0].tolist() == ([1, 1] if how == "frames" else [1, 9])
    recipe = Recipe().override("activations", buckets=4, min_gain=0.0)
    scales = search_scales(found, {"layer": torch.ones(1, 1)}, recipe)["layer.act_scale"]
    assert (len(scales.unique()) == 1) == (how != "frames")


def test_times_are_binned_by_their_place() -> None:
    data = MemorySet(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0.05, 0.06, 1.0]))
    found = collect_statistics(Linear(), {"layer": ()}, data, bins=6)
    ranges = found["layer.range"][0]
    assert [ranges[k].tolist() for k in (0, 2, 4)] == [[1, 1], [2, 2], [3, 3]]
    assert int(found["layer.hist"].sum()) == 3


def test_a_time_step_on_an_edge_is_calibrated_in_the_bucket_the_clock_gives_it() -> None:
    """All bin edges 0, 62.5, ... that are whole numbers, each between its two neighbours."""
    times = torch.tensor([t + d for t in range(125, 1000, 125) for d in (-1, 0, 1)])
    # Inputs as large as their bucket, so that a row in another one is seen in its range.
    data = MemorySet((times // 125 + 1.0)[:, None].exp2(), times, num_train_timesteps=1000)
    stats = collect_statistics(Linear(), {"layer": ()}, data, bins=8)
    recipe = Recipe.load("w8a8").override("activations", buckets=8, min_gain=0.0)
    clock = StepClock(search_scales(stats, {"layer": torch.ones(1, 1)}, recipe)["bucket_of"])
    clock.set(times)
    assert clock.bucket.unique().tolist() == list(range(8))
    top = stats["layer.range"][0, :, 1]
    assert torch.equal(top[clock.bucket], (times // 125 + 1.0).exp2())
