"""Networks and references that the tests of the OpenVINO engine share."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.base import BACKENDS
from quantempo.engines.openvino.engine import KernelRow, OpenVinoEngine
from quantempo.models.layers import sites
from quantempo.quantized import (
    LayerPlan,
    QConv2d,
    QLayer,
    fill,
    find_clock,
    install_clock,
    quantized_layers,
    swap_layers,
)

_REASON = OpenVinoEngine().missing()


needs_openvino = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


STEPS = 1000


def sqnr_db(truth: Tensor, found: Tensor) -> float:
    """Return 10 log10(sum truth^2 / sum (found - truth)^2)."""
    error = (found - truth).double().pow(2).sum().clamp_min(1e-300)
    return float(10 * torch.log10(truth.double().pow(2).sum() / error))


class OneLayer(nn.Module):
    """A denoiser that is one layer, called as diffusers calls them."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, sample: Tensor, timestep: Tensor, scale: float = 1.0) -> Tensor:
        if self.before is not None:
            sample = self.before(sample)
        return self.layer(sample) * scale


def one_layer(
    layer: nn.Module,
    zero_points: tuple[int, ...] = (93,),
    exponents: tuple[int, ...] = (-4,),
    before: Callable[[Tensor], Tensor] | None = None,
    segments: tuple[int, ...] = (),
    bits: tuple[int, ...] = (8, 8),
) -> OneLayer:
    """Quantize a layer with random integers; act_scale[s, g] = 2^(exponents[g] + s)."""
    net = OneLayer(copy.deepcopy(layer), before).eval()
    buckets = len(exponents)
    clock = install_clock(net, torch.arange(STEPS) * buckets // STEPS)
    swap_layers(net, [LayerPlan("layer", "int8", segments, buckets, None, *bits)], clock)
    quantized: Any = net.layer
    generator = torch.Generator().manual_seed(7)

    def draw(low: int, high: int, shape: torch.Size) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator)

    out, top, groups = quantized.weight_int.shape[:1], quantized.weight_format.qmax, None
    codes = draw(-top, top, quantized.weight_shape)
    if quantized.weight_group is not None:
        groups = draw(0, 255, quantized.weight_group.shape).to(torch.uint8)
        codes = quantized.weight_format.grid(codes.shape, groups).round(codes.float())
    fill(
        quantized,
        codes.to(torch.int8),
        torch.exp2(draw(-9, -6, out).float()),
        draw(-50, 50, out).float() if quantized.bias is not None else None,
        torch.exp2(torch.tensor([[e + s for e in exponents] for s in range(len(zero_points))])),
        torch.tensor(zero_points, dtype=torch.int32),
        groups,
    )
    return net


def integer_output(layer: QLayer, x: Tensor, buckets: list[int]) -> Tensor:
    """Return the layer's output from int64 sums, row by row; independent of every backend.

    Padding is done by hand, with the zero point.
    """
    rows = []
    for row, bucket in zip(x.double(), buckets, strict=True):
        total: Any = 0.0
        parts = row.split(layer.segments, 0 if isinstance(layer, QConv2d) else -1)
        width = layer.segments if len(parts) > 1 else (layer.weight_codes.shape[1],)
        for i, (part, weight) in enumerate(
            zip(parts, layer.weight_codes.long().split(width, 1), strict=True)
        ):
            scale = layer.act_scale[i, bucket].double()
            zero = int(layer.act_zero_point[i])
            codes = (torch.round(part / scale) + zero).clamp(0, 2**layer.act_bits - 1).long()
            if isinstance(layer, QConv2d):
                pad = (layer.padding[1],) * 2 + (layer.padding[0],) * 2
                codes = F.pad(codes, pad, value=zero)
                sums = F.conv2d(
                    codes[None] - zero, weight, None, layer.stride, 0, layer.dilation, layer.groups
                )[0]
                shape = (-1, 1, 1)
            else:
                sums, shape = (codes - zero) @ weight.T, (-1,)
            total = total + sums.double() * scale * layer.weight_scale.double().reshape(shape)
        if layer.bias is not None:
            total = total + layer.bias.double().reshape(shape)
        rows.append(total)
    return torch.stack(rows)


def draw_inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Draw inputs that are never half-way between two codes for scales 2^-5 ... 2^-2.

    Some are outside the range. Half-way values are rounded with and without the zero point added,
    which differs where that is odd; they do not occur in practice.
    """
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-220, 220, shape, generator=generator)
    return (codes + 0.3125) * 2.0**-4


LAYERS = {
    "3x3": (nn.Conv2d(17, 24, 3, padding=1), (2, 17, 9, 7)),
    "3x3, stride 2": (nn.Conv2d(16, 8, 3, stride=2, padding=1), (1, 16, 8, 8)),
    "3x3, no padding, dilated": (nn.Conv2d(8, 16, 3, dilation=2), (1, 8, 9, 9)),
    "1x1, no bias": (nn.Conv2d(32, 16, 1, bias=False), (1, 32, 5, 5)),
    "uneven": (nn.Conv2d(3, 5, (3, 1), stride=(1, 2), padding=(2, 0)), (1, 3, 6, 8)),
    "groups": (nn.Conv2d(16, 32, 3, padding=1, groups=4), (2, 16, 6, 6)),
    "linear": (nn.Linear(48, 40), (3, 48)),
    "linear, tokens": (nn.Linear(33, 20), (2, 11, 33)),
    "linear, no bias": (nn.Linear(64, 64, bias=False), (2, 9, 64)),
}


def packed(
    denoiser: nn.Module, buckets: int = 1, int8: bool = True, bits: Any = (8, 8), **given: Any
) -> nn.Module:
    """Quantize a copy of a denoiser from the ranges it shows on random inputs (or none of it)."""
    net = copy.deepcopy(denoiser)
    observed: dict[str, list[Tensor]] = {}
    found = [site for site in sites(net) if site.role not in ("input", "output", "time") and int8]
    hooks = []
    for site in found:
        axis = 1 if isinstance(site.layer, nn.Conv2d) else -1

        def observe(_: Any, args: Any, name: str = site.name, dim: int = axis) -> None:
            channels = args[0].detach().transpose(dim, 0).flatten(1)
            ends = torch.stack([channels.amin(1), channels.amax(1)])
            observed.setdefault(name, []).append(ends)

        hooks.append(site.layer.register_forward_pre_hook(observe))
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(2, *sample_shape(net))
        with torch.no_grad():
            net(x, torch.tensor([100, 900]), **given)
    for hook in hooks:
        hook.remove()
    clock = install_clock(net, torch.arange(STEPS) * buckets // STEPS)
    layers = {site.name: site.layer for site in found}
    plans = [LayerPlan(s.name, "int8", s.segments, buckets, None, *bits) for s in found]
    swap_layers(net, plans, clock)
    for name, layer in quantized_layers(net):
        fill_from_ranges(layer, layers[name], torch.stack(observed[name]))
    return net.eval()


def fill_from_ranges(layer: QLayer, float_layer: Any, ends: Tensor) -> None:
    """Fill a layer with min-max grids; bucket g is 1 + g / 4 times as wide as bucket 0."""
    scales, zeros = [], []
    for part in ends.transpose(0, 1).split(layer.segments, 2):
        low, high = min(0.0, float(part[0].min())), max(0.0, float(part[1].max()))
        zeros.append(round(-low * layer.act_qmax / (high - low)))
        scales.append((high - low) / layer.act_qmax)
    weight = float_layer.weight.detach()
    weight_scale = weight.flatten(1).abs().amax(1) / (2 ** (layer.weight_bits - 1) - 1)
    integers = torch.round(weight / weight_scale.reshape(-1, *[1] * (weight.ndim - 1)))
    growth = 1 + torch.arange(layer.act_scale.shape[1]) / 4
    fill(
        layer,
        integers.to(torch.int8),
        weight_scale,
        None if float_layer.bias is None else float_layer.bias.detach(),
        torch.tensor(scales)[:, None] * growth,
        torch.tensor(zeros, dtype=torch.int32),
    )


def sample_shape(net: Any) -> tuple[int, int, int]:
    return net.config.in_channels, net.config.sample_size, net.config.sample_size


def simulated(net: nn.Module) -> nn.Module:
    """Return a copy of a packed network that runs on the simulated backend."""
    copied = copy.deepcopy(net)
    clock = find_clock(copied)
    copied.register_forward_pre_hook(
        lambda _, args, kwargs: clock.set(kwargs.get("timestep", args[1] if args[1:] else None)),
        with_kwargs=True,
    )
    for _, layer in quantized_layers(copied):
        object.__setattr__(layer, "clock", clock)
        layer.kernel = BACKENDS.get("simulated").lower(layer)
    return copied


class NormNet(nn.Module):
    """Group norms behind everything that is folded into them, and behind what must not be."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(g, 16, eps=1e-5) for g in (1, 4, 16, 8))
        self.row = nn.Linear(1, 16)
        for norm in self.norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        row = self.row(timestep[:, None].to(sample.dtype) / 1000)[:, :, None, None]
        x = self.norms[0](self.first(sample) + row)
        y = self.norms[1]((self.second(x) * row + 0.5 * row) * 1.5)
        shared = y + row
        z = self.norms[2](shared) + shared
        flat = z.reshape(*z.shape[:2], -1)
        return self.norms[3](flat).transpose(1, 2) + flat.transpose(1, 2)


def kernel_table(denoiser: nn.Module) -> list[KernelRow]:
    """Return how the graph that ran last executes each convolution and linear layer."""
    return next(reversed(denoiser.forward.graphs.values())).rows
