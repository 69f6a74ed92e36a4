"""Every family of diffusers: what docs/pipelines.md says works goes on working."""

from contextlib import nullcontext

import pytest

from tests.pipelines import page
from tests.pipelines.runner import FAMILIES, run

# Worse than this on a random network is an error, not rounding: the worst of the page has 20 dB.
FLOOR_DB = 15.0
# On the page alone, for time: they differ from others in schedule or call only, or take long.
PAGE_ONLY = {
    *("DDIM", "DDPM, learned variance", "TCD", "Stable Diffusion 1, no guidance"),
    *("Stable Diffusion 2, v-prediction", "SDXL, image to image", "SDXL, EDM schedule"),
    *("Consistency models, classes", "PixArt alpha", "Stable Diffusion, x4 upscale"),
    *("Stable Diffusion, GLIGEN network", "Text to video (UNet3D)", "Stable Video Diffusion"),
    *("ControlNet, SDXL", "SDXL refiner", "AnimateDiff", "Kandinsky 2.2, decoder"),
    *("Latent diffusion (VQ)", "Latent diffusion, text", "InstructPix2Pix", "MusicLDM"),
    *("Flux, image to image", "Flux dev (guidance embedded)", "Stable Diffusion 3"),
    *("Qwen-Image", "Wan 2.1, text to video"),
}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PAGE_ONLY])
def test_a_family_does_what_the_page_says(name: str) -> None:
    # A graph of OpenVINO is half the time of a family: the new process compiles one.
    row, said = run(name, engine="simulated"), page.read()[name]
    found = page.line(row) if row.get("clear", True) else {"result": "fails"}
    assert found["result"] == said["result"], row
    # Lines that name no engine are older than the recipe of today.
    old = said["sqnr"][-1:].isdigit()
    for value, least in zip(page.decibels(found), page.decibels(said), strict=True):
        assert value > (FLOOR_DB if old else max(FLOOR_DB, least - 1)), row
    assert old or found["share"] == said["share"], row


def test_a_family_that_got_worse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    said = page.read()["Wan 2.2, two experts"]
    row = {"family": "Wan 2.2, two experts", "share": float(said["share"][:-1]) / 100, "float": {}}
    row |= {"engine": "openvino", "sqnr_db": dict(enumerate(page.decibels(said)))}
    changes = ({}, {"share": 0.1}, {"sqnr_db": {0: 26.0, 1: 8.0}}, {"error": "no", "clear": True})
    for number, change in enumerate(changes):
        made = row | change | {"stage": ""}
        monkeypatch.setattr(f"{__name__}.run", lambda *_, made=made, **how: made)
        with pytest.raises(AssertionError) if number else nullcontext():
            test_a_family_does_what_the_page_says("Wan 2.2, two experts")


def test_the_page_has_every_family() -> None:
    assert list(page.read()) == list(FAMILIES)
