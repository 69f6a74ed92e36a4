"""What was timed, as flat rows: written after every change, summarized, printed for people."""

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Results", "Row", "best", "speedups", "text_table"]

Row = dict[str, Any]

_IDENTITY = ("kind", "model", "batch", "candidate", "op", "shape", "name")


class Results:
    """Rows of one bench and what they share, `head`; `write` gets the record at every change."""

    def __init__(self, head: Row, write: Callable[[Row], None] = lambda record: None) -> None:
        self.head, self.write = head, write
        self._rows: dict[tuple[Any, ...], Row] = {}

    def put(self, *rows: Row) -> None:
        """Add rows, each in the place of the one with the same identity."""
        for row in rows:
            self._rows[tuple(row.get(key) for key in _IDENTITY)] = row
        self.write(self.record())

    def record(self) -> Row:
        """Return {**head, "speedup_vs_best_bf16", ..., "rows"}; see `speedups`.

        A row is {"kind": "forward", "model", "batch", "candidate", "ms_per_forward", "ms_min",
        "rounds", "sqnr_db", "prepare_seconds", "peak_bytes"} with "engine" and "attentions_8bit"
        (how many ran so) for ours, or one of kind "images_per_second", "layer", "limits" or "op";
        "failed" says why there is no time.
        """
        rows = list(self._rows.values())
        return {**self.head, **speedups(rows, self.head.get("engine")), "rows": rows}


def best(rows: list[Row], kind: str, engine: str | None = None) -> Row | None:
    """Return the fastest forward of a kind ("bf16", "torch": 8 bits, "ours": on one engine)."""
    own = (row for row in _timed(rows) if row["candidate"].startswith(f"{kind}/"))
    return next((row for row in own if kind != "ours" or row["engine"] == engine), None)


def _timed(rows: list[Row]) -> list[Row]:
    """Return the forwards that have a time, the fastest first."""
    timed = [row for row in rows if row["kind"] == "forward" and "failed" not in row]
    return sorted(timed, key=lambda row: row["ms_per_forward"])


def speedups(rows: list[Row], engine: str | None) -> dict[str, dict[str, float | None]]:
    """Return what ours gains over the best float forms, and over torch's own 8-bit products.

    "speedup_vs_best_bf16", "speedup_vs_best_fp32", "speedup_vs_best_8bit": {"MODEL_bBATCH": their
    best ms / best ms of the engine, None without one}; for bf16 also {"OPERATOR": see `_slowest`}.
    """

    def ratio(own: list[Row], kind: str) -> float | None:
        base, ours = best(own, kind, engine), best(own, "ours", engine)
        return round(base["ms_per_forward"] / ours["ms_per_forward"], 3) if base and ours else None

    networks = {"{}_b{}".format(*key): own for key, own in _networks(rows).items()}
    kinds = {"bf16": "bf16", "fp32": "fp32", "8bit": "torch"}
    found = {
        f"speedup_vs_best_{name}": {key: ratio(own, kind) for key, own in networks.items()}
        for name, kind in kinds.items()
    }
    found["speedup_vs_best_bf16"] |= _slowest([row for row in rows if row["kind"] == "op"])
    return found


def _networks(rows: list[Row]) -> dict[tuple[str, int], list[Row]]:
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if "model" in row:
            found.setdefault((row["model"], row["batch"]), []).append(row)
    return found


def _slowest(rows: list[Row]) -> dict[str, float | None]:
    """Return the smaller speed-up of the first two shapes of each product, None without both."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        found.setdefault(row["op"], []).append(row.get("speedup_vs_bf16"))
    return {
        op: None if None in ratios[:2] else min(ratios[:2])  # type: ignore[type-var]
        for op, ratios in found.items()
        if set(ratios) != {None}
    }


def text_table(record: Row) -> Iterator[str]:
    """Yield the lines of a table for people, the fastest candidate first."""
    for (model, batch), rows in _networks(record["rows"]).items():
        yield ""
        yield f"{model}, batch {batch}: median ms a forward, dB against float32, MB"
        for row in _timed(rows):
            eight = row.get("attentions_8bit")
            yield (
                f"  {row['candidate']:<26} {row['ms_per_forward']:10.3f} {row['sqnr_db']:7.1f} "
                f"{row['peak_bytes'] / 1e6:9.0f}   ready in {row['prepare_seconds']:.0f} s"
                + (f", {eight} attentions in 8 bits" if eight else "")
            )
        for row in rows:
            if row["kind"] == "images_per_second":
                yield (
                    f"  DDIM-{row['steps']} with {row['candidate']}: "
                    f"{row.get('measured', row.get('failed'))} images a second "
                    f"({row['from_forwards']} by its forwards alone)"
                )
            elif row["kind"] == "layer":
                w4, w8 = row["w4a8_ms"], row["w8a8_ms"]
                text = f"W4A8 {w4:.4f} ms, W8A8 {w8:.4f} ms: W{4 if w4 < w8 else 8}A8 is faster"
                yield f"  {row['shape']:<36} {len(row['layers']):3} layers: {text}"
            elif "failed" in row:
                yield f"  {row['candidate']:<26} not timed: {row['failed']}"
        for key in ("speedup_vs_best_fp32", "speedup_vs_best_bf16", "speedup_vs_best_8bit"):
            ratio = record[key].get(f"{model}_b{batch}")
            if ratio is not None:
                yield f"  {key} of {record['engine']}: {ratio}"
    yield from _op_lines(record["rows"])


def _op_lines(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row["kind"] == "limits":
            yield ""
            yield (
                f"limits: {row['int8_tflops']} TFLOP/s in 8 bits (twice the best bf16 product), "
                f"{row['copy_tbytes']} TB/s (a copy within the device)"
            )
        if row["kind"] != "op":
            continue
        head, gain = f"  {row['op']:<13} {row['shape']:<24}", "speedup_vs_"
        if "checked" in row:
            gains = (f"{row[k]:.2f}x {k.removeprefix(gain)}" for k in row if k.startswith(gain))
            yield (
                f"{head} {row['ms']['ours']:9.4f} ms {row['tflops']:8.1f} TFLOP/s "
                f"{row['tbytes']:6.2f} TB/s {100 * row['roofline_fraction']:5.1f} %  "
                + "  ".join(gains)
            )
        yield from (f"{head} {name} not timed: {why}" for name, why in row["failed"].items())
