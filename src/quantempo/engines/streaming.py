"""Networks larger than the GPU: weights in pinned host memory, copied while others are used.

What the engine holds for one block alone, in its own form, is one stretch of the host's memory. As
many blocks as fit stay on the GPU, the others share two buffers: while one runs, a side stream
fills in the next. Addresses are fixed and every call starts anew: a CUDA graph records the copies.
"""

import copy
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from quantempo.core.instance import own_forward
from quantempo.engines.base import Prepared
from quantempo.engines.fusion import FusedBlock, fused_modules
from quantempo.errors import QuantempoError, log
from quantempo.kernels import ops
from quantempo.quantized import QLayer, quantized_layers

__all__ = ["Lane", "Streamed"]

# Bytes that are worth a place in a buffer, and where they may begin.
LEAST, ALIGNED = 2**16, 256


class Lane:
    """Copies on a side stream of a GPU, and what its memory is asked."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def copy(self, to: Tensor, host: Tensor) -> Any:
        """Copy after all that was launched so far; return what `wait` waits for."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(host, non_blocking=True)
        return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is launched from here on come after a copy."""
        torch.cuda.current_stream(self.device).wait_event(copied)

    def finish(self) -> None:
        """Let later copies, of any thread, come after what was launched so far."""
        if not torch.cuda.is_current_stream_capturing():
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def measured(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """Return what a call returns, and the most bytes that it had on top of those before."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return call(), torch.cuda.max_memory_allocated(self.device) - before


class _Unit:
    """What is copied at once; parts: (tensor, begin and end of its memory in `host`)."""

    def __init__(self) -> None:
        self.parts, self.host = list[tuple[Tensor, int, int]](), torch.empty(0)
        self.size, self.slot, self.streamed = 0, 0, False


def _put(memory: Tensor, tensor: Tensor, begin: int, end: int) -> None:
    """Let a tensor be what it is in these bytes of other memory, in a storage of its own."""
    how = tensor.storage_offset(), tensor.shape, tensor.stride()
    empty = torch.empty(0, dtype=tensor.dtype, device=memory.device)
    tensor.data = empty.set_(memory.untyped_storage()[begin:end], *how)  # type: ignore[call-overload]


def _take(memory: Tensor, at: int, group: list[Any]) -> list[tuple[Tensor, int, int]]:
    """Move tensors, of which the first has the memory of all; return those that are read."""
    start, stop, first, _ = group[0]
    whole = torch.empty(0, dtype=torch.uint8).set_(first.untyped_storage())
    memory[at : at + stop - start] = whole
    shift = at - start
    for begin, end, tensor, _ in group:
        _put(memory, tensor, begin + shift, end + shift)
    return [(tensor, begin + shift, end + shift) for begin, end, tensor, users in group if users]


def _tensors(value: Any, unit: Any, device: torch.device, seen: set[int]) -> Iterator[Any]:
    """Yield the tensors that an engine holds, none of modules, and their unit; put it there."""
    if id(value) in seen or (seen and isinstance(value, nn.Module | FusedBlock)):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value, unit
    elif isinstance(value, dict | list | tuple | set):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part, unit, device, seen)
    elif type(value).__module__.startswith("quantempo."):
        if isinstance(value, Prepared):
            value.device = device
        # What is written to stays.
        unit = None if hasattr(value, "fill") else unit
        yield from _tensors(getattr(value, "__dict__", ()), unit, device, seen)


class Streamed:
    """The forward of a denoiser on a CPU, with an engine, that runs on a GPU.

    memory: bytes of the GPU for the network and its calls: what these take is measured at the first
    one, and at each with more input. The integers as stored stay in the host's memory, what blocks
    have in float or in common is on the GPU.
    """

    def __init__(self, denoiser: nn.Module, lane: Lane, memory: int) -> None:
        self.denoiser, self.lane, self.memory = denoiser, lane, memory
        self.lock, self.elements, self.bytes = threading.RLock(), 0, 0
        # Of each buffer: what is in it, and what is still to be waited for.
        self.slots, self.held, self.copied = list[Tensor](), list[Any](), list[Any]()
        self.order, self.following = dict[_Unit, None](), dict[_Unit, _Unit]()
        ops.reserve(lane.device)
        forwards = {n: own_forward(m).active for n, m in fused_modules(denoiser).items()}
        found = [n for n, forward in forwards.items() if isinstance(forward, FusedBlock)]
        # What is around other blocks stays: no two are at work at once.
        inner = [n for n in found if not any(other.startswith(f"{n}.") for other in found)]
        units = {name: _Unit() for name in inner}
        self.blocks = [(units[name], forwards.pop(name)) for name in inner]
        self.layers = list[tuple[_Unit, QLayer]]()
        for name, layer in quantized_layers(denoiser):
            around = next((n for n in inner if name.startswith(f"{n}.")), name)
            self.layers.append((units.setdefault(around, _Unit()), layer))
            layer.kernel.here(torch.device("cpu"))  # type: ignore[union-attr]
        self._move([(None, forward) for forward in forwards.values()])
        self.units = [unit for unit in units.values() if unit.size]
        self._place()

    def _move(self, others: list[tuple[None, Any]]) -> None:
        """Move to pinned memory what one block alone reads, to the GPU what else is read."""
        device, pin = self.lane.device, self.lane.device.type == "cuda"
        aside = [t for _, q in self.layers for t in (q.weight_int, q.weight_group, q._unpacked)]
        # Who reads a tensor: units, None for all else, or nobody: the engine has its own.
        known = {id(t): (t, set[Any]()) for t in aside if t is not None}
        for tensor in (*self.denoiser.parameters(), *self.denoiser.buffers()):
            known.setdefault(id(tensor), (tensor, {None}))
        kernels = [(unit, layer.kernel) for unit, layer in self.layers]
        for unit, owner in (*self.blocks, *kernels, *others):
            for tensor, user in _tensors(owner, unit, device, set()):
                known.setdefault(id(tensor), (tensor, set()))[1].add(user)
        # Tensors whose memory overlaps.
        groups, last = list[list[Any]](), 0
        spans = (
            (memory.data_ptr(), memory.data_ptr() + memory.nbytes(), tensor, users)
            for tensor, users in known.values()
            for memory in (tensor.untyped_storage(),)
        )
        for span in sorted(spans, key=lambda span: (span[0], -span[1])):
            if span[0] == span[1]:
                span[2].data = span[2].data.to(device)
            elif span[0] < last:
                groups[-1].append(span)
            else:
                groups.append([span])
                last = span[1]
        mine = dict[_Unit, list[Any]]()
        for group in groups:
            users, size = set().union(*(span[3] for span in group)), group[0][1] - group[0][0]
            if len(users) == 1 and (user := next(iter(users))) and size >= LEAST:
                mine.setdefault(user, []).append((user.size, group))
                user.size += -(-size // ALIGNED) * ALIGNED
            elif users:
                self.bytes += size
                _take(torch.empty(size, dtype=torch.uint8, device=device), 0, group)
        for unit, every in mine.items():
            unit.host = torch.empty(unit.size, dtype=torch.uint8, pin_memory=pin)
            for at, group in every:
                unit.parts += _take(unit.host, at, group)
        for _, layer in self.layers:
            layer.aside = True

    def _place(self, memory: float = 0.0) -> None:
        """Keep so many bytes of blocks on the GPU, evenly spread; the others share two buffers."""
        units, device = list(dict.fromkeys((*self.order, *self.units))), self.lane.device
        total, largest = (f([0, *(unit.size for unit in units)]) for f in (sum, max))
        share, debt = (total - memory + largest) / total if total > memory else 0.0, 0.0
        for unit in units:
            debt += min(share, 1.0) * unit.size
            unit.streamed = debt >= unit.size
            debt -= unit.size * unit.streamed
        moving = [unit for unit in units if unit.streamed]
        if bool(moving) != bool(self.slots):
            new = (torch.empty(largest, dtype=torch.uint8, device=device) for _ in moving and "ab")
            self.slots = list(new)
        for i, unit in enumerate(moving):
            unit.slot = i % 2
        for unit in units:
            to = self.slots[unit.slot] if unit.streamed else unit.host.to(device, copy=True)
            for part in unit.parts:
                _put(to, *part)
        self.following = dict(itertools.pairwise(u for u in self.order if u.streamed))
        for unit, block in self.blocks:
            block.here = partial(self._enter, unit)
        for unit, layer in self.layers:
            # Another one: recordings notice.
            layer.kernel = kernel = copy.copy(layer.kernel)
            kernel.here = partial(self._enter, unit)  # type: ignore[union-attr]

    def _load(self, unit: _Unit) -> None:
        if self.held[unit.slot] is not unit:
            to = self.slots[unit.slot][: unit.size]
            self.held[unit.slot], self.copied[unit.slot] = unit, self.lane.copy(to, unit.host)

    def _enter(self, unit: _Unit, device: torch.device) -> None:
        """Have the weights of a block there, and those of the next one on their way."""
        if unit.size:
            self.order[unit] = None
        if not unit.streamed:
            return
        self._load(unit)
        if self.copied[unit.slot] is not None:
            self.lane.wait(self.copied[unit.slot])
            self.copied[unit.slot] = None
        if unit in self.following:
            self._load(self.following[unit])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        if torch.compiler.is_compiling():
            text = "streamed weights cannot be compiled; attach without memory, or record the calls"
            raise QuantempoError(f"{text} (quantempo.graphed)")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        elements, device = sum(x.numel() for x in tensors), self.lane.device
        # A time-step may be on the host.
        if tensors and all(x.device != device for x in tensors):
            text = f"got an input on {tensors[0].device} for weights that are streamed to {device}"
            raise QuantempoError(f"{text}; move it, or attach without memory")
        recording = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        with self.lock:
            if elements <= self.elements or recording:
                return self._forward(args, kwargs)
            self._place()
            output, taken = self.lane.measured(partial(self._forward, args, kwargs))
            taken, self.elements = taken + self.bytes + sum(map(len, self.slots)), elements
            self._place(self.memory - taken)
        text = "%d of %d blocks are copied in each call, which takes %.2f GB without the others"
        left = sum(unit.streamed for unit in self.units), len(self.units), taken / 1e9
        level = logging.WARNING if taken > self.memory else logging.INFO
        log.log(level, f"{text}; %.2f GB are given", *left, self.memory / 1e9)
        return output

    def _forward(self, args: Any, kwargs: Any) -> Any:
        # A recording that was replayed has left there what it wanted.
        self.held, self.copied = [None, None], [None, None]
        for unit in itertools.chain(*list(self.following.items())[:1]):
            self._load(unit)
        try:
            return type(self.denoiser).forward(self.denoiser, *args, **kwargs)
        finally:
            for copied in filter(None, self.copied):
                self.lane.wait(copied)
            self.lane.finish()

    def close(self) -> None:
        """Free the buffers; what is in modules stays where it is."""
        vars(self).clear()
