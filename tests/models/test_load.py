"""Opening a pipeline: the right error for each broken folder, and digests that see every change."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from quantempo.errors import QuantempoError
from quantempo.models.load import check_finite, load_pipeline, model_digest
from tests.packed import packed, saved
from tests.tiny import tiny_unconditional, tiny_unet


def with_entry(**entry: object) -> Callable[[bytes], bytes]:
    """Return what sets an entry of a JSON file."""
    return lambda text: json.dumps(json.loads(text) | entry).encode()


PLAIN = "diffusion_pytorch_model.safetensors"
WEIGHTS, CONFIG = f"unet/{PLAIN}", "unet/config.json"


def renamed_weight(file: bytes) -> bytes:
    tensors = load(file)
    tensors |= {name: tensors["conv_in.bias"].clone() for name in ("other", "others")}
    tensors["conv_in.weights"] = tensors.pop("conv_in.weight")
    return save(tensors, {"format": "pt"})


def with_lora(file: bytes) -> bytes:
    tensors = load(file)
    base = tensors.pop("conv_in.weight")
    added = {"conv_in.base_layer.weight": base, "conv_in.lora_A.default.weight": base[:2].clone()}
    return save(tensors | added, {"format": "pt"})


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        (WEIGHTS, lambda whole: whole[:-100], "damaged or truncated"),
        (WEIGHTS, lambda whole: b"\xff" * 64, "damaged or truncated"),
        (CONFIG, lambda whole: b"{", "config.json is not valid JSON"),
        ("model_index.json", None, "no model_index.json"),
        (WEIGHTS, None, "cannot load"),
        (CONFIG, with_entry(block_out_channels=[16, 64]), "cannot load"),
        ("model_index.json", with_entry(_class_name="NoPipeline"), "cannot load"),
        (CONFIG, lambda whole: b"\xef\xbb\xbf" + whole, "config.json .*without a byte order mark"),
        (WEIGHTS, renamed_weight, "lacks 1 of the network's tensors"),
        (WEIGHTS, with_lora, r"holds a LoRA \('conv_in.lora_A.*fuse_lora.*unload_lora_weights"),
    ],
)
def test_a_broken_folder_is_one_sentence(file, damage, message, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(saved("unconditional"), folder)
    whole = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage is not None:
        (folder / file).write_bytes(damage(whole))
    with pytest.raises(QuantempoError, match=message) as caught:
        load_pipeline(folder)
    assert "\n" not in str(caught.value)


def test_a_component_is_told_from_a_pipeline() -> None:
    with pytest.raises(QuantempoError, match="give the folder above it"):
        load_pipeline(saved("unconditional") / "unet")


@pytest.mark.parametrize("name", ["/no/such/folder", "nowhere", "a/b/c", "a" * 300])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    with pytest.raises(QuantempoError, match="no folder"):
        load_pipeline(name)


def test_a_whole_folder_loads_with_its_own_bits() -> None:
    pipe = load_pipeline(saved("unconditional"))
    wanted = tiny_unet().state_dict()
    state = pipe.unet.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    tiny_unconditional().save_pretrained(tmp_path / "model", safe_serialization=False)
    assert list((tmp_path / "model/unet").glob("*.bin"))
    with pytest.raises(QuantempoError, match=r"cannot load .*safetensors"):
        load_pipeline(tmp_path / "model")


def renamed(folder: Path, **variants: str | None) -> None:
    """Give the weights of components another variant."""
    for component, variant in variants.items():
        for name in (PLAIN, "model.safetensors"):
            if (file := folder / component / name).is_file() and variant:
                file.rename(file.with_name(name.replace(".s", f".{variant}.s")))


@pytest.mark.parametrize(
    ("variants", "option"),
    [
        ({"unet": "fp16"}, None),
        ({"unet": "ema"}, None),
        ({"unet": "non_ema", "vae": "non_ema", "text_encoder": "non_ema"}, None),
        ({"vae": "fp16", "text_encoder": "fp16"}, None),
        ({"unet": "ema"}, "ema"),
    ],
)
def test_variants_are_loaded_as_diffusers_does(variants, option, tmp_path):
    shutil.copytree(saved("text"), tmp_path / "model")
    renamed(tmp_path / "model", **variants)
    pipe = load_pipeline(tmp_path / "model", variant=option)
    wanted = load_pipeline(saved("text"))
    for name in ("unet", "vae", "text_encoder"):
        assert model_digest(getattr(pipe, name)) == model_digest(getattr(wanted, name))


def test_a_choice_of_variants_is_left_to_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("unconditional"), folder)
    other = tiny_unet(seed=1)
    other.save_pretrained(folder / "unet", variant="ema")
    assert model_digest(load_pipeline(folder).unet) == model_digest(tiny_unet())
    assert model_digest(load_pipeline(folder, variant="ema").unet) == model_digest(other)
    (folder / "unet" / PLAIN).rename(folder / "unet" / PLAIN.replace(".s", ".fp16.s"))
    with pytest.raises(QuantempoError, match="variants ema, fp16 only; choose one: --variant"):
        load_pipeline(folder)
    assert load_pipeline(folder, variant="fp16")
    with pytest.raises(QuantempoError, match="cannot load"):
        load_pipeline(folder, variant="bf16")


def test_files_that_diffusers_does_not_read_do_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved("unconditional"), folder)
    for name in ("._" + PLAIN, "other.safetensors", PLAIN.replace(".s", ".ema.s"), "notes.json"):
        (folder / "unet" / name).write_bytes(b"{ torn")
    (folder / "training.json").write_bytes(b"{ torn")
    (folder / "samples").mkdir()
    (folder / "samples/._config.json").write_bytes(b"\x00\x05")
    assert model_digest(load_pipeline(folder).unet) == model_digest(tiny_unet())


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
def test_a_bug_of_the_plug_in_is_no_broken_folder(kind, monkeypatch):
    def bug(*_: object) -> None:
        raise kind("a bug")

    monkeypatch.setattr("quantempo.quantized.swap_layers", bug)
    with pytest.raises(kind, match="a bug"):
        load_pipeline(packed("unconditional").folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float) -> None:
    net = tiny_unet()
    check_finite(net)
    net.mid_block.resnets[0].conv1.weight.data[0, 0, 1, 1] = value
    with pytest.raises(QuantempoError, match=r"weight 'mid_block\.resnets\.0\.conv1\.weight'"):
        check_finite(net)


def test_the_digest_sees_values_names_types_and_shapes() -> None:
    def build(weight: torch.Tensor, name: str = "a") -> str:
        net = nn.Module()
        net.register_buffer(name, weight)
        return model_digest(net)

    zeros = torch.zeros(2, 3)
    one_bit = zeros.clone()
    one_bit[1, 2] = -0.0
    half = torch.zeros(3, 2, dtype=torch.bfloat16)
    digests = {build(value) for value in (zeros, one_bit, zeros.T, zeros.int(), half)}
    assert len(digests | {build(zeros, "b")}) == 6
    assert build(zeros) == build(zeros.clone())
    assert build(torch.zeros(())) != build(torch.zeros(1))
