"""Record a denoiser as CUDA graphs, one for each shape of its inputs.

For small batches a CPU cannot make the launches of a forward as fast as the GPU runs them; a graph
is one. It holds the whole call, the hook that sets the step clock included: one for all time-steps.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from quantempo.core.instance import keep
from quantempo.errors import log
from quantempo.models.layers import timestep_of, timestep_place
from quantempo.quantized import quantized_layers

__all__ = ["Graphed", "capture", "graphed", "signature"]

# Eager calls before a recording: lazily made constants, autotuning, libraries that load.
_WARMUP = 2


def signature(value: Any, tensors: list[Tensor] | None = None) -> Any:
    """Return structure, shapes, dtypes, devices, other values; `tensors` gets these, in order."""
    if isinstance(value, Tensor):
        if tensors is not None:
            tensors.append(value)
        return Tensor, tuple(value.shape), value.dtype, value.device
    if isinstance(value, tuple | list):
        return type(value), tuple(signature(item, tensors) for item in value)
    if isinstance(value, dict):
        return dict, tuple((key, signature(item, tensors)) for key, item in value.items())
    # The type too: 1, 1.0 and True are equal.
    return type(value), value


def capture(
    call: Callable[[], Any], warmup: int = _WARMUP, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Return the CUDA graph of a call that waits for nothing, and its output, overwritten later."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = call()
    return graph, output


@dataclass(frozen=True)
class _Recording:
    graph: Any
    inputs: list[Tensor]
    output: Any


class Graphed(nn.Module):
    """Replay a denoiser's calls on a GPU; on other devices, or with gradients, call it.

    The first call of a signature (`signature` of the arguments) runs eagerly, then is recorded;
    later ones copy their inputs in, replay, and copy the outputs out. Recordings are dropped when
    the model is moved or an engine attached; after any other change call `clear`. Those of all
    networks of a process share memory: their replays follow each other, on one stream.

    denoiser: any function that waits for no value of its tensors; warmup: eager calls before each.
    """

    def __init__(self, denoiser: Callable[..., Any], warmup: int = _WARMUP) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.warmup, self.place = max(1, warmup), timestep_place(denoiser)
        self._recordings: dict[Any, _Recording | None] = {}
        self._pool: Any = None
        self._watched: Any = None
        self._seen: Any = None
        self._told: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "denoiser":
                raise
            return getattr(self.denoiser, name)

    def clear(self) -> None:
        """Drop all recordings."""
        self._recordings, self._pool = {}, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graphed":
        # Recordings stay with the tensors that they read.
        return Graphed(copy.deepcopy(self.denoiser, memo), self.warmup)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser, replayed where possible."""
        device = _cuda_device((args, kwargs))
        if device is None or torch.compiler.is_compiling():
            return self.denoiser(*args, **kwargs)
        if torch.is_grad_enabled():
            self._tell("it was called with gradients enabled; use torch.no_grad()")
            return self.denoiser(*args, **kwargs)
        args, kwargs = _with_timestep(args, kwargs, device, self.place)
        tensors: list[Tensor] = []
        # A forward may compute in another type under autocast.
        mixed = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        key = (signature((args, kwargs), tensors), mixed)
        self._check()
        try:
            known = key in self._recordings
        except TypeError as error:
            self._tell(f"an argument cannot be compared ({error})")
            return self.denoiser(*args, **kwargs)
        if not known:
            self._recordings[key] = self._record(args, kwargs, device)
        recording = self._recordings[key]
        if recording is None:
            return self.denoiser(*args, **kwargs)
        for static, tensor in zip(recording.inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        recording.graph.replay()
        # The next replay writes where this one did.
        return tree_map_only(Tensor, torch.clone, recording.output)

    def _check(self) -> None:
        """Drop what was recorded with other kernels, or with weights elsewhere in memory."""
        if not isinstance(self.denoiser, nn.Module):
            return
        if self._watched is None:
            keep(self, "_watched", _sample(self.denoiser))
        layer, places = self._watched
        now = (
            None if layer is None else layer.kernel,
            tuple(getattr(module, name).data_ptr() for module, name in places),
        )
        if self._seen is not None and (now[0] is not self._seen[0] or now[1] != self._seen[1]):
            self.clear()
        keep(self, "_seen", now)

    def _record(self, args: Any, kwargs: Any, device: torch.device) -> _Recording | None:
        """Return a recording of this call, or None if it cannot be captured."""
        with torch.inference_mode(False):
            (args, kwargs), inputs = _copied((args, kwargs))
        try:
            with torch.cuda.device(device):
                # One pool for all: a replay has no use for what another left.
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                call = functools.partial(self.denoiser, *args, **kwargs)
                graph, output = capture(call, self.warmup, self._pool)
        except RuntimeError as error:
            self._tell(f"it cannot be captured: {(str(error).splitlines() or ['no reason'])[0]}")
            return None
        return _Recording(graph, inputs, output)

    def _tell(self, reason: str) -> None:
        """Warn once about each reason for which calls run eagerly."""
        if reason not in self._told:
            log.warning("no CUDA graph of the denoiser, it runs eagerly: %s", reason)
            self._told.add(reason)


graphed = Graphed


def _sample(denoiser: nn.Module) -> tuple[Any, list[tuple[nn.Module, str]]]:
    """Return an integer layer, and a few tensors by which a move of the network is noticed."""
    # Looking at all of them would take longer than replaying a small graph.
    layer = next((layer for _, layer in quantized_layers(denoiser)), None)
    owned = [
        (module, name)
        for module in denoiser.modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
    return layer, owned[:: max(1, len(owned) // 8)]


def _cuda_device(arguments: Any) -> torch.device | None:
    """Return the device of the first tensor on a GPU, or None."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return next((t.device for t in tensors if t.device.type == "cuda"), None)


def _with_timestep(args: Any, kwargs: Any, device: Any, place: Any = ("timestep", 1)) -> Any:
    """Return the arguments with the time-step as a tensor on the device."""
    # A number would be part of the recording; from the CPU it would be copied during one.
    name, index = place
    if name not in kwargs and len(args) <= index:
        return args, kwargs
    timestep = timestep_of(args, kwargs, place)
    if isinstance(timestep, Tensor) and timestep.device.type == "cpu" and timestep.ndim == 0:
        timestep = timestep.item()
    if isinstance(timestep, int | float) and not isinstance(timestep, bool):
        dtype = torch.float32 if isinstance(timestep, float) else torch.int64
        # Filled by a launch: nothing waits, as it would for a copy.
        timestep = torch.full((), timestep, dtype=dtype, device=device)
    elif isinstance(timestep, Tensor):
        timestep = timestep.to(device)
    if name in kwargs:
        return args, {**kwargs, name: timestep}
    return (*args[:index], timestep, *args[index + 1 :]), kwargs


def _copied(arguments: Any) -> tuple[Any, list[Tensor]]:
    """Return the arguments with copies of the tensors, and these."""
    copies = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), arguments)
    return copies, [leaf for leaf in tree_leaves(copies) if isinstance(leaf, Tensor)]
