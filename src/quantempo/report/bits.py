"""Say in words which bits a packed model has, from its layer table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["bits_cell", "bits_facts", "bits_label"]

Row = Mapping[str, Any]


def _integer(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] != "matmul" and row["bits_activation"] <= 8]


def _span(values: set[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def bits_label(rows: Sequence[Row]) -> str:
    """Return "int8", or "W4A8", or "W4-8A8" where layers differ; "int8" without integer layers."""
    layers = _integer(rows)
    weights = {int(row["bits_weight"]) for row in layers} or {8}
    activations = {int(row["bits_activation"]) for row in layers} or {8}
    if weights == activations == {8}:
        return "int8"
    return f"W{_span(weights)}A{_span(activations)}"


def bits_cell(row: Row) -> str:
    """Return the bits of one row: "4 / 8", "4g16 / 8" in groups, "–" for products in float."""
    weight, activation = row["bits_weight"], row["bits_activation"]
    if weight is None and activation > 8:
        return "–"
    group = f"g{row['group']}" if row.get("group") else ""
    return f"{'–' if weight is None else weight}{group} / {activation}"


def _megabytes(rows: Sequence[Row]) -> float:
    """Return what integer weights take, in files: up to 4 bits two to a byte, a byte a group."""

    def size(row: Row) -> int:
        (out, inputs, *kernel), group = row["weight_shape"], row.get("group")
        taps = math.prod(kernel)
        if group:
            return int(out * taps * (-(-inputs // 2) - (-inputs // group)))
        return int(out * (-(-inputs * taps // 2) if row["bits_weight"] <= 4 else inputs * taps))

    return sum(map(size, rows)) / 1e6


def bits_facts(rows: Sequence[Row], mean: float | None) -> list[tuple[str, str]]:
    """Return (bits, how many layers and bytes have them), fewest bits first, and the `mean`."""
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in _integer(rows):
        groups.setdefault((row["bits_weight"], row["bits_activation"]), []).append(row)
    facts = [
        (f"W{w}A{a}", f"{len(group)} layers, {_megabytes(group):.2f} MB of weights")
        for (w, a), group in sorted(groups.items())
    ]
    return facts if mean is None else [*facts, ("bits a weight, mean", f"{mean:.2f}")]
