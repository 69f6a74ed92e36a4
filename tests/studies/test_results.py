"""Verdicts: they follow from the numbers, and nobody is convicted by chance too often."""

import csv
import io
import math

import numpy as np
import pytest

from quantempo.recipe import Recipe
from studies.ptq4dm.cells import Row, Sampler
from studies.ptq4dm.results import MEASURES, Found, mean_interval, rows_csv, summarize

SAMPLER = Sampler("ddim", 10)


def found(**values: list[float | None]) -> Found:
    rows = [Row(label, SAMPLER, 6) for label in values]
    cells = {
        ("", label): [
            None if v is None else {"fed_data": v, "psnr_db": -v, "images": 200} for v in column
        ]
        for label, column in values.items()
    }
    return Found(rows, cells)


def test_the_interval_is_students() -> None:
    # t(0.975, 2) = 4.303; std of (1, 2, 3) is 1.
    mean, half = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert mean_interval([5.0]) == (5.0, math.inf)
    # Far down the table the approximation must not jump: t(0.975, 30) = 2.042.
    values = list(np.linspace(-1, 1, 31))
    exact = 2.042 * float(np.std(values, ddof=1)) / math.sqrt(31)
    assert mean_interval(values)[1] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("n", range(2, 40))
def test_the_table_of_students_t_is_right_at_every_length(n: int) -> None:
    from scipy.stats import t

    values = np.arange(n, dtype=float)
    exact = t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)
    # Three digits, in the table and in the expansion beyond it.
    assert mean_interval(list(values))[1] == pytest.approx(exact, rel=1e-3)


def test_the_better_end_of_every_measure() -> None:
    """Signal ratios, SSIM and IS are better when larger, distances when smaller."""
    more = {"psnr_db", "ssim", "sqnr_db", "is"}
    assert set(MEASURES) == more | {"fed_float", "fed_data", "sfed_data", "kid_data"}
    for measure in MEASURES:
        cells = {
            ("", label): [{measure: v + r / 10, "images": 200} for r in range(3)]
            for label, v in (("low", 1.0), ("high", 2.0))
        }
        # Differences of their own, for an interval that is no point.
        cells["", "high"][0][measure] = 2.01
        both = Found([Row("low", SAMPLER, 6), Row("high", SAMPLER, 6)], cells)
        word = both.compare(("", "high"), ("", "low"), measure)[0]
        assert word == ("better" if measure in more else "worse"), measure


def test_five_percent_of_equal_rows_are_told_apart() -> None:
    # 2000 draws at a true rate of 5 %: 3.3 to 6.7 % has a false alarm rate of 5e-4.
    generator = np.random.default_rng(0)
    called = 0
    for _ in range(2000):
        first, second = generator.normal(size=(2, 3))
        both = found(a=list(first), b=list(second))
        called += both.compare(("", "a"), ("", "b"), "fed_data")[0] != "tie"
    assert 0.033 < called / 2000 < 0.067


def test_a_common_shift_of_a_seed_cancels() -> None:
    rows = found(a=[10.0, 200.0, 3000.0], b=[10.9, 201.0, 3001.1])
    word, text = rows.compare(("", "a"), ("", "b"), "fed_data")
    assert word == "better" and "difference -1.00 ± 0.25" in text


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 2.1, 2.0], "confirmed"),
        ([2.0, 2.1, 2.0], [1.0, 1.1, 0.9], "refuted"),
        ([1.0, 2.0, 3.0], [3.0, 1.0, 2.0], "tie"),
        ([1.0, None, None], [3.0, 1.0, 2.0], "not run"),
        ([None, None, None], [3.0, 1.0, 2.0], "not run"),
    ],
)
def test_verdicts(first: list[float | None], second: list[float | None], verdict: str) -> None:
    judged = found(a=first, b=second).judge("a beats b", "1 < 2", ("", "a"), ("", "b"))
    assert judged["verdict"] == verdict


def test_measures_that_contradict_each_other_are_mixed() -> None:
    cells = {
        ("", "a"): [{"fed_data": 1.0, "psnr_db": 30.0 + r, "images": 200} for r in range(3)],
        ("", "b"): [{"fed_data": 2.0, "psnr_db": 35.0 + r, "images": 200} for r in range(3)],
    }
    both = Found([Row("a", SAMPLER, 6), Row("b", SAMPLER, 6)], cells)
    assert both.judge("", "", ("", "a"), ("", "b"))["verdict"] == "mixed"
    assert both.judge("", "", ("", "a"), ("", "b"), ("fed_data",))["verdict"] == "confirmed"


def test_distances_of_few_images_judge_nothing() -> None:
    cells = {
        ("", label): [{"fed_data": v + r, "psnr_db": 30.0, "images": 199} for r in range(3)]
        for label, v in (("a", 1.0), ("b", 100.0))
    }
    both = Found([Row("a", SAMPLER, 6), Row("b", SAMPLER, 6)], cells)
    judged = both.judge("", "", ("", "a"), ("", "b"), ("fed_data",))
    assert judged["verdict"] == "not run" and "fewer than 200 images" in judged["detail"]
    assert both.judge("", "", ("", "a"), ("", "b"))["verdict"] == "tie"


def cell(**values: object) -> dict[str, object]:
    base = {"images": 2, "float_layers": 0, "picture": None, "curve": None, "seconds": 1.0}
    return {**base, "fed_data": 5.0, "psnr_db": 30.0, "identical": 0.0, **values}


def test_a_row_names_its_settings_and_spreads() -> None:
    recipe = Recipe.load("ptq4dm").override("trace", chains=8)
    row = Row("ours", SAMPLER, 6, recipe, Sampler("euler", 30), group="table", released=True)
    line = summarize(row, [cell(psnr_db=30.0), cell(psnr_db=32.0), None])
    assert line["bits"] == "W8A8" and line["law"] == "ndtc_repo" and line["metric"] == "lp 2.4"
    assert line["samples"] == 8 and line["source"] == "trajectory, legacy pairs"
    assert line["sampler"] == "DDIM 10" and line["calibrated"] == "Euler 30"
    assert line["seeds"] == 2 and line["missing"] == 1 and line["images"] == 4
    spread = {"mean": 31.0, "std": pytest.approx(math.sqrt(2)), "values": [30.0, 32.0]}
    assert line["psnr_db"] == spread and line["ssim"] is None
    table = list(csv.DictReader(io.StringIO(rows_csv([line]))))
    assert table[0]["psnr_db_mean"] == "31.0" and table[0]["ssim_mean"] == ""


def test_equal_images_have_no_psnr() -> None:
    row = Row("Sigma", SAMPLER, 4)
    line = summarize(row, [cell(psnr_db=100.0, identical=1.0)] * 2)
    assert line["psnr_db"] is None and line["identical"] == 4
    line = summarize(row, [cell(identical=1.0), cell(identical=0.5)])
    assert line["psnr_db"]["mean"] == 30 and "identical" not in line


def test_curves_are_averaged_over_seeds() -> None:
    curves = [{"t": [1.0, 2.0], "sqnr_db": [first, 20.0]} for first in (10.0, 12.0)]
    line = summarize(Row("a", SAMPLER, 4), [cell(curve=curve) for curve in curves])
    assert line["curve"]["sqnr_db"] == [11.0, 20.0]
    assert line["curve"]["std"] == [pytest.approx(math.sqrt(2)), 0.0]
