"""Write `docs/pipelines.md`, the matrix of families, and read it back."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["FILE", "decibels", "line", "read", "write"]

FILE = Path(__file__).resolve().parents[2] / "docs" / "pipelines.md"
HEAD = """# Pipelines of diffusers: what works

Written by `python -m tests.pipelines --write` (names after it: those alone) with
diffusers {version}, torch {torch}.

One tiny pipeline with random weights for each family goes through `quantempo quantize` (recipe
`w8a8` with little data; every argument of the call by `--set`, pictures and tensors as files),
evaluate, inspect, and, in a new process, reload, sample and a comparison of every call of its
denoisers with the float network. Random weights tell right from wrong, not good from
better, and narrow networks have smaller shares of integers than real ones: FLUX.1 has 99 % where
its tiny kin here has 90 %. An SQNR of 60 dB says that the residual branches of that network are
small.

In brackets: the networks that are packed. `integers`: share of the multiplications of convolutions
and linear layers. `SQNR`: of the worst call, `simulated` / the default engine,
which is named (lines without a name: `onednn`, before OpenVINO became the default for pairs).
`kept in float`: how many layers and why; products of attention always are. "measured":
for its error, large for its work.

| family | pipeline | result | integers | SQNR, dB | kept in float |
|---|---|---|---|---|---|
"""


def line(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a family."""
    packed = f" ({', '.join(row['packed'])})" if "packed" in row else ""
    cells = {"family": row["family"], "pipeline": row.get("pipeline", "") + packed}
    if "error" in row:
        said = re.sub(r"'?/[^ ]*/(\w+)'?", r"\1", row["error"].split(": ", 1)[-1])
        # Which of several diffusers names first changes with the seed of Python's hashes.
        said = re.sub(r"(has no class) `.*", r"\1 that the model names", said)
        how = "refused" if row["clear"] else f"fails at {row['stage']}"
        result = f"{how}: {said[:200]}".replace("|", "/").replace("<", "(").replace(">", ")")
        return cells | {"result": result, "share": "", "sqnr": "", "float": ""}
    reasons: Counter[str] = Counter()
    for why, count in row["float"].items():
        reasons[why.split(":")[0]] += 0 if "two activ" in why else count
    return cells | {
        "result": "works",
        "share": f"{row['share']:.1%}",
        "sqnr": " / ".join(f"{min(value, 99.9):.1f}" for value in row["sqnr_db"].values())
        + f" {row['engine']}",
        "float": ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()) if n),
    }


def write(rows: list[dict[str, Any]], order: Iterable[str]) -> None:
    """Write the page; families that were not run keep their lines."""
    import diffusers
    import torch

    text = HEAD.format(version=diffusers.__version__, torch=torch.__version__)
    found = (read() if FILE.exists() else {}) | {row["family"]: line(row) for row in rows}
    lines = [found[name] for name in order if name in found]
    text += "".join(f"| {' | '.join(cells.values())} |\n" for cells in lines)
    works = sum(cells["result"] == "works" for cells in lines)
    FILE.write_text(f"{text}\n{works} of {len(lines)} work.\n")


def read() -> dict[str, dict[str, str]]:
    """Return the cells of every family on the page."""
    found = {}
    for row in re.findall(r"^\| (.*) \|$", FILE.read_text(), re.M)[1:]:
        cells = row.split(" | ")
        keys = ("family", "pipeline", "result", "share", "sqnr", "float")
        found[cells[0]] = dict(zip(keys, cells, strict=True))
    return found


def decibels(cells: dict[str, str]) -> list[float]:
    """Return the figures of the cell `sqnr`."""
    return [float(value) for value in re.findall(r"[\d.]+", cells["sqnr"])]
