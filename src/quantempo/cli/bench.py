"""quantempo bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quantempo.cli.common import Device, Json, show
from quantempo.errors import QuantempoError

__all__ = ["bench"]


def bench(
    run: Annotated[Path | None, typer.Option("--run", help="Run folder that is packed.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size; repeat for more.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Engine; repeat for more. All installed by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved samples of each.")] = 9,
    compiled: Annotated[bool, typer.Option(help="Include torch.compile baselines (CPU).")] = True,
    device: Device = "cpu",
    model: Annotated[
        str | None,
        typer.Option(help="GPU: sd15, ddpm35m or a diffusers folder, quantized without data."),
    ] = None,
    candidate: Annotated[
        list[str] | None, typer.Option(help="GPU: pattern like 'ours/*'; repeat for more.")
    ] = None,
    ops: Annotated[bool, typer.Option("--ops", help="GPU: time the kernels one by one.")] = False,
    steps: Annotated[
        int | None,
        typer.Option("--images-per-second", min=1, help="GPU: also run DDIM of so many steps."),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=1, help="GPU: seconds a candidate may take to compile.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="GPU: write the results to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Time the denoiser: on a CPU every engine, on a GPU our kernels, against the best float forms.

    Example: quantempo bench --run runs/cifar --batch 8 --batch 16
    """
    if device == "cpu":
        if model or candidate or ops or steps or budget or out:
            raise QuantempoError(
                "--model, --candidate, --ops, --images-per-second, --budget and --out time a GPU; "
                "add --device cuda"
            )
        _on_cpu(run, batch or [8, 16], engine, rounds, compiled, as_json)
        return
    settings: dict[str, Any] = {"candidates": candidate or (), "rounds": rounds, "budget": budget}
    _on_gpu(run, device, engine, {**settings, "steps": steps}, as_json, batches=batch, model=model,
            ops=ops, out=out)  # fmt: skip


def _on_cpu(run: Path | None, batches: list[int], engines: Any, rounds: int, *how: bool) -> None:
    if run is None:
        raise QuantempoError("nothing to time: give --run RUN")
    from quantempo.bench.run import bench_run
    from quantempo.pipeline import stages as pipeline

    compiled, as_json = how
    results = bench_run(
        pipeline.reopen(run), batches=batches, engines=engines, rounds=rounds, compiled=compiled
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


def _on_gpu(
    run: Path | None,
    device: str,
    engines: list[str] | None,
    settings: dict[str, Any],
    as_json: bool,
    **what: Any,
) -> None:
    from quantempo.bench.cuda import bench_cuda, check_request, text_table
    from quantempo.engines.select import ENGINES
    from quantempo.models.load import check_device

    check_request(run is not None, what["model"], what["ops"], settings["candidates"])
    if engines is not None and len(engines) > 1:
        raise QuantempoError(f"got {len(engines)} engines; on a GPU bench times one, give one")
    for name in engines or ():
        ENGINES.get(name)
    check_device(device)
    session = None
    if run is not None:
        from quantempo.pipeline.session import reopen

        session = reopen(run, device=device)
    if engines:
        settings["engine"] = engines[0]
    results = bench_cuda(session, device=device, **what, **settings)
    if as_json:
        show(results, as_json)
        return
    for line in text_table(results):
        typer.echo(line)
