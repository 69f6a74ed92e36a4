"""`quantize_` of modules and `QuantempoConfig` for float models: weights alone, no data."""

import copy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

import quantempo
from quantempo.engines import ENGINES, attached
from quantempo.errors import QuantempoError
from quantempo.quantized import quantized_layers
from tests.packed import saved
from tests.tiny import noise
from tests.uses import sqnr_db

CALL: dict[str, Any] = {"timestep": torch.tensor([5, 9]), "class_labels": torch.tensor([1, 2])}
X = noise(2, 4, 8, 8)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


@torch.no_grad()
@pytest.mark.parametrize("engine", ["auto", "onednn", "simulated"])
@pytest.mark.parametrize(("recipe", "least"), [("w8a8", 38), ("w4a8", 21)])
def test_a_bare_module(engine: str, recipe: str, least: float) -> None:
    if engine != "auto" and (reason := ENGINES.get(engine).missing()):
        pytest.skip(reason)
    net, x = Mlp(), noise(5, 7, 64)
    wanted = net(x)
    found = quantempo.quantize_(net, recipe, engine=engine)(x)
    assert sqnr_db(found, wanted) > least
    again = quantempo.quantize_(Mlp(), recipe, engine="simulated")(x)
    assert torch.allclose(found, again, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "simulated"])
def test_it_compiles_at_once(engine: str) -> None:
    if reason := ENGINES.get(engine).missing():
        pytest.skip(reason)
    net, x = quantempo.quantize_(Mlp(), engine=engine), noise(5, 64)
    assert torch.allclose(torch.compile(net)(x), net(x), atol=1e-6)


def test_refusals_leave_the_module_as_it_was() -> None:
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3))
    with pytest.raises(QuantempoError, match="no linear layer to quantize without data"):
        quantempo.quantize_(net)
    net = Mlp()
    for bad in ({"engine": "nothing"}, {"engine": "openvino"}, {"config": "w9a9"}):
        with pytest.raises(QuantempoError):
            quantempo.quantize_(net, **bad)
        assert isinstance(net.up, nn.Linear)
    quantempo.quantize_(net)
    with pytest.raises(QuantempoError, match="quantized already"):
        quantempo.quantize_(net)
    vae = {"subfolder": "vae", "quantization_config": quantempo.QuantempoConfig(recipe="w8a8")}
    with pytest.raises(QuantempoError, match="no time-step"):
        AutoencoderKL.from_pretrained(saved("dit"), **vae)


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "least"), [("w8a8", 45), ("w4a8", 30)])
def test_a_float_model_is_quantized_as_it_is_loaded(recipe: str, least: float, tmp_path) -> None:
    source: Any = {"pretrained_model_name_or_path": saved("dit"), "subfolder": "transformer"}
    config = quantempo.QuantempoConfig(recipe=recipe)
    net = DiTTransformer2DModel.from_pretrained(**source, quantization_config=config)
    float_net = DiTTransformer2DModel.from_pretrained(**source)
    quantempo.attach(net, "simulated")
    found = net(X, **CALL).sample
    assert sqnr_db(found, float_net(X, **CALL).sample) > least
    # What is saved loads like any other, with the same bits; in place it is the same.
    net.save_pretrained(tmp_path)
    again = DiTTransformer2DModel.from_pretrained(tmp_path)
    in_place = quantempo.quantize_(copy.deepcopy(float_net), recipe, engine="simulated")
    quantempo.attach(again, "simulated")
    assert torch.equal(again(X, **CALL).sample, found)
    assert torch.equal(in_place(X, **CALL).sample, found) and attached(in_place) == "simulated"


def test_convolutions_stay_in_float_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    config = quantempo.QuantempoConfig(recipe="w8a8")
    given: Any = {"subfolder": "unet", "quantization_config": config}
    net = UNet2DConditionModel.from_pretrained(saved("text"), **given)
    assert "convolutions stay in float" in caplog.text
    assert all(layer.dynamic for _, layer in quantized_layers(net))
