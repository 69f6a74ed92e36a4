"""Turn the cells of a study into rows with spreads, and claims into verdicts.

Seeds pair: repetition r of every row has the same calibration seed and image seeds, so two rows
are compared by the differences of their repetitions, in which what a seed brings to both cancels.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from studies.ptq4dm.cells import Row

__all__ = ["MEASURES", "Found", "mean_interval", "rows_csv", "summarize"]

# Name -> whether more is better.
MEASURES = dict.fromkeys(("psnr_db", "ssim", "sqnr_db"), True)
MEASURES |= dict.fromkeys(("fed_float", "fed_data", "sfed_data", "kid_data"), False) | {"is": True}
# Distances between sets of fewer images than this a seed say nothing, so they judge nothing.
DISTANCES, ENOUGH = ("fed_float", "fed_data", "sfed_data", "kid_data", "is"), 200
# Student's t at 97.5 % for 1, 2, ... degrees of freedom.
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return (mean, half width of its 95 % interval) of independent, roughly normal values.

    half = t_{0.975, n - 1} std / sqrt(n); infinite for one value.
    """
    n = len(values)
    if n < 2:
        return float(np.mean(values)), math.inf
    # Beyond the table the expansion of t in 1 / degrees of freedom, right to three digits there.
    t = _T975[n - 2] if n - 2 < len(_T975) else 1.96 + 2.372 / (n - 1) + 2.82 / (n - 1) ** 2
    return float(np.mean(values)), t * float(np.std(values, ddof=1)) / math.sqrt(n)


class Found:
    """The results of one item's rows.

    rows: of the item; cells: (group, label) -> one result per repetition, None where it failed or
    was not run.
    """

    def __init__(
        self, rows: Sequence[Row], cells: Mapping[tuple[str, str], Sequence[dict[str, Any] | None]]
    ) -> None:
        self.rows = rows
        self.cells = cells

    def values(self, label: str, measure: str, group: str = "") -> dict[int, float]:
        """Return repetition -> value, of those that have one."""
        found = {r: c for r, c in enumerate(self.cells.get((group, label), ())) if c}
        return {r: c[measure] for r, c in found.items() if c.get(measure) is not None}

    def _few(self, rows: Sequence[tuple[str, str]]) -> bool:
        cells = [cell for row in rows for cell in self.cells.get(row, ()) if cell]
        return any(cell["images"] < ENOUGH for cell in cells)

    def mean(self, label: str, measure: str, group: str = "") -> float | None:
        """Return the mean over repetitions, or None."""
        values = self.values(label, measure, group)
        return float(np.mean(list(values.values()))) if values else None

    def compare(
        self, first: tuple[str, str], second: tuple[str, str], measure: str
    ) -> tuple[str, str]:
        """Compare two rows, each (group, label), by the differences of their repetitions.

        Returns (word, detail): word is "better" or "worse" (of the first, where the 95 % interval
        of the mean difference leaves out zero: 5 % false alarms), "tie", or "not run".
        """
        if measure in DISTANCES and self._few((first, second)):
            return "not run", f"{measure}: fewer than {ENOUGH} images a seed"
        a, b = (self.values(label, measure, group) for group, label in (first, second))
        both = sorted(set(a) & set(b))
        if len(both) < 2:
            return "not run", f"{measure}: fewer than two seeds"
        difference, half = mean_interval([a[r] - b[r] for r in both])
        means = tuple(_form(float(np.mean([x[r] for r in both]))) for x in (a, b))
        text = f"{measure} {means[0]} against {means[1]}"
        text += f" (difference {_form(difference, sign=True)} ± {_form(half)})"
        if abs(difference) <= half:
            return "tie", text
        return ("better" if (difference > 0) == MEASURES[measure] else "worse"), text

    def judge(
        self,
        text: str,
        paper: str,
        first: tuple[str, str],
        second: tuple[str, str],
        measures: Sequence[str] = ("fed_data", "psnr_db"),
    ) -> dict[str, Any]:
        """Judge the claim that the first row, (group, label), is better or at least no worse.

        Every measure votes: "confirmed" if the first is better, "refuted" if it is worse, "tie"
        if nobody can tell, "mixed" if the measures contradict each other.
        """
        found = [self.compare(first, second, measure) for measure in measures]
        votes = {word for word, _ in found} - {"tie", "not run"}
        if all(word == "not run" for word, _ in found):
            verdict = "not run"
        elif len(votes) > 1:
            verdict = "mixed"
        else:
            verdict = {"better": "confirmed", "worse": "refuted"}.get(*votes) if votes else "tie"
        told = [part for word, part in found if word != "not run"]
        detail = "; ".join(told or [part for _, part in found])
        return {"text": text, "paper": paper, "verdict": verdict, "detail": detail}


def summarize(row: Row, cells: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the JSON of one row: its columns, mean and std of every measure, a mean curve."""
    done = [cell for cell in cells if cell]
    result = row.columns() | {
        "images": sum(cell["images"] for cell in done),
        "seeds": len(done),
        "missing": len(cells) - len(done),
        "float_layers": done[0]["float_layers"] if done else None,
        "picture": next((cell["picture"] for cell in done if cell["picture"]), None),
        "pooled": None,
        "curve": _curve([cell["curve"] for cell in done if cell["curve"]]),
        "seconds": round(sum(cell["seconds"] for cell in done), 1),
    }
    for measure in MEASURES:
        values = [cell[measure] for cell in done if cell.get(measure) is not None]
        result[measure] = _spread(values) if values else None
    shares = [cell.get("identical", 0) for cell in done]
    if done and min(shares) == 1:
        # No noise to speak of: its ratio is a cap, not a result.
        result |= {"psnr_db": None, "identical": result["images"]}
    return result


def _spread(values: list[float]) -> dict[str, Any]:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "values": values}


def _curve(curves: list[dict[str, list[float]]]) -> dict[str, Any] | None:
    if not curves:
        return None
    table = np.array([curve["sqnr_db"] for curve in curves])
    std = table.std(axis=0, ddof=1).tolist() if len(curves) > 1 else None
    return {"t": curves[0]["t"], "sqnr_db": table.mean(axis=0).tolist(), "std": std}


def rows_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of an item as CSV text, mean and std of each measure in two columns."""
    plain = [key for key in rows[0] if key not in (*MEASURES, "curve", "picture", "pooled")]
    head = [*plain, *(f"{m}_{end}" for m in MEASURES for end in ("mean", "std"))]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        cells = ["+".join(row[k]) if isinstance(row[k], list) else row[k] for k in plain]
        for measure in MEASURES:
            value = row[measure] or {"mean": None, "std": None}
            cells += [value["mean"], value["std"]]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return stream.getvalue()


def _form(value: float, sign: bool = False) -> str:
    digits = 2 if abs(value) < 1000 else 0
    digits = 4 if 0 < abs(value) < 0.1 else digits
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
