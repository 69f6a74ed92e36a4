"""What a recording depends on, and calls that are not recorded."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from quantempo.engines.cuda import graphs
from quantempo.engines.cuda.graphs import Graphed, graphed, signature
from tests.engines.quantized import make_linear
from tests.tiny import tiny_unet


def test_signatures_tell_shapes_types_structure_and_values():
    x = torch.zeros(2, 3)
    tensors = (x, x.half(), torch.zeros(3, 2), x.to("meta"), [x])
    different = [
        *(((first,), {}) for first in tensors), *(((x, last), {}) for last in (1, 1.0, True, None)),
        ((x,), {"a": x}), ((x,), {"b": x}),
        *(((x,), {"a": {"b": (x, text)}}) for text in ("text", "other")),
    ]  # fmt: skip
    keys = [signature(call) for call in different]
    assert len(set(keys)) == len(different)
    # Values and strides of tensors are no part of it.
    found: list[Tensor] = []
    again = torch.ones(3, 2).T
    assert signature(((again,), {}), found) == keys[0]
    assert found[0] is again
    assert signature((x, {"a": {"b": (again, x)}}), found) and found[1:] == [x, again, x]


@torch.no_grad()
def test_on_a_cpu_it_calls_through():
    network = tiny_unet()
    wrapped = graphed(network)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor(450)
    assert torch.equal(wrapped(x, t).sample, network(x, t).sample)
    assert torch.equal(wrapped(x, timestep=450).sample, network(x, 450).sample)
    assert not wrapped._recordings
    # Attributes are the denoiser's, as pipelines ask for them.
    assert wrapped.config is network.config and wrapped.dtype == network.dtype
    with pytest.raises(AttributeError):
        _ = wrapped.no_such_thing
    other = copy.deepcopy(wrapped)
    assert isinstance(other, Graphed) and other.denoiser is not network
    assert torch.equal(other(x, t).sample, network(x, t).sample)
    assert graphed(lambda x: x + 1)(torch.ones(1)).item() == 2


def test_time_steps_become_tensors_of_the_device():
    cpu, x = torch.device("cpu"), torch.zeros(1)
    for value, dtype in ((450, torch.int64), (0.5, torch.float32), (torch.tensor(7), torch.int64)):
        (first, timestep), _ = graphs._with_timestep((x, value), {}, cpu)
        assert first is x and timestep.dtype == dtype and timestep.shape == ()
        assert timestep.item() == value
        args, kwargs = graphs._with_timestep((x,), {"timestep": value, "a": 1}, cpu)
        assert len(args) == 1 and kwargs["timestep"].item() == value and kwargs["a"] == 1
    steps = torch.tensor([1, 2])
    (_, timestep, last), _ = graphs._with_timestep((x, steps, "end"), {}, cpu)
    assert torch.equal(timestep, steps) and last == "end"
    assert graphs._with_timestep((x,), {"a": 1}, cpu) == ((x,), {"a": 1})
    # Where the signature has other arguments before it.
    args, _ = graphs._with_timestep((x, "text", 7, "end"), {}, cpu, ("timestep", 2))
    assert args[1::2] == ("text", "end") and args[2].item() == 7


class FakeGraph:
    """Stand in for a CUDA graph on a machine without: run the function on the static inputs."""

    def __init__(self, wrapped: Graphed, args, kwargs, output: Tensor) -> None:
        self.call, self.output = lambda: wrapped.denoiser(*args, **kwargs), output

    def replay(self) -> None:
        self.output.copy_(self.call())


class OnFakeGraphs(Graphed):
    recorded = 0

    def _record(self, args, kwargs, device):
        self.recorded += 1
        (args, kwargs), inputs = graphs._copied((args, kwargs))
        output = torch.full_like(self.denoiser(*args, **kwargs), torch.nan)
        return graphs._Recording(FakeGraph(self, args, kwargs, output), inputs, output)


@pytest.fixture
def as_if_cuda(monkeypatch):
    monkeypatch.setattr(graphs, "_cuda_device", lambda arguments: torch.device("cpu"))


@torch.no_grad()
def test_a_signature_is_recorded_once_and_outputs_are_copies(as_if_cuda):
    wrapped = OnFakeGraphs(lambda x, t, scale=1.0: (x * t).sum(1) * scale)
    outputs = [wrapped(torch.full((2, 3), float(i)), i) for i in range(4)]
    assert [y[0].item() for y in outputs] == [3.0 * i * i for i in range(4)]
    assert wrapped.recorded == 1
    assert wrapped(torch.ones(2, 3).T.contiguous().T, 5)[1].item() == 15
    assert wrapped.recorded == 1
    assert wrapped(torch.ones(5, 3), 5).shape == (5,)
    assert wrapped(torch.ones(5, 3), 5, scale=2.0)[0].item() == 30
    assert wrapped.recorded == 3
    wrapped.clear()
    assert wrapped(torch.ones(5, 3), 5).shape == (5,) and wrapped.recorded == 4


def test_what_cannot_be_recorded_is_said_once(as_if_cuda, caplog, monkeypatch):
    class Odd:
        __hash__ = None

    wrapped = OnFakeGraphs(lambda x, t, other=None: x * t)
    x = torch.ones(2)
    with caplog.at_level(logging.WARNING, "quantempo"):
        for _ in range(2):
            assert wrapped(x, 3)[0].item() == 3
            with torch.no_grad():
                assert wrapped(x, 3, other=Odd())[0].item() == 3
    assert wrapped.recorded == 0
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "gradients" in lines[0] and "cannot be compared" in lines[1]
    # A recording that failed is not tried again.
    monkeypatch.setattr(OnFakeGraphs, "_record", lambda *_: None)
    with torch.no_grad():
        assert wrapped(x, 4)[0].item() == 4
    assert list(wrapped._recordings.values()) == [None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.layer = nn.Linear(2, 2), make_linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def move(self) -> None:
        """As a move there and back does: the same module, its weights elsewhere in memory."""
        self.inner.weight.data = self.inner.weight.data.clone()

    def lower(self) -> None:
        self.layer.kernel = object()


@pytest.mark.parametrize("change", [Net.move, Net.lower])
def test_a_move_and_other_kernels_drop_the_recordings(as_if_cuda, change):
    network = Net()
    wrapped = OnFakeGraphs(network)
    with torch.no_grad():
        for _ in range(2):
            wrapped(torch.ones(3, 2))
            assert wrapped.recorded == 1
        change(network)
        wrapped(torch.ones(3, 2))
    assert wrapped.recorded == 2 and len(wrapped._recordings) == 1
