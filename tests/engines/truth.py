"""What a quantized layer must give, from the int64 reference alone; shared by backend tests."""

from typing import Any

import torch
from torch import Tensor, nn

from quantempo.models.layers import hooked
from quantempo.quantized import QConv2d, QLayer
from tests.kernels import reference


def codes_of(layer: QLayer, x: Tensor, bucket: int = 0) -> list[tuple[Tensor, Tensor, int, float]]:
    """Return (codes, weight, zero point, scale) of each segment."""
    axis = 1 if isinstance(layer, QConv2d) else -1
    result, start = [], 0
    for i, width in enumerate(layer.segments):
        scale, zero = float(layer.act_scale[i, bucket]), int(layer.act_zero_point[i])
        weight = layer.weight_codes
        if len(layer.segments) > 1:
            weight = weight[:, start : start + width]
        part = x.narrow(axis, start, width)
        result.append((reference.quantize(part, scale, zero, layer.act_qmax), weight, zero, scale))
        start += width
    return result


def expected(layer: QLayer, x: Tensor, bucket: int = 0) -> Tensor:
    """Return the layer's output in float64 from the int64 reference."""
    y: Tensor | float = 0.0
    for codes, weight, zero, scale in codes_of(layer, x, bucket):
        if isinstance(layer, QConv2d):
            acc = reference.conv2d_accumulator(
                codes, weight, zero, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            y = y + reference.epilogue(acc, scale, layer.weight_scale, None, 1)
        else:
            acc = reference.linear_accumulator(codes, weight, zero)
            y = y + reference.epilogue(acc, scale, layer.weight_scale, None, -1)
    rows = (-1, 1, 1) if isinstance(layer, QConv2d) else (-1,)
    return y + layer.bias.double().reshape(rows)


def noise(*shape: int, seed: int = 0, spread: float = 60.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread


def relative(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b|."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def check_like_simulated(y: Tensor, simulated: Tensor, truth: Tensor, level: float) -> None:
    """Assert that an engine's output is the simulated one but for codes that moved.

    Moved codes decorrelate the rounding: y is as far from the float output as the simulated one
    (at most `level`, relative), both are sqrt(2) of that apart, and their difference d is noise
    that does not know the output: its share along it has a standard deviation of d / sqrt(n). A
    scale off by a few thousandths is none.
    """
    noise_level, apart = relative(simulated, truth), relative(y, simulated)
    assert noise_level <= level
    assert relative(y, truth) <= 1.2 * noise_level
    assert apart <= 1.2 * 2**0.5 * noise_level
    y, simulated, truth = y.double(), simulated.double(), truth.double()
    gain = float(((y - simulated) * truth).sum() / truth.square().sum())
    # Where no code moved: float32 roundings.
    assert abs(gain) <= 5 * apart / truth.numel() ** 0.5 + 1e-6, (gain, apart)


@torch.no_grad()
def block_calls(network: nn.Module, kinds: tuple[str, ...], *arguments: Any) -> dict[str, Any]:
    """Return name -> (args, kwargs, output) of each block of these classes, in one forward."""
    seen: dict[str, Any] = {}

    def see(name: str, block: nn.Module, args: Any, kwargs: Any, y: Tensor) -> None:
        seen[name] = (args, kwargs, y[0] if isinstance(y, tuple) else y)

    found = {n: m for n, m in network.named_modules() if type(m).__name__ in kinds}
    with hooked(found, see):
        network(*arguments)
    return seen
