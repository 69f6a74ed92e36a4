"""Weights of 4 bits packed or as bytes: with which a layer is faster, measured where it runs."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import GroupFormat
from quantempo.engines.base import BACKENDS
from quantempo.engines.simulated import float32_copy, once
from quantempo.errors import QuantempoError, log
from quantempo.quantized import CLOCK_NAME, QLayer, quantized_layers

__all__ = ["time_forms"]

# Each form has the best of so many calls, of 2 where they take SLOW ms.
_ROUNDS, _SLOW = 10, 50.0
# Bytes written before each call, how often: a network reads its weights from memory, not from a
# cache, and a GPU is busy while the call is launched.
_SCRATCH = {"cpu": (1 << 25, 1), "cuda": (1 << 28, 4)}


@torch.no_grad()
def time_forms(backend: str, denoiser: nn.Module, args: Any, kwargs: Any) -> list[dict[str, Any]]:
    """Time the layers of a call, not fused, with random weights: {"shape", "layers": names, ms}.

    In groups of 16 where theirs have none; not those that the backend cannot take. Outputs are
    random. Raises QuantempoError: the network is offloaded.
    """
    network, lowers = float32_copy(denoiser, None), BACKENDS.get(backend)
    layers, rows = dict(quantized_layers(network)), dict[Any, tuple[dict[str, Any], Any]]()
    if not layers:
        return []
    device = next(iter(layers.values())).weight_scale.device
    if device.type not in _SCRATCH:
        raise QuantempoError("got packed = 'auto' for an offloaded model; give keep or unpack")
    size, often = _SCRATCH[device.type]
    scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def ms(call: Any) -> float:
        for _ in range(often):
            scratch.zero_()
        if device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def see(layer: QLayer, name: str, x: Tensor) -> Tensor:
        if lowers.unsupported(layer):
            return once(layer, True, x)
        key = repr(layer), x.shape, x.dtype
        if key not in rows:
            pair: list[Any] = [
                partial(lowers.lower(_grouped(layer, unpack)), x) for unpack in (False, True)
            ]
            y, _ = (call() for call in pair)
            if device.type == "cuda":  # of a small layer the launch would be timed
                pair = [_recorded(call) for call in pair]
            rounds = _ROUNDS if max(map(ms, pair)) < _SLOW else 2
            times = zip(*([ms(call) for call in pair] for _ in range(rounds)), strict=True)
            w4a8, w8a8 = map(min, times)
            shape = " by ".join("x".join(map(str, size)) for size in (x.shape, layer.weight_shape))
            rows[key] = {"shape": shape, "layers": [], "w4a8_ms": w4a8, "w8a8_ms": w8a8}, y.shape
        row, size = rows[key]
        row["layers"].append(name)
        return torch.randn(size, dtype=x.dtype, device=device)

    for name, layer in layers.items():
        layer.kernel = partial(see, layer, name)
    network.get_submodule(CLOCK_NAME).call.bucket = torch.zeros((), dtype=torch.long, device=device)
    here: Any = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with here, _silent():
        type(network).forward(network, *args, **kwargs)
    return [row for row, _ in rows.values()]


def _recorded(call: Callable[[], Any]) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@contextmanager
def _silent() -> Iterator[None]:
    """Leave out what this thread says: what is true of random weights is not of the network."""
    mine = threading.get_ident()

    def of_others(record: Any) -> bool:
        return bool(record.thread != mine)

    log.addFilter(of_others)
    try:
        yield
    finally:
        log.removeFilter(of_others)


def _grouped(layer: QLayer, unpack: bool) -> QLayer:
    """Return a layer of the same shape and scales whose weight is random, of 4 bits in groups."""
    other, spec, shape = copy.copy(layer), layer.weight_format, layer.weight_shape
    other.weight_format = spec = spec if isinstance(spec, GroupFormat) else GroupFormat(4)
    # Scales up to 8: no code is beyond 127.
    draw = partial(torch.randint, dtype=torch.uint8, device=layer.weight_scale.device)
    codes = {"weight_int": draw(256, spec.stored_shape(shape))}
    codes["weight_group"] = draw(128, spec.group_shape(shape))
    other._buffers, other.unpack = {**layer._buffers, **codes}, unpack
    return other
