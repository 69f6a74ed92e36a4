"""Blocks that are copied while others run, with a side stream that copies early or late."""

import copy
import gc
import itertools
import types
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn

from quantempo.engines import ENGINES, attach, detach, select, streaming
from quantempo.engines.fusion import report
from quantempo.errors import QuantempoError
from quantempo.quantized import quantized_layers
from quantempo.recipe import WeightSettings
from tests.engines.one_by_one import call, quantized
from tests.engines.quantized import INPUTS, quantized_unet

pytestmark = pytest.mark.usefixtures("on_a_cpu")


class Lane:
    """A side stream that copies as late as it may (what is overwritten is garbage), or at once."""

    def __init__(self, late: bool = True) -> None:
        self.device, self.late, self.used = torch.device("cpu"), late, 0
        self.open: list[Any] = []

    def copy(self, to: Tensor, host: Tensor) -> Any:
        (to.fill_(0x55) if self.late else to.copy_(host))
        self.open.append((to, host))
        return to, host

    def wait(self, copied: Any = None) -> None:
        # A stream copies in order.
        while self.open and copied is not None:
            to, host = self.open.pop(0)
            to.copy_(host)
            if to is copied[0] and host is copied[1]:
                return

    def finish(self) -> None:
        assert not self.open

    def measured(self, run: Any) -> tuple[Any, int]:
        return run(), self.used


@pytest.fixture
def lane(monkeypatch) -> Lane:
    made = Lane()
    monkeypatch.setattr(select, "_lane", lambda *_: made)
    monkeypatch.setattr(ENGINES.get("triton"), "devices", ("cpu",))
    monkeypatch.setattr(streaming, "LEAST", 0)
    take = streaming._take

    def poison(memory: Tensor, at: int, group: list[Any]) -> Any:
        old = group[0][2].untyped_storage()
        found = take(memory, at, group)
        torch.empty(0, dtype=torch.uint8).set_(old).fill_(0x55)
        return found

    monkeypatch.setattr(streaming, "_take", poison)
    return made


def held() -> int:
    """Return the bytes of all storages that there are, without a collection of garbage."""
    found = (o.untyped_storage() for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter))
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())


def network(kind: str) -> tuple[nn.Module, Any, Any]:
    """Return a network and the arguments of a call."""
    if kind not in ("unet", "groups"):
        return copy.deepcopy(quantized(kind)), (), call(kind)
    how = {"bits": {"*_blocks.*": "w4a8"}, "weights": WeightSettings(group=16)}
    return quantized_unet(**(how if kind == "groups" else {})), INPUTS[0], {}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flux", "pixart", "unet", "groups"])
@pytest.mark.parametrize("engine", ["triton", "simulated"])
def test_streamed_networks_give_the_same_bits(lane, engine, kind):
    net, args, kwargs = network(kind)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    attach(net, engine)
    y = net(*args, **kwargs)[0]
    fused = [row.reason for row in report(net)]
    attach(net, engine, memory=0)
    assert [row.reason for row in report(net)] == fused
    stream = net.forward.active
    for late in (True, False):
        # The first call has no order yet.
        lane.late = late
        assert torch.equal(net(*args, **kwargs)[0], y)
    total = sum(unit.size for unit in stream.units)
    for part in (0.0, 0.3, 0.6, 1.0):
        stream._place(part * total)
        assert sum(unit.size for unit in stream.units if not unit.streamed) <= part * total
        lane.late = not lane.late
        assert torch.equal(net(*args, **kwargs)[0], y)
    assert not stream.slots
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    detach(net)
    attach(net, engine)
    assert torch.equal(net(*args, **kwargs)[0], y)


@torch.no_grad()
def test_a_block_is_copied_while_the_one_before_it_runs(lane):
    net, args, kwargs = network("flux")
    attach(net, "triton", memory=0)
    y, stream = net(*args, **kwargs)[0], net.forward.active
    log = list[Any]()
    lane.copy = lambda to, host: log.append(host) or Lane.copy(lane, to, host)
    lane.wait = lambda copied: log.append(copied[1]) or Lane.wait(lane, copied)
    assert torch.equal(net(*args, **kwargs)[0], y)
    hosts = [id(unit.host) for unit in stream.order]
    # Each is waited for, then the next one is on its way before it runs.
    rest = itertools.chain(*itertools.pairwise(hosts[1:]))
    assert list(map(id, log)) == [*hosts[:2], hosts[0], *rest, hosts[-1]]
    # A call that is broken off leaves nothing wrong behind, nor does what was recorded.
    with pytest.raises(AttributeError):
        net(*args, **{**kwargs, "encoder_hidden_states": None})
    stream._load(list(stream.order)[-1])
    assert torch.equal(net(*args, **kwargs)[0], y)
    # One tensor there is enough, be it not the first.
    stream._forward = lambda args, kwargs: kwargs
    away = kwargs["timestep"].to("meta")
    assert stream(timestep=away, x=y)["x"] is y
    with pytest.raises(QuantempoError, match="got an input on meta for weights that are streamed"):
        stream(timestep=away)


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("kind", ["flux", "groups"])
def test_a_network_that_is_moved_holds_nothing_and_runs_on_as_before(lane, kind, memory):
    net, args, kwargs = network(kind)
    gc.collect()
    before, alone = {k: v.clone() for k, v in net.state_dict().items()}, held()
    attach(net, "triton", memory=memory)
    y, sizes = net(*args, **kwargs)[0], []
    most = held() - alone
    packed = [layer.aside for _, layer in quantized_layers(net)]
    for _ in range(3):
        # As if it had come to another device.
        net.quantempo_clock.moved()
        assert all(layer.kernel is None for _, layer in quantized_layers(net))
        sizes.append(held() - alone)
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert torch.equal(net(*args, **kwargs)[0], y)
        assert packed == [layer.aside for _, layer in quantized_layers(net)]
    assert abs(sizes[2] - sizes[1]) < 20_000 and max(sizes) < most / 2
    detach(net)
    assert not any(layer.aside for _, layer in quantized_layers(net))


def test_what_cannot_be_streamed_is_said_in_a_sentence(monkeypatch):
    net = copy.deepcopy(quantized("flux"))
    with pytest.raises(QuantempoError, match="memory is that of a GPU, and torch finds none"):
        attach(net, memory="12GB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(QuantempoError, match="neither with packed = 'auto'"):
        attach(net, packed="auto", memory="12GB")
    monkeypatch.undo()
    net._hf_hook = types.SimpleNamespace(execution_device="meta")
    with pytest.raises(QuantempoError, match="attach, then enable_model_cpu_offload"):
        attach(net)
    del net._hf_hook
    cpu, how = torch.device("cpu"), {"offload_type": "block_level", "num_blocks_per_group": 1}
    group = partial(apply_group_offloading, onload_device=cpu, **how)
    ways = [partial(cpu_offload, execution_device=cpu), group]
    for offload in ways:
        other = copy.deepcopy(net)
        offload(other)
        with pytest.raises(QuantempoError, match="is offloaded in parts, but engine triton"):
            ENGINES.get("triton").attach(other)
