"""Record the inputs of one block of a network, and run the block on them alone.

The network is stopped at the block, so a recording costs what comes before it and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from quantempo.engines.base import BACKENDS
from quantempo.errors import QuantempoError
from quantempo.models.layers import hooked
from quantempo.quantized import QLayer, StepClock

__all__ = ["BlockRun", "Inputs", "record", "record_all", "run_until", "tensors_of"]


class _StopError(Exception):
    """Raised by a hook to end a forward early."""


def run_until(module: nn.Module, call: Callable[[], Any], see: Callable[..., None]) -> None:
    """Run `call` until `module` is called; give see(args, kwargs) what it was called with.

    Raises:
        QuantempoError: `call` never reached the module.
    """

    def stop(_: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args, kwargs)
        raise _StopError

    with hooked({"": module}, stop, before=True):
        try:
            call()
        except _StopError:
            return
    raise QuantempoError("a block was not reached by the network's forward; exclude its layers")


def tensors_of(output: Any) -> list[Tensor]:
    """Return the floating tensors in the output of a block, in order."""
    leaves = pytree.tree_leaves(output)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


class Inputs:
    """The arguments of a block for N rows of the calibration set.

    Tensors whose first dimension grows with the rows of a call are kept for each row; all else is
    taken to be the same for every call.

    Args:
        budget: bytes kept on the device they come from; what would be more lies on the host, in
            half precision (values beyond its range are clipped to it).
    """

    def __init__(self, rows: int, budget: int) -> None:
        self.rows, self.budget = rows, budget
        self.halved = False
        self._parts: list[tuple[int, list[Any]]] = []
        # (whether it grows with the rows, value) of each leaf of the arguments.
        self._leaves: list[tuple[bool, Any]] = []
        self._tree: Any = None

    def add(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Append a call of `count` rows."""
        leaves, self._tree = pytree.tree_flatten((args, kwargs))
        if not self._parts:
            size = sum(v.nbytes for v in leaves if isinstance(v, Tensor))
            self.halved = size / count * self.rows > self.budget
        self._parts.append((count, [self._keep(value) for value in leaves]))

    def _keep(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if self.halved and value.dtype == torch.float32:
            top = torch.finfo(torch.float16).max
            return value.clamp(-top, top).half().cpu()
        return value.cpu() if self.halved else value.clone()

    @property
    def expected_bytes(self) -> float:
        """Bytes that all rows will take, from those of the calls so far."""
        rows = sum(count for count, _ in self._parts)
        tensors = [v for _, part in self._parts for v in part if isinstance(v, Tensor)]
        return sum(v.nbytes for v in tensors) / max(1, rows) * self.rows

    def close(self) -> None:
        """Join the calls; nothing can be added afterwards."""
        counts = [count for count, _ in self._parts]
        for column in zip(*(part for _, part in self._parts), strict=True):
            grows = _grows(column, counts)
            self._leaves.append((grows, torch.cat(column) if grows else column[0]))
        self._parts.clear()

    def take(self, index: Tensor, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) of rows `index` (k,), float32."""

        def at(grows: bool, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if grows:
                # Waits for the device where rows lie on the host: read while it is on its way,
                # the index would be garbage.
                rows = value.unflatten(0, (self.rows, -1))
                value = rows.index_select(0, index.to(value.device)).flatten(0, 1)
            value = value.to(device, non_blocking=True)
            return value.float() if value.dtype == torch.float16 and self.halved else value

        return pytree.tree_unflatten([at(*leaf) for leaf in self._leaves], self._tree)


def _grows(column: Sequence[Any], counts: list[int]) -> bool:
    """Return whether the first dimensions are a common multiple of the rows of the calls."""
    if any(not isinstance(v, Tensor) or v.ndim == 0 for v in column):
        return False
    each = column[0].shape[0] // counts[0]
    return each > 0 and all(v.shape[0] == each * n for v, n in zip(column, counts, strict=True))


@torch.no_grad()
def record(module: nn.Module, calls: list[tuple[int, Callable[[], Any]]], budget: int) -> Inputs:
    """Return what `module` is called with by each of `calls` = (rows, forward of the network)."""
    inputs = Inputs(sum(rows for rows, _ in calls), budget)
    for rows, call in calls:

        def see(args: tuple[Any, ...], kwargs: dict[str, Any], rows: int = rows) -> None:
            inputs.add(rows, args, kwargs)

        run_until(module, call, see)
    inputs.close()
    return inputs


@torch.no_grad()
def record_all(
    modules: Mapping[str, nn.Module], calls: list[tuple[int, Callable[[], Any]]], budget: int
) -> dict[str, Inputs] | None:
    """Return what every module is first called with, each call run once; None over the budget."""
    total = sum(rows for rows, _ in calls)
    found = {name: Inputs(total, budget) for name in modules}
    seen: set[str] = set()
    rows = 0

    def see(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in seen:
            found[name].add(rows, args, kwargs)
            seen.add(name)

    with hooked(modules, see, before=True):
        for rows, call in calls:  # noqa: B007 (the hook reads it)
            seen.clear()
            call()
            if sum(inputs.expected_bytes for inputs in found.values()) > budget:
                return None
    for inputs in found.values():
        inputs.close()
    return found


class BlockRun:
    """One block, float and quantized, with the inputs of both.

    Args:
        name: of the block; module: float; copied: the same with quantized layers.
        floats, copies: its integer layers by full name, in order of execution.
        exact, quantized: inputs of the float block, and of the quantized one behind the already
            quantized part of the network.
        times: (N,) time-step of each row, as the denoiser receives it.
        clock: of the quantized denoiser.
        batch: rows of a call.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        copied: nn.Module,
        floats: Mapping[str, nn.Module],
        copies: Mapping[str, QLayer],
        exact: Inputs,
        quantized: Inputs,
        times: Tensor,
        clock: StepClock,
        batch: int,
    ) -> None:
        self.name, self.module, self.copied = name, module, copied
        self.floats, self.copies = dict(floats), dict(copies)
        self.exact, self.quantized, self.clock, self.batch = exact, quantized, clock, batch
        self.device = clock.bucket_of.device
        self.times = times.to(self.device)

    def __len__(self) -> int:
        return self.exact.rows

    def batches(self) -> Iterator[Tensor]:
        """Yield the numbers of all rows, (k,) int64, a batch at a time."""
        yield from torch.arange(len(self), device=self.device).split(self.batch)

    def run(self, index: Tensor, *, exact: bool) -> list[Tensor]:
        """Return the outputs of the block, float or quantized, on its own inputs of some rows."""
        inputs = self.exact if exact else self.quantized
        return self.call(index, inputs.take(index, self.device), exact=exact)

    def call(self, index: Tensor, arguments: Any, *, exact: bool) -> list[Tensor]:
        """Return the outputs of the block on (args, kwargs), at the times of rows `index`."""
        self.clock.set(self.times.index_select(0, index))
        module, (args, kwargs) = self.module if exact else self.copied, arguments
        return tensors_of(module(*args, **kwargs))

    def layer_inputs(self, name: str) -> Iterator[Tensor]:
        """Yield the input of one quantized layer for all rows, the block's integers as they are.

        The clock stands at the times of what was yielded.
        """
        seen: list[Tensor] = []

        def see(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0])

        for index in self.batches():

            def call(index: Tensor = index) -> None:
                self.run(index, exact=False)

            run_until(self.copies[name], call, see)
            yield seen.pop()

    def assign(self, name: str, codes: Tensor) -> None:
        """Give one quantized layer its integers, and the simulated kernel that reads them."""
        layer = self.copies[name]
        layer.set_codes(codes.to(layer.weight_int.device))
        layer.kernel = BACKENDS.get("simulated").lower(layer)

    def codes(self) -> dict[str, Tensor]:
        """Return copies of the integers of all layers."""
        return {name: layer.weight_codes.clone() for name, layer in self.copies.items()}

    @torch.no_grad()
    def powers(self) -> list[Tensor]:
        """Return (N,) for each output: mean square of the float block's at the row's time-step."""
        rows: list[list[Tensor]] = []
        for index in self.batches():
            rows.append([_row_mean(y.square(), len(index)) for y in self.run(index, exact=True)])
        _, group = self.times.unique(return_inverse=True)
        result = []
        for parts in zip(*rows, strict=True):
            power = torch.cat(parts)
            sums = power.new_zeros(len(power)).index_add_(0, group, power)
            counts = power.new_zeros(len(power)).index_add_(0, group, torch.ones_like(power))
            mean = (sums / counts.clamp_min(1)).index_select(0, group)
            result.append(mean.clamp_min(torch.finfo(torch.float32).tiny * 2**20))
        return result

    def error(
        self, got: list[Tensor], wanted: list[Tensor], powers: list[Tensor], index: Tensor
    ) -> Tensor:
        """Return () mean over rows and outputs of |got - wanted|^2 / power at the time-step."""
        terms = [
            (_row_mean((y - target).square(), len(index)) / power.index_select(0, index)).mean()
            for y, target, power in zip(got, wanted, powers, strict=True)
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def loss(self, powers: list[Tensor]) -> float:
        """Return the error of the quantized block over all rows, its integers as they are."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for index in self.batches():
            wanted = self.run(index, exact=True)
            error = self.error(self.run(index, exact=False), wanted, powers, index)
            total += error.double() * len(index)
        return float(total) / len(self)


def _row_mean(values: Tensor, rows: int) -> Tensor:
    """Return (rows,) means of (rows m, ...)."""
    return values.reshape(rows, -1).mean(1)
