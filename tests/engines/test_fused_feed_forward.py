"""Feed-forward layers of any block against their layers one by one, on a CPU."""

from typing import Any

import pytest
import torch
from diffusers.models import transformers
from diffusers.models.attention import FeedForward, LuminaFeedForward
from torch import Tensor, nn

from quantempo.engines.fusion import fused_modules, report, unfuse
from quantempo.quantized import find_clock
from tests.engines.one_by_one import ENGINE, by_token, check_errors, errors, randomized
from tests.engines.quantized import quantize_network
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")

LAYERS: dict[str, Any] = {
    **{
        name: lambda name=name: FeedForward(32, 48, activation_fn=name)
        for name in ("gelu", "geglu", "swiglu")
    },
    "gelu_tanh": lambda: FeedForward(32, 48, activation_fn="gelu-approximate"),
    "lumina": lambda: LuminaFeedForward(32, 64, 16),
    "aura": lambda: transformers.auraflow_transformer_2d.AuraFlowFeedForward(32, 96),
    "hidream": lambda: transformers.transformer_hidream_image.HiDreamImageFeedForwardSwiGLU(32, 96),
    "z-image": lambda: transformers.transformer_z_image.FeedForward(32, 64),
}


class Network(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(32, 32), layer

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        y: Tensor = self.layer(self.stem(sample))
        return y


def network(kind: str) -> nn.Module:
    """Return it in integers, no engine attached."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = randomized(Network(LAYERS[kind]()))
    return quantize_network(plain, [(noise(3, 9, 32, seed=t), torch.tensor(t)) for t in (9, 900)])


def call(batch: int = 3, *shape: int) -> dict[str, Tensor]:
    x = noise(batch, *(shape or (9,)), 32, seed=5)
    return {"sample": x, "timestep": torch.linspace(900, 20, batch).round()}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("every", [0, 1, 2])
def test_a_feed_forward_layer_is_two_products(kind, every):
    net = by_token(network(kind), every) if every else network(kind)
    ENGINE.attach(net)
    assert [row.reason for row in report(net) if row.name == "layer"] == [None]
    for given in (call(), call(1), call(2, 3, 4)):
        check_errors(errors(net, **given))
    # Two layers that read the same codes are one product.
    gate, up = net.layer.forward.parts.gate, net.layer.forward.parts.up
    assert len(net.layer.forward.ups) == 1 + (gate is not None and gate.dynamic != up.dynamic)


@torch.no_grad()
def test_times_by_token_odd_calls_and_other_layers_take_the_path_of_the_class():
    net, x = network("gelu"), call()
    ENGINE.attach(net)
    forward = net.layer.forward
    assert forward.takes(x["sample"]) and not forward.takes(x["sample"].double())
    assert forward.parts.given(scale=None) is None and forward.parts.given() == ()
    with find_clock(net).at(torch.arange(27).reshape(3, 9) % 3):
        y = net.layer(x["sample"])
        unfuse(net)
        assert torch.equal(y, net.layer(x["sample"]))
    net.layer.net.append(nn.ReLU())
    ENGINE.attach(net)
    assert not fused_modules(net)
