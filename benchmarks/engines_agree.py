"""Say how far the images of the engines are from the float model's and from each other's.

python benchmarks/engines_agree.py --run runs/demo --images 16
python benchmarks/engines_agree.py --run runs/demo --engines simulated --images 64
python benchmarks/engines_agree.py --run runs/35m --device cuda --images 1024 --batch 256 --plain

Beside each engine stands by how much its PSNR to float differs from that of `simulated`, image by
image, with the standard error of the mean. Two rows say what such a difference means: `simulated`
with the output of every integer layer off by 1e-6 of itself, and rounded to float16. Values near a
tie round the other way there, and the trajectories part. On a GPU a row more is `triton` with its
network in CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantempo.engines.cuda.graphs import graphed
from quantempo.engines.layerwise import execution
from quantempo.engines.select import ENGINES
from quantempo.errors import QuantempoError
from quantempo.evaluation import psnr_db
from quantempo.models.layers import denoiser_of
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline.quality import open_model
from quantempo.pipeline.session import reopen

__all__ = ["main"]

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "simulated, off by 1e-6": lambda y: y * (1 + 1e-6 * torch.randn_like(y)),
    "simulated, float16": lambda y: y.half().to(y.dtype),
}


def changed(pipe: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Let `change` be applied to what every integer layer returns, the same in every run."""
    torch.manual_seed(0)
    net = denoiser_of(pipe)[1]
    for name in execution(net):
        net.get_submodule(name).register_forward_hook(lambda layer, given, y: change(y))
    return pipe


def recorded(pipe: Any) -> Any:
    """Put the denoiser into CUDA graphs."""
    name, net = denoiser_of(pipe)
    setattr(pipe, name, graphed(net))
    return pipe


def main() -> None:
    """Sample the same seeds on every engine that can run here; print mean PSNR in dB."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="run folder with a packed model")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--engines", nargs="+", help="by default all that run on the device")
    parser.add_argument("--plain", action="store_true", help="without the two changed rows")
    given = parser.parse_args()
    if given.images < 2:
        parser.error(f"got --images {given.images}; expected 2 at least, for a standard error")
    # The float images are the yardstick: no 10-bit products in them.
    torch.backends.cudnn.allow_tf32 = False
    try:
        session = reopen(given.run, device=given.device)
    except QuantempoError as refusal:
        parser.error(str(refusal))
    kinds = {torch.device(given.device).type, "any"}
    names = given.engines or [
        name
        for name in ENGINES.names()
        if ENGINES.get(name).missing() is None and kinds & set(ENGINES.get(name).devices)
    ]
    names = list(dict.fromkeys(["simulated", *names]))
    options = {"steps": given.steps, "batch_size": given.batch, **session.call}

    def sampled(pipe: Any) -> np.ndarray:
        return run_pipeline(pipe, range(given.images), **options)

    def packed(engine: str) -> Any:
        return open_model(session.run / "packed", engine=engine, device=given.device)

    images = {name: sampled(packed(name)) for name in names}
    if "triton" in names and "cuda" in kinds:
        images["triton, graph"] = sampled(recorded(packed("triton")))
    for name, change in ({} if given.plain else CHANGES).items():
        images[name] = sampled(changed(packed("simulated"), change))
    images["float"] = sampled(session.pipe)
    to_float = {name: psnr_db(images[name], images["float"]) for name in images if name != "float"}
    paired = {}
    for name in to_float:
        off = np.asarray(to_float[name]) - np.asarray(to_float["simulated"])
        error = off.std(ddof=1) / len(off) ** 0.5
        paired[name] = {"mean_db": round(float(off.mean()), 3), "error_db": round(float(error), 3)}
    rows = {
        f"{a} / {b}": round(float(np.mean(psnr_db(images[a], images[b]))), 2)
        for a, b in combinations(images, 2)
    }
    found = {"images": given.images, "steps": given.steps, "psnr_db_mean": rows}
    print(json.dumps({**found, "psnr_to_float_minus_simulated": paired}, indent=1))


if __name__ == "__main__":
    main()
