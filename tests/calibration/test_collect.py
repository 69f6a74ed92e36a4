"""Statistics of layer inputs, against the inputs themselves kept whole in float64."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.statistics import collect_statistics, time_bin_edges
from quantempo.models.load import load_pipeline
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
    edges = time_bin_edges(1000, BINS)
    found = collect_statistics(net, NAMES, data, edges)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    return found, Kept(net, data), edges


def test_edges_cut_training_time_evenly() -> None:
    assert time_bin_edges(1000, 4).tolist() == [0, 250, 500, 750, 1000]


def test_ranges_are_those_of_the_inputs_in_each_bin(collected: Any) -> None:
    found, kept, edges = collected
    seen = 0
    for (name, segment), _ in kept.inputs.items():
        ranges = found[name][0].state()["range"]
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
        state = found[name][1].state()
        hist, (low, high) = state["hist"][segment].double(), state["edges"][segment].tolist()
        for k in range(BINS):
            values = kept.of_bin((name, segment), float(edges[k]), float(edges[k + 1]))
            assert int(hist[k].sum()) == len(values), (name, k)
            if not len(values):
                continue
            centers = low + (torch.arange(hist.shape[1]) + 0.5) * (high - low) / hist.shape[1]
            mean = float((hist[k] * centers).sum() / hist[k].sum())
            # A value is at most half a bin from the centre it is counted at.
            assert abs(mean - float(values.mean())) <= (high - low) / hist.shape[1]


def test_fractions_of_time_are_binned_by_training_time(tmp_path: Path) -> None:
    class Fractions:
        """A set whose network is given t / T."""

        def batches(self, batch_size: int = 32) -> Any:
            yield type(
                "B", (), {"x_t": torch.tensor([[1.0], [2.0], [3.0]]), "t": torch.tensor(TIMES)}
            )()

        def replay(self, net: torch.nn.Module, batch: Any) -> Tensor:
            return net(batch.x_t)

    TIMES = [0.05, 0.55, 1.0]
    net = torch.nn.Sequential(torch.nn.Linear(1, 1))
    edges = time_bin_edges(1000, 10)
    found = collect_statistics(net, {"0": ()}, Fractions(), edges, per_unit=1000.0)
    ranges = found["0"][0].state()["range"][0]
    assert [ranges[k].tolist() for k in (0, 5, 9)] == [[1, 1], [2, 2], [3, 3]]
    assert int(found["0"][1].state()["hist"].sum()) == 3
