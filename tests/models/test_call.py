"""One call of a pipeline: entries of images, whole arguments, outputs, errors in a sentence."""

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AudioPipelineOutput,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.models.call import call_pipeline, images_a_call, kind_of
from quantempo.models.sampling import run_pipeline
from tests.tiny import (
    noise,
    tiny_dit,
    tiny_embeds,
    tiny_flux,
    tiny_text,
    tiny_unconditional,
    tiny_unet,
)

WORDS = {"prompt": ["a", "b"]}
PICTURES = [Image.new("RGB", (16, 16), (level, 0, 90)) for level in (0, 250)]


def like(kind: Any) -> Any:
    """Make a pipeline of another class from the parts of the tiny one."""
    return kind(**tiny_text().components, requires_safety_checker=False)


class Spy(DDIMPipeline):
    """Note the arguments of its calls."""

    calls: list[dict[str, Any]]

    def __call__(  # type: ignore[override]
        self, prompt: Any = None, image: Any = None, timesteps: Any = None, sigmas: Any = None,
        latents: Any = None, prompt_embeds_2: Any = None, height: Any = 7, video: Any = None,
        original_size: tuple[int, int] = (0, 0), class_labels: Any = None, generator: Any = None,
        num_inference_steps: Any = None, output_type: str = "pil", ip_adapter_image: Any = None,
        num_images_per_prompt: int = 1,
    ) -> Any:  # fmt: skip
        self.calls.append({key: value for key, value in locals().items() if key != "self"})
        return diffusers.ImagePipelineOutput(images=np.zeros((len(generator), 2, 2, 3)))


@pytest.fixture
def spy() -> Spy:
    pipe = Spy(**tiny_unconditional().components)
    pipe.calls = []
    return pipe


def test_entries_go_with_their_image_and_all_else_is_whole(spy: Spy) -> None:
    rows = noise(3, 4)
    call: dict[str, Any] = {
        "prompt": ["a", "b"],
        "image": PICTURES,
        "latents": rows,
        "prompt_embeds_2": list(rows),
        "class_labels": np.array([5, 6]),
        "timesteps": [9, 7, 4, 1],
        "sigmas": rows,
        "height": None,
        "original_size": [1, 2],
    }
    run_pipeline(spy, [1, 2, 3, 4, 5], steps=1, batch_size=3, **call)
    first, second = spy.calls
    assert first["prompt"] == ["a", "b", "a"] and second["prompt"] == ["b", "a"]
    assert second["image"] == [PICTURES[1], PICTURES[0]] and second["class_labels"] == [6, 5]
    assert torch.equal(second["latents"], rows[:2])
    assert all(map(torch.equal, second["prompt_embeds_2"], rows[:2]))
    for made in spy.calls:
        assert made["timesteps"] == [9, 7, 4, 1] and made["sigmas"] is rows
        assert made["height"] is None and made["original_size"] == (1, 2)
    run_pipeline(spy, [1, 2], steps=1, places=[4, 1], **call)
    assert spy.calls[-1]["prompt"] == ["a", "b"]
    assert torch.equal(spy.calls[-1]["latents"], rows[[1, 1]])


@pytest.mark.parametrize(
    ("given", "one", "two"),
    [
        ({"latents": 0.5}, 0.5, 0.5),
        ({"image": PICTURES[0]}, PICTURES[0], [PICTURES[0]] * 2),
        ({"image": noise(3, 8, 8)}, noise(3, 8, 8), [noise(3, 8, 8)] * 2),
        ({"image": noise(2, 3, 8, 8)}, noise(2, 3, 8, 8)[:1], noise(2, 3, 8, 8)),
        ({"video": PICTURES}, PICTURES, [PICTURES] * 2),
        ({"video": [PICTURES, PICTURES[::-1]]}, PICTURES, [PICTURES, PICTURES[::-1]]),
    ],
)
def test_one_picture_is_for_all_and_several_are_one_each(spy, given, one, two):
    for seeds, wanted in (([1], one), ([1, 2], two)):
        run_pipeline(spy, seeds, steps=1, prompt="a", **given)
        found = spy.calls[-1][next(iter(given))]
        assert str(found) == str(wanted) and type(found) is type(wanted)


def test_the_table_knows_the_arguments_of_diffusers() -> None:
    kinds = {
        "text": "prompt prompt_2 prompt_3 negative_prompt negative_prompt_2 class_labels",
        "rows": "latents prompt_embeds prompt_embeds_2 negative_prompt_embeds pooled_prompt_embeds "
        "negative_pooled_prompt_embeds prompt_attention_mask negative_prompt_attention_mask_2 "
        "prompt_embeds_mask image_embeds negative_image_embeds image_embeddings image_latents "
        "masked_image_latents prompt_embeds_qwen audio_latents prompt_embeds_pooled",
        "image": "image mask_image control_image ip_adapter_image control_mask last_image hint",
        "film": "video control_video mask_video pose_video",
    }
    for kind, names in kinds.items():
        assert {kind_of(name) for name in names.split()} == {kind}
    whole = "timesteps sigmas guidance_scale height skip_guidance_layers target_size eta "
    whole += "text_encoder_out_layers prompt_cu_seqlens prompt_strength control_guidance_start "
    whole += "prompt_embeds_llama3 input_images_mask reference_images gligen_phrases"
    assert {kind_of(name) for name in whole.split()} == {None}


def test_a_list_that_means_something_else_is_given_one_image_at_a_time(spy: Spy) -> None:
    assert images_a_call(spy, {"image": PICTURES, "prompt": "a"}, 16) == 16
    assert images_a_call(spy, {"ip_adapter_image": PICTURES}, 16) == 1
    kind: Any = diffusers.Flux2KleinPipeline
    assert images_a_call(kind.__new__(kind), {"image": PICTURES}, 16) == 1
    # Of a film the first frame; these encode picture i for film i.
    for name, most in (("Wan", 1), ("LTX", 16), ("CogVideoX", 16), ("HunyuanVideo", 16)):
        kind = getattr(diffusers, f"{name}ImageToVideoPipeline")
        film = kind.__new__(kind)
        film.video_processor = None
        assert images_a_call(film, {"image": PICTURES}, 16) == most
    how: dict[str, Any] = {"steps": 1, "prompt": "a", "ip_adapter_image": PICTURES}
    with pytest.raises(QuantempoError, match="one image at a time"):
        call_pipeline(spy, [1, 2], **how)
    call_pipeline(spy, [1, 2], places=[1, 1], **how)
    made = spy.calls.pop()
    assert (made["num_images_per_prompt"], made["prompt"]) == (2, ["a"])
    assert made["ip_adapter_image"] == PICTURES[1] and len(made["generator"]) == 2
    run_pipeline(spy, [1, 2, 3], steps=1, prompt="a", ip_adapter_image=PICTURES)
    assert [c["ip_adapter_image"] for c in spy.calls] == [PICTURES[0], PICTURES[1], PICTURES[0]]


def test_pipelines_that_give_no_latents_are_asked_for_what_they_can() -> None:
    pipe = ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler())
    assert call_pipeline(pipe, [1, 2], steps=2, output_type="latent").shape == (2, 16, 16, 3)
    assert call_pipeline(tiny_text(), [1], steps=1, output_type="latent", prompt="a").shape[1] == 4


def test_a_scheduler_without_a_step_and_a_pipeline_of_pipelines_run() -> None:
    pipe = ScoreSdeVePipeline(tiny_unet(), ScoreSdeVeScheduler())
    assert run_pipeline(pipe, [1, 2], steps=2).shape == (2, 16, 16, 3)
    outer, inner = tiny_unconditional(), tiny_unconditional()
    inner.set_progress_bar_config(desc="mine")
    outer.prior_pipe = inner
    outer.set_progress_bar_config = inner.set_progress_bar_config
    del outer._progress_bar_config
    run_pipeline(outer, [1], steps=1)
    assert inner._progress_bar_config == {"desc": "mine"}


def test_other_outputs_are_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = noise(2, 50).numpy()
    monkeypatch.setattr(Spy, "calls", [], raising=False)
    monkeypatch.setattr(diffusers, "ImagePipelineOutput", lambda images: AudioPipelineOutput(sound))
    made = run_pipeline(Spy(**tiny_unconditional().components), [1, 2], steps=1, prompt="a")
    assert made.dtype == np.float32 and np.array_equal(made, sound)


CASES: list[tuple[Any, dict[str, Any], tuple[str, ...]]] = [
    (StableDiffusionImg2ImgPipeline, WORDS, ("give --set image=FILE", "call={'image': ...}")),
    (StableDiffusionInpaintPipeline, WORDS, ("InpaintPipeline failed", "give --set image=FILE")),
    (tiny_text, {**WORDS, "timesteps": [9, 8]}, ("ValueError", "check prompt, timesteps")),
    (tiny_text, {**WORDS, **tiny_embeds(2)}, ("Cannot forward both", "prompt_embeds")),
    (tiny_unconditional, {"eta": "a"}, ("TypeError", "eta")),
    (tiny_unconditional, {"use_clipped_model_output": noise(3)}, ("RuntimeError", "use_clipped")),
    (tiny_dit, {"class_labels": "a"}, ("class label a", "0 to 999")),
    (tiny_text, {"prompt": 3}, ("prompt", "ValueError")),
    (tiny_text, {**WORDS, "height": "a", "width": 16}, ("height", "TypeError")),
    (tiny_text, {**WORDS, "height": 16}, ("ignores height without width",)),
    (tiny_text, {**WORDS, "num_images_per_prompt": 2}, ("ask for more images",)),
    (tiny_text, {**WORDS, "num_inference_steps": 2}, ("give the number of steps",)),
    (tiny_text, {**WORDS, "generator": torch.Generator()}, ("from seeds",)),
    (tiny_text, {**WORDS, "hight": 2}, ("did you mean 'height'",)),
    (tiny_text, {"prompt": None}, ("needs a prompt", "--prompts FILE")),
    (tiny_text, {**WORDS, "latents": noise(0, 4, 8, 8)}, ("empty 'latents'",)),
]


@pytest.mark.parametrize(("build", "call", "words"), CASES)
def test_what_a_pipeline_cannot_do_is_one_sentence(build, call, words):
    pipe = like(build) if inspect.isclass(build) else build()
    with pytest.raises(QuantempoError) as error:
        call_pipeline(pipe, [1, 2], steps=4, **call)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_bug_below_the_pipeline_stays_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_text()

    def bug(*_: object) -> None:
        raise TypeError("a bug")

    namespace = {"__name__": "quantempo.engines.some", "bug": bug}
    exec("def forward(*args, **kwargs): bug()", namespace)
    monkeypatch.setattr(pipe.unet, "forward", namespace["forward"])
    with pytest.raises(TypeError, match="a bug"):
        call_pipeline(pipe, [1], steps=1, prompt="a")


def test_tensors_that_are_given_go_where_the_pipeline_runs(monkeypatch) -> None:
    (pipe, call), seen = tiny_flux(7), []

    def encode(**given: Any) -> None:
        seen.extend(given[name].device.type for name in call if "embeds" in name)
        raise RuntimeError

    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("meta"))
    monkeypatch.setattr(pipe, "encode_prompt", encode)
    with pytest.raises(QuantempoError, match="failed with the arguments"):
        call_pipeline(pipe, [0], steps=1, **call)
    assert seen == ["meta", "meta"]
