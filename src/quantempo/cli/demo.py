"""quantempo demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quantempo.cli.common import Force, Json, show

__all__ = ["demo"]


def demo(
    run: Annotated[Path, typer.Option("--run", help="Run folder.")] = Path("runs/demo"),
    images: Annotated[int, typer.Option(min=2, help="Pairs of images.")] = 64,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Do the whole main line on the bundled CIFAR-10 model; no network, a few minutes.

    Example: quantempo demo
    """
    from quantempo.cli.run_demo import run_demo

    metrics = run_demo(run, images=images, force=force)
    keys = (
        "psnr_db_mean",
        "psnr_db_p05",
        "ssim_mean",
        "fed_lite0",
        "engine",
        "int8_mac_share",
        "int8_mac_share_with_attention",
        "bytes_float32",
        "bytes_packed",
        "ms_per_forward",
        "speedup_vs_best_fp32",
        "speedup_vs_best_bf16",
        "calibration_seconds",
        "total_seconds",
        "peak_rss_bytes",
    )
    shown = {key: metrics[key] for key in keys if key in metrics}
    show(metrics if as_json else {**shown, "report": str(run / "report.html")}, as_json)
