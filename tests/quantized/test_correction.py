"""The affine correction of a network's output: its tables and its hook."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.quantized import install_clock
from quantempo.quantized.correction import (
    OutputCorrection,
    install_correction,
)
from tests.tiny import tiny_unet


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(points: int = 4) -> OutputCorrection:
    """A correction of 3 channels at times 0, 100, 300, ... with random tables."""
    correction = OutputCorrection(points, 3)
    times = torch.tensor([0.0, 100.0, 300.0, 900.0])[:points]
    tables = {name: noise(points, 3, seed=i) for i, name in enumerate(("gain", "shift"))}
    correction.replace(times=times, **tables)
    return correction


def test_without_a_fit_it_is_the_identity_bit_for_bit() -> None:
    x = noise(2, 6, 5, 5)
    assert torch.equal(OutputCorrection(3, 3)(x, torch.tensor(40)), x)


def test_tables_are_linear_in_time_and_constant_outside() -> None:
    correction, times = filled(), [-50.0, 0.0, 30.0, 100.0, 170.5, 300.0, 899.0, 900.0, 2000.0]
    got = correction.at(correction.gain, torch.tensor(times))
    points = correction.times.double().numpy()
    for c in range(3):
        wanted = np.interp(times, points, correction.gain[:, c].double().numpy())
        # One float32 rounding of the share of an interval, one of the result.
        np.testing.assert_allclose(got[:, c].numpy(), wanted, rtol=0, atol=1e-6)
    assert torch.equal(correction.at(correction.gain, correction.times), correction.gain)


def test_every_sample_gets_the_correction_of_its_own_time() -> None:
    correction, x, t = filled(), noise(4, 3, 5, 5), torch.tensor([0, 170, 900, 33])
    whole = correction(x, t)
    for i in range(4):
        assert torch.equal(whole[i : i + 1], correction(x[i : i + 1], t[i]))
    # A batch that is a multiple of the times, as in layers: rows of a time stand together.
    assert torch.equal(correction(x, t[:2])[:2], correction(x[:2], t[0]))


def test_a_learned_variance_and_tokens() -> None:
    correction, t = filled(), torch.tensor(170)
    x = noise(2, 6, 5, 5)
    got = correction(x, t)
    assert torch.equal(got[:, 3:], x[:, 3:]) and not torch.equal(got[:, :3], x[:, :3])
    # (B, tokens, C): the same numbers with the channels last.
    tokens = x.flatten(2).transpose(1, 2)
    assert torch.equal(correction(tokens, t), got.flatten(2).transpose(1, 2))
    assert correction(x.bfloat16(), t).dtype == torch.bfloat16


def test_tables_stay_float32_in_a_bfloat16_network() -> None:
    correction = filled()
    before = {name: value.clone() for name, value in correction.tables().items()}
    correction.to(torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in correction.tables().items())


def test_tables_are_checked() -> None:
    with pytest.raises(QuantempoError, match="expected times, gain"):
        filled().replace(gains=torch.ones(1, 1))
    with pytest.raises(QuantempoError, match="not quantized"):
        install_correction(tiny_unet(), filled())


class Net(nn.Module):
    """A denoiser that shows what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None
        self.config = SimpleNamespace(in_channels=3, out_channels=3)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.seen = (sample, timestep)
        return (sample * 2,)


def ready(correction: OutputCorrection, per_unit: float = 1.0) -> Net:
    net = Net()
    install_clock(net, torch.zeros(1000, dtype=torch.int64), per_unit)
    install_correction(net, correction)
    return net


def test_the_hook_corrects_what_the_network_returns() -> None:
    x, correction = noise(2, 3, 4, 4), filled()
    wanted = correction(2 * x, torch.tensor(170.0))
    assert torch.equal(ready(filled())(x, torch.tensor(170))[0], wanted)
    # A network that is given t / T.
    assert torch.equal(ready(filled(), 1000.0)(x, timestep=torch.tensor(0.170))[0], wanted)
    net = ready(filled())
    with pytest.raises(QuantempoError, match="has a correction already"):
        install_correction(net, filled())


def test_it_compiles_without_a_graph_break() -> None:
    net, x, t = ready(filled()), noise(2, 3, 4, 4), torch.tensor(170)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t)[0], net(x, t)[0])
