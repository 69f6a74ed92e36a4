"""Say what scales of time buckets cost in time.

python benchmarks/time_scales.py --run runs/demo --batch 8

The packed network of a run with one scale a layer, with the buckets it was packed with, and with
buckets in every layer. One JSON line.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from quantempo import __version__
from quantempo.bench.forwards import take_turns, wall_ms
from quantempo.core.machine import machine
from quantempo.engines.select import attach, detach
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.quantized import quantized_layers

__all__ = ["main"]


def main() -> None:
    """Time all forms in turns; print medians and their ratios to one scale a layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run folder with a packed model")
    parser.add_argument("--engine", default="onednn")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    packed = denoiser_of(load_pipeline(f"{given.run}/packed"))[1]
    detach(packed)
    size = packed.config.sample_size
    x = torch.randn(given.batch, packed.config.in_channels, size, size)
    buckets = max(layer.act_scale.shape[1] for _, layer in quantized_layers(packed))
    own = sum(layer.act_scale.shape[1] > 1 for _, layer in quantized_layers(packed))
    forms: dict[str, Callable[[nn.Module], None]] = {
        "one scale": lambda net: _columns(net, 1),
        "as packed": lambda net: None,
        "buckets in every layer": lambda net: _columns(net, buckets),
    }
    calls = {}
    for name, change in forms.items():
        net: Any = copy.deepcopy(packed)
        change(net)
        attach(net, given.engine)
        calls[name] = partial(net, x, torch.tensor(500))
    with torch.no_grad():
        times = take_turns(calls, wall_ms, rounds=given.rounds, seconds=0.3)
    base = times["one scale"]
    report = {
        "benchmark": "time_scales",
        "engine": given.engine,
        "batch": given.batch,
        "buckets": buckets,
        "layers_with_buckets": own,
        "layers": len(list(quantized_layers(packed))),
        "ms": {name: round(median(values), 3) for name, values in times.items()},
        "ms_min": {name: round(min(values), 3) for name, values in times.items()},
        # Of the same round: slow drifts of a shared machine cancel.
        "ratio": {
            name: round(median(a / b for a, b in zip(values, base, strict=True)), 4)
            for name, values in times.items()
        },
        "versions": {"quantempo": __version__, "torch": torch.__version__},
        "machine": machine(),
    }
    print(json.dumps(report))


def _columns(net: nn.Module, buckets: int) -> None:
    """Give every layer a scale table of that many columns."""
    for _, layer in quantized_layers(net):
        layer.act_scale = layer.act_scale[:, :1].expand(-1, buckets).clone()


if __name__ == "__main__":
    main()
