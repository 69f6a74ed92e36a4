"""A packed folder in a new process that knows nothing but `import quantempo`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quantempo.engines.select import ENGINES, attach
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from tests.packed import packed

SEEDS = (3, 4)
SCRIPT = """
import sys
import quantempo
assert not [m for m in sys.modules if m.split(".")[0] in ("diffusers", "torch")]
from diffusers import DiffusionPipeline
import numpy as np, torch
folder, out, *engines = sys.argv[1:]
torch.set_num_threads(1)
images = {}
for engine in engines:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if engine != "auto":
        quantempo.attach(pipe.unet, engine)
    noise = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    images[engine] = pipe(batch_size=2, generator=noise, num_inference_steps=3,
                          output_type="np").images
np.savez(out, **images)
assert not [m for m in sys.modules if m.startswith("tests")]
"""


def engines() -> list[str]:
    return ["auto", *(name for name in ENGINES.names() if ENGINES.get(name).missing() is None)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Samples of every engine from one new process."""
    out = tmp_path_factory.mktemp("fresh") / "images.npz"
    source = Path(__file__).resolve().parents[2] / "src"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, packed("unconditional").folder, out, *engines()],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as file:
        return dict(file)


@pytest.mark.parametrize("engine", engines())
def test_samples_are_bit_identical(engine: str, images: dict[str, np.ndarray]) -> None:
    pipe = load_pipeline(packed("unconditional").folder)
    if engine != "auto":
        attach(denoiser_of(pipe)[1], engine)
    noise = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    here = pipe(batch_size=2, generator=noise, num_inference_steps=3, output_type="np").images
    assert images[engine].shape == (2, 16, 16, 3)
    assert np.array_equal(images[engine], here)
    assert here.std() > 0.01


def test_engines_are_not_the_same_program(images: dict[str, np.ndarray]) -> None:
    # Guards the test above: were every engine the same code, it would prove little.
    assert len({image.tobytes() for image in images.values()}) > 1
