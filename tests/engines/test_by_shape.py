"""The engine that `auto` takes for each shape of the inputs, and what it says of it."""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.core.instance import set_forward
from quantempo.engines import attach, attached, base, detach
from quantempo.engines.layerwise import execution
from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.engines.select import ByShape
from quantempo.errors import QuantempoError
from quantempo.kernels.cpu import fused
from tests.engines.openvino_nets import needs_openvino
from tests.tiny import noise

T = torch.tensor(450)


class Net(nn.Module):
    """A denoiser whose forward sleeps and says who ran."""

    seconds = 0.0

    def forward(self, sample: Tensor, timestep: Any) -> str:
        time.sleep(self.seconds)
        return "base"


def by_shape(slow: str) -> tuple[Net, list[int]]:
    """Return a denoiser with two engines, and the rows that the rival ran."""
    net, rows = Net(), list[int]()
    net.seconds = 0.05 if slow == "base" else 0.0

    def run(sample: Tensor, timestep: Any) -> str:
        rows.append(len(sample))
        if sample.ndim == 3:
            raise QuantempoError("three dimensions are refused")
        time.sleep(0.05 if slow == "rival" else 0.0)
        return "rival"

    set_forward(net, ByShape(net, "base", "rival", run, 2))
    return net, rows


@pytest.mark.parametrize("slow", ["base", "rival"])
def test_few_rows_run_on_the_rival_and_more_on_the_faster(slow, caplog):
    net, rows = by_shape(slow)
    with caplog.at_level(logging.INFO, "quantempo"):
        assert [net(noise(n, 3, 4, 4), T) for n in (1, 2, 1)] == ["rival"] * 3
        assert caplog.messages == [
            f"engine rival for inputs {(n, 3, 4, 4)}: faster up to 2 rows" for n in (1, 2)
        ]
        caplog.clear()
        fast = "rival" if slow == "base" else "base"
        before = len(rows)
        assert [net(noise(3, 3, 4, 4), timestep=T) for _ in range(3)] == [fast] * 3
    # Once to warm it up and twice timed; then chosen.
    assert len(rows) - before == 3 + (3 if fast == "rival" else 0)
    (line,) = caplog.messages
    assert line.startswith(f"engine {fast} for inputs (3, 3, 4, 4): base ") and "rival" in line


def test_a_call_that_the_rival_refuses_runs_on_the_base(caplog):
    net, rows = by_shape("base")
    with caplog.at_level(logging.INFO, "quantempo"):
        assert [net(noise(1, 3, 4), T) for _ in range(3)] == ["base"] * 3
    assert rows == [1]
    assert caplog.messages == ["engine base for inputs (1, 3, 4): three dimensions are refused"]


@needs_openvino
@pytest.mark.skipif(fused.missing() is not None, reason=str(fused.missing()))
@torch.no_grad()
def test_auto_has_both_engines_on_one_network(packed_unet, monkeypatch):
    monkeypatch.setattr(
        ByShape, "_choose", lambda self, rows, *call: (("openvino", "onednn")[rows > 2], "told")
    )
    network, alone, x = copy.deepcopy(packed_unet), copy.deepcopy(packed_unet), noise(3, 3, 16, 16)
    assert attach(network) == attached(network) == "onednn"
    for name, given in (("openvino", x[:1]), ("onednn", x)):
        y = network(given, T).sample
        assert attached(network) == name
        attach(alone, name)
        assert torch.equal(alone(given, T).sample, y)
        # Layers and blocks are those of one engine, whichever ran.
        assert set(execution(network).values()) == {"onednn, fused"}
    detach(network)
    assert attached(network) is None
    with pytest.raises(QuantempoError, match="attach"):
        network(x, T)


@torch.no_grad()
def test_without_openvino_the_other_engine_runs_and_it_is_said_once(
    packed_unet, monkeypatch, caplog
):
    monkeypatch.setattr(OpenVinoEngine, "missing", lambda self: "OpenVINO is not installed")
    base.warn_once.cache_clear()
    with caplog.at_level(logging.INFO, "quantempo"):
        for _ in range(2):
            network = copy.deepcopy(packed_unet)
            name = attach(network)
            network(noise(1, 3, 16, 16), T)
            assert attached(network) == name != "openvino"
    said = [text for text in caplog.messages if "OpenVINO" in text]
    assert said == ["engine openvino is not used: OpenVINO is not installed"]
