"""Operators: their checks find wrong kernels, costs are counted right, rows hold the arithmetic."""

from typing import Any

import pytest
import torch

from benchmarks.kernels.cases import CASES, PRODUCTS, attention, conv, gemm, joint, norm, tokens
from benchmarks.kernels.table import Limits, bench_ops, check, measure_limits, tera, time_op
from quantempo.bench.results import Results, text_table
from quantempo.errors import QuantempoError
from quantempo.kernels import ops
from tests.bench.timers import Steady

CPU = torch.device("cpu")
SMALL = (
    conv(3, 6, 32, 48), gemm(150, 48, 64), norm(2, 4, 64), norm(2, 4, 64, 32), tokens(2, 5, 64),
    tokens(2, 5, 64, static=True), gemm(150, 48, 64, block=True), joint(3, 5, 2, 24),
    attention(2048, 1, 64),
)  # fmt: skip


def test_costs_by_hand() -> None:
    first = CASES[0]
    assert first.name == "N256 32x32 128->128"
    # 77.3 GFLOP each of the two convolutions of a block.
    assert first.operations == 2 * 9 * 128 * 128 * 256 * 1024 == pytest.approx(77.3e9, rel=1e-3)
    assert first.moved == 256 * 1024 * (128 + 2 * 128 + 2 * 128) + 9 * 128 * 128
    product = PRODUCTS[0]
    assert product.name == "8192x4608x1152" and product.operations == 2 * 8192 * 4608 * 1152
    assert product.moved == 8192 * 1152 + 4608 * 1152 + 2 * 8192 * 4608
    assert norm(256, 32, 128).moved == 3 * 256 * 1024 * 128
    assert norm(256, 32, 256, 128).moved == 4 * 256 * 1024 * (256 + 128)


def test_the_roofline_takes_the_slower_limit() -> None:
    limits = Limits(bf16_tflops=800.0, copy_tbytes=3.0)
    assert limits.fraction(1.6e12, 1.5e9, 4.0) == pytest.approx(1 / 4)
    assert limits.fraction(1.6e12, 6.0e9, 4.0) == pytest.approx(2 / 4)
    assert tera(8e11, 1.0) == pytest.approx(800)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_definition_passes_its_check(case: Any) -> None:
    torch.manual_seed(0)
    check(case, case.make(CPU))


@pytest.mark.parametrize(
    ("case", "what", "message"),
    [
        (SMALL[0], "border", "integer sums differ"),
        (SMALL[0], "shift", "epilogue"),
        (SMALL[0], "chance", "repeated runs"),
        (SMALL[1], "sum", "integer sums differ"),
        (SMALL[1], "bias", "epilogue"),
        (SMALL[2], "code", "steps from its value"),
        (SMALL[3], "raw", "steps from its value"),
        (SMALL[4], "shift", "steps from its value"),
        (SMALL[6], "gate", "epilogue"),
        (SMALL[7], "raw", "steps from its value"),
    ],
)
def test_wrong_kernels_are_refused(case, what, message, monkeypatch):
    torch.manual_seed(0)
    true, calls = getattr(ops, case.op), [0]

    def wrong(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if what == "border":
            # The zero point is missing in one corner class.
            table = kwargs["table"].clone()
            table[0b0101] = table[0]
            kwargs["table"] = table
        elif what in ("shift", "bias", "gate") and kwargs.get(what) is not None:
            kwargs[what] = kwargs[what] * 1.1
        found = true(*args, **kwargs)
        if what == "chance":
            found[0, 0, 0, 0] = calls[0]
        elif what == "sum" and found.dtype == torch.int32:
            found[-1, -1] += 1
        elif what == "code":
            found[0][-1, 0, 0, 0] ^= 2
        elif what == "raw":
            found[2].add_(1)
        return found

    monkeypatch.setattr(ops, case.op, wrong)
    with pytest.raises(QuantempoError, match=message):
        check(case, case.make(CPU))


def test_rows_hold_the_arithmetic() -> None:
    limits = Limits(bf16_tflops=1e-3, copy_tbytes=1e-3)
    row = time_op(SMALL[1], CPU, Steady(), limits, rounds=3)
    assert row["checked"] and row["failed"] == {} and row["copies"] == 1
    assert set(row["ms"]) == {"ours", "bf16", "_int_mm", "fp8 rowwise"}
    assert row["speedup_vs_bf16"] == row["speedup_vs__int_mm"] == 1.0
    floor = max(2 * 150 * 48 * 64 / 2e6, SMALL[1].moved / 1e6)
    assert row["roofline_fraction"] == round(floor / 2.0, 3)


def test_a_wrong_kernel_is_a_row_without_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "qgemm", lambda **kw: torch.zeros(150, 48, dtype=torch.int32))
    row = time_op(SMALL[1], CPU, Steady(), Limits(1.0, 1.0), rounds=2)
    assert "integer sums differ" in row["failed"]["ours"] and "ours" not in row["ms"]
    assert "bf16" in row["ms"] and "checked" not in row and "tflops" not in row


def test_a_rival_that_cannot_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("needs sm_89")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    row = time_op(SMALL[1], CPU, Steady(), Limits(1.0, 1.0), rounds=2)
    assert row["failed"] == {"fp8 rowwise": "while timing: RuntimeError: needs sm_89"}
    assert "ours" in row["ms"]


def test_rivals_compute_the_same_shapes() -> None:
    for case in SMALL[:2]:
        shape = case.run(case.make(CPU)).shape
        assert {maker(CPU)().shape for maker in case.rivals.values()} == {shape}
    assert SMALL[2].rivals == {}


def test_limits_are_of_the_best_product_and_of_both_ways_of_a_copy() -> None:
    limits = measure_limits(CPU, Steady(), rounds=2, size=64, copy=1000)
    assert limits.bf16_tflops == pytest.approx(2 * 64**3 / 2e9)
    assert limits.copy_tbytes == pytest.approx(2 * 1000 / 2e9)


def test_the_table_of_some_cases_comes_row_by_row() -> None:
    written: list[Any] = []
    results = Results({"device": "cpu"}, lambda record: written.append(len(record["rows"])))
    bench_ops(
        results, SMALL[:2], device="cpu", rounds=2, seconds=0.0, timer=Steady(), size=32, copy=100
    )
    limits, *rows = results.record()["rows"]
    assert written == [1, 2, 3] and [row["op"] for row in rows] == ["qconv2d", "qgemm"]
    assert limits["int8_tflops"] == pytest.approx(2 * limits["bf16_tflops"], 1)
    text = "\n".join(text_table(results.record()))
    assert "limits:" in text and "1.00x bf16" in text and "qgemm" in text
