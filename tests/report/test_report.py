"""The page as a whole: whole and partial run folders, what it may contain."""

import re
import shutil
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.recipe import Recipe
from quantempo.report import plots, render, sensitivity_plot
from quantempo.report.answers import against, seen
from quantempo.report.sections import SECTIONS
from tests.report.page import Page, check_nothing_is_fetched_or_run
from tests.report.run_folder import RECIPE, make_run

pytest.importorskip("matplotlib", reason="extra 'report'")
pytest.importorskip("jinja2", reason="extra 'report'")

SECTION_IDS = [name for name, _, _ in SECTIONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "w8a8 <demo> & more")
    render(run.path)
    return run.path


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out where only words are looked at: drawing them takes seconds."""
    for name in plots.__all__:
        if name not in ("Activation", "quantiles"):
            monkeypatch.setattr(
                plots, name, lambda *args: f"<svg x=''><text>{args[-1]}</text></svg>"
            )
    monkeypatch.setattr(sensitivity_plot, "draw", lambda table: "<svg x=''></svg>")


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_every_section_is_there_and_filled(page: Page) -> None:
    assert list(page.sections) == SECTION_IDS
    assert not page.open
    for name, text in page.sections.items():
        assert "not run" not in text, name
    pictures = [value for tag, key, value in page.attributes if (tag, key) == ("img", "src")]
    # Worst and best pair with their difference, the slider, the grid.
    assert len(pictures) == 3 * 2 + 2 + 3 * 10


def test_numbers_and_names_come_from_the_files(page: Page) -> None:
    for words in ("36.42 dB", "97.3 %", "9.12 MB", "0.9871", "openvino/int8", "DDIMScheduler",
                  "100 to 109", "not FID", "fed_lite0, int8, against 10", "0.0012 ± 0.0004",
                  "a tie", "1,720 MB"):  # fmt: skip
        assert words in page.sections["quality"], words
    layers = page.sections["layers"]
    assert "down_blocks.4.resnets.0.conv_shortcut shortcut 64 × 128 × 1 × 1 8 / 8 2 4" in layers
    assert "1 in float: input layer: reads x_t itself" in layers and "bits w / a" in layers
    assert "[activations]" in page.sections["recipe"] and "p = 2.4" in page.sections["recipe"]
    environment = page.sections["environment"]
    assert "ddpm-tiny" in environment and "some/where" not in environment
    assert "Some CPU" in environment and "2.13.0" in environment and "4.8 s" in environment


def test_sensitivity_lists_the_choice_and_what_it_spends(page: Page) -> None:
    text = page.sections["sensitivity"]
    for words in ("600,000 of 640,000 (93.8 %)", "12,000,000, no budget", "6.02", "0.00123"):
        assert words in text, words
    # The largest loss first: the last of 20 layers, at w4a8.
    last = "down_blocks.4.resnets.0.attentions.0.to_q attention 64 × 64"
    assert text.index(last) < text.index("down_blocks.0.resnets.0.conv1")
    assert "w4a8 2.00e-03 2.00e-05" in text and "0.00e+00" in text


def test_the_recipe_is_toml_that_reads_back(page: Page) -> None:
    text = page.raw["recipe"].replace("Recipe", "", 1)
    assert Recipe.from_dict(tomllib.loads(text)) == RECIPE != Recipe()


def test_nothing_is_fetched_or_run_and_names_are_escaped(page: Page) -> None:
    check_nothing_is_fetched_or_run(page)
    assert "run folder w8a8 &lt;demo&gt; &amp; more ·" in page.text


def test_the_first_screen_answers_in_words(page: Page, folder: Path) -> None:
    head = re.search(r"<title>(.*)</title>", page.text)[1]
    date = f"{datetime.fromtimestamp((folder / 'metrics.json').stat().st_mtime, UTC):%d %B %Y}"
    for words in ("ddpm-tiny · demo ·", "Some CPU", "threads: 2", date):
        assert words in head, words
    assert "<h1>ddpm-tiny · demo</h1>" in page.text
    first = page.sections["summary"]
    # 35.79 / 9.12; 7.5 / 8.71 at batch 1, 236 / 118 and 402 / 118 at batch 16.
    for words in (
        "3.92× smaller", "1.16× slower Than the fastest", "3.41× faster than float32",
        "Batch 1 on cpu: 1.16× slower than bfloat16 and 2.63× faster than float32",
        "2.00× faster than bfloat16", "hardly visible 36.4 dB PSNR", "dB (visible side by side)",
        "worst pair, seed 109, 31.0 dB", "best pair, seed 100, 40.0 dB", "--batch 4",
        "Slower than float at batch 1",
    ):  # fmt: skip
        assert words in first, words
    # The largest loss of 20 layers: 20 of 210.
    assert "down_blocks.4.resnets.0.attentions.0.to_q 9.5 %" in first
    other = Page(page.text.replace(re.search(r"<script>.*</script>", page.text, re.S)[0], ""))
    assert other.sections == page.sections


def test_the_worst_come_first_and_everything_has_a_name(page: Page) -> None:
    seeds = re.findall(r'class="seed">(\d+): ([\d.]+) dB', page.text)
    assert [seed for seed, _ in seeds] == [str(seed) for seed in range(109, 99, -1)]
    table = re.search(r'<section id="layers">.*?</table>', page.text, re.DOTALL)[0]
    errors = [float(v) for v in re.findall(r"<td>([\d.]+)</td></tr>", table)]
    assert len(errors) == 20 and errors == sorted(errors)
    assert page.counts["table"] == page.counts["caption"] and page.counts["summary"] == 2
    assert len(re.findall(r'<svg role="img" aria-label="[^"]+"', page.text)) == page.counts["svg"]
    # What scrolls takes the focus, and nothing waits for a pointer to show.
    for kind in ("wide", "band", "slide", "plot"):
        opened = re.findall(rf'<\w+ class="{kind}"[^>]*>', page.text)
        assert opened and all('tabindex="0"' in tag for tag in opened), kind
    assert "title=" not in page.text and page.text.count(":hover") == 1


def test_a_narrow_screen_cuts_nothing_without_a_hint(page: Page) -> None:
    narrow = page.text[page.text.index("@media (max-width: 720px)") :].partition("@media print")[0]
    assert ".plot { overflow-x: auto; }" in narrow and "scroll sideways" in narrow
    assert "min(" not in narrow and ".answers { " in page.text and "auto-fit" in page.text


def test_times_say_faster_slower_and_equal() -> None:
    said = [against(ratio, "float32") for ratio in (2.4, 0.5, 1.01, 0.99)]
    assert said[:2] == ["2.40× faster than float32", "2.00× slower than float32"]
    assert said[2:] == ["as fast as float32"] * 2
    assert [seen(v) for v in (40, 39.9, 30, 12)] == [
        "not visible", "hardly visible", "visible side by side", "visible at a glance",
    ]  # fmt: skip


def test_figures_follow_the_theme(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    figures = re.findall(r"<svg .*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        assert "var(--muted)" in figure or "var(--ink)" in figure
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_pictures_are_enlarged_without_smoothing_and_differences_amplified(folder: Path) -> None:
    import base64
    import io

    text = (folder / "report.html").read_text()
    cells = re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]+)"', text)
    files = {label: io.BytesIO(base64.b64decode(data)) for data, label in cells}
    images = {label: np.asarray(Image.open(file)) for label, file in files.items()}
    both = (folder / f"samples/{kind}/103.png" for kind in ("float", "int8"))
    first, second = (np.asarray(Image.open(file)) for file in both)
    assert (images["float, seed 103: 37.0 dB"] == first.repeat(4, axis=0).repeat(4, axis=1)).all()
    label = next(key for key in images if key.startswith("difference") and "seed 103" in key)
    gain = int(re.search(r"× (\d+)", label).group(1))
    expected = np.clip(gain * np.abs(first.astype(int) - second.astype(int)), 0, 255)
    assert (images[label][::4, ::4] == expected).all()
    # sigma 5: 99 % lie below 3 sigma = 15, and 16 * 15 still fits.
    assert gain == 16


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    for kind in ("float", "int8"):
        (tmp_path / f"samples/{kind}").mkdir(parents=True)
        Image.new("RGB", (640, 320), (10, 20, 30)).save(tmp_path / f"samples/{kind}/5.png")
    text = render(tmp_path).read_text()
    assert "Enlarged" not in text and "1 of 1 pairs" in text
    assert len(text) < 70_000


ABSENT = {
    "metrics.json": {"quality", "steps"},
    "bench.json": {"speed"},
    "sensitivity.json": {"sensitivity"},
    "samples": {"samples"},
    "trace.json": {"timesteps"},
    "stats.safetensors": {"activations"},
    "scales.safetensors": {"activations", "scales"},
    "layers.json": {"activations", "scales", "layers"},
    "manifest.json": {"recipe", "environment"},
    "model.json": set(),
    "trace": set(),
}


@pytest.mark.parametrize("missing", ABSENT)
def test_a_missing_file_empties_its_sections_only(missing, tmp_path, no_drawing):
    run = make_run(tmp_path / "run", seeds=2, blocks=1)
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    page = Page(render(run.path).read_text())
    assert list(page.sections) == SECTION_IDS
    empty = {name for name, text in page.sections.items() if "not run – " in text}
    assert empty == ABSENT[missing]
    for name in empty:
        assert "quantempo " in page.sections[name]


def test_an_empty_folder_and_no_folder(tmp_path: Path) -> None:
    page = Page(render(tmp_path).read_text())
    first = page.sections.pop("summary")
    assert first.count("not measured") == 3 and "quantempo quantize MODEL --run" in first
    assert all("not run – " in text for text in page.sections.values())
    with pytest.raises(QuantempoError, match="no run folder"):
        render(tmp_path / "absent")


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, no_drawing: None) -> None:
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    (run / "metrics.json").write_text('{"psnr_db_mean": ')
    with pytest.raises(QuantempoError, match=r"metrics\.json is damaged"):
        render(run.path)
    assert not (run / "report.html").exists()


def test_a_key_of_the_layers_that_is_missing_is_damage(tmp_path: Path, no_drawing: None) -> None:
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    rows, said = run.read_json("layers.json"), {}
    for key in rows[0]:
        run.write_json("layers.json", [{k: v for k, v in row.items() if k != key} for row in rows])
        try:
            render(run.path)
        except QuantempoError as error:
            said[key] = str(error)
    assert len(said) > 8 and all("' is damaged (" in text for text in said.values())
    assert (
        "section 'Layers, the worst first' is damaged" in said["reason"]
        and "reason" in said["reason"]
    )
    run.write_json("layers.json", [row | {"sqnr_db": "much"} for row in rows])
    with pytest.raises(QuantempoError, match="is damaged"):
        render(run.path)


def test_metrics_without_speed_or_steps_say_so(tmp_path: Path, no_drawing: None) -> None:
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    metrics = run.read_json("metrics.json")
    gone = ("eps_sqnr_db", "bytes_float32", "bytes_packed", "engine", "scores", "extractor_note",
            "int8_mac_share")  # fmt: skip
    run.write_json("metrics.json", {k: v for k, v in metrics.items() if k not in gone})
    (run / "bench.json").unlink()
    page = Page(render(run.path).read_text())
    assert "eps_sqnr_db" in page.sections["steps"] and "not run" in page.sections["speed"]
    assert "quantempo bench --run" in page.sections["speed"]
    assert "36.42 dB" in page.sections["quality"] and "not run" in page.sections["quality"]
    assert "faster here? not measured" in page.sections["summary"]


def test_a_model_of_one_bucket_has_words_instead_of_curves(tmp_path, no_drawing):
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    tensors = run.read_safetensors("scales.safetensors")
    for key in [key for key in tensors if key.endswith("act_scale")]:
        tensors[key] = tensors[key][:, :1]
    tensors["bucket_of"] = torch.zeros(1000, dtype=torch.int64)
    run.write_safetensors("scales.safetensors", tensors)
    page = Page(render(run.path).read_text())
    assert "All 4 integer layers keep one activation scale" in page.sections["scales"]
    assert "orange lines" in page.sections["activations"]


def test_a_low_bit_model_is_not_called_int8(tmp_path: Path, no_drawing: None) -> None:
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    rows = run.read_json("layers.json")
    for row in rows:
        row["bits_weight"] = 4 if row["bits_activation"] == 8 else row["bits_weight"]
    run.write_json("layers.json", rows)
    metrics = run.read_json("metrics.json") | {"weight_bits_mean": 4.0, "engine": "x"}
    run.write_json("metrics.json", metrics)
    sections = Page(render(run.path).read_text()).sections
    summary = sections["quality"]
    for words in ("W4A8 against float", "fed_lite0, W4A8", "W4A8 4 layers", "mean 4.00"):
        assert words in summary, words
    assert "int8" not in summary and "W4A8" in sections["samples"]


def test_pictures_that_are_no_seeds_or_have_no_pair(tmp_path: Path, no_drawing: None) -> None:
    run = make_run(tmp_path / "run", seeds=2, blocks=1)
    for kind in ("float", "int8"):
        shutil.copy(run / f"samples/{kind}/100.png", run / f"samples/{kind}/best.png")
    (run / "samples/int8/101.png").unlink()
    assert "2 of 2 pairs" in render(run.path).read_text()
    assert Image.open(run / "pairs.png").width == 2 * 96
    (run / "samples/int8/best.png").write_bytes(b"no picture")
    with pytest.raises(QuantempoError, match=r"cannot read .*best\.png"):
        render(run.path)


def test_times_of_a_bench_file_are_shown_by_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", seeds=1, blocks=1)
    row = {"kind": "forward", "model": "m", "batch": 8}
    rows = [
        row | {"candidate": "fp32/eager", "ms_per_forward": 10.0},
        row | {"candidate": "ours/x", "ms_per_forward": 1.38, "engine": "x"},
        row | {"candidate": "ours/y", "failed": "y is not installed"},
    ]
    record = {"engine": "x", "rows": rows}
    run.write_json("bench.json", {"cpu": record, "cuda": {"engine": "x", "rows": []}})
    page = Page(render(run.path).read_text())
    assert "batch 8" in page.sections["speed"] and "1.38" in page.sections["speed"]
    assert "7.25× faster" in page.sections["summary"]


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_missing_packages_say_what_to_install(package, folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(QuantempoError, match=r"quantempo\[report\]"):
        render(folder)
