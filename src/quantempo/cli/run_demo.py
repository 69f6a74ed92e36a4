"""The whole main line on the bundled model, every number it claims measured on the spot."""

import resource
import sys
import time
from importlib.resources import files
from pathlib import Path

from quantempo.bench.run import bench
from quantempo.errors import log
from quantempo.pipeline import quality
from quantempo.pipeline import stages as pipeline
from quantempo.report import render

__all__ = ["DEMO_MODEL", "run_demo"]

DEMO_MODEL = Path(str(files("quantempo"))) / "data" / "ddpm-cifar10-9m"


def run_demo(run: str | Path = "runs/demo", *, images: int = 64, force: bool = False) -> dict:
    """Quantize, sample (DDIM), score, time and report the bundled model; return the metrics."""
    start = time.perf_counter()
    session = pipeline.load(DEMO_MODEL, run, "w8a8", force=force)
    pipeline.finish(session)
    quality.evaluate(session, images=images)
    timed = time.perf_counter()
    bench(session, batches=[8], rounds=7)
    log.info("bench      %8.1f s     %s", time.perf_counter() - timed, session.run / "bench.json")
    metrics = session.run.read_json("metrics.json")
    metrics["total_seconds"] = round(time.perf_counter() - start, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    metrics["peak_rss_bytes"] = peak if sys.platform == "darwin" else peak * 1024
    session.run.write_json("metrics.json", metrics)
    render(session.run.path)
    return metrics
