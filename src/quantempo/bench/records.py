"""What was timed on a GPU, as one flat record for files and as a table for people."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantempo.run_folder import atomic_path

__all__ = ["results_of", "text_table", "write_results"]


def results_of(*found: dict[str, Any]) -> dict[str, Any]:
    """Return one record of what `bench_cuda` (or its parts) found, for `docs/gpu/results.json`.

    Returns:
        {"speedup_vs_best_bf16": {"MODEL_bBATCH": ratio, "OPERATOR": ratio}, "rows": one flat
        dictionary for each candidate, kernel and limit, with a "kind", "machine"}.
    """
    record: dict[str, Any] = {"speedup_vs_best_bf16": {}, "rows": []}
    for results in found:
        if "machine" in results:
            record["machine"] = results["machine"]
        for model in results.get("models", ()):
            for batch, row in model["batches"].items():
                key = f"{model['model']}_b{batch}"
                record["speedup_vs_best_bf16"][key] = row["speedup_vs_best_bf16"]
                record["rows"] += _model_rows(model, int(batch), row)
        kernels = results.get("ops")
        if kernels:
            record["rows"].append({"kind": "limits", **kernels["limits"]})
            record["rows"] += [{"kind": "op", **row} for row in kernels["rows"]]
            record["speedup_vs_best_bf16"] |= _slowest(kernels["rows"])
    return record


def _slowest(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the smaller speed-up over bfloat16 of the first two shapes of each product.

    None where one of the two was not timed: another shape does not stand in for it.
    """
    found: dict[str, list[float | None]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row.get("speedup_vs_bf16"))
    least: dict[str, float | None] = {}
    for op, ratios in found.items():
        if any(ratio is not None for ratio in ratios):
            first = [ratio for ratio in ratios[:2] if ratio is not None]
            least[op] = min(first) if len(first) == len(ratios[:2]) else None
    return least


def _model_rows(model: dict[str, Any], batch: int, row: dict[str, Any]) -> list[dict[str, Any]]:
    common = {"model": model["model"], "batch": batch}
    columns = ("ms_per_forward", "ms_min", "sqnr_db", "prepare_seconds", "peak_bytes")
    rows: list[dict[str, Any]] = [
        {"kind": "forward", **common, "candidate": name, **{c: row[c][name] for c in columns}}
        for name in row["ms_per_forward"]
    ]
    rows += [
        {"kind": "forward", **common, "candidate": name, "failed": reason}
        for name, reason in row["failed"].items()
    ]
    for speed in row.get("images_per_second", {}).values():
        rows.append({"kind": "images_per_second", **common, **speed})
    return rows


def write_results(path: str | Path, results: dict[str, Any]) -> None:
    """Write the record of some results, or a record itself, as JSON; whole or not at all."""
    record = results if "rows" in results else results_of(results)
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def text_table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table for people, the fastest candidate first."""
    for model in results.get("models", ()):
        for batch, row in model["batches"].items():
            yield ""
            yield f"{model['model']}, batch {batch}: median ms a forward, dB against float32, MB"
            for name, ms in sorted(row["ms_per_forward"].items(), key=lambda item: item[1]):
                db, peak = row["sqnr_db"][name], row["peak_bytes"][name] / 1e6
                quality = "exact" if db is None else f"{db:.1f}"
                seconds = row["prepare_seconds"][name]
                yield f"  {name:<26} {ms:10.3f} {quality:>7} {peak:9.0f}   ready in {seconds:.0f} s"
            for name, reason in row["failed"].items():
                yield f"  {name:<26} not timed: {reason}"
            for speed in row.get("images_per_second", {}).values():
                measured = speed.get("measured", speed.get("failed"))
                yield (
                    f"  DDIM-{speed['steps']} with {speed['candidate']}: {measured} images a "
                    f"second ({speed['from_forwards']} by its forwards alone)"
                )
            yield f"  speedup_vs_best_bf16: {row['speedup_vs_best_bf16']}"
    if "ops" in results:
        yield from _op_lines(results["ops"])


def _op_lines(kernels: dict[str, Any]) -> Iterator[str]:
    limits = kernels["limits"]
    yield ""
    yield (
        f"limits: {limits['int8_tflops']} TFLOP/s in 8 bits (twice the best bf16 product), "
        f"{limits['copy_tbytes']} TB/s (a copy within the device)"
    )
    for row in kernels["rows"]:
        head = f"  {row['op']:<13} {row['shape']:<24}"
        if "checked" in row:
            ratios = "  ".join(
                f"{value:.2f}x {key.removeprefix('speedup_vs_')}"
                for key, value in row.items()
                if key.startswith("speedup_vs_")
            )
            yield (
                f"{head} {row['ms']['ours']:9.4f} ms {row['tflops']:8.1f} TFLOP/s "
                f"{row['tbytes']:6.2f} TB/s {100 * row['roofline_fraction']:5.1f} %  {ratios}"
            )
        for name, reason in row["failed"].items():
            yield f"{head} {name} not timed: {reason}"
