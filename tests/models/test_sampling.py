"""Running pipelines from seeds: equal to diffusers, whatever the batch; clear refusals."""

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from quantempo.errors import QuantempoError
from quantempo.models.call import generators
from quantempo.models.layers import bind_inputs
from quantempo.models.sampling import SCHEDULERS, run_pipeline, swap_scheduler
from quantempo.models.unconditional import UnconditionalPipeline
from tests.tiny import tiny_dit, tiny_embeds, tiny_text, tiny_unconditional, tiny_unet

SEEDS = [3, 14, 15, 92, 65]


def first_inputs(pipe: Any, denoiser: Any, seeds: list[int], **call: Any) -> list[Tensor]:
    """Return every x_t of a run, the batches of one step joined."""
    seen: list[Tensor] = []
    handle = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0].clone()), with_kwargs=True
    )
    run_pipeline(pipe, seeds, **call)
    handle.remove()
    return seen


def test_one_generator_an_image() -> None:
    both = [torch.randn(3, generator=g) for g in generators([5, 9])]
    assert torch.equal(both[1], torch.randn(3, generator=generators([9])[0]))
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_one_seed_is_what_diffusers_makes_of_it(sampler: str) -> None:
    pipe = tiny_unconditional(sampler=sampler)
    images = run_pipeline(pipe, SEEDS[:2], steps=4, batch_size=1)
    for seed, image in zip(SEEDS, images, strict=False):
        generator = torch.Generator().manual_seed(seed)
        wanted = pipe(generator=generator, num_inference_steps=4, output_type="pil").images[0]
        assert np.array_equal(image, np.asarray(wanted))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_our_pixel_pipeline_equals_the_stock_one_bit_for_bit(sampler: str) -> None:
    stock = tiny_unconditional(sampler=sampler)
    ours = UnconditionalPipeline(stock.unet, stock.scheduler)
    ours.set_progress_bar_config(disable=True)
    for extra in ({}, {"eta": 0.7}) if sampler == "ddim" else ({},):
        images = []
        for pipe in (stock, ours):
            generator = [torch.Generator().manual_seed(seed) for seed in SEEDS]
            output = pipe(5, generator, num_inference_steps=5, output_type="pt", **extra)
            images.append(output.images)
        assert torch.equal(*images)


FAMILIES = {
    "unconditional": (tiny_unconditional, {}),
    "text": (tiny_text, tiny_embeds(5)),
    "dit": (tiny_dit, {"class_labels": [1, 2, 3, 4, 5]}),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_depends_on_its_seed_only(family: str, scheduler: str) -> None:
    """Batch sizes agree to one level: the noise is equal, only the order of float sums differs."""
    build, call = FAMILIES[family]
    pipe = swap_scheduler(build(), scheduler)
    # global random state must not matter
    torch.manual_seed(1)
    together = run_pipeline(pipe, SEEDS, steps=3, batch_size=5, **call)
    torch.manual_seed(2)
    apart = run_pipeline(pipe, SEEDS, steps=3, batch_size=2, **call)
    assert together.dtype == np.uint8
    assert together.shape == (5, 16, 16, 3)
    assert np.abs(together.astype(int) - apart.astype(int)).max() <= 1
    # and every image is another one
    assert all((together[i] != together[j]).mean() > 0.1 for i in range(5) for j in range(i))


def test_the_noise_is_equal_bit_for_bit_whatever_the_batch() -> None:
    pipe = tiny_unconditional()
    steps = {"steps": 1}
    whole = first_inputs(pipe, pipe.unet, SEEDS, batch_size=5, **steps)
    parts = first_inputs(pipe, pipe.unet, SEEDS, batch_size=2, **steps)
    assert torch.equal(torch.cat(whole), torch.cat(parts))
    start = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(s)) for s in SEEDS]
    assert torch.equal(torch.cat(whole), torch.stack(start))


def test_entries_of_images_go_round() -> None:
    pipe = tiny_dit()
    pair = run_pipeline(pipe, [7] * 4, steps=2, batch_size=3, class_labels=[1, 2])
    same = run_pipeline(pipe, [7] * 2, steps=2, batch_size=2, class_labels=1)
    assert np.array_equal(pair[0], pair[2])
    assert np.array_equal(pair[1], pair[3])
    assert np.array_equal(same[0], same[1])
    assert not np.array_equal(pair[0], pair[1])
    text = tiny_text()
    prompts = run_pipeline(text, [7, 7, 7], steps=2, batch_size=3, prompt=["a", "b"])
    single = run_pipeline(text, [7, 7], steps=2, batch_size=2, prompt="a")
    assert np.array_equal(prompts[0], prompts[2])
    assert np.abs(single.astype(int) - prompts[:1].astype(int)).max() <= 1


def test_batches_are_handed_out_as_they_come() -> None:
    seen: list[tuple[int, np.ndarray]] = []
    see = lambda first, batch: seen.append((first, batch))  # noqa: E731
    images = run_pipeline(tiny_unconditional(), SEEDS, steps=1, batch_size=2, on_batch=see)
    assert [first for first, _ in seen] == [0, 2, 4]
    assert np.array_equal(np.concatenate([batch for _, batch in seen]), images)


def test_the_pipeline_is_left_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_unconditional(sampler="ddpm")
    pipe.set_progress_bar_config(desc="mine")
    run_pipeline(pipe, [1], steps=1)
    assert pipe._progress_bar_config == {"desc": "mine"}
    assert "step" not in vars(pipe.scheduler)
    del pipe._progress_bar_config
    run_pipeline(pipe, [1], steps=1)
    assert not hasattr(pipe, "_progress_bar_config")
    # no terminal, no bar
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", SCHEDULERS)
def test_swapping_keeps_the_noise_law(name: str) -> None:
    """A law far from every class's defaults, and one that equals the old class's defaults."""
    text = tiny_text()
    plain = tiny_unconditional()
    for pipe in (text, plain):
        old = pipe.scheduler
        swapped = swap_scheduler(pipe, name)
        assert type(swapped.scheduler).__name__ == SCHEDULERS[name][0]
        assert torch.equal(swapped.scheduler.alphas_cumprod, old.alphas_cumprod)
        assert swapped.unet is pipe.unet
        assert pipe.scheduler is old
    assert type(swap_scheduler(text, name)) is type(text)
    kind = diffusers.DDIMPipeline if name == "ddim" else UnconditionalPipeline
    assert type(swap_scheduler(plain, name)) is kind


def test_a_scheduler_that_cannot_follow_the_noise_law_is_refused() -> None:
    pipe = swap_scheduler(tiny_text(), "ddim", rescale_betas_zero_snr=True)
    assert swap_scheduler(pipe, "euler").scheduler.config.rescale_betas_zero_snr
    with pytest.raises(QuantempoError, match="HeunDiscreteScheduler cannot follow"):
        swap_scheduler(pipe, "heun")


def test_settings_of_a_scheduler_can_be_given() -> None:
    pipe = swap_scheduler(tiny_unconditional(), "euler", timestep_spacing="trailing")
    pipe.scheduler.set_timesteps(10)
    assert pipe.scheduler.timesteps[0] == 999
    sde = swap_scheduler(tiny_unconditional(), "dpm++sde")
    assert sde.scheduler.config.algorithm_type == "sde-dpmsolver++"


def test_euler_input_is_scaled_to_unit_variance() -> None:
    """What the stock DDPM pipeline would get wrong: x_T has std sigma_max = 157, not 1."""
    pipe = swap_scheduler(tiny_unconditional(size=32), "euler")
    start = first_inputs(pipe, pipe.unet, SEEDS, steps=2)[0]
    # 15360 normal numbers: relative standard error of the std 0.6 %
    assert abs(float(start.std()) - 1) < 0.03


def test_learned_variance_is_cut_off_where_it_is_not_wanted() -> None:
    unet = tiny_unet()
    unet.conv_out = torch.nn.Conv2d(16, 6, 3, padding=1)
    pipe = diffusers.DDPMPipeline(unet, tiny_unconditional(sampler="ddpm").scheduler)
    for name in ("ddim", "dpm++", "euler"):
        images = run_pipeline(swap_scheduler(pipe, name), [1], steps=2)
        assert images.shape == (1, 16, 16, 3)
    learned = swap_scheduler(pipe, "ddpm", variance_type="learned_range")
    assert run_pipeline(learned, [1], steps=2).shape == (1, 16, 16, 3)


def test_half_precision_runs() -> None:
    pipe = tiny_unconditional()
    pipe.unet = pipe.unet.bfloat16()
    assert run_pipeline(pipe, [1, 2], steps=2).shape == (2, 16, 16, 3)


def wrong_scheduler() -> Any:
    pipe = tiny_unconditional(sampler="ddpm")
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def broken() -> Any:
    pipe = tiny_unconditional()
    pipe.unet.conv_out.bias.data[0] = torch.nan
    return pipe


@pytest.mark.parametrize(
    ("build", "call", "words"),
    [
        (tiny_text, {}, ("StableDiffusionPipeline needs a prompt: pass --prompts FILE",)),
        (tiny_dit, {}, ("DiTPipeline needs class_labels: pass --class-labels",)),
        (tiny_dit, {"class_labels": []}, ("empty", "at least one")),
        (tiny_unconditional, {"etta": 0.5}, ("'etta'", "did you mean 'eta'")),
        (tiny_unconditional, {"prompt": "a cat"}, ("DDIMPipeline takes no argument 'prompt'",)),
        (wrong_scheduler, {}, ("EulerDiscreteScheduler", "swap_scheduler")),
        (broken, {}, ("NaN", "[3, 14]")),
    ],
)
def test_mistakes_are_explained(build: Any, call: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(QuantempoError) as error:
        run_pipeline(build(), SEEDS[:2], steps=2, **call)
    assert all(word in str(error.value) for word in words)


def test_wrong_schedulers_are_explained() -> None:
    with pytest.raises(QuantempoError, match="did you mean 'ddim'"):
        swap_scheduler(tiny_unconditional(), "dim")
    with pytest.raises(QuantempoError, match="did you mean 'timestep_spacing'"):
        swap_scheduler(tiny_unconditional(), "ddim", timestep_spacings="leading")
    flow = tiny_text()
    flow.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(QuantempoError, match="cannot be replaced by DDIMScheduler"):
        swap_scheduler(flow, "ddim")
    with pytest.raises(QuantempoError, match="no seeds"):
        run_pipeline(tiny_unconditional(), [], steps=2)


def test_arguments_of_a_denoiser_are_named_and_the_time_is_kept() -> None:
    unet, x = tiny_unet(), torch.zeros(2, 3, 16, 16)
    for t, kept in (
        (7, torch.tensor([7, 7])),
        (torch.tensor(7, dtype=torch.int32), torch.tensor([7, 7])),
        (torch.tensor([7]), torch.tensor([7, 7])),
        (torch.tensor([7, 9]), torch.tensor([7, 9])),
        (7.25, torch.tensor([7.25, 7.25])),
        (torch.tensor(7.25, dtype=torch.float64), torch.tensor([7.25, 7.25]).double()),
    ):
        calls = ((x, t), {}), ((x,), {"timestep": t}), ((), {"sample": x, "timestep": t})
        for args, kwargs in calls:
            inputs = bind_inputs(unet, args, {**kwargs, "return_dict": False})
            assert inputs.sample is x
            assert inputs.timestep.dtype == kept.dtype
            assert torch.equal(inputs.timestep, kept)
            assert inputs.conditioning == {}
            assert (inputs.sample_name, inputs.timestep_name) == ("sample", "timestep")
    with pytest.raises(QuantempoError, match=r"shape \(3,\)"):
        bind_inputs(unet, (x, torch.zeros(3)), {})
    with pytest.raises(QuantempoError, match="a time"):
        bind_inputs(torch.nn.Linear(2, 2), (x,), {})
