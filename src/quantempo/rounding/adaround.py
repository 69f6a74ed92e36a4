"""Learn for every weight whether to round up or down, a block at a time.

    w_hat = s clamp(floor + h(v), qmin, qmax)
    loss = block error / start + 0.8 sum_l layer error_l / start + penalty sum (1 - |2 h - 1|^beta)

Errors are relative to the power of the float output, that of the block at each time-step. Inputs
are those behind the quantized part of the network, mixed element by element with the float ones.

Source: Nagel et al. 2020 (AdaRound, eq. 21-24) on the blocks of Li et al. 2021 (BRECQ); QDrop, Wei
et al. 2022; the layer term after EDA-DM, Liu et al. 2024.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from quantempo.core import Format, Grid
from quantempo.models.layers import hooked
from quantempo.quantized import QConv2d, QLayer
from quantempo.recipe import RoundingSettings
from quantempo.rounding import base

__all__ = ["START_KEPT", "SoftKernel", "errors", "learn"]

# What is noted of a block whose start was better.
START_KEPT = "the start was better and is kept"

# Share of the iterations before the penalty sets in; its exponent falls from the first to the
# second afterwards, as in the papers.
WARM_UP = 0.2
BETA = (20.0, 2.0)
# Of the penalty, a mean over weights, beside a loss of 1.8 at the start. Below 100 a few percent
# of h are undecided at the end, and rounding them costs more than all that was learned (measured
# on a small block: 16 leaves 15 % undecided, 500 none, with errors 0.55 and 0.48 of the start's).
WEIGHT = 300.0
# A v has about 3 to go and moves by at most the rate in an iteration. The papers' 1e-3 is for
# 20,000 iterations; fewer need larger steps to get anywhere.
TRAVEL, LEAST_RATE, MOST_RATE = 30.0, 1e-3, 0.1
# From the nearest codes h starts where the soft weight is the float one. From others it starts
# near the codes: at the float weight what they know would be lost (measured on the first block of
# the bundled model, 4 bits, 100 iterations: error 2.5e-3 from a gptq start of 2.3e-5).
SPREAD = {"nearest": 1.0}
SPREAD_ELSE = 0.2
# Of the errors of layers in the loss.
LAYER_SHARE = 0.8
TINY = torch.finfo(torch.float32).tiny
# Of the rectified sigmoid: h reaches 0 and 1 at finite v. Louizos et al. 2018.
_STRETCH, _SHIFT = 1.2, -0.1


class SoftKernel:
    """A layer whose codes are floor + h(v), between two neighbours each; v is learned.

    It starts from given codes c: floor is c or c - 1, so that the float weight lies between or, if
    c is further away, c is one of the two; h is the fraction of the float weight, kept on the side
    of c, so that rounding h gives c back. spread: distance of h at the start from c, 1 for the one
    described, towards 0 for a start near c itself.
    """

    def __init__(
        self, layer: QLayer, weight: Tensor, codes: Tensor, spec: Format | Grid, spread: float = 1.0
    ) -> None:
        self.layer, self.grid = layer, Grid.of(spec)
        # Of one step: s scale in groups.
        self.rows = layer.weight_scale.reshape(-1, *[1] * (weight.ndim - 1)) * self.grid.step
        ratio, start = weight.detach().float() / self.rows, codes.float() / self.grid.step
        upper = start > ratio
        self.floor = start - upper.float()
        h = (ratio - self.floor).clamp(0, 1)
        h = torch.where(upper, h.clamp_min(0.51), h.clamp_max(0.49))
        h = upper.float() + spread * (h - upper.float())
        # Off the ends, where the gradient of the clamp is zero.
        h = h.clamp(0.01, 0.99)
        self.v = torch.logit((h - _SHIFT) / _STRETCH).requires_grad_()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output on fake-quantized input, in float arithmetic."""
        layer, weight, quantized = self.layer, self.weight(), base.dequantized_input(self.layer, x)
        if isinstance(layer, QConv2d):
            how = (layer.stride, layer.padding, layer.dilation, layer.groups)
            return F.conv2d(quantized, weight, layer.bias, *how).to(x.dtype)
        return F.linear(quantized, weight, layer.bias).to(x.dtype)

    def h(self) -> Tensor:
        """Return the soft part of the codes, clamp(1.2 sigmoid(v) - 0.1, 0, 1)."""
        return (torch.sigmoid(self.v) * _STRETCH + _SHIFT).clamp(0, 1)

    def weight(self) -> Tensor:
        """Return the soft weight, float32."""
        return self.rows * (self.floor + self.h()).clamp(self.grid.low, self.grid.high)  # type: ignore[arg-type]

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Return the codes with h rounded, int8."""
        hard = self.floor + (self.h() >= 0.5).float()
        return (hard.clamp(self.grid.low, self.grid.high) * self.grid.step).to(torch.int8)  # type: ignore[arg-type]


@contextmanager
def _outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield the last output of each layer of a block."""
    last: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        last[name] = output

    with hooked(layers, see):
        yield last


def learn(
    block: base.BlockRun, parameters: list[Tensor], settings: RoundingSettings, *,
    powers: list[Tensor], start: tuple[Tensor, Tensor], rate: float,
    penalty: Callable[[int], Tensor],
) -> None:  # fmt: skip
    """Minimise the loss over `parameters` by Adam, in place; nothing waits for the device.

    The block's layers have kernels that depend on the parameters. settings: `iterations` of `batch`
    rows each, drawn with repeats by `seed`; `drop`; start: from `errors`, of the integers it starts
    from; penalty: iteration -> term added to the loss, which is 1.8 for the integers at the start.
    """
    host = torch.Generator().manual_seed(settings.seed)
    mixing = torch.Generator(block.device).manual_seed(settings.seed)
    size = (settings.iterations, settings.batch)
    rows = torch.randint(len(block), size, generator=host).to(block.device)
    adam = torch.optim.Adam(parameters, lr=rate)
    with _outputs(block.floats) as exact, _outputs(block.copies) as quantized:
        for iteration, drawn in enumerate(rows):
            index = block.exact.alike(drawn)
            with torch.no_grad():
                arguments = block.exact.take(index, block.device)
                wanted = block.call(index, arguments, exact=True)
                given = block.quantized.take(index, block.device)
                mixed = _mix(given, arguments, settings.drop, mixing)
            with torch.enable_grad():
                got = block.call(index, mixed, exact=False)
                whole = block.error(got, wanted, powers, index)
                layers = _layer_error(quantized, exact)
                loss = whole / start[0] + LAYER_SHARE * layers / start[1] + penalty(iteration)
                # Not backward(): norms between the layers need no gradients.
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            adam.step()


@torch.no_grad()
def errors(block: base.BlockRun, powers: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return () error of the block and () sum of its layers' errors over all rows, as they are."""
    totals: list[tuple[Tensor, Tensor]] = []
    with _outputs(block.floats) as exact, _outputs(block.copies) as quantized:
        for index in block.batches():
            wanted = block.run(index, exact=True)
            whole = block.error(block.run(index, exact=False), wanted, powers, index)
            layers = _layer_error(quantized, exact)
            totals.append((whole * len(index), layers * len(index)))
    whole, layers = (torch.stack(column).sum() / len(block) for column in zip(*totals, strict=True))
    return whole.clamp_min(TINY), layers.clamp_min(TINY)


def _layer_error(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    powers = {name: wanted[name].square().mean().clamp_min(TINY) for name in got}
    return torch.stack([(got[n] - wanted[n]).square().mean() / powers[n] for n in got]).sum()


def _mix(quantized: Any, exact: Any, drop: float, generator: torch.Generator) -> Any:
    """Return arguments with each element from `exact` with probability `drop`."""

    def mixed(value: Any, wanted: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1):
            return value
        chance = torch.rand(value.shape, generator=generator, device=value.device)
        return torch.where(chance < drop, wanted, value)

    return quantized if drop == 0 else pytree.tree_map(mixed, quantized, exact)


def _adaround_codes(unit: base.Unit) -> dict[str, Tensor]:
    """Learn better codes than another rounding's; keep those of the smaller error, over all rows.

    The block's layers hold them afterwards.
    """
    settings, block = unit.settings, unit.block
    base.check_start(settings)
    start = base.ROUNDINGS.get(settings.start).codes(unit)
    for name, value in start.items():
        block.assign(name, value)
    if settings.iterations == 0:
        return start
    powers = block.powers()
    before = block.loss(powers)
    codes = _learn_codes(unit, start, powers)
    for name, value in codes.items():
        block.assign(name, value)
    after = block.loss(powers)
    better = after < before
    moved = sum(int((codes[name] != start[name]).sum()) for name in codes)
    share = moved / max(1, sum(value.numel() for value in codes.values()))
    kept = f"{100 * share:.1f} % of the codes moved" if better else START_KEPT
    unit.notes.append(f"adaround {before:.3e} -> {after:.3e}, {kept}")
    if not better:
        for name, value in start.items():
            block.assign(name, value)
    return codes if better else start


def _learn_codes(
    unit: base.Unit, start: dict[str, Tensor], powers: list[Tensor]
) -> dict[str, Tensor]:
    """Return the learned codes; the block's layers are left with the soft kernels."""
    settings, block = unit.settings, unit.block
    # Of the integers: soft codes start near the float weights, with hardly an error.
    at_start = errors(block, powers)
    spread = SPREAD.get(settings.start, SPREAD_ELSE)
    kernels = {
        name: SoftKernel(block.copies[name], weight, start[name], unit.grid(name), spread)
        for name, weight in unit.weights.items()
    }
    for name, kernel in kernels.items():
        block.copies[name].kernel = kernel
    count = sum(kernel.v.numel() for kernel in kernels.values())
    warm = int(WARM_UP * settings.iterations)

    def penalty(iteration: int) -> Tensor:
        if iteration < warm:
            return torch.zeros((), device=block.device)
        done = (iteration - warm) / max(1, settings.iterations - warm)
        beta = BETA[0] + (BETA[1] - BETA[0]) * done
        sums = [(1 - (2 * kernel.h() - 1).abs().pow(beta)).sum() for kernel in kernels.values()]
        return WEIGHT * torch.stack(sums).sum() / count

    rate = min(MOST_RATE, max(LEAST_RATE, TRAVEL / settings.iterations))
    parameters = [kernel.v for kernel in kernels.values()]
    learn(block, parameters, settings, powers=powers, start=at_start, rate=rate, penalty=penalty)
    return {name: kernel.codes() for name, kernel in kernels.items()}


base.ROUNDINGS.register("adaround")(base.Rounding("block", _adaround_codes))
