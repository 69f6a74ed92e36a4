"""Optional 8-bit sites of the sampler: which numbers each one puts on its grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.quantized import (
    SiteQuantizer,
    attach_sampler_site,
    find_sites,
    install_sites,
    measured_sites,
    output_part,
)
from tests.tiny import tiny_dit, tiny_unet

SCALE, ZERO = 0.125, 100


def on_grid(x: Tensor) -> Tensor:
    """Return scale * (clamp(round(x / scale) + zero, 0, 255) - zero) in float64."""
    return SCALE * ((x.double() / SCALE).round() + ZERO).clamp(0, 255).sub(ZERO)


def ready(quantizer: SiteQuantizer) -> SiteQuantizer:
    quantizer.scale.fill_(SCALE)
    quantizer.zero_point.fill_(ZERO)
    return quantizer


def noise(*shape: int) -> Tensor:
    # Wide enough that both ends of the grid clip.
    return 10 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def run(net: nn.Module, x: Tensor) -> Tensor:
    label = {"class_labels": torch.tensor([1, 2])} if "DiT" in type(net).__name__ else {}
    with torch.no_grad():
        return net(x, torch.tensor([500, 500]), **label).sample


def test_a_site_is_an_eight_bit_grid() -> None:
    x = noise(4, 5)
    y = ready(SiteQuantizer())(x)
    assert torch.equal(y.double(), on_grid(x))
    assert y.min() == -ZERO * SCALE and y.max() == (255 - ZERO) * SCALE
    assert ready(SiteQuantizer())(x.bfloat16()).dtype == torch.bfloat16


def test_eps_covers_the_whole_output_of_a_plain_network() -> None:
    net, x = tiny_unet(), noise(2, 3, 16, 16)
    wanted = on_grid(run(net, x))
    installed = install_sites(net, ["eps"])
    ready(installed["eps"])
    assert torch.equal(run(net, x).double(), wanted)
    assert find_sites(net) == dict(installed.items())
    with torch.no_grad():
        as_tuple = net(x, torch.tensor([500, 500]), return_dict=False)[0]
    assert torch.equal(as_tuple.double(), wanted)


@pytest.mark.parametrize(
    ("name", "first", "second"), [("eps", 1, 0), ("mu", 1, 0), ("sigma", 0, 1)]
)
def test_halves_of_a_learned_variance(name: str, first: int, second: int) -> None:
    net, x = tiny_dit().transformer, noise(2, 4, 8, 8)
    plain = run(net, x)
    ready(install_sites(net, [name])[name])
    got = run(net, x)
    for part, quantized in ((slice(0, 4), first), (slice(4, 8), second)):
        wanted = on_grid(plain[:, part]) if quantized else plain[:, part].double()
        assert torch.equal(got[:, part].double(), wanted)


def test_two_sites_do_not_see_each_other() -> None:
    net, x = tiny_dit().transformer, noise(2, 4, 8, 8)
    plain = run(net, x)
    both = install_sites(net, ["mu", "sigma"])
    ready(both["mu"])
    ready(both["sigma"]).scale.fill_(SCALE / 2)
    got = run(net, x).double()
    assert torch.equal(got[:, :4], on_grid(plain[:, :4]))
    # The half of the scale on twice the values is the same grid, halved.
    assert torch.equal(got[:, 4:], on_grid(2 * plain[:, 4:]) / 2)


def test_sigma_needs_a_learned_variance() -> None:
    with pytest.raises(QuantempoError, match=r"learned variance \(6 output channels\).*has 3"):
        output_part("sigma", torch.zeros(1, 3, 4, 4), 3)
    assert output_part("mu", torch.zeros(1, 3, 4, 4), 3) == slice(0, 3)


def test_unknown_sites_are_refused_and_none_leaves_no_trace() -> None:
    net = tiny_unet()
    with pytest.raises(QuantempoError, match=r"unknown site 'epsilon' \(known: eps"):
        install_sites(net, ["epsilon"])
    install_sites(net, [])
    assert find_sites(net) == {} and not net._forward_hooks
    assert not any("quantempo" in key for key in net.state_dict())


def test_x_prev_leaves_the_network_alone() -> None:
    net, x = tiny_unet(), noise(2, 3, 16, 16)
    plain = run(net, x)
    ready(install_sites(net, ["x_prev"])["x_prev"])
    assert torch.equal(run(net, x), plain)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_x_prev_acts_on_what_the_scheduler_returns(kind: type, return_dict: bool) -> None:
    plain, quantized = kind(), kind()
    attach_sampler_site(quantized, ready(SiteQuantizer()))
    eps, x = noise(2, 3, 4, 4), noise(2, 3, 4, 4).flip(0)
    results = []
    for scheduler in (plain, quantized):
        scheduler.set_timesteps(10)
        g = torch.Generator().manual_seed(4)
        t = scheduler.timesteps[3]
        out = scheduler.step(eps, t, x, generator=g, return_dict=return_dict)
        results.append((out[0], out[1]))
    assert torch.equal(results[1][0].double(), on_grid(results[0][0]))
    # The prediction of x_0 is not the sample.
    assert torch.equal(results[1][1], results[0][1])


class Wrapper(nn.Module):
    """Stand for a denoiser: pass everything on, answer in the form asked for."""

    def __init__(self, net: nn.Module, form: str) -> None:
        super().__init__()
        self.net, self.form = net, form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.form == "Transformer2DModelOutput":
            return self.net(*args, **kwargs)
        sample = self.net(*args, **kwargs, return_dict=False)
        return sample if self.form == "tuple" else sample[0]


@pytest.mark.parametrize("form", ["Transformer2DModelOutput", "tuple", "Tensor"])
@pytest.mark.parametrize("named", [False, True])
def test_a_wrapper_can_carry_the_sites(form: str, named: bool) -> None:
    net, x = tiny_dit().transformer, noise(2, 4, 8, 8)
    plain = run(net, x)
    wrapper = Wrapper(net, form)
    ready(install_sites(wrapper, ["mu", "x_prev"])["mu"])
    t, labels = torch.tensor([500, 500]), torch.tensor([1, 2])
    with torch.no_grad():
        if named:
            # As a trace replays a call: x_t is not the first.
            out = wrapper(class_labels=labels, timestep=t, hidden_states=x)
        else:
            out = wrapper(x, t, class_labels=labels)
    assert type(out).__name__ == form
    got = out if form == "Tensor" else out[0]
    assert torch.equal(got[:, :4].double(), on_grid(plain[:, :4]))
    assert torch.equal(got[:, 4:], plain[:, 4:])
    assert set(find_sites(wrapper)) == {"mu", "x_prev"} and find_sites(net) == {}
    assert torch.equal(run(net, x), plain)


def test_sigma_of_a_plain_network_leaves_its_output_alone() -> None:
    net, x = tiny_unet(), noise(2, 3, 16, 16)
    plain = run(net, x)
    ready(install_sites(net, ["sigma"])["sigma"])
    assert torch.equal(run(net, x), plain)
    assert measured_sites(("eps", "sigma", "x_prev"), net) == ("eps", "x_prev")
    assert measured_sites(("sigma",), tiny_dit().transformer) == ("sigma",)
