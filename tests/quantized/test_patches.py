"""A convolution whose stride is its kernel is one integer product, in 1 and 3 dimensions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantempo
from quantempo.calibration.dataset import MemorySet
from quantempo.models.layers import sites
from quantempo.pipeline.quantize import quantize as quantize_network
from quantempo.quantized.layers import QPatches
from quantempo.recipe import Recipe
from tests.kernels.reference import quantize
from tests.tiny import noise

# Sizes leave something over at the ends, which the convolution drops.
CUT = {
    "1d point": (nn.Conv1d(6, 5, 1), (7,)),
    "1d": (nn.Conv1d(6, 5, 4, 4, bias=False), (18,)),
    "3d point": (nn.Conv3d(6, 5, 1), (2, 3, 4)),
    "3d": (nn.Conv3d(6, 5, (1, 2, 3), (1, 2, 3)), (2, 5, 7)),
}


class Network(nn.Module):
    """A layer that only measured roles call ordinary: others read x_t and write the output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(1, 1), layer, nn.Linear(1, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.last(self.middle(self.first(sample[..., None])[..., 0])[..., None])[..., 0]


def network(case: str) -> tuple[nn.Module, Tensor]:
    layer, size = CUT[case]
    return Network(layer).eval(), noise(6, 6, *size)


def packed(net: nn.Module, x: Tensor, engine: str, **rounding: Any) -> nn.Module:
    recipe = Recipe.load("w8a8").override("rounding", samples=6, **rounding)
    recipe = recipe.override("activations", buckets=1)
    found = quantize_network(net, MemorySet(x, torch.arange(6) * 100), recipe)
    copied = found.install(net, copy=True)
    quantempo.attach(copied, engine)
    return copied


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "engine"),
    [*((case, "simulated") for case in CUT), ("3d", "onednn"), ("3d", "openvino")],
)
def test_patches_equal_the_convolution_of_their_grids(case: str, engine: str) -> None:
    net, x = network(case)
    copied = packed(net, x, engine)
    layer: Any = copied.middle
    assert isinstance(layer, QPatches) and layer.act_scale.numel() == 1
    hidden = net.first(x[..., None])[..., 0]
    scale, zero = float(layer.act_scale), int(layer.act_zero_point)
    weight = layer.weight_int.reshape(net.middle.weight.shape)
    steps = (quantize(hidden, scale, zero).double() - zero) * scale
    exact = [steps, weight.double() * layer.weight_scale.double().reshape(-1, *[1] * (x.ndim - 1))]
    convolve = nn.functional.conv1d if x.ndim == 3 else nn.functional.conv3d
    bias = None if layer.bias is None else layer.bias.double()
    wanted = net.last.double()(convolve(*exact, bias, net.middle.stride)[..., None])[..., 0]
    net.last.float()
    torch.testing.assert_close(copied(x, 0).double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nearest", "gptq", "adaround"])
def test_every_rounding_takes_patches(name: str) -> None:
    net, x = network("3d")
    settings = {"iterations": 20} if name == "adaround" else {}
    copied = packed(net, x, "simulated", name=name, **settings)
    error = (copied(x, 0) - net(x, 0)).square().mean() / net(x, 0).square().mean()
    assert float(error) < 1e-3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 4, 5, padding=2), nn.Conv1d(4, 4, 2), nn.Conv1d(4, 4, 2, 2, padding=1),
        nn.Conv1d(4, 4, 2, 2, dilation=2), nn.Conv1d(4, 4, 1, groups=2), nn.Conv3d(4, 4, 3),
        nn.Conv3d(4, 4, (1, 2, 2), 1), nn.ConvTranspose1d(4, 4, 2, 2), nn.ConvTranspose3d(4, 4, 2),
    ],
)  # fmt: skip
def test_what_is_no_product_over_patches_stays_in_float(layer: nn.Module) -> None:
    reason = sites(nn.Sequential(layer))[0].unsupported
    assert reason is not None and type(layer).__name__ in reason
