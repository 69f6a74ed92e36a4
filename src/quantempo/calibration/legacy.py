"""Pair x_t with t as the released PTQ4DM program did, to measure what that costs.

That program draws a label l in [0, K), samples in K steps, and keeps under label l what loop
iteration l *returned*, counted from the noisy end: the network input of step index K - 2 - l, and
the finished image for l = K - 1. The network then calibrates on it with t = l, not translated to a
training time-step. Both are slips (a right trace has the input of index l with the time it was
received with); nothing but a study should use this.

Source: the generator of its calibration data, `backward_t_calib_data_generator` in 42Shawn/PTQ4DM.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from quantempo.errors import QuantempoError

__all__ = ["legacy_indices", "pair_as_released"]


def legacy_indices(labels: Tensor, steps: int) -> Tensor:
    """Return the step index whose network input each label got: max(K - 2 - l, 0), int64.

    Label K - 1 got the finished image, which the network never receives; it is recorded at index 0
    for its other arguments, and `pair_as_released` puts the image in.

    Args:
        labels: int64 in [0, steps), any shape.
        steps: K.
    """
    return (steps - 2 - labels).clamp(min=0)


def pair_as_released(
    tensors: Mapping[str, Tensor],
    labels: Tensor,
    first: int,
    steps: int,
    final: Tensor | np.ndarray,
    calls: int,
) -> dict[str, Tensor]:
    """Relabel the rows recorded at `legacy_indices(labels)`: t = l, and x_0 for l = K - 1.

    Args:
        tensors: rows of a chunk, `x_t` (n, ...), `t` (n,), `chain`, `pick`, `call`, `target`.
        labels: (b, picks) int64, the label of each pick of each chain.
        first: number of the first chain.
        steps: K.
        final: what the pipeline returned: latents (b, ...), or images (b, H, W, C) in [0, 1], of
            which x_0 = 2 image - 1, as far as [0, 1] has not clipped it.
        calls: of the denoiser in the run; stands for "after the last" in `call`.

    Returns:
        the same tensors with x_t, t (dtype as received), target (= t) and call replaced.

    Raises:
        QuantempoError: the pipeline did not return a sample of the shape of x_t.
    """
    chain = tensors["chain"] - first
    label = labels[chain, tensors["pick"]]
    finished = _finished(final, tensors["x_t"].shape[1:])
    ends = label == steps - 1
    x_t = tensors["x_t"].clone()
    x_t[ends] = finished[chain[ends]]
    return {
        **tensors,
        "x_t": x_t,
        "t": label.to(tensors["t"].dtype),
        "target": label.to(tensors["target"].dtype),
        "call": torch.where(ends, calls, tensors["call"]),
    }


def _finished(final: Tensor | np.ndarray, shape: torch.Size) -> Tensor:
    """Return the finished samples (b, *shape) float32 in the space of x_t."""
    if isinstance(final, Tensor):
        samples = final.detach().cpu().float()
    else:
        samples = 2 * torch.from_numpy(final).float().movedim(-1, 1) - 1
    if samples.shape[1:] != shape:
        raise QuantempoError(
            f"legacy_pairing needs the finished x_0 of shape {tuple(shape)}, but the pipeline "
            f"returned {tuple(samples.shape[1:])} (decoded images); turn legacy_pairing off"
        )
    return samples
