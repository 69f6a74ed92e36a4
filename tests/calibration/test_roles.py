"""What a layer is for is measured on calls of the network: its name and its place say nothing."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import MemorySet
from quantempo.calibration.statistics import measure_roles
from quantempo.models.layers import sites
from quantempo.pipeline.quantize import quantize
from quantempo.recipe import Recipe
from tests.tiny import noise

WIDTH = 8


class Probe(nn.Module):
    """A denoiser of tokens whose names mislead and whose layers stand in no order."""

    # Layer -> what it acts on; "" for none of the measured roles.
    ROLES: ClassVar = {
        "conv_out": "input",
        "time_embedding": "",
        "beside": "input",
        "block": "time",
        "table": "time",
        "pooled": "time",
        "label": "time",
        "words": "",
        "tinted": "",
        "conv_in": "output",
        "stray": "",
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("never", *sorted(self.ROLES)):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.positions = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, label: Tensor) -> Tensor:
        t = timestep.float()[:, None] / 1000 * torch.ones(WIDTH)
        tokens = sample.flatten(2).mT
        hidden = self.conv_out(tokens) + self.beside(tokens)
        # A sequence, as in Chroma, of the time alone.
        modulation = self.table(torch.cos(self.block(t))[:, None] + self.positions).mean(1)
        modulation = modulation + self.pooled(text.mean(1)) + self.label(label)
        # Tokens of the text with the time added, as in the first block of Flux.
        words = self.tinted(self.words(text) + modulation[:, None])
        hidden = self.time_embedding(hidden + modulation[:, None]) + words.mean(1, keepdim=True)
        output = self.conv_in(hidden).mT.reshape(sample.shape)
        self.stray(hidden)
        return output


def probe_data() -> MemorySet:
    calls = []
    for rows in (2, 4):
        text, label = noise(rows, 7, WIDTH, seed=rows), noise(rows, WIDTH, seed=rows + 1)
        inputs = {"sample": noise(rows, WIDTH, 4, 4), "timestep": torch.arange(rows) * 200 + 100}
        calls.append({**inputs, "text": text, "label": label})
    return MemorySet.of_calls(Probe(), calls, 1000)


def test_roles_are_what_layers_act_on() -> None:
    assert measure_roles(Probe(), probe_data()) == Probe.ROLES


@pytest.mark.parametrize("zero", [nn.init.zeros_, nn.init.ones_])
def test_a_network_whose_end_is_constant_has_no_wrong_time(zero) -> None:
    """A fresh network's last layer is often zero: nothing before it changes the output."""
    net = Probe()
    zero(net.conv_in.weight)
    assert measure_roles(net, probe_data()) == Probe.ROLES


def test_a_layer_that_never_runs_is_left_in_float_and_named() -> None:
    net, recipe = Probe(), Recipe.load("w8a8").override("rounding", samples=6)
    plans = {plan.name: plan for plan in quantize(net, probe_data(), recipe).plans}
    assert plans["never"].kind == "float" and "never runs" in plans["never"].reason
    assert {p.name for p in plans.values() if p.kind == "int8"} == {
        name for name, role in Probe.ROLES.items() if not role
    }
    named = {site.name: site.role for site in sites(net, Probe.ROLES)}
    assert named["conv_out"] == "input" and named["time_embedding"] == "linear"
