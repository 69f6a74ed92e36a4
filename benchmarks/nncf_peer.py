"""Compare our OpenVINO engine with NNCF's own int8 graph of the same network.

Both are quantized from the same recorded inputs, run on the same machine in turns, and sample the
same seeds. NNCF runs at its best here: model_type=transformer, the layers in float that ours has
there; `--defaults` for its own settings, 11 dB worse. It is a peer, not a dependency: pip install
nncf.

    python benchmarks/nncf_peer.py --run runs/demo --batch 8 --images 16
"""

from __future__ import annotations

import argparse
import json
import re
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.bench.forwards import take_turns, wall_ms
from quantempo.calibration.dataset import TraceSet
from quantempo.core.machine import machine
from quantempo.engines.select import attach
from quantempo.evaluation import psnr_db
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline.session import Session, reopen

__all__ = ["main"]


class _Plain(nn.Module):
    """A denoiser that returns a tensor."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the network's output."""
        return self.denoiser(sample, timestep).sample


class _Graph:
    """Call NNCF's graph as the denoiser it stands for."""

    def __init__(
        self,
        denoiser: nn.Module,
        data: TraceSet,
        batch: int,
        rows: int,
        spared: list[str] | None = None,
    ) -> None:
        import nncf
        import openvino as ov

        index = torch.linspace(0, len(data) - 1, rows).long().split(batch)
        calls = [data.rows(part) for part in index if len(part) == batch]
        first = calls[0]
        graph = ov.convert_model(_Plain(denoiser), example_input=(first.x_t, first.t))
        graph.reshape({0: list(first.x_t.shape), 1: [batch]})
        inputs = nncf.Dataset([(call.x_t.numpy(), call.t.numpy()) for call in calls])
        how: dict[str, Any] = {}
        if spared is not None:
            patterns = [rf".*\.{re.escape(name)}/.*" for name in spared]
            how["ignored_scope"] = nncf.IgnoredScope(patterns=patterns, validate=False)
            how["model_type"] = nncf.ModelType.TRANSFORMER
        quantized = nncf.quantize(graph, inputs, subset_size=len(calls), **how)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self.request = ov.Core().compile_model(quantized, "CPU", settings).create_infer_request()
        self.batch = batch

    def __call__(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        from diffusers.models.unets.unet_2d import UNet2DOutput

        t = torch.as_tensor(timestep).reshape(-1).expand(self.batch).contiguous()
        result = self.request.infer([sample.numpy(), t.numpy()], share_inputs=True)
        output = torch.from_numpy(np.array(next(iter(result.values()))))
        return UNet2DOutput(sample=output) if return_dict else (output,)


def compare(
    session: Session, batch: int, images: int, rounds: int, rows: int, defaults: bool
) -> dict[str, Any]:
    """Return milliseconds and PSNR of both graphs."""
    data = TraceSet(session.run / "trace")
    float_pipe = load_pipeline(session.source)
    ours = load_pipeline(session.run / "packed")
    attach(denoiser_of(ours)[1], "openvino")
    peer = load_pipeline(session.source)
    denoiser = denoiser_of(peer)[1]
    table = session.run.read_json("layers.json")
    spared = [
        row["name"] for row in table if row["bits_activation"] > 8 and row["kind"] != "matmul"
    ]
    graph = _Graph(session.denoiser, data, batch, rows, None if defaults else spared)

    part = data.rows(torch.arange(batch))
    inputs = (part.x_t, part.t[:1].expand(batch).contiguous())
    calls = {"ours": lambda: denoiser_of(ours)[1](*inputs), "nncf": lambda: graph(*inputs)}
    with torch.no_grad():
        times = take_turns(calls, wall_ms, rounds=rounds)
    denoiser.forward = graph.__call__  # type: ignore[method-assign]
    seeds = range(images // batch * batch)
    options: dict[str, Any] = {"steps": session.recipe.trace.steps, "batch_size": batch}
    pictures = [run_pipeline(pipe, seeds, **options) for pipe in (float_pipe, ours, peer)]
    quality = {
        name: psnr_db(pictures[0], images) for name, images in zip(times, pictures[1:], strict=True)
    }
    return {
        "machine": machine(),
        "batch": batch,
        "images": len(seeds),
        "ms_per_forward": {name: round(median(values), 2) for name, values in times.items()},
        "ms_min": {name: round(min(values), 2) for name, values in times.items()},
        "psnr_db_mean": {name: round(float(v.mean()), 2) for name, v in quality.items()},
        "psnr_db_p05": {name: round(float(np.percentile(v, 5)), 2) for name, v in quality.items()},
    }


def main() -> None:
    """Parse, compare, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="run folder with a packed UNet2DModel")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=16, help="a multiple of the batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calibration-rows", type=int, default=256)
    parser.add_argument("--defaults", action="store_true", help="NNCF's own settings")
    given = parser.parse_args()
    sizes = given.batch, given.images, given.rounds, given.calibration_rows
    result = compare(reopen(given.run), *sizes, given.defaults)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
