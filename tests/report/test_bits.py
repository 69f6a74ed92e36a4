"""What the report says of bits, from made-up layer tables."""

from pathlib import Path
from typing import Any

import pytest

from quantempo.report.bits import bits_cell, bits_facts, bits_label
from tests.report.run_folder import make_run

pytest.importorskip("matplotlib", reason="extra 'report'")


def row(weight: int, activation: int, *shape: int, kind: str = "Conv2d") -> dict[str, Any]:
    return {"kind": kind, "bits_weight": weight, "bits_activation": activation,
            "weight_shape": list(shape)}  # fmt: skip


FLOATS = [row(32, 32, 64, 3, 3, 3), row(12, 32, 64, 64), row(0, 32, kind="matmul")]


@pytest.mark.parametrize(
    ("bits", "label"),
    [
        ([], "int8"),
        ([(8, 8), (8, 8)], "int8"),
        ([(4, 8), (4, 8)], "W4A8"),
        ([(4, 8), (8, 8)], "W4-8A8"),
        ([(4, 6), (8, 4)], "W4-8A4-6"),
        ([(8, 6)], "W8A6"),
    ],
)
def test_the_model_is_named_by_its_bits(bits: list[tuple[int, int]], label: str) -> None:
    assert bits_label([*FLOATS, *(row(*pair, 4, 4) for pair in bits)]) == label


def test_bytes_are_those_of_the_file() -> None:
    # 4 bits: two to a byte, each row of 27 inputs in 14 bytes; 3 bits take 4, 5 bits take 8.
    rows = [row(4, 8, 1000, 3, 3, 3), row(3, 8, 1000, 26), row(5, 6, 1000, 27), *FLOATS]
    assert bits_facts(rows, 4.0) == [
        ("W3A8", "1 layers, 0.01 MB of weights"),
        ("W4A8", "1 layers, 0.01 MB of weights"),
        ("W5A6", "1 layers, 0.03 MB of weights"),
        ("bits a weight, mean", "4.00"),
    ]
    assert bits_facts(FLOATS, None) == []


def test_products_of_attention_are_shown_as_what_they_are(tmp_path: Path) -> None:
    row = make_run(tmp_path / "run", seeds=2, blocks=1).read_json("layers.json")[-1]
    assert bits_cell(row) == "–" and "product" in row["reason"]
