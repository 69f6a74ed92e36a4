"""quantempo bench (layer L6)."""

from __future__ import annotations

from typing import Annotated

import typer

from quantempo.cli.common import Json, Run, show

__all__ = ["bench"]


def bench(
    run: Run,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeat for more.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine; repeat for more. All installed by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved samples of each.")] = 9,
    compiled: Annotated[bool, typer.Option(help="Include torch.compile baselines.")] = True,
    as_json: Json = False,
) -> None:
    """Time the denoiser: every engine against eager, channels_last and compiled float.

    Example: quantempo bench --run runs/cifar --batch 8 --batch 16
    """
    from quantempo import pipeline
    from quantempo.speed import bench_run

    results = bench_run(
        pipeline.reopen(run),
        batches=batch or [8, 16],
        engines=engine,
        rounds=rounds,
        compiled=compiled,
    )
    if as_json:
        show(results, as_json)
        return
    for size, row in results["batches"].items():
        typer.echo(f"\nbatch {size}: median ms per forward, {rounds} interleaved rounds")
        for name, value in sorted(row["ms_per_forward"].items(), key=lambda item: item[1]):
            typer.echo(f"  {name:<28} {value:10.2f}")
        for key in ("speedup_vs_best_fp32", "speedup_vs_best_bf16"):
            typer.echo(f"  {key} of {row['engine']}: {row[key]}")
