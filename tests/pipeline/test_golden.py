"""Frozen scales of the bundled model: tuned constants, grids and defaults that nothing else pins.

`python -m tests.pipeline.test_golden` writes them anew; say in the commit which moved, and why.
"""

import json
from pathlib import Path

import torch

from quantempo.calibration.dataset import MemorySet
from quantempo.cli.run_demo import DEMO_MODEL
from quantempo.models.load import load_pipeline
from quantempo.pipeline import quantize as core
from quantempo.recipe import Recipe

FROZEN = Path(__file__).parents[1] / "data" / "golden_scales.json"


def found() -> dict[str, list[float]]:
    """Return time buckets and, for each layer, activation scales, zero points, mean weight scale.

    The recipe is the default one. Inputs have the noise levels of the schedule at 16 times:
    x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps with x_0 of 8 x 8 flat blocks.
    """
    denoiser = load_pipeline(DEMO_MODEL).unet
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(16) * 62 + 31
    abar = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)[t].view(-1, 1, 1, 1)
    flat = torch.rand((16, 3, 4, 4), generator=generator) * 2 - 1
    flat = flat.repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.randn(flat.shape, generator=generator)
    data = MemorySet(abar.sqrt() * flat + (1 - abar).sqrt() * noise, t, num_train_timesteps=1000)
    recipe = Recipe()
    plans = core.plan(denoiser, recipe)
    scales = core.search(denoiser, core.calibrate(denoiser, data, plans, recipe), plans, recipe)
    table = {"edges": scales["bucket_of"].diff().nonzero().flatten().tolist()}
    for key, value in scales.items():
        if key.endswith("act_scale"):
            name = key.removesuffix(".act_scale")
            mean = float(scales[f"{name}.weight_scale"].double().mean())
            zero = scales[f"{name}.act_zero_point"].tolist()
            table[name] = [float(f"{x:.6g}") for x in (*value.flatten().tolist(), *zero, mean)]
    return table


def test_scales_of_the_bundled_model_are_the_frozen_ones() -> None:
    frozen, now = json.loads(FROZEN.read_text()), found()
    assert now.keys() == frozen.keys() and now["edges"] == frozen["edges"]
    # 1e-4: float32 sums in another order. A few argmins may be near ties on another CPU: 3 of 100.
    moved = [
        name
        for name, row in frozen.items()
        if len(row) != len(now[name])
        or any(abs(a - b) > 1e-4 * abs(b) for a, b in zip(now[name], row, strict=True))
    ]
    assert len(moved) <= 0.03 * len(frozen), moved


if __name__ == "__main__":
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found().items()]
    FROZEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
