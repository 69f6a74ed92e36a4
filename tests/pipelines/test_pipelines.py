"""Every family of diffusers: what docs/pipelines.md says works goes on working."""

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
    assert said["result"] != "works" or "error" not in row, row
    assert said["result"].startswith("fails") or row.get("clear", True), row
    assert all(value > FLOOR_DB for value in row.get("sqnr_db", {}).values()), row


def test_the_page_has_every_family() -> None:
    assert list(page.read()) == list(FAMILIES)
