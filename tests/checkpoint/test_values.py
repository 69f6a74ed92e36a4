"""Checkpoints whose hash is right and whose values are not: one sentence each, nothing runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from quantempo.checkpoint.diffusers_plugin import mark_quantized
from quantempo.core.instance import put_buffer
from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline
from tests.checkpoint.test_bits import load, mixed
from tests.checkpoint.test_format2 import FORMAT2, with_setting
from tests.packed import packed

LAYER = "up_blocks.0.resnets.0.conv_shortcut"


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("quantempo_clock.bucket_of", 40, -3, "from -3 to 3; expected 0 to"),
        ("quantempo_clock.bucket_of", 40, 4, "from 0 to 4; expected 0 to 3"),
        ("quantempo_clock.bucket_of", 40, 10**6, "from 0 to 1000000; expected 0 to"),
        (f"{LAYER}.act_scale", (1, 2), 0.0, "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (1, 2), -1.0, "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (0, 3), float("nan"), "a bad value in act_scale"),
        (f"{LAYER}.act_scale", (0, 3), float("inf"), "a bad value in act_scale"),
        (f"{LAYER}.weight_scale", 5, float("nan"), "a bad value in weight_scale"),
        (f"{LAYER}.weight_scale", 5, 0.0, "a bad value in weight_scale"),
        (f"{LAYER}.act_zero_point", 1, 100_000, r"to 100000; expected 0 to 255"),
        (f"{LAYER}.act_zero_point", 1, -1, "zero points of .* from -1 to"),
    ],
)
def test_a_bad_value_among_good_ones_is_refused(name, index, value, message, tmp_path):
    net = load_pipeline(FORMAT2 / "w8a8").unet
    net.get_buffer(name)[index] = value
    # As someone who edits it would: the hash is of the new tensors.
    mark_quantized(net, net.hf_quantizer.quantization_config)
    net.save_pretrained(tmp_path)
    with pytest.raises(QuantempoError, match=message) as caught:
        type(net).from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("num_train_timesteps", v, "expected 1 to 100000") for v in (0, -5, 10**12, "10", True)),
        *(("per_unit", v, "finite numbers, per_unit not 0") for v in (0, float("nan"), None, "1")),
        *(("times", v, "expected") for v in (3, {}, {"count": 2, "values": [1, 1]}, {"steps": 2})),
        ("bits", {LAYER: [9, 8]}, "unknown format 'int9'"),
        *(
            ("bits", {LAYER: [4, 8, group]}, f"got 4 bits in groups of {group}; expected")
            for group in (12, 16.0, "16", True, -16)
        ),
        ("bits", {LAYER: [4, 8, 16, "x"]}, "damaged"),
        ("buckets", {LAYER: 0}, "expected 1 or more"),
        ("segments", {LAYER: [16, 15]}, "expected parts of 32"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_made(key, value, message, tmp_path):
    with_setting(tmp_path, key, value)
    with pytest.raises(QuantempoError, match=message) as caught:
        load_pipeline(tmp_path / "packed")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{LAYER}.weight_int", lambda v: v.double(), r"weight_int as torch\.float64"),
        (f"{LAYER}.weight_int", lambda v: v.fill_(-128), "codes of .* from -128 to"),
        (f"{LAYER}.act_scale", lambda v: v.half(), r"act_scale as torch\.float16"),
        (f"{LAYER}.act_scale", lambda v: v[:, :2], r"of shape \(2, 2\); expected"),
        (f"{LAYER}.act_zero_point", lambda v: v.long(), r"zero_point as torch\.int64"),
        (f"{LAYER}.bias", lambda v: v.fill_(float("nan")), f"a bad value in bias of {LAYER}"),
        ("time_embedding.linear_1.bias", lambda v: v / 0, "a bad value in bias of time"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(name: str, change: Any, message: str, tmp_path: Path):
    net = load_pipeline(FORMAT2 / "w8a8").unet
    put_buffer(net, name, change(net.get_buffer(name)).clone())
    net.save_pretrained(tmp_path)
    with pytest.raises(QuantempoError, match=message):
        type(net).from_pretrained(tmp_path)


def test_groups_that_leave_a_byte_are_refused(tmp_path: Path) -> None:
    net: Any = load(mixed("unconditional"))
    layer = net.get_submodule("up_blocks.0.resnets.0.conv1")
    # s = 16, z = 0 of one group: its codes go to 240.
    layer.weight_group[3, 4, 0] = 0xF0
    mark_quantized(net, net.hf_quantizer.quantization_config)
    net.save_pretrained(tmp_path)
    with pytest.raises(QuantempoError, match=r"codes of up.*conv1 from -\d+ to \d+; expected") as e:
        type(net).from_pretrained(tmp_path)
    assert "\n" not in str(e.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A packed folder of today that a test may damage."""
    return shutil.copytree(packed("unconditional").folder, tmp_path / "packed")


def edit(file: Path, change: Any) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def setting(key: str, value: Any) -> Any:
    return lambda values: values["quantization_config"].update({key: value})


SCHEDULER, NETWORK = "scheduler/scheduler_config.json", "unet/config.json"
EDITS = [
    (SCHEDULER, lambda v: v.update(beta_start=0.0401)),
    (SCHEDULER, lambda v: v.pop("clip_sample")),
    (SCHEDULER, lambda v: v.update(num_train_timesteps=10**9)),
    ("model_index.json", lambda v: v.update(scheduler=["diffusers", "DDPMScheduler"])),
    (NETWORK, lambda v: v.update(norm_eps=1e-3)),
    (NETWORK, lambda v: v.update(act_fn="gelu")),
    (NETWORK, lambda v: v.update(layers_per_block=10**9)),
    (NETWORK, lambda v: v.pop("flip_sin_to_cos") and v.update(flip_sin_to_coz=True)),
    *((NETWORK, setting(*each)) for each in (
        ("per_unit", 0.5), ("per_unit", "1"), ("bits", {LAYER: [8, 2]}), ("bits", 3),
        ("segments", {LAYER: ["a"]}), ("segments", [1]), ("recipe", None), ("buckets", None),
        ("num_train_timesteps", 900), ("float_layers", []), ("hashes", [1]), ("network", 7),
        ("colour", 1), ("version", "0"), ("hashes", {}),
        *(("format_version", v) for v in (0, -5, True, False, 2.5, None, "3", 1)),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change"), EDITS)
def test_an_edited_setting_is_one_sentence(folder: Path, file: str, change: Any) -> None:
    edit(folder / file, change)
    with pytest.raises(QuantempoError) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


# Diffusers reads the index itself, and builds the network before a quantizer is asked.
@pytest.mark.parametrize(("file", "change"), EDITS[:2] + EDITS[4:6] + EDITS[8:])
def test_an_edited_setting_is_refused_by_plain_diffusers_too(folder: Path, file: str, change: Any):
    edit(folder / file, change)
    with pytest.raises(QuantempoError):
        DiffusionPipeline.from_pretrained(folder)


def test_a_packed_network_without_settings_says_so(folder: Path) -> None:
    edit(folder / NETWORK, lambda v: v.pop("quantization_config"))
    with pytest.raises(QuantempoError, match="has no quantization_config"):
        load_pipeline(folder)


def test_a_tensor_too_many_is_refused(folder: Path) -> None:
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "extra": torch.zeros(1)}, file)
    with pytest.raises(QuantempoError, match="has unknown 1 tensors, the first is 'extra'"):
        load_pipeline(folder)


def test_a_changed_float_part_is_saved_and_loads_again(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(folder)
    pipe.unet.conv_in.bias.data.add_(0.01)
    pipe.scheduler.register_to_config(clip_sample_range=2.0)
    pipe.save_pretrained(tmp_path / "edited")
    again = load_pipeline(tmp_path / "edited")
    assert torch.equal(again.unet.conv_in.bias, pipe.unet.conv_in.bias)


def test_a_folder_packed_before_there_were_hashes_of_settings_loads(folder: Path) -> None:
    wanted = load_pipeline(folder).unet.state_dict()
    (folder / "quantempo.json").unlink()
    edit(folder / NETWORK, lambda v: v["quantization_config"].pop("network"))
    edit(folder / NETWORK, lambda v: v["quantization_config"]["hashes"].pop("settings"))
    found = load_pipeline(folder).unet.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_nothing_says_where_the_float_model_lay(folder: Path) -> None:
    assert not [f for f in folder.rglob("*.json") if "_name_or_path" in f.read_text()]
