"""Load checkpoints of format 2, written by commit e79707b, and compare with what they gave then.

A UNet2DModel of width 8 and 16 with a skip input in two segments, four time buckets everywhere,
12-bit time embedding, 8-bit and (w4a8) 4-bit weights. `expected.safetensors` has inputs (x, t of
four time-steps), the output and two images of DDIM 4 under the engine `simulated`; `weights.json`
the SHA-256 of every layer's dequantized weight.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantempo.checkpoint.diffusers_plugin import FORMAT_VERSION
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.quantized import quantized_layers

FORMAT2 = Path(__file__).resolve().parents[1] / "data" / "format2"
RECIPES = ("w8a8", "w4a8")


def sqnr_db(wanted: Tensor, got: Tensor) -> float:
    error = (wanted - got).double().square().sum().clamp_min(1e-300)
    return float(10 * torch.log10(wanted.double().square().sum() / error))


@pytest.mark.parametrize("recipe", RECIPES)
def test_weights_are_those_of_the_version_that_wrote_them(recipe: str) -> None:
    net = denoiser_of(load_pipeline(FORMAT2 / recipe))[1]
    # Those of 4 bits are in groups now, which engines keep packed.
    layers = [layer for _, layer in quantized_layers(net)]
    assert all((q.weight_group is not None) == (q.weight_bits <= 4) for q in layers)
    wanted = json.loads((FORMAT2 / recipe / "weights.json").read_text())
    for name, digest in wanted.items():
        weight = net.get_submodule(name).weight.detach()
        assert weight.dtype == torch.float32
        assert hashlib.sha256(weight.contiguous().numpy()).hexdigest() == digest, name


@torch.no_grad()
def agrees(folder: Path, recipe: str) -> None:
    """Assert that a folder gives the output and the images that format 2 gave."""
    pipe = load_pipeline(folder)
    net = denoiser_of(pipe)[1]
    attach(net, "simulated")
    wanted = load_file(FORMAT2 / recipe / "expected.safetensors")
    output = net(wanted["x"], wanted["t"]).sample
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(2)
    images = pipe(batch_size=2, num_inference_steps=4, generator=seed, output_type="np").images
    # Bit-equal on the machine that wrote them. Float layers of another CPU add in another order,
    # which costs 110 dB, or less where a code on a rounding edge moves; quantizing costs 30 dB.
    for got, name in ((output, "output"), (torch.from_numpy(images), "images")):
        assert sqnr_db(wanted[name], got) > 60


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_and_images_are_those_of_the_version_that_wrote_them(recipe, caplog, tmp_path):
    agrees(FORMAT2 / recipe, recipe)
    assert [record.levelname for record in caplog.records] in ([], ["INFO"])
    # Saved again it is of today's format and the same model.
    pipe = load_pipeline(FORMAT2 / recipe)
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    assert again.unet.hf_quantizer.quantization_config.format_version == FORMAT_VERSION
    state = pipe.unet.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.unet.state_dict().items())
    agrees(tmp_path, recipe)


def test_a_checkpoint_of_format_1_loads(tmp_path: Path) -> None:
    shutil.copytree(FORMAT2 / "w8a8", tmp_path / "packed")
    file = tmp_path / "packed/unet/config.json"
    config = json.loads(file.read_text())
    # What the first format had.
    kept = {"buckets", "float_layers", "hashes", "int12", "num_train_timesteps", "per_unit",
            "quant_method", "recipe", "segments", "sites", "version"}  # fmt: skip
    old = {k: v for k, v in config["quantization_config"].items() if k in kept}
    config["quantization_config"] = old | {"format_version": 1}
    file.write_text(json.dumps(config))
    agrees(tmp_path / "packed", "w8a8")


def with_setting(folder: Path, key: str, value: object) -> None:
    """Write a checkpoint with another setting into `folder / "packed"`."""
    shutil.copytree(FORMAT2 / "w8a8", folder / "packed")
    file = folder / "packed/unet/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"][key] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("delta", {"bits": {"conv_out": 4}, "buckets": 1, "refresh": 0}, "changes between steps"),
        ("attention", ["mid_block.attentions.0"], "attention products"),
        ("correction", {"options": ["affine"], "points": 1, "channels": 3}, "a correction"),
    ],
)
def test_what_is_no_longer_run_is_refused(key, value, message, tmp_path):
    with_setting(tmp_path, key, value)
    with pytest.raises(QuantempoError, match=f"{message}.*quantize the float model again"):
        load_pipeline(tmp_path / "packed")
