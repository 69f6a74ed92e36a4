"""Record calls into CUDA graphs, and what a forward takes of the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Forward", "allocated", "capture", "fastest_library", "peak_of"]

Forward = Callable[..., Any]

_WARM = 3


def capture(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
    """Return `forward` recorded once into a CUDA graph.

    The result copies its tensors into the recorded ones, replays, and returns the recorded output,
    which the next call overwrites. Arguments that are no tensors are those of the recording.

    Args:
        forward: launches kernels of fixed shapes, without waiting for the device.
        args, kwargs: of the recording; cloned.
    """
    leaves, shape = pytree.tree_flatten((args, kwargs))
    kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    fixed_args, fixed_kwargs = pytree.tree_unflatten(kept, shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(_WARM):
            forward(*fixed_args, **fixed_kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = forward(*fixed_args, **fixed_kwargs)

    def replay(*args: Any, **kwargs: Any) -> Any:
        given, given_shape = pytree.tree_flatten((args, kwargs))
        if given_shape != shape:
            raise ValueError(f"got arguments {given_shape}; the graph was recorded with {shape}")
        for mine, new in zip(kept, given, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        graph.replay()
        return output

    # The graph reads the network's weights where they are, and does not keep them alive itself.
    replay.recorded = forward  # type: ignore[attr-defined]
    return replay


@contextmanager
def fastest_library() -> Iterator[None]:
    """Let cuDNN try its algorithms at the first call of every shape: rivals get their best."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors hold on a CUDA device now; 0 elsewhere."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def peak_of(call: Callable[[], Any], device: torch.device) -> int:
    """Return how many bytes above those held before a call its tensors reach; 0 off CUDA."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.synchronize(device)
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before
