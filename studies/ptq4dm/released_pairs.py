"""Pair x_t with t as the released PTQ4DM program did, to measure what that costs.

That program draws a label l in [0, K), samples in K steps, and keeps under label l what loop
iteration l *returned*, counted from the noisy end: the network input of step index K - 2 - l, and
the finished image for l = K - 1. The network then calibrates on it with t = l, not translated to a
training time-step. Both are slips.

Source: the generator of its calibration data, `backward_t_calib_data_generator` in 42Shawn/PTQ4DM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from quantempo.calibration.dataset import TraceSet, index_of
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.run_folder import RunFolder, read_tensors, tensors_sha256

__all__ = ["ReleasedPairs", "finished_samples", "relabel", "rewrite"]


@dataclass(frozen=True)
class ReleasedPairs:
    """Draw labels l of a distribution and return the indices max(K - 2 - l, 0) recorded for them.

    Label K - 1 got the finished image, which the network never receives: recorded at index 0 for
    its other arguments, until `relabel` puts the image in.
    """

    of: str = "ndtc_repo"

    def labels(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        """Return (n,) int64 labels in descending order, that of their indices."""
        drawn = make_time_sampler(self.of).sample(n, num_steps, generator)
        return drawn.sort(descending=True).values

    def sample(self, n: int, num_steps: int, generator: Generator) -> Tensor:
        """Return (n,) int64 ascending step indices in [0, num_steps)."""
        return (num_steps - 2 - self.labels(n, num_steps, generator)).clamp(min=0)

    def density(self, num_steps: int) -> Tensor:
        """Return the (num_steps,) float64 probability of each index; it sums to one."""
        mass = make_time_sampler(self.of).density(num_steps)
        index = (num_steps - 2 - torch.arange(num_steps)).clamp(min=0)
        return torch.zeros_like(mass).index_add(0, index, mass)


@contextmanager
def finished_samples(scheduler: Any) -> Iterator[list[Tensor]]:
    """Yield a list that gets the last sample of every run of this scheduler, on the CPU."""
    step, found = scheduler.step, list[Tensor]()

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def keep(model_output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(model_output, timestep, *args, **kwargs)
        if float(timestep) == float(scheduler.timesteps[-1]):
            sample = result[0] if isinstance(result, tuple) else result.prev_sample
            found.append(sample.detach().cpu().float())
        return result

    scheduler.step = keep
    try:
        yield found
    finally:
        scheduler.step = step


def rewrite(data: TraceSet, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> TraceSet:
    """Write tensors of a trace anew, chunk by chunk, and return it."""
    index = index_of(data.folder.path)
    for chunk in data.info["chunks"]:
        tensors, metadata = read_tensors(data.folder / chunk["file"])
        tensors |= change(tensors)
        data.folder.write_safetensors(chunk["file"], tensors, metadata)
        chunk["sha256"] = tensors_sha256(tensors)
    RunFolder(index.parent).write_json(index.name, data.info)
    return TraceSet(data.folder.path)


def relabel(data: TraceSet, law: ReleasedPairs, finished: list[Tensor], seed: int) -> TraceSet:
    """Give the rows of a trace of `law` their labels: t = l, and the finished x_0 for l = K - 1.

    Args:
        data: recorded with one input of each chain; its chunks are written anew.
        law: the distribution it was recorded with.
        finished: last samples, batch after batch, behind those of the trace's probes.
        seed: of the generator of the draw.
    """
    steps, chains = data.info["settings"]["steps"], data.info["settings"]["chains"]
    labels = law.labels(chains, steps, Generator().manual_seed(seed))
    assert (steps - 2 - labels).clamp(min=0).tolist() == [r[0] for r in data.info["target_steps"]]
    images = torch.cat(finished)[-chains:]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        chain = tensors["chain"]
        label, x_t = labels[chain], tensors["x_t"].clone()
        ends = label == steps - 1
        x_t[ends] = images[chain[ends]]
        return {"x_t": x_t, "t": label.to(tensors["t"].dtype)}

    return rewrite(data, change)
