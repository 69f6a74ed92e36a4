"""Optional 8-bit sites of the sampler: the network's output and x_{t-1} (layer L2).

The paper's first study asks which of mu, Sigma and x_{t-1} may be quantized. For a network that
predicts the noise, `eps` is its output (mu follows from it); with a learned variance the output
has twice the channels and `sigma` is the second half, `mu` another name for the first. `x_prev` is
what the scheduler returns at each step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION, QParams, fake_quantize
from quantempo.errors import QuantempoError

__all__ = [
    "SITES",
    "SiteQuantizer",
    "attach_sampler_site",
    "check_sites",
    "find_sites",
    "install_sites",
    "output_part",
]

SITES = ("eps", "mu", "sigma", "x_prev")
_NAME = "quantempo_sites"


class SiteQuantizer(nn.Module):
    """Fake-quantize one tensor of the sampler to 8 bits: scale () float32, zero_point () int32."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the 8-bit grid, same shape and dtype; error <= scale / 2 inside the range."""
        grid = QParams(self.scale.reshape(1), self.zero_point.reshape(1))
        return fake_quantize(x, grid, ACTIVATION)


def output_part(site: str, output: Tensor, channels: int) -> slice:
    """Return the channels of the network's output that a site covers.

    Args:
        site: "eps", "mu" or "sigma".
        output: (B, C_out, ...) the network's output.
        channels: C of x_t; C_out = 2 C means a learned variance.

    Raises:
        QuantempoError: "sigma" for a network without a learned variance.
    """
    learned = output.shape[1] == 2 * channels
    if site == "sigma":
        if not learned:
            raise QuantempoError(
                f"site 'sigma' needs a network with a learned variance ({2 * channels} output "
                f"channels); this one has {output.shape[1]}: remove it from layers.sites"
            )
        return slice(channels, 2 * channels)
    return slice(0, channels if learned else output.shape[1])


def check_sites(names: list[str] | tuple[str, ...]) -> None:
    """Raise QuantempoError for a site that does not exist."""
    for name in names:
        if name not in SITES:
            raise QuantempoError(f"unknown site '{name}' (known: {', '.join(SITES)})")


def install_sites(denoiser: nn.Module, names: list[str] | tuple[str, ...]) -> nn.ModuleDict:
    """Add one quantizer for each named site as children of the denoiser, and the output hook.

    `x_prev` acts on the scheduler: call `attach_sampler_site(pipe)` too.

    Raises:
        QuantempoError: an unknown site.
    """
    check_sites(names)
    found = nn.ModuleDict({name: SiteQuantizer() for name in names})
    if not names:
        return found
    denoiser.add_module(_NAME, found)

    def quantize_output(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        sample = output[0]
        channels = (args[0] if args else next(iter(kwargs.values()))).shape[1]
        for name, quantizer in found.items():
            if name != "x_prev":
                part = output_part(name, sample, channels)
                sample = sample.clone()
                sample[:, part] = quantizer(sample[:, part])
        if isinstance(output, tuple):
            return (sample, *output[1:])
        return type(output)(sample=sample)

    if any(name != "x_prev" for name in names):
        denoiser.register_forward_hook(quantize_output, with_kwargs=True)
    return found


def find_sites(denoiser: nn.Module) -> dict[str, SiteQuantizer]:
    """Return the installed sites by name."""
    return dict(getattr(denoiser, _NAME, {}).items())


def attach_sampler_site(scheduler: Any, quantizer: SiteQuantizer) -> None:
    """Quantize the sample that this scheduler instance returns at each step (site `x_prev`)."""
    step = scheduler.step

    # `wraps` keeps the signature, which pipelines inspect.
    @functools.wraps(step)
    def quantized_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        if isinstance(result, tuple):
            return (quantizer(result[0]), *result[1:])
        result.prev_sample = quantizer(result.prev_sample)
        return result

    scheduler.step = quantized_step
