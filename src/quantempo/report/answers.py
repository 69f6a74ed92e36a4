"""What the first screen answers: size, speed here, what changed, layers; its template has words."""

import shlex
from typing import Any, NamedTuple

from quantempo.report.bits import bits_label
from quantempo.report.pictures import compare, ranked
from quantempo.run_folder import RunFolder

__all__ = ["against", "command", "first_screen", "megabytes", "optional", "seen", "timed"]

# PSNR from which people tell 8-bit images apart not at all, side by side, or at a glance.
_VISIBLE = ((40.0, "not visible"), (34.0, "hardly visible"), (28.0, "visible side by side"))
_FLOATS = {"fp32/": "float32", "bf16/": "bfloat16"}


def seen(psnr_db: float) -> str:
    """Say whether people see a difference of so many dB PSNR."""
    return next((text for least, text in _VISIBLE if psnr_db >= least), "visible at a glance")


def against(ratio: float, other: str) -> str:
    """Say what a ratio of times, theirs by ours, means; within 2 % of 1 they are equal."""
    if abs(ratio - 1) < 0.02:
        return f"as fast as {other}"
    return (
        f"{ratio:.2f}× faster than {other}"
        if ratio > 1
        else f"{1 / ratio:.2f}× slower than {other}"
    )


def megabytes(value: float) -> str:
    """Return bytes as "9.12 MB"."""
    return f"{value / 1e6:.2f} MB" if value < 1e8 else f"{value / 1e6:,.0f} MB"


def optional(run: RunFolder, name: str) -> Any:
    """Return the JSON value of a file, {} without it."""
    return run.read_json(name) if run.has(name) else {}


def command(run: RunFolder, verb: str, more: str = "") -> str:
    """Return the line to paste; a verb that starts a run takes the float MODEL too."""
    model = " MODEL" if verb in ("trace", "quantize") else ""
    return f"quantempo {verb}{model} --run {shlex.quote(str(run.path) + more)}"


class Timed(NamedTuple):
    """Forwards timed together, fastest first; the judged engine's; best ms by float type."""

    device: str
    batch: int
    engine: str
    rows: list[dict[str, Any]]
    ours: dict[str, Any] | None
    floats: dict[str, float]


def timed(run: RunFolder) -> list[Timed]:
    """Return what `quantempo bench` measured in a run folder, a CPU's first."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for device, record in sorted(optional(run, "bench.json").items()):
        for row in record["rows"]:
            if row["kind"] == "forward" and "failed" not in row:
                found.setdefault((device, row["batch"], record["engine"]), []).append(row)
    times = []
    for key, rows in found.items():
        rows.sort(key=lambda row: row["ms_per_forward"])
        own = [r for r in rows if r["candidate"].startswith("ours/") and r["engine"] == key[2]]
        floats: dict[str, float] = {}
        for row in rows:
            if name := _FLOATS.get(row["candidate"][:5]):
                floats.setdefault(name, row["ms_per_forward"])
        times.append(Timed(*key, rows, own[0] if own else None, floats))
    return times


def _costly(run: RunFolder, rows: list[dict[str, Any]], count: int = 3) -> list[tuple[str, str]]:
    """Return the layers that cost most in the image or, unknown, alone, with their cost."""
    if layers := optional(run, "sensitivity.json").get("layers"):
        losses = {row["name"]: max(row["losses"].values(), default=0.0) for row in layers}
        total = sum(losses.values()) or 1.0
        worst = sorted(losses, key=losses.__getitem__, reverse=True)[:count]
        return [(name, f"{100 * losses[name] / total:.1f} %") for name in worst]
    known = sorted((r["sqnr_db"], r["name"]) for r in rows if r["sqnr_db"] is not None)
    return [(name, f"{sqnr:.1f} dB") for sqnr, name in known[:count]]


def first_screen(run: RunFolder) -> dict[str, Any]:
    """Return what `first.html.j2` shows; of pairs the worst and the best with their difference."""
    metrics, model = optional(run, "metrics.json"), optional(run, "model.json")
    rows, (seeds, psnr) = optional(run, "layers.json") or [], ranked(run)
    chosen = list(dict.fromkeys((*seeds[:1], *seeds[-1:])))
    cells, gain, _ = compare(run / "samples/float", run / "samples/int8", chosen)
    kinds = ("worst pair", "best pair") if psnr and len(chosen) > 1 else ("a pair", "another pair")
    pairs = [
        (f"{kind}, seed {seed}" + (f", {psnr[seed]:.1f} dB" if seed in psnr else ""), cell)
        for kind, seed, cell in zip(kinds, chosen, cells, strict=False)
    ]
    files = (run / f"packed/{model.get('component')}").glob("*.safetensors")
    packed_by = run.stages().get("pack", {}).get("key")
    return {
        "run": run, "metrics": metrics, "pairs": pairs, "gain": gain, "label": bits_label(rows),
        "packed": metrics.get("bytes_packed") or sum(file.stat().st_size for file in files),
        "full": metrics.get("bytes_float32") or 4 * model.get("parameters", 0),
        "times": [one for one in timed(run) if one.ours and one.floats], "finished": bool(rows),
        "costly": _costly(run, rows), "ranked": run.has("sensitivity.json"),
        "stale": metrics.get("packed_key", packed_by) != packed_by,
        "against": against, "command": command, "megabytes": megabytes, "seen": seen,
    }  # fmt: skip
