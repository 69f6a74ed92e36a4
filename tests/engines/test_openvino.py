"""The OpenVINO engine: our integers, our scales, and the float parts around them.

Where the tolerances come from. Whole networks amplify:
a last-bit difference before a rounding moves a code by one, and after some layers the two results
differ by as much as each differs from float. There the bound is the quantization error itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.engines.openvino import engine
from quantempo.engines.openvino.engine import OpenVinoEngine
from quantempo.models.layers import sites
from quantempo.quantized import install_clock, quantized_layers
from tests.engines import openvino_nets as nets
from tests.tiny import noise

pytestmark = nets.needs_openvino


@torch.no_grad()
def test_a_network_is_as_good_as_on_the_simulated_backend(unet: nn.Module, engine_unet: nn.Module):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 16, 16)
    reference = nets.simulated(nets.packed(unet, buckets=3))
    for t in (50, 950):
        truth, expected = unet(x, t).sample, reference(x, t).sample
        found = engine_unet(x, t).sample
        loss = nets.sqnr_db(truth, expected)
        assert 25 < loss < 60
        # See the top of the file; 1 dB covers the luck of one draw of 2304 output values.
        assert nets.sqnr_db(expected, found) > loss - 1
        assert abs(nets.sqnr_db(truth, found) - loss) < 1


@torch.no_grad()
def test_all_layers_run_in_int8_and_the_others_are_listed(unet: nn.Module, engine_unet: nn.Module):
    engine_unet(torch.randn(3, 3, 16, 16), 7)
    rows = nets.kernel_table(engine_unet)
    expected, in_float = set(), []
    for site in sites(unet):
        if site.role in ("input", "output", "time"):
            in_float.append(site.name)
        else:
            expected |= {f"{site.name}/{i}" for i in range(len(site.segments or (1,)))}
    assert {row.name for row in rows if row.quantized} == expected
    assert all(row.int8 == row.quantized for row in rows)
    assert sum(not row.quantized for row in rows) == len(in_float)


@torch.no_grad()
def test_a_layer_that_is_not_int8_is_shown(unet, monkeypatch, caplog):
    net = nets.packed(unet)
    # A grid OpenVINO has no integers for.
    monkeypatch.setattr("quantempo.engines.openvino.graph._LEVELS", 300)
    OpenVinoEngine().attach(net)
    net(torch.randn(1, 3, 16, 16), 7)
    rows = [row for row in nets.kernel_table(net) if row.quantized]
    assert rows and not any(row.int8 for row in rows)
    assert "does not run these layers in int8" in caplog.text and rows[0].name in caplog.text


@torch.no_grad()
def test_the_float_parts_equal_torch(unet: nn.Module, monkeypatch) -> None:
    """With no integer layer at all the graph is the float network: every rewrite is an identity."""
    net = nets.packed(unet, int8=False)
    assert not list(quantized_layers(net))
    monkeypatch.setattr(engine, "has_bfloat16", lambda: False)
    OpenVinoEngine().attach(net)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    truth = copy.deepcopy(unet).double()(x.double(), 321).sample
    # Two float32 programs of some 100 operations: torch itself is at 120 dB or better here.
    assert nets.sqnr_db(truth, unet(x, 321).sample) > 120
    assert nets.sqnr_db(truth, net(x, 321).sample) > 117


@torch.no_grad()
def test_bfloat16_attention_loses_little(unet: nn.Module, monkeypatch) -> None:
    net = nets.packed(unet, int8=False)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(engine, "has_bfloat16", lambda: True)
    OpenVinoEngine().attach(net)
    # One rounding to 8 bits is 2^-9 / sqrt(3), 59 dB; attention adds to a residual stream.
    assert 59 < nets.sqnr_db(unet(x, 321).sample, net(x, 321).sample) < 110


@torch.no_grad()
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_bfloat16_attention_is_right_for_every_number_of_tokens(heads: int, monkeypatch) -> None:
    """OpenVINO's own is wrong (5 to 20 dB) with as many queries as heads."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (heads, 8)).transpose(1, 2) for part in x.chunk(3, 2))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    net = nets.OneLayer(nn.Identity(), attend).eval()
    install_clock(net, torch.zeros(nets.STEPS, dtype=torch.int64))
    monkeypatch.setattr(engine, "has_bfloat16", lambda: True)
    OpenVinoEngine().attach(net)
    for tokens in (1, 2, 3, 8, 9):
        x = noise(2, tokens, 3 * heads * 8, seed=tokens)
        # q, k, v and the probabilities have 8 bits.
        assert nets.sqnr_db(attend(x), net(x, torch.tensor(1))) > 38


@torch.no_grad()
def test_group_norms_equal_torch() -> None:
    torch.manual_seed(0)
    net = nets.NormNet().eval()
    x, t = torch.randn(3, 3, 9, 7), torch.tensor([0, 500, 999])
    copied, ratios = copy.deepcopy(net).double(), []

    def note(norm: Any, args: tuple[Tensor]) -> None:
        groups = args[0].reshape(len(args[0]), norm.num_groups, -1)
        ratios.append((groups.mean(2) ** 2 / (groups.var(2, correction=0) + norm.eps)).max())

    for norm in copied.norms:
        norm.register_forward_pre_hook(note)
    truth = copied(x.double(), t.double())
    install_clock(net, torch.zeros(nets.STEPS, dtype=torch.int64))
    OpenVinoEngine().attach(net)
    found = net(x, t)
    assert found.shape == truth.shape
    # Some 60 float32 operations, each good to 2^-24, and the cancellation in each variance, whose
    # relative error is mean^2 / var larger (halved by the square root).
    bound = (60 + float(sum(ratios))) * 2**-24
    assert bound < 1e-3
    assert float((found - truth).abs().max()) < bound * float(truth.abs().max())


@torch.no_grad()
def test_group_norm_with_a_large_mean() -> None:
    """The variance is E[x^2] - E[x]^2: its relative error grows with mean^2 / var."""
    net = nn.Module()

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.norm(sample * self.scale)

    for mean in (0.0, 10.0, 100.0):
        net = Shifted()
        x = mean + torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(3))
        truth = copy.deepcopy(net).double()(x.double(), torch.zeros(2))
        install_clock(net, torch.zeros(nets.STEPS, dtype=torch.int64))
        OpenVinoEngine().attach(net)
        bound = 8 * 2**-23 * (1 + mean**2)
        assert nets.sqnr_db(truth, net(x, 0)) > -20 * torch.log10(torch.tensor(bound)), mean
