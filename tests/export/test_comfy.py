"""ComfyUI's checkpoints: an independent reader of the written spec, and there and back."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from safetensors.numpy import safe_open, save_file

from quantempo.core.paged import save_tensors
from quantempo.export import comfy
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline import stages
from quantempo.pipeline.samples import open_model
from quantempo.quantized import QLinear, WeightOnlyLinear, quantized_layers
from quantempo.recipe import Recipe
from tests.packed import plain
from tests.tiny import tiny_clip, tiny_dit, tiny_flux, tiny_unconditional

H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float64)


def spec_weight(tensors: dict[str, np.ndarray], name: str, mark: dict[str, Any]) -> np.ndarray:
    """Return the weight of a layer by docs/formats/comfy.md, float64; shares nothing with ours."""
    if mark["format"] == "asym_w4a8_int8":
        packed = tensors[f"{name}.weight"].view(np.uint8)
        codes = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
        codes[:, ::2], codes[:, 1::2] = packed % 16, packed // 16
        e4m3 = tensors[f"{name}.weight_s_rel"].view(np.uint8).astype(int)
        exponent, mantissa = e4m3 // 8 % 16, e4m3 % 8
        fine = np.where(exponent, 2.0 ** (exponent - 7) * (1 + mantissa / 8), mantissa / 512)
        wide = tensors[f"{name}.weight_codebook"][codes] * np.repeat(fine, 16, 1)
        codes8, scale = np.clip(np.rint(wide), -127, 127), tensors[f"{name}.weight_s_channel"]
    else:
        codes8, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"].ravel()
    weight = codes8.astype(np.float64) * scale.astype(np.float64)[:, None]
    if mark.get("convrot") or mark["format"] == "asym_w4a8_int8":
        h = H4
        for _ in range(3):
            h = np.kron(h, H4)
        weight = (weight.reshape(len(weight), -1, 256) @ (h / 16)).reshape(weight.shape)
    return weight


def marks_of(file: Path) -> dict[str, Any]:
    tensors = load_file_bf16(file)
    found = {
        key.removesuffix(".comfy_quant"): json.loads(value.tobytes())
        for key, value in tensors.items()
        if key.endswith(".comfy_quant")
    }
    with safe_open(file, "np") as opened:
        assert json.loads(opened.metadata()["_quantization_metadata"])["layers"] == found
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return the float and the run folder of three pipelines."""
    root, found = tmp_path_factory.mktemp("comfy"), {}
    (flux, call), dit = tiny_flux(9), tiny_dit()
    (token, text), (token2, text2) = tiny_clip(), tiny_clip()
    flux.vae.register_to_config(shift_factor=0.0)
    flux.register_modules(tokenizer=token, text_encoder=text)
    flux.register_modules(tokenizer_2=token2, text_encoder_2=text2)
    recipe = plain().override("activations", granularity="token")
    few = recipe.override("trace", chains=2, steps=2, picks=2)
    four = Recipe.load("w4a8").override("activations", granularity="token")
    four = four.override("trace", chains=2, steps=2, picks=2)
    cases = {
        "flux": (flux, few, call), "four": (flux, four.override("rounding", name="nearest"), call),
        "unet": (tiny_unconditional(), few, {}), "dit": (dit, few, {"class_labels": [1, 2]}),
    }  # fmt: skip
    for name, (pipe, chosen, given) in cases.items():
        pipe.save_pretrained(root / name)
        stages.finish(stages.load(str(root / name), root / f"run-{name}", chosen, call=given))
        found[name] = root / name, root / f"run-{name}"
    return found


@pytest.mark.parametrize("name", ["flux", "four", "unet", "dit"])
def test_a_reader_of_the_spec_finds_our_integers(name: str, made: Any, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    about = comfy.write(made[name][1] / "packed", file)
    network = denoiser_of(load_pipeline(made[name][1] / "packed"))[1]
    tensors, marks = load_file_bf16(file), marks_of(file)
    layers = dict(quantized_layers(network))
    plain_ones = {n for n, layer in layers.items() if type(layer) is QLinear}
    one_grid = {n for n in plain_ones if len(layers[n].segments) == 1}
    said = {n for n in one_grid if not layers[n].act_scale.numel()}
    assert about["int8"] == len(said)
    others = {n for n, m in network.named_modules() if isinstance(m, WeightOnlyLinear)}
    assert about["not_said"].keys() == (layers.keys() - said) | others
    assert all(row["reason"] and row["bytes"] for row in about["not_said"].values())
    found = dict(tensors)
    for key in marks:
        found.pop(f"{key}.comfy_quant")
        found[f"{key}.weight"] = spec_weight(tensors, key, marks[key])
        found.pop(f"{key}.weight_scale")
    state = denoiser_of(load_pipeline(made[name][0]))[1].state_dict()
    if name in ("flux", "four"):
        assert "single_blocks.0.linear1" in marks and "double_blocks.0.img_attn.qkv" in marks
        found = diffusers_names({k: torch.from_numpy(v) for k, v in found.items()})
    else:
        assert marks.keys() == said
    assert found.keys() == state.keys()
    assert all(tuple(found[key].shape) == tuple(state[key].shape) for key in state)
    for key in said:
        own = layers[key].weight_codes.double() * layers[key].weight_scale.double()[:, None]
        assert np.array_equal(found[f"{key}.weight"], own.numpy())
        if layers[key].bias is not None:
            assert np.array_equal(found[f"{key}.bias"], layers[key].bias.numpy())


def diffusers_names(tensors: dict[str, Any]) -> dict[str, np.ndarray]:
    """Rename tensors of FLUX by diffusers' own reader of original files, of a tiny width."""
    text = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    names = dict(vars(single_file_utils))
    exec(text.replace("3072", "16"), names)
    found = names["convert_flux_transformer_checkpoint_to_diffusers"](tensors)
    return {key: value.numpy() for key, value in found.items()}


def load_file_bf16(file: Path) -> dict[str, np.ndarray]:
    from safetensors.torch import load_file as load

    found = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in load(file).items()}
    return {key: value.numpy() for key, value in found.items()}


def test_there_and_back_are_the_same_integers(made: Any, tmp_path: Path) -> None:
    source, run = made["flux"]
    comfy.write(run / "packed", tmp_path / "x.safetensors")
    about = comfy.read(tmp_path / "x.safetensors", str(source), tmp_path / "back")
    assert about["rounded_again"] == 0
    first, again = (open_model(p, engine="simulated") for p in (run / "packed", tmp_path / "back"))
    one, two = (dict(quantized_layers(denoiser_of(p)[1])) for p in (first, again))
    # The input of the other one has two grids.
    assert two.keys() == one.keys() - {"single_transformer_blocks.0.proj_out"}
    assert about["int8"] == len(two)
    for key in two:
        layer = one[key]
        assert torch.equal(layer.weight_codes, two[key].weight_codes)
        assert torch.equal(layer.weight_scale, two[key].weight_scale)
        assert torch.equal(layer.bias, two[key].bias)
    call = tiny_flux(9)[1]
    images = [run_pipeline(p, range(2), steps=2, batch_size=2, **call) for p in (first, again)]
    # Modulations went through bfloat16, and the layer of two grids.
    assert np.abs(images[0].astype(float) - images[1].astype(float)).mean() < 4


def rotated(g: torch.Generator, out: int, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random tensors of a layer of 256 inputs and their mark."""
    mark = {"format": kind, "convrot": True, "convrot_groupsize": 256}
    if kind == "int8_tensorwise":
        codes = torch.randint(-127, 128, (out, 256), generator=g, dtype=torch.int8)
        return {"weight": codes, "weight_scale": torch.rand(out, 1, generator=g)}, mark
    part = {"weight": torch.randint(-128, 128, (out, 128), generator=g, dtype=torch.int8)}
    part["weight_codebook"] = torch.linspace(-7, 8, 16)
    fine = 1 + 15 * torch.rand(out, 16, generator=g)
    part["weight_s_rel"] = fine.to(torch.float8_e4m3fn).view(torch.uint8)
    return part | {"weight_s_channel": torch.rand(out, generator=g)}, mark


@pytest.mark.parametrize("kind", ["int8_tensorwise", "asym_w4a8_int8"])
def test_rotated_weights_are_those_of_the_spec(kind: str) -> None:
    part, mark = rotated(torch.Generator().manual_seed(0), 5, kind)
    tensors = {f"a.{key}": value.numpy() for key, value in part.items()}
    wanted = spec_weight(tensors, "a", mark)
    # Sums of 256 float32 products.
    assert np.abs(comfy._weight(part, mark).numpy() - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 0.1


def test_rotation_is_exported(tmp_path: Path) -> None:
    weight = torch.randn(7, 512, generator=torch.Generator().manual_seed(0))
    turned = comfy.hadamard(weight)
    assert torch.allclose(comfy.hadamard(turned), weight, atol=1e-5)
    scale = turned.abs().amax(1) / 127
    tensors = {"a.weight": (turned / scale[:, None]).round().to(torch.int8).numpy()}
    tensors["a.weight_scale"] = scale[:, None].numpy()
    found = spec_weight(tensors, "a", {"format": "int8_tensorwise", "convrot": True})
    error = ((found - weight.numpy()) ** 2).sum() / (weight.numpy() ** 2).sum()
    assert 1e-6 < error < 1e-3


def test_fp8_is_rounded_to_int8_and_listed(made: Any, tmp_path: Path, caplog: Any) -> None:
    source, run = made["flux"]
    from safetensors.torch import load_file as load

    file = tmp_path / "x.safetensors"
    comfy.write(run / "packed", file)
    tensors, name = load(file), "double_blocks.0.img_attn.qkv"
    weight = tensors[f"{name}.weight"] * tensors[f"{name}.weight_scale"]
    scale = weight.abs().max() / 448
    tensors[f"{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(1.0)}
    text = bytearray(json.dumps({"format": "float8_e4m3fn"}).encode())
    tensors[f"{name}.comfy_quant"] = torch.frombuffer(text, dtype=torch.uint8)
    prefixed = {f"model.diffusion_model.{key}": value for key, value in tensors.items()}
    save_tensors(tmp_path / "y.safetensors", prefixed)
    about = comfy.read(tmp_path / "y.safetensors", str(source), tmp_path / "back")
    own = {f"transformer_blocks.0.attn.to_{part}" for part in "qkv"}
    assert about["rounded"].keys() == own
    assert all(row["sqnr_db"] > 30 for row in about["rounded"].values())
    assert "float8_e4m3fn, rounded to int8 again" in caplog.text


def test_wrong_files_are_refused_in_a_sentence(made: Any, tmp_path: Path, cli: Any) -> None:
    source, run = made["flux"]
    good = tmp_path / "good.safetensors"
    comfy.write(run / "packed", good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-5000])
    float_file = tmp_path / "float.safetensors"
    save_file({"a.weight": np.ones((2, 2), np.float32)}, float_file)
    odd = load_file_bf16(good)
    name = next(iter(marks_of(good)))
    wide = {"format": "int8_tensorwise", "convrot_groupsize": 64}
    for kind, mark in (("nvfp4", {"format": "nvfp4"}), ("wide", wide)):
        text = np.frombuffer(json.dumps(mark).encode(), np.uint8)
        save_file(odd | {f"{name}.comfy_quant": text}, tmp_path / f"{kind}.safetensors")
    part = {key: value for key, value in odd.items() if key != f"{name}.weight_scale"}
    save_file(part, tmp_path / "part.safetensors")
    scale = odd[f"{name}.weight_scale"]
    turned = {"format": "int8_tensorwise", "convrot": True}
    changes = {
        "short": {"weight_scale": scale[:-1]}, "nan": {"weight_scale": scale * np.nan},
        "negative": {"weight_scale": -scale},
        "low": {"weight": np.full_like(odd[f"{name}.weight"], -128)},
        "turned": {"comfy_quant": np.frombuffer(json.dumps(turned).encode(), np.uint8)},
    }  # fmt: skip
    for kind, change in changes.items():
        odd_one = odd | {f"{name}.{key}": value for key, value in change.items()}
        save_file(odd_one, tmp_path / f"{kind}.safetensors")
    cases = [
        (cut, source, "damaged"), (tmp_path / "none", source, "is no file"),
        (float_file, source, "no quantized layer"),
        (tmp_path / "nvfp4.safetensors", source, "nvfp4"),
        (tmp_path / "wide.safetensors", source, "256"),
        (tmp_path / "part.safetensors", source, "weight_scale"),
        *((tmp_path / f"{kind}.safetensors", source, "do not fit") for kind in ("short", "turned")),
        *((tmp_path / f"{kind}.safetensors", source, "not > 0") for kind in ("nan", "negative")),
        (tmp_path / "low.safetensors", source, "-128"),
        (good, made["unet"][0], "differ"), (good, tmp_path / "nowhere", "nowhere"),
    ]  # fmt: skip
    for file, model, words in cases:
        out = tmp_path / "out"
        result = cli("import", file, "--model", model, "--out", out)
        assert result.code == 2 and words in result.err and not out.exists()
    new = tmp_path / "new"
    for folder, to, kind, words in [
        (source, new, "comfy", "packed networks"), (run, good, "comfy", "exists"),
        (run, new, "gguf", "gguf"),
    ]:  # fmt: skip
        result = cli("export", folder, "--format", kind, "--out", to)
        assert result.code == 2 and words in result.err and not new.exists()


def test_the_commands(made: Any, tmp_path: Path, cli: Any) -> None:
    source, run = made["flux"]
    wrong = cli("export", run, "--format", "onnx", "--out", tmp_path / "g", "--rotate")
    assert wrong.code == 2 and "--rotate is of format comfy" in wrong.err
    out, back = tmp_path / "x.safetensors", tmp_path / "back"
    assert cli("export", run, "--format", "comfy", "--out", out, "--rotate").code == 0
    result = cli("import", out, "--model", source, "--out", back)
    assert result.code == 0 and "rounded_again" in result.out
