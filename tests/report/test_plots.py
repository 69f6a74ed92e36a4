"""The arithmetic inside the figures."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from quantempo.report import plots, sensitivity_plot
from quantempo.report.sections import window_of
from tests.report.run_folder import make_run

pytest.importorskip("matplotlib", reason="extra 'report'")


def test_quantiles_of_a_histogram_are_those_of_the_sample() -> None:
    values = np.sort(np.random.default_rng(0).gamma(2.0, 1.0, 20_000))
    lo, hi = values[0] - 1, values[-1] + 1
    counts, edges = np.histogram(values, 2048, (lo, hi))
    shares = (0.01, 0.25, 0.5, 0.75, 0.99)
    found = plots.quantiles(counts, lo, hi, shares)
    # Inside one bin the order is lost: at most one bin width away.
    np.testing.assert_allclose(found, np.quantile(values, shares), atol=edges[1] - edges[0])


def test_quantiles_skip_empty_bins_at_both_ends_and_between() -> None:
    counts = np.array([0, 0, 10, 0, 0, 10, 0])
    found = plots.quantiles(counts, 0.0, 7.0, (0.0, 0.25, 0.75, 1.0))
    np.testing.assert_allclose(found, [2.0, 2.5, 5.5, 6.0])


def test_the_window_is_what_the_codes_stand_for() -> None:
    scales = {
        "x.act_scale": np.array([[0.5, 0.25], [9.0, 9.0]], np.float32),
        "x.act_zero_point": np.array([100, 0], np.int32),
        "bucket_of": np.array([0, 0, 1]),
    }
    # x_hat = scale * (q - zero_point) at q = 0 and 255.
    np.testing.assert_allclose(window_of(scales, "x", 8), [[-50, 77.5], [-50, 77.5], [-25, 38.75]])
    scales["x.act_scale"] = scales["x.act_scale"][:, :1]
    assert (window_of(scales, "x", 8) == [-50, 77.5]).all()
    assert window_of({}, "x", 8) is None


def test_density_and_bars_are_on_one_scale() -> None:
    drawn, law = np.array([0, 0, 1, 3]), np.array([0.5, 0.25, 0.0, 0.25])
    svg = plots.timestep_distribution(drawn, law, 4)
    assert svg.startswith("<svg") and svg.endswith("</svg>\n")
    assert "density" in svg and "drawn" in svg
    assert "density" not in plots.timestep_distribution(drawn, None, 4)


def test_a_figure_of_its_own_has_colours_and_no_variables(tmp_path: Path) -> None:
    table = make_run(tmp_path, seeds=1, blocks=1).read_json("sensitivity.json")
    inline = sensitivity_plot.draw(table)
    assert "var(--int8)" in inline
    alone = sensitivity_plot.standalone(inline)
    assert "var(" not in alone and plots.INT8 in alone
    assert ElementTree.fromstring(alone).tag.endswith("svg")
    # Nothing measured yet, nothing chosen: still a figure.
    empty = {**table, "choice": None, "layers": [{**table["layers"][0], "losses": {}}]}
    assert sensitivity_plot.draw(empty).startswith("<svg")
    assert sensitivity_plot.layer_cells(empty)[1][0][4] == "–"
