"""quantempo sample and evaluate: images of a model, and how near they are to the float ones."""

from pathlib import Path
from typing import Any

import typer

from quantempo.cli import common as use

__all__ = ["evaluate", "sample"]

_SHOWN = (
    *("psnr_db_mean", "psnr_db_p05", "motion_sqnr_db", "sqnr_db_mean", "sqnr_db_p05", "ssim_mean"),
    *("fed_lite0", "is_lite0_float", "is_lite0_int8"),
    *("fed_lite0_reference_float", "fed_lite0_reference_int8", "engine", "int8_mac_share"),
    *("int8_mac_share_with_attention", "bytes_float32", "bytes_packed"),
)


@use.with_call
@use.with_loading
def sample(
    model: Path = typer.Argument(..., help="Float or packed diffusers folder."),
    out: Path = typer.Option(..., help="Folder for the files, named by their seed."),
    images: int = typer.Option(16, min=1, max=use.MOST, help="Number of images."),
    seed: int = typer.Option(0, help="Seed of the first; the next count up."),
    steps: int = typer.Option(50, min=1, max=use.MOST, help="Sampling steps."),
    batch_size: use.BatchSize = 16,
    engine: use.EngineName = "auto",
    packed: use.Packed = "keep",
    lora: list[str] = typer.Option([], help="FILE:0.8, beside the layers; can be repeated."),
    scheduler: use.Scheduler = None,
    device: use.Device = "cpu",
    memory: use.Memory = None,
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
    from quantempo.models.layers import denoisers_of
    from quantempo.models.load import model_digest, named_lora
    from quantempo.pipeline import quality
    from quantempo.pipeline.samples import engine_of

    loading |= {"engine": engine, "packed": packed, "scheduler": scheduler, "device": device}
    loading |= {"memory": memory, "lora": lora}
    pipe = quality.open_model(model, **loading)
    digests = [*map(model_digest, denoisers_of(pipe).values()), *map(str, map(named_lora, lora))]
    quality.sample(
        pipe, out, range(seed, seed + images), steps=steps, batch_size=batch_size, call=call,
        identity=" ".join(digests), force=force,
    )  # fmt: skip
    made = {"images": images, "folder": str(out), "engine": engine_of(pipe)}
    use.show(made, as_json)


@use.with_call
def evaluate(
    run: use.Run,
    images: int = typer.Option(64, min=2, max=use.MOST, help="Pairs of images."),
    steps: int = typer.Option(50, min=1, max=use.MOST, help="Sampling steps."),
    seed: int = typer.Option(0, help="Seed of the first pair."),
    batch_size: use.BatchSize = 16,
    engine: use.EngineName = "auto",
    packed: use.Packed = "keep",
    device: use.Device = "cpu",
    data: Path | None = typer.Option(
        None, help="Folder of real images to score both sets against."
    ),
    inception: Path | None = typer.Option(
        None, help="Inception weights, for FID, IS, sFID and KID."
    ),
    force: use.Force = False,
    as_json: use.Json = False,
    *,
    call: dict[str, Any],
) -> None:
    """Sample float and int8 images from the same seeds and score them.

    Arguments that are not given are those the model was traced with.

    Example: quantempo evaluate --run runs/cifar --images 64
    """
    from quantempo.pipeline import quality
    from quantempo.pipeline import stages as pipeline

    session = pipeline.reopen(run, force=force)
    metrics = quality.evaluate(
        session, images=images, steps=steps, seed=seed, batch_size=batch_size, engine=engine,
        packed=packed, device=device, data=data, inception=inception, call=call,
    )  # fmt: skip
    use.show(metrics if as_json else {k: metrics[k] for k in _SHOWN if k in metrics}, as_json)
