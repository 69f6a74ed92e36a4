"""Counted multiply-accumulates, against sums written out by hand and against torch's counter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from quantempo.models.macs import ATTENTION_MATMULS, count_macs
from tests.tiny import tiny_dit, tiny_unet


def test_layers_by_hand() -> None:
    class Net(nn.ModuleDict):
        def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> None:
            self["conv"](image)
            self["groups"](image)
            self["linear"](tokens)
            self["linear"](tokens)

    net = Net(
        {
            "conv": nn.Conv2d(4, 6, (3, 2), stride=2),
            "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
            "linear": nn.Linear(5, 7),
            "unused": nn.Linear(5, 7),
        }
    )
    inputs = torch.zeros(2, 4, 9, 8), torch.zeros(2, 3, 5)
    assert count_macs(net, lambda: net(*inputs), 2) == {
        "conv": (4 * 4) * 6 * (4 * 3 * 2),
        "groups": (9 * 8) * 6 * (2 * 3 * 3),
        "linear": 2 * 3 * 7 * 5,
        ATTENTION_MATMULS: 0,
    }


@pytest.mark.parametrize("fused", [True, False])
def test_attention_by_hand(fused: bool) -> None:
    q, k, v = torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 11, 8), torch.zeros(2, 3, 11, 8)

    def call() -> None:
        if fused:
            F.scaled_dot_product_attention(q, k, v)
        else:
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
            torch.bmm(scores, v.flatten(0, 1))

    # Per sample: 3 heads, 7 queries, 11 keys, width 8; scores and the mean of the values.
    assert count_macs(nn.Identity(), call, 2) == {ATTENTION_MATMULS: 2 * 3 * 7 * 11 * 8}


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_whole_networks_against_the_flop_counter_of_torch(kind: str) -> None:
    if kind == "unet":
        net = tiny_unet()
        inputs = (torch.zeros(2, 3, 16, 16), torch.tensor([5, 5]))
    else:
        net = tiny_dit().transformer
        inputs = (torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), torch.tensor([1, 2]))

    def call() -> None:
        net(*inputs) if kind == "unet" else net(inputs[0], inputs[1], class_labels=inputs[2])

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        call()
    macs = count_macs(net, call, 2)
    # torch's counter has no entry for the fused attention of the CPU; by hand, per sample:
    # blocks * 2 products * tokens^2 * width.
    attention = 4 * 2 * 64**2 * 32 if kind == "unet" else 2 * 2 * 16**2 * 16
    assert macs.pop(ATTENTION_MATMULS) == attention
    assert sum(macs.values()) == counter.get_total_flops() // 2 // 2
