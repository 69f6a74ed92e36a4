"""quantempo sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli import common as use

__all__ = ["sample"]


@use.with_call
@use.with_loading
def sample(
    model: Annotated[Path, typer.Argument(help="Float or packed diffusers folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the files, named by their seed.")],
    images: Annotated[int, typer.Option(min=1, max=use.MOST, help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first; the next count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=use.MOST, help="Sampling steps.")] = 50,
    batch_size: use.BatchSize = 16,
    engine: use.EngineName = "auto",
    scheduler: use.Scheduler = None,
    device: use.Device = "cpu",
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
    loading: dict[str, Any],
) -> None:
    """Make images from seeds; image i depends on its seed only.

    Films are written as GIF, audio as WAV, and their exact values beside them as NPY. Arguments
    that are not given are those the model was traced with.

    Example: quantempo sample runs/cifar/packed --out images --images 16
    """
    from quantempo.engines.select import attached
    from quantempo.models.layers import denoiser_of
    from quantempo.models.load import model_digest
    from quantempo.pipeline import quality

    pipe = quality.open_model(model, engine=engine, scheduler=scheduler, device=device, **loading)
    denoiser = denoiser_of(pipe)[1]
    quality.sample(
        pipe, out, range(seed, seed + images), steps=steps, batch_size=batch_size, call=call,
        identity=model_digest(denoiser), force=force,
    )  # fmt: skip
    made = {"images": images, "folder": str(out), "engine": attached(denoiser) or "float"}
    use.show(made, as_json)
