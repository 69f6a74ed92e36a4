"""Optional 8-bit sites of the sampler: the network's output and x_{t-1}.

The paper's first study asks which of mu, Sigma and x_{t-1} may be quantized. For a network that
predicts the noise, `eps` is its output (mu follows from it); with a learned variance the output
has twice the channels and `sigma` is the second half, `mu` another name for the first; without one
`sigma` is the variance that the scheduler takes from its schedule (`models.variance`). `x_prev` is
what the scheduler returns at each step.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from quantempo.core import ACTIVATION, QParams, fake_quantize
from quantempo.errors import QuantempoError
from quantempo.models.variance import has_learned_variance, wrap_variance

__all__ = [
    "SITES",
    "SiteQuantizer",
    "attach_sampler_site",
    "attach_scheduler_sites",
    "attach_variance_site",
    "check_sites",
    "find_sites",
    "install_sites",
    "measured_sites",
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

    `x_prev`, and `sigma` where the network has no learned variance, act on the scheduler: call
    `attach_scheduler_sites` too.

    Args:
        denoiser: the network, or any module whose forward passes everything on to it and returns
            what it returns (an output object, a tuple or a tensor).
        names: sites, each once.

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
        sample = output if isinstance(output, Tensor) else output[0]
        channels = _x_t(args, kwargs, sample).shape[1]
        for name, quantizer in found.items():
            of_scheduler = name == "sigma" and sample.shape[1] != 2 * channels
            if name != "x_prev" and not of_scheduler:
                part = output_part(name, sample, channels)
                sample = sample.clone()
                sample[:, part] = quantizer(sample[:, part])
        if isinstance(output, Tensor):
            return sample
        if isinstance(output, tuple):
            return (sample, *output[1:])
        return type(output)(sample=sample)

    if any(name != "x_prev" for name in names):
        denoiser.register_forward_hook(quantize_output, with_kwargs=True)
    return found


def _x_t(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
    """Return x_t among the arguments, by position or else as the one with the output's grid."""
    if args:
        return args[0]
    tensors = [v for v in kwargs.values() if isinstance(v, Tensor) and v.ndim == output.ndim]
    for value in tensors:
        if len(value) == len(output) and value.shape[2:] == output.shape[2:]:
            return value
    raise QuantempoError(
        f"got {', '.join(kwargs)} for an output of shape {tuple(output.shape)}; expected an x_t "
        "of the same batch and size: pass it first, without a name"
    )


def measured_sites(names: list[str] | tuple[str, ...], denoiser: nn.Module) -> tuple[str, ...]:
    """Return the sites whose scale is searched over a trace.

    All but `sigma` of a network without a learned variance, whose values the schedule gives
    (`models.variance.variance_grid`).
    """
    learned = has_learned_variance(denoiser)
    return tuple(name for name in names if name != "sigma" or learned)


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


def attach_variance_site(scheduler: Any, quantizer: SiteQuantizer) -> None:
    """Quantize the variance that this scheduler instance takes from its schedule (site `sigma`).

    DDIM at eta = 0 multiplies it by zero, so there the images stay what they were, bit for bit.

    Raises:
        QuantempoError: a scheduler other than DDIM and DDPM.
    """

    def quantized(variance: Tensor, limit: Tensor | None) -> Tensor:
        near = quantizer(variance.to(quantizer.scale.device)).to(variance.device)
        # Rounded up beyond its limit, the update would take the root of a negative number; the
        # margin is for the float32 roundings in between.
        if limit is not None and float(near) > float(limit) * (1 - 1e-5):
            near = near - quantizer.scale.to(near)
        return near.clamp(min=0)

    wrap_variance(scheduler, quantized)


def attach_scheduler_sites(scheduler: Any, denoiser: nn.Module) -> None:
    """Attach the installed sites of `denoiser` that act on the scheduler instance.

    Raises:
        QuantempoError: see `attach_variance_site`.
    """
    sites = find_sites(denoiser)
    if "x_prev" in sites:
        attach_sampler_site(scheduler, sites["x_prev"])
    if "sigma" in sites and not has_learned_variance(denoiser):
        attach_variance_site(scheduler, sites["sigma"])
