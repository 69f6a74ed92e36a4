"""Arguments of a call: read from text and files, kept by a run folder, as traced by default."""

import logging
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AudioPipelineOutput,
    DDIMPipeline,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image
from safetensors.torch import save_file

from quantempo.errors import QuantempoError
from quantempo.evaluation import evaluate_outputs
from quantempo.models.load import load_pipeline
from quantempo.pipeline import quality, stages
from quantempo.pipeline.arguments import (
    kept_arguments,
    merged,
    read_arguments,
    read_call,
    write_call,
)
from quantempo.run_folder import RunFolder, hash_of
from tests.packed import recipe, saved
from tests.tiny import noise, tiny_embeds, tiny_text, tiny_unconditional

SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*"))


def picture(seed: int, size: int = 16, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of pictures, tensors and other files."""
    (tmp_path / "pics").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / f"pics/{i}.png")
    (tmp_path / "pics/._0.png").write_bytes(b"of a Mac")
    (tmp_path / "pics/notes.txt").write_text("none")
    save_file({"prompt_embeds": noise(2, 8, 16)}, tmp_path / "one.safetensors")
    save_file({"a": noise(2), "b": noise(3)}, tmp_path / "two.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("height=32", 32),
        ("guidance_scale = 1e1", 10.0),
        ("strength=.5", 0.5),
        ("sigmas=[1.0, 0.5]", [1.0, 0.5]),
        ("original_size=(32, 32)", (32, 32)),
        ("clean=true", True),
        ("clean=True", True),
        ("height=None", None),
        ("height=none", None),
        ("prompt=1984", "1984"),
        ("prompt=5 # cats", "5 # cats"),
        ("prompt=a=b", "a=b"),
        ("prompt=the cat.png", "the cat.png"),
        ("interpolation=bilinear", "bilinear"),
        ("cross_attention_kwargs={scale = 0.5}", {"scale": 0.5}),
    ],
)
def test_a_setting_is_read_as_what_it_looks_like(text: str, value: Any) -> None:
    found = read_arguments(None, [text])[text.partition("=")[0].strip()]
    assert found == value and type(found) is type(value)


def test_names_of_files_become_what_they_hold(files: Path) -> None:
    (files / "call.toml").write_text(
        '\ufeffimage = "pics/*.png"\nmask_image = "pics/1.png"\ncontrol_image = "pics"\n'
        'prompt_embeds = "one.safetensors"\nheight = "None"\nother = "two.safetensors:b"\n'
        'hint = ["pics/2.png", "pics/[01].png"]\n'
    )
    call = read_arguments(files / "call.toml", ["height=8"])
    wanted = [picture(i) for i in range(3)]
    assert call["image"] == call["control_image"] == wanted
    assert call["mask_image"] == wanted[1] and call["hint"] == [wanted[2], *wanted[:2]]
    assert torch.equal(call["prompt_embeds"], noise(2, 8, 16)) and call["other"].shape == (3,)
    assert call["height"] == 8


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("height", "expected key=value"),
        ("a b=3", "expected key=value"),
        ("sigmas=[1, ", r"got --set sigmas=\[1,"),
        ("image=none/*.png", r"no file 'none/\*.png'"),
        ("image=pics/notes.png", "no file"),
        (f"image={'a' * 300}", "no file"),
        ("latents=two.safetensors", "holds no 'latents' but a, b"),
        ("latents=pics/notes.safetensors", "no file"),
        ("image=pics/._0.png", "expected a picture"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    files: Path, setting: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(QuantempoError, match=words) as error:
        read_arguments(None, [setting])
    assert "\n" not in str(error.value)


CALL: dict[str, Any] = {
    "prompt": ["a", "b"],
    "image": [picture(0), picture(1, mode="L"), picture(2, mode="RGBA")],
    "latents": noise(2, 3).bfloat16(),
    "array": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::-1],
    "size": (32, 32),
    "nested": {"scale": [0.5, None, True, float("inf")], 3: "of a number"},
}


def test_a_call_comes_back_as_it_was(tmp_path: Path) -> None:
    run, call = RunFolder(tmp_path), kept_arguments(CALL | {"n": np.float32(0.5), "i": np.int64(3)})
    run.write_json("call.json", write_call(run, call))
    again = read_call(run, run.read_json("call.json"))
    assert again["n"] == 0.5 and type(again["n"]) is float and type(again["i"]) is int
    assert again["image"] == CALL["image"] and again["image"][1].mode == "L"
    assert again["latents"].dtype == torch.bfloat16
    assert isinstance(again["array"], np.ndarray) and np.array_equal(again["array"], CALL["array"])
    assert again["size"] == (32, 32) and again["nested"] == CALL["nested"]
    assert hash_of(again) == hash_of(call)
    data = (tmp_path / "call.safetensors").read_bytes()
    (tmp_path / "call.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(QuantempoError, match="damaged"):
        read_call(run, run.read_json("call.json"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.Generator(), "it holds a Generator"),
        (print, "it holds a builtin_function"),
        (Path("a"), "it holds a PosixPath"),
        ([1, object()], "it holds a object"),
        ([picture(0), picture(0, 8)], "several sizes"),
    ],
)
def test_what_cannot_be_kept_is_refused(value: Any, words: str) -> None:
    with pytest.raises(QuantempoError, match=words):
        kept_arguments({"x": value})


def test_prompts_and_their_embeddings_replace_each_other() -> None:
    texts, embeds = {"prompt": "a", "negative_prompt": "b"}, tiny_embeds(1)
    settings = {"guidance_scale": 2.0, "image": "i"}
    assert merged({**texts, **settings}, embeds) == {**settings, **embeds}
    assert merged({**embeds, **settings}, texts) == {**settings, **texts}
    assert merged({**texts, **settings}, {"prompt": "c"}) == {**texts, **settings, "prompt": "c"}


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The run folder of an image-to-image pipeline, and its call."""
    root, parts = tmp_path_factory.mktemp("img2img"), tiny_text().components
    StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False).save_pretrained(
        root / "model"
    )
    call = {"prompt": ["a", "b"], "image": [picture(0), picture(1)], "guidance_scale": 2.0}
    stages.quantize(root / "model", root / "run", SMALL, call=call | {"strength": np.float64(0.5)})
    return root / "run", call


def test_image_to_image_is_quantized_reopened_and_judged(traced: Any) -> None:
    run, call = traced
    again = stages.reopen(run)
    assert again.call == call | {"strength": 0.5} and not again.stale("pack")
    metrics = quality.evaluate(again, images=2, steps=4, engine="simulated")
    assert metrics["psnr_db_mean"] > 30
    with pytest.raises(QuantempoError, match="made with other settings"):
        changed = call | {"strength": 0.5, "image": [picture(0), picture(2)]}
        stages.load(run.parent / "model", run, SMALL, call=changed)


def test_settings_of_the_trace_are_those_of_a_sample(
    traced: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, call = traced
    pipe = quality.open_model(run / "packed", engine="simulated")
    given = {key: call[key] for key in ("prompt", "image")}
    how: dict[str, Any] = {"steps": 4, "batch_size": 2}
    with caplog.at_level(logging.INFO, "quantempo"):
        taken = quality.sample(pipe, tmp_path / "a", [0, 1], call=given, **how)
    said = " ".join(caplog.messages)
    assert "guidance_scale 2.0, as traced (StableDiffusionImg2ImgPipeline's own: 7.5)" in said
    whole = quality.sample(pipe, tmp_path / "b", [0, 1], call=call | {"strength": 0.5}, **how)
    assert np.array_equal(taken, whole)
    caplog.clear()
    quality.sample(quality.open_model(run.parent / "model"), tmp_path / "f", [0], call=given, **how)
    assert not caplog.messages
    other = quality.sample(pipe, tmp_path / "c", [0], call=given | {"guidance_scale": 7.5}, **how)
    assert "guidance_scale 7.5 here, but 2.0 when the model was traced" in caplog.messages
    assert not np.array_equal(other[0], whole[0])


def test_a_pipeline_in_memory_is_a_source(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny_text()
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv1.weight += 0.1
    session = stages.load(pipe, tmp_path / "run", SMALL, call={"prompt": "a"})
    with caplog.at_level(logging.INFO, "quantempo"):
        stages.finish(session)
    assert "guidance_scale 7.5, the pipeline's own: give what you will sample with" in caplog.text
    assert session.denoiser is pipe.unet
    again = stages.reopen(tmp_path / "run")
    assert again.model["sha256"] == session.model["sha256"] and not again.stale("pack")
    assert stages.quantize(pipe, tmp_path / "run", SMALL, call={"prompt": "a"}).is_dir()
    pipe.unet.to(torch.bfloat16)
    with pytest.raises(QuantempoError, match=r"is torch.bfloat16; expected torch.float32"):
        stages.quantize(pipe, tmp_path / "other", SMALL)
    with pytest.raises(QuantempoError, match="the unet is offloaded"):
        pipe.unet.to("meta")
        stages.quantize(pipe, tmp_path / "other", SMALL)
    with pytest.raises(QuantempoError, match="dtype is for folders"):
        stages.quantize(tiny_text(), tmp_path / "other", SMALL, dtype="bfloat16")
    with pytest.raises(QuantempoError, match="got a int as source"):
        stages.quantize(3, tmp_path / "other", SMALL)
    pipe = tiny_text()
    pipe.unet.conv_in.register_module("lora_A", torch.nn.Linear(2, 2))
    with pytest.raises(QuantempoError, match=r"holds a LoRA .*unload_lora_weights"):
        stages.quantize(pipe, tmp_path / "other", SMALL)
    assert not (tmp_path / "other").exists()


def test_films_and_audio_are_written_to_look_at_and_exactly(tmp_path: Path) -> None:
    parts = tiny_text().components
    parts.pop("safety_checker")
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "motion_layers_per_block": 1}
    motion = MotionAdapter(motion_norm_num_groups=8, motion_num_attention_heads=2, **sizes)
    pipe = AnimateDiffPipeline(**parts, motion_adapter=motion)
    call = {"prompt": ["a", "b"], "num_frames": 3, "height": 16, "width": 16}
    films = quality.sample(pipe, tmp_path, [4, 5], steps=1, call=call)
    assert films.shape == (2, 3, 16, 16, 3) and films.dtype == np.uint8
    names = ["4.gif", "4.npy", "5.gif", "5.npy", "settings.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    with Image.open(tmp_path / "4.gif") as film:
        assert getattr(film, "n_frames", 1) == 3
    (tmp_path / "4.npy").unlink()
    assert np.array_equal(quality.sample(pipe, tmp_path, [4, 5], steps=1, call=call), films)


class Sound(DDIMPipeline):
    """Hand out two channels of noise."""

    def __call__(self, batch_size: int, generator: Any, num_inference_steps: int, output_type: str):
        return AudioPipelineOutput(noise(batch_size, 2, 30).numpy() / 5)


def test_audio_is_written_to_listen_to_and_exactly(tmp_path: Path) -> None:
    pipe = Sound(**tiny_unconditional().components)
    pipe.unet.register_to_config(sample_rate=8000)
    made = quality.sample(pipe, tmp_path, [3], steps=1)
    assert np.array_equal(made, noise(1, 2, 30).numpy() / 5)
    with wave.open(str(tmp_path / "3.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 8000, 30)
        levels = np.frombuffer(file.readframes(30), "<i2").reshape(30, 2).T
    assert np.abs(levels / 32767 - made[0]).max() < 1 / 32767


def test_films_and_numbers_are_judged() -> None:
    films = np.zeros((2, 3, 8, 8, 3), np.uint8)
    films[:, 1] = 100
    other = films.copy()
    other[:, 2] = 10
    found = evaluate_outputs(films, other)
    assert found["psnr_db_by_frame"] == pytest.approx([100, 100, 10 * np.log10(25.5**2)])
    # The noise is in one of two steps: 100^2 + 100^2 over 10^2.
    assert found["motion_sqnr_db"] == pytest.approx(10 * np.log10(200))
    sound = noise(2, 50).numpy()
    found = evaluate_outputs(sound, sound * np.array([[1.0], [1.1]], np.float32))
    assert found["sqnr_db"] == pytest.approx([150, 20], abs=1e-4)


def test_bfloat16_is_loaded_traced_and_packed(tmp_path: Path) -> None:
    source = saved("unconditional")
    packed = stages.quantize(source, tmp_path / "run", SMALL, dtype=torch.bfloat16)
    again = stages.reopen(tmp_path / "run")
    assert again.denoiser.dtype == torch.bfloat16 and not again.stale("pack")
    assert load_pipeline(packed, "bfloat16").unet.dtype == torch.bfloat16
    with pytest.raises(QuantempoError, match="unknown dtype 'half'"):
        stages.load(source, tmp_path / "other", SMALL, dtype="half")
