"""Where the x_t of a calibration set comes from: the trajectory, or what a paper put there instead.

A source replaces x_t of recorded rows before `trace` writes them; all else stays as it was.

    trajectory  x_t as the network received it
    mimic       x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, the input of training;
                of a flow (1 - sigma_t) x_0 + sigma_t eps
    raw         x_t = x_0 whatever t
    noise       x_t = eps whatever t

x_0 is an image of a data set in [-1, 1], or its latents; eps ~ N(0, I). For all but the trajectory
the network need not run, but once a batch. Source: PTQ4DM, eq. 4 and table 2.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from quantempo.errors import QuantempoError
from quantempo.models.sampling import is_flow
from quantempo.registry import Registry

__all__ = ["SOURCES", "Source", "check_source", "image_digest", "replace_rows"]

SOURCES: Registry["Source"] = Registry("source of x_t")
_OWN = 0x1A7E_5EED
# Parts of a pipeline that make x_t something else than an image, or what `latents_of` returns.
_AUTOENCODERS = ("vqvae", "movq")


class Source(NamedTuple):
    """Say how x_t is made.

    make: (x_0 (n, ...), eps (n, ...), a (n, 1, ...), b (n, 1, ...)) -> x_t (n, ...), all float32, a
    and b factors of signal and noise, or None to keep what was received; needs_images: reads x_0;
    needs_schedule: reads a and b.
    """

    make: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None
    needs_images: bool = False
    needs_schedule: bool = False


SOURCES.register("trajectory")(Source(None))
SOURCES.register("mimic")(Source(lambda x_0, eps, a, b: a * x_0 + b * eps, True, True))
SOURCES.register("raw")(Source(lambda x_0, eps, a, b: x_0, needs_images=True))
SOURCES.register("noise")(Source(lambda x_0, eps, a, b: eps))


def check_source(source: str, pipe: Any, images: np.ndarray | None) -> None:
    """Raise QuantempoError where a source does not fit the pipeline, scheduler or images."""
    chosen = SOURCES.get(source)
    known = getattr(pipe.scheduler, "alphas_cumprod", None) is not None
    if chosen.needs_schedule and not (known or is_flow(pipe.scheduler)):
        text = f"source '{source}' needs abar_t, which {type(pipe.scheduler).__name__} does not"
        raise QuantempoError(f"{text} have; expected a model with a DDPM schedule, or a flow")
    if not chosen.needs_images:
        return
    if any(getattr(pipe, name, None) is not None for name in _AUTOENCODERS):
        raise QuantempoError(
            f"source '{source}' puts images in place of x_t, but {type(pipe).__name__} denoises "
            "what no VAE makes of them; use source 'trajectory' or 'noise'"
        )
    if images is None:
        raise QuantempoError(f"source '{source}' needs images; pass a folder of them (--data)")
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        text = f"got images {images.dtype} of shape {images.shape}"
        raise QuantempoError(f"{text}; expected uint8 (n, H, W, C)")


def image_digest(source: str, images: np.ndarray | None) -> str | None:
    """Return the SHA-256 over shape and bytes of the images, or None if the source reads none."""
    if images is None or not SOURCES.get(source).needs_images:
        return None
    digest = hashlib.sha256(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def replace_rows(
    source: str, rows: Mapping[str, Tensor], alphas_cumprod: Tensor | None,
    images: np.ndarray | None, seed: int, encode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Return the x_t (n, ...) float32 that a source puts in place of the recorded ones.

    Both halves of guidance get the same x_t. Images are dealt without repetition as long as they
    last; a fractional t takes abar from its two neighbours, linearly. The same seed (of the trace)
    and chain give the same bits.

    rows: recorded `x_t` (n, ...), `t`, `chain`, `pick` and `half` (n,), in the order of these;
    alphas_cumprod: (T,) abar of each training time-step, which t is; None: t is sigma, of a flow;
    images: (m, H, W, C) uint8; encode: (1, C, H, W) in [-1, 1] -> (1, ...) latents.
    Raises QuantempoError: images of another shape than x_t.
    """
    chosen, x_t = SOURCES.get(source), rows["x_t"]
    if chosen.make is None:
        return x_t
    first = (rows["half"] == 0).nonzero()[:, 0]
    chain, pick = rows["chain"][first].tolist(), rows["pick"][first].tolist()
    halves = len(x_t) // len(first)
    # Every chain has numbers of its own, so that it does not matter how many run together; not
    # its generator, whose numbers became its noise.
    shape = x_t.shape[1:]
    own = {c: Generator().manual_seed((seed + c) ^ _OWN) for c in chain}
    eps = torch.stack([torch.randn(shape, generator=own[c]) for c in chain])
    x_0 = torch.zeros_like(eps)
    if chosen.needs_images:
        assert images is not None
        picks = max(pick) + 1
        places = torch.tensor([c * picks + p for c, p in zip(chain, pick, strict=True)])
        x_0 = _draw(images, places, Generator().manual_seed(seed ^ _OWN))
        # One by one: the size of a batch changes last digits.
        x_0 = torch.cat([encode(image) for image in x_0.split(1)]) if encode else x_0
        if x_0.shape != eps.shape:
            found, wanted = tuple(x_0.shape[1:]), tuple(x_t.shape[1:])
            raise QuantempoError(
                f"got images (or their latents) of shape {found} (C, H, W) for x_t of shape "
                f"{wanted}; resize them, or use a data set with these channels"
            )
    signal = noise = torch.zeros(len(x_t))
    if chosen.needs_schedule and alphas_cumprod is None:
        signal, noise = 1 - rows["t"].float(), rows["t"].float()
    elif alphas_cumprod is not None and chosen.needs_schedule:
        abar = _abar(alphas_cumprod, rows["t"].double()).float()
        signal, noise = abar.sqrt(), (1 - abar).sqrt()
    x_0, eps = (value.repeat_interleave(halves, 0) for value in (x_0, eps))
    factors = (value.view(-1, *[1] * (x_t.ndim - 1)) for value in (signal, noise))
    return chosen.make(x_0, eps, *factors).contiguous()


def _draw(images: np.ndarray, places: Tensor, generator: Generator) -> Tensor:
    """Return (n, C, H, W) float32 images in [-1, 1], 255 -> 1; every image once a round."""
    order = torch.randperm(len(images), generator=generator)
    picked = torch.from_numpy(images[order[places % len(images)].numpy()])
    return picked.float().movedim(-1, 1) / 127.5 - 1


def _abar(alphas_cumprod: Tensor, t: Tensor) -> Tensor:
    """Return abar (n,) float64 at t (n,), linear between training time-steps, ends held."""
    table = alphas_cumprod.detach().cpu().double()
    t = t.clamp(0, len(table) - 1)
    low = t.floor().long()
    high = (low + 1).clamp(max=len(table) - 1)
    return torch.lerp(table[low], table[high], t - low)
