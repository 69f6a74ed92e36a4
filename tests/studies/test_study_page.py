"""The page and the plots of a study: whole and partial folders, numbers."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.run_folder import RunFolder
from studies.ptq4dm import page as page_module
from studies.ptq4dm.page import render_study
from studies.ptq4dm.plots import grouped, item_plots, write_plots
from tests.report.page import Page, check_nothing_is_fetched_or_run
from tests.studies.study_folder import T, float_row, make_study, study_row

pytest.importorskip("matplotlib", reason="extra 'report'")
pytest.importorskip("jinja2", reason="extra 'report'")

ITEMS = ["T1", "T2", "F3", "F4", "T3", "T4", "T5", "F5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = make_study(tmp_path_factory.mktemp("studies") / "study")
    render_study(run.path)
    write_plots(run.path)
    return run


@pytest.fixture(scope="module")
def page(run: RunFolder) -> Page:
    return Page((run / "study.html").read_text())


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out where only words are looked at: drawing them takes seconds."""
    monkeypatch.setattr(page_module, "item_plots", lambda item, extractor: [])


def _small(path: Path, rows: list[dict[str, Any]], **changes: Any) -> Page:
    """Return the page of a study of one item."""
    run = RunFolder(path)
    item = {"name": "T9", "title": "One", "question": "?", "reading": "", "paper": None,
            "rows": rows, "claims": [], "extra": {}}  # fmt: skip
    run.write_json("items/T9.json", item)
    run.write_json("study.json", {"name": "small", "items": ["T9"]} | changes)
    return Page(render_study(path).read_text())


def test_every_item_has_its_section_in_the_order_of_the_study(page: Page) -> None:
    assert list(page.sections) == ["summary", *ITEMS, "lost", "settings"]
    assert not page.open
    links = [value for tag, key, value in page.attributes if (tag, key) == ("a", "href")]
    assert set(links) == {f"#{name}" for name in page.sections}


def test_numbers_come_from_the_files(run: RunFolder, page: Page) -> None:
    row = run.read_json("items/T1.json")["rows"][1]
    psnr, kid = row["psnr_db"], row["kid_data"]
    assert psnr["std"] == pytest.approx(np.std(psnr["values"], ddof=1))
    text = page.sections["T1"]
    assert f"{np.mean(psnr['values']):.2f} ± {psnr['std']:.2f}" in text
    assert f"{1e3 * kid['mean']:.3f} ± {1e3 * kid['std']:.3f}" in text
    # Every row names what it was made of.
    assert "DDIM 100 · W8A8 · ndtc · trajectory · lp · N 1,024 · 3 float layers" in text
    assert text.count("3 × 64 images") == len(run.read_json("items/T1.json")["rows"])
    assert "1 failed" in text and "identical" in text and "Not measured here: sFED to data" in text
    pooled = run.read_json("items/T3.json")["rows"][1]["pooled"]
    assert f"pooled {pooled['fed_data']:.2f} (192)" in page.sections["T3"]


def test_verdicts_are_counted_and_said_in_words_and_colour(run: RunFolder, page: Page) -> None:
    text = page.sections["summary"]
    assert text.startswith("Summary 1 confirmed 2 tie 1 mixed 1 refuted 1 not run")
    assert "T2 Noise beats mimic FID 21.63 → 21.99 refuted FED 60.1 ± 1.2" in text
    chips = re.findall(
        r'<span class="chip ([\w-]+)">([\w ]+)</span>', (run / "study.html").read_text()
    )
    assert [kind for kind, _ in chips] == ["confirmed", "tie", "refuted", "mixed", "tie", "not-run"]
    assert all(kind == words.replace(" ", "-") for kind, words in chips)


def test_what_is_missing_is_listed(page: Page) -> None:
    how = "not run – items/F5.json is missing: python -m studies.ptq4dm --only F5"
    assert how in page.sections["F5"]
    lost = page.sections["lost"]
    assert "T4 kl scale of layer x is not finite" in lost
    assert "T5 DDPM 1000 the budget was spent" in lost and "F5 all items/F5.json" in lost
    for name in ITEMS[:-1]:
        assert "not run" not in page.sections[name], name


def test_settings_name_the_model_and_not_where_it_lay(page: Page) -> None:
    text = page.sections["settings"]
    for words in ("ddpm-tiny", "35,700,000", "lite0", "seeds 0, 1, 2", "Some CPU", "2.13.0",
                  "transfer yes", "gpu –"):  # fmt: skip
        assert words in text, words
    assert "some/where" not in text


def test_the_paper_s_table_is_folded_away(run: RunFolder, page: Page) -> None:
    text = (run / "study.html").read_text()
    assert text.count("<details>") == 1 and "<details open" not in text
    assert "FP 14.88 21.63 17.66 µ 15.51 21.38 –" in page.sections["T1"]


def test_missing_and_broken_numbers_are_dashes(tmp_path: Path, no_drawing: None) -> None:
    rng = np.random.default_rng(0)
    row = study_row("a", 0.9, rng, fed_data=None, law=None, samples=None, float_layers=1)
    row["kid_data"] = {"mean": None, "std": None, "values": []}
    row["is"]["std"] = None
    page = _small(tmp_path, [row, study_row("b", 0.8, rng)])
    words = page.sections["T9"]
    assert re.search(rf"a DDIM 100 · W8A8 · trajectory · lp · 1 float layer · 3 × 64 images .* – – "
                     rf"{row['is']['mean']:.2f} b ", words)  # fmt: skip
    assert "nan" not in words.lower() and "None" not in words
    # Python reads NaN from JSON although no study may write it.
    file = tmp_path / "items/T9.json"
    file.write_text(re.sub(r'"mean": [\d.]+', '"mean": NaN', file.read_text()))
    text = Page(render_study(tmp_path).read_text()).sections["T9"]
    assert "nan" not in text.lower() and "Not measured here: PSNR dB, SSIM" in text


def test_inception_features_give_a_fid_and_others_do_not(tmp_path: Path, no_drawing: None) -> None:
    rows = [study_row("a", 0.9, np.random.default_rng(0))]
    words = _small(tmp_path, rows, settings={"extractor": "inception"}).sections["T9"]
    assert "FID to data" in words and "FED" not in words
    words = _small(tmp_path, rows, settings={"extractor": "lite0"}).sections["T9"]
    assert "FED to data" in words and "FID" not in words


def test_nothing_is_fetched_and_nothing_is_run(page: Page) -> None:
    check_nothing_is_fetched_or_run(page)
    assert "<h1>ddpm &lt;cifar10&gt; &amp; more</h1>" in page.text


def test_pictures_are_those_of_the_folder_float_first(run: RunFolder) -> None:
    text = (run / "study.html").read_text()
    section = text[text.index('<section id="F4">') : text.index('<section id="T3">')]
    cells = re.findall(r'src="data:image/png;base64,([^"]+)" alt="samples of ([^"]+)"', section)
    assert [label for _, label in cells][:3] == ["float", "t = 0 T", "t = 0.2 T"]
    for data, name in ((cells[0][0], "f4-float"), (cells[3][0], "f4-2")):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        assert (shown == np.asarray(Image.open(run / f"pictures/{name}.png"))).all()


def test_many_wide_or_missing_pictures(tmp_path: Path, no_drawing: None) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3200, 400), (9, 9, 9)).save(tmp_path / "pictures/wide.png")
    rows = [study_row(f"r{i}", 0.9, rng, group=f"g{i % 2}", picture="pictures/wide.png")
            for i in range(12)]  # fmt: skip
    rows[2]["picture"] = "pictures/gone.png"
    rows.append(float_row(rng, group="g0", picture="pictures/wide.png"))
    page = _small(tmp_path, rows)
    labels = [value for tag, key, value in page.attributes if (tag, key) == ("img", "alt")]
    assert labels[0] == "samples of float, g0" and len(labels) == 9
    assert "10 of 13 rows. Files of 1 more are missing." in page.sections["T9"]
    data = next(value for tag, key, value in page.attributes if (tag, key) == ("img", "src"))
    image = Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))
    assert image.size == (1600, 200)


def test_plots_stand_alone(run: RunFolder) -> None:
    files = sorted(path.stem for path in run.path.glob("items/*.svg"))
    assert files == sorted(ITEMS[:-1])
    for name in files:
        text = (run / f"items/{name}.svg").read_text()
        root = ElementTree.fromstring(text)
        assert "var(--" not in text and "<script" not in text and 'href="http' not in text
        inner = root.findall("{http://www.w3.org/2000/svg}svg")
        tops = [float(svg.get("y")) for svg in inner]
        heights = [float(svg.get("height")) for svg in inner]
        # One below the other, nothing over the edge.
        assert all(t + h < n for t, h, n in zip(tops, heights, [*tops[1:], 1e9], strict=True))
        assert tops[-1] + heights[-1] < float(root.get("height"))


def test_items_draw_what_they_have(run: RunFolder) -> None:
    count = {name: len(item_plots(run.read_json(f"items/{name}.json"))) for name in ITEMS[:-1]}
    assert count == {"T1": 1, "T2": 1, "F3": 1, "F4": 2, "T3": 2, "T4": 1, "T5": 2}
    assert not item_plots({"name": "T1", "rows": [], "extra": {}})
    # Without data the distance to the float model takes its place.
    assert "FED\N{NO-BREAK SPACE}" not in item_plots(run.read_json("items/T4.json"))[0].svg
    assert "float\N{NO-BREAK SPACE}↓" in item_plots(run.read_json("items/T4.json"))[0].svg
    assert "data\N{NO-BREAK SPACE}↓" in item_plots(run.read_json("items/T1.json"))[0].svg
    assert list(grouped(run.read_json("items/T5.json"))) == ["DDIM 50", "DDIM 100", "DPM++ 20",
                                                             "Euler 30"]  # fmt: skip


def test_curves_are_eight_at_most() -> None:
    rng = np.random.default_rng(0)
    rows = [study_row(f"row {i}", 0.9, rng, curve={"t": [0, T], "sqnr_db": [i, i], "std": None})
            for i in range(11)]  # fmt: skip
    plot = item_plots({"name": "T9", "rows": rows})[-1]
    assert "The first 8 of 11 labels" in plot.caption and "band" not in plot.caption
    assert "row 7" in plot.svg and "row 8" not in plot.svg


def test_no_study_and_a_damaged_item_are_errors_that_name_it(tmp_path: Path) -> None:
    for function in (render_study, write_plots):
        with pytest.raises(QuantempoError, match=r"no study\.json in .*studies\.ptq4dm"):
            function(tmp_path)
    _small(tmp_path, [])
    (tmp_path / "study.html").unlink()
    (tmp_path / "items/T9.json").write_text('{"rows": ')
    with pytest.raises(QuantempoError, match=r"T9\.json is damaged"):
        render_study(tmp_path)
    assert not (tmp_path / "study.html").exists()
