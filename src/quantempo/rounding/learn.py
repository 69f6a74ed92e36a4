"""The loop that learns something of a block from the error of its output.

    loss = block error / start + 0.8 sum_l layer error_l / start + penalty

Errors are relative to the power of the float output, that of the block at each time-step. Inputs
are those behind the quantized part of the network, mixed element by element with the float ones
(QDrop, Wei et al. 2022). The layer term: after EDA-DM (Liu et al. 2024).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.models.layers import hooked
from quantempo.recipe import RoundingSettings
from quantempo.rounding.base import BlockRun

__all__ = ["LAYER_SHARE", "errors", "learn"]

LAYER_SHARE = 0.8
TINY = torch.finfo(torch.float32).tiny


@contextmanager
def _outputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Yield the last output of each layer of a block."""
    last: dict[str, Tensor] = {}

    def see(name: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        last[name] = output

    with hooked(layers, see):
        yield last


def learn(
    block: BlockRun, parameters: list[Tensor], settings: RoundingSettings, *, powers: list[Tensor],
    start: tuple[Tensor, Tensor], rate: float, penalty: Callable[[int], Tensor],
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
def errors(block: BlockRun, powers: list[Tensor]) -> tuple[Tensor, Tensor]:
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
