"""Saving and loading through diffusers: bit for bit, in any dtype, in shards; damage is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantempo.checkpoint.diffusers_plugin import QuantempoConfig
from quantempo.cli.run_demo import DEMO_MODEL
from quantempo.core import paged
from quantempo.engines import ENGINES, attach, detach
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.pipeline import stages as pipeline
from quantempo.quantized import CLOCK_NAME, QLayer, StoredLinear, quantized_layers
from tests.packed import KINDS, packed, recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"


def component(folder: Path, kind: str) -> Path:
    return folder / ("transformer" if kind == "dit" else "unet")


def ours(net: torch.nn.Module) -> dict[str, Tensor]:
    """Return the quantized tensors of a network by name."""
    found = {f"{CLOCK_NAME}.bucket_of": net.get_buffer(f"{CLOCK_NAME}.bucket_of")}
    for name, module in net.named_modules():
        if isinstance(module, QLayer | StoredLinear):
            found |= {
                f"{name}.{k}": v for k, v in (*module.named_buffers(), *module.named_parameters())
            }
    return found


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A packed folder that a test may damage."""
    folder = tmp_path / "packed"
    shutil.copytree(packed("unconditional").folder, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_integers_and_scales_survive_any_dtype(kind: str, dtype: torch.dtype) -> None:
    folder = packed(kind).folder
    stored = load_file(component(folder, kind) / WEIGHTS)
    net = denoiser_of(DiffusionPipeline.from_pretrained(folder, dtype=dtype))[1]
    quantized = ours(net)
    for name, value in quantized.items():
        half = stored[name].dtype == torch.float16
        assert value.dtype == (torch.float32 if half else stored[name].dtype), name
        assert torch.equal(value, stored[name].to(value.dtype)), name
        assert value.dtype in (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float32)
    for name, value in net.state_dict().items():
        if name not in quantized:
            assert value.dtype == dtype and torch.equal(value, stored[name].to(dtype)), name


def test_a_network_alone_loads_too() -> None:
    net = UNet2DModel.from_pretrained(packed("unconditional").folder / "unet")
    stored = load_file(packed("unconditional").folder / "unet" / WEIGHTS)
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    load_pipeline(packed(kind).folder).save_pretrained(tmp_path / "again")
    first, second = component(packed(kind).folder, kind), component(tmp_path / "again", kind)
    assert (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    for config in configs:
        # Where it was loaded from is all that may differ.
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]


def test_shards_hold_the_same_model(tmp_path: Path) -> None:
    pipe = load_pipeline(packed("unconditional").folder)
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards/unet").glob("*.safetensors"))) > 3
    again = load_pipeline(tmp_path / "shards")
    state = again.unet.state_dict()
    assert state.keys() == pipe.unet.state_dict().keys()
    assert all(torch.equal(state[name], v) for name, v in pipe.unet.state_dict().items())
    half = DiffusionPipeline.from_pretrained(tmp_path / "shards", dtype=torch.bfloat16)
    wanted = ours(pipe.unet)
    assert all(torch.equal(value, wanted[name]) for name, value in ours(half.unet).items())


CASTS = {
    "bfloat16": lambda net: net.bfloat16(),
    "half": lambda net: torch.nn.ModuleList([net]).half(),
    "double": lambda net: net.double(),
    "type": lambda net: net.type(torch.float16),
    "to": lambda net: torch.nn.ModuleList([net]).to("cpu", torch.bfloat16),
}


@torch.no_grad()
@pytest.mark.parametrize("way", CASTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_was_cast_keeps_what_is_quantized_and_loads_again(kind, way, tmp_path):
    pipe = load_pipeline(packed(kind).folder)
    net = denoiser_of(pipe)[1]
    before = {name: value.clone() for name, value in ours(net).items()}
    CASTS[way](net)
    for name, value in ours(net).items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    dtype = next(p.dtype for n, p in net.named_parameters() if n not in before)
    assert dtype != torch.float32
    net.save_pretrained(tmp_path / "cast")
    again = type(net).from_pretrained(tmp_path / "cast", dtype=dtype)
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    if kind == "unconditional":
        x = torch.randn(2, 3, 16, 16).to(dtype)
        for network in (net, again):
            attach(network, "simulated")
        y = net(x, 500).sample
        assert y.dtype == dtype and y.isfinite().all() and torch.equal(again(x, 500).sample, y)
    for cast in (pipe.to, net.to, lambda dtype: net.half()):
        with pytest.raises(ValueError, match="quantized model"):
            cast(torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_tensors_and_text_is_saved(kind: str) -> None:
    files = [file for file in packed(kind).folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".md", ".safetensors", ".txt"}
    for file in files:
        if file.suffix != ".safetensors":
            file.read_text()


def edit_config(folder: Path, **values: object) -> None:
    file = folder / "unet/config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= values
    file.write_text(json.dumps(config))


def test_a_newer_format_is_refused(copy: Path) -> None:
    edit_config(copy, format_version=6)
    with pytest.raises(QuantempoError, match="format_version 6; this quantempo reads up to 5"):
        load_pipeline(copy)
    with pytest.raises(QuantempoError, match="upgrade quantempo"):
        UNet2DModel.from_pretrained(copy / "unet")


def test_an_unknown_key_is_refused(copy: Path) -> None:
    edit_config(copy, colour="blue")
    with pytest.raises(QuantempoError, match=r"has unknown keys \['colour'\]"):
        load_pipeline(copy)
    QuantempoConfig(**QuantempoConfig().to_dict())


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(tensor: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        (length,) = struct.unpack("<Q", raw[:8])
        offset = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0]
        raw[8 + length + offset] ^= 1
        file.write_bytes(raw)

    return damage


def drop(tensor: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        # Mapped from the file about to be written over.
        kept = {name: value.clone() for name, value in tensors.items() if name != tensor}
        assert len(kept) == len(tensors) - 1
        save_file(kept, file)

    return damage


LAYER = "mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged or truncated"),
        (flip(f"{LAYER}.weight_int"), "do not match the hash"),
        (flip(f"{LAYER}.weight_scale"), "do not match the hash"),
        (flip(f"{LAYER}.act_scale"), "do not match the hash"),
        (flip(f"{LAYER}.act_zero_point"), "do not match the hash"),
        (flip(f"{LAYER}.bias"), "do not match the hash"),
        (flip("quantempo_clock.bucket_of"), "do not match the hash"),
        (flip("time_embedding.linear_1.weight"), "do not match the hash"),
        (drop(f"{LAYER}.weight_int"), rf"lacks 1 tensors, the first is '{LAYER}\.weight_int'"),
        (drop(f"{LAYER}.act_scale"), "lacks 1 tensors"),
        (drop("conv_in.weight"), r"lacks 1 tensors, the first is 'conv_in\.weight'"),
        (flip("conv_in.weight"), "do not match the hash"),
        (flip("mid_block.resnets.0.norm1.weight"), "do not match the hash"),
    ],
    ids=lambda value: None,
)
def test_damage_is_one_sentence(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    load_pipeline(copy)
    damage(copy / "unet" / WEIGHTS)
    with pytest.raises(QuantempoError, match=message) as caught:
        load_pipeline(copy)
    assert "\n" not in str(caught.value)


def test_a_layer_of_another_model_is_refused(copy: Path) -> None:
    file = copy / "unet/config.json"
    config = json.loads(file.read_text())
    config["layers_per_block"] = 2
    file.write_text(json.dumps(config))
    with pytest.raises(QuantempoError):
        load_pipeline(copy)


def test_the_bundled_model_packs_into_28_percent(tmp_path: Path) -> None:
    small = recipe(buckets=1).override("trace", steps=2)
    folder = pipeline.quantize(DEMO_MODEL, tmp_path / "run", small)
    packed_bytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    parameters = sum(p.numel() for p in load_pipeline(DEMO_MODEL).unet.parameters())
    assert packed_bytes <= 0.28 * 4 * parameters
    # Nothing is lost to be so small: every parameter is there in some form.
    assert packed_bytes >= parameters


@pytest.fixture
def lying(copy: Path, monkeypatch: pytest.MonkeyPatch) -> UNet2DModel:
    """A network whose integers, small ones too, lie in the files of `copy`."""
    monkeypatch.setattr(paged, "_SMALL", 1)
    return UNet2DModel.from_pretrained(copy / "unet")


def lie(net: torch.nn.Module) -> set[bool]:
    return {isinstance(q.weight_int, paged.Paged) for _, q in quantized_layers(net)}


@pytest.mark.parametrize("engine", ENGINES.names())
@torch.no_grad()
def test_integers_stay_in_the_file_and_are_those_of_a_whole_load(engine, lying, copy, tmp_path):
    if ENGINES.get(engine).missing() or engine == "triton":
        pytest.skip(f"{engine} cannot run without a GPU")
    whole = UNet2DModel.from_pretrained(packed("unconditional").folder / "unet")
    whole.load_state_dict(lying.state_dict())
    assert lie(lying) == {True} and lie(whole) == {False}
    args, outputs = (torch.randn(2, 3, 16, 16), torch.tensor(5)), []
    for net in (whole, lying, deepcopy(lying), pickle.loads(pickle.dumps(lying))):
        attach(net, engine)
        outputs.append(net(*args).sample)
    detach(lying)
    assert lie(lying) == {True}
    attach(lying, engine)
    outputs.append(lying(*args).sample)
    # In the place of what it reads, too.
    for folder in (tmp_path / "again", copy / "unet", copy / "unet"):
        lying.save_pretrained(folder)
        outputs.append(lying(*args).sample)
        stored = load_file(packed("unconditional").folder / "unet" / WEIGHTS)
        found = load_file(folder / WEIGHTS)
        assert all(torch.equal(value, found.pop(name)) for name, value in stored.items())
    assert all(torch.equal(outputs[0], y) for y in outputs[1:])


def test_a_file_that_was_changed_under_a_network_is_refused(lying, copy):
    file = copy / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes())
    with pytest.raises(QuantempoError, match="was it changed"):
        attach(lying, "simulated")
        lying(torch.randn(1, 3, 16, 16), torch.tensor(5))
