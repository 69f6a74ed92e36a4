"""The ladder: its rungs follow the shipped recipes; what a small one writes, resumes and keeps."""

import itertools
import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.pipeline import stages as pipeline
from quantempo.recipe import Recipe
from studies.ablation import ladder as module
from studies.ablation import variants
from studies.ablation.ladder import LadderSettings, ladder
from studies.ablation.rungs import Rung, rungs
from tests.packed import recipe, saved

# Settings of a recipe that a rung of this suffix may change.
MAY = {"wide": {"layers"}, "gptq": {"rounding"}, "bias": {"rounding"}}
SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*"))
STEPS = 4


def families() -> dict[str, list[Rung]]:
    """Return the chain of each family; rungs beside a chain lead nowhere."""
    found: dict[str, list[Rung]] = {}
    for rung in rungs():
        if not rung.idea.startswith("beside the chain"):
            found.setdefault(rung.family, []).append(rung)
    return found


def changed(before: Rung, after: Rung) -> set[str]:
    names = {field.name for field in fields(Recipe)} - {"name"}
    return {n for n in names if getattr(before.recipe, n) != getattr(after.recipe, n)}


FOUR = recipe(exclude=("up_blocks.*", "mid_block.*", "*.resnets.*", "*.attentions.*"))
FOUR = FOUR.override("weights", bits=4, group=16).override("rounding", name="gptq")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A float network with two integer layers, blocks of their own, and its calibration set."""
    run = tmp_path_factory.mktemp("variants") / "run"
    session = pipeline.load(str(saved("unconditional")), run, FOUR)
    return session.denoiser, pipeline.trace(session)


def error(four: tuple[Any, Any], variant: str, rounding: str = "gptq") -> tuple[float, Any, Any]:
    net, data = four
    copied, row = variants.quantized(net, FOUR.override("rounding", name=rounding), data, variant)
    batch = data.rows(data.spread(8))
    with torch.no_grad():
        off = data.replay(copied, batch) - data.replay(net, batch)
    return float(off.square().mean()), copied, row


@pytest.mark.parametrize("variant", ["smooth=0.5", "rotate=16"])
def test_transformed_layers_are_rounded_for_the_inputs_that_they_get(four: Any, variant: str):
    how, _, value = variant.partition("=")
    net, _ = variants._transformed(*four[:1], FOUR, four[1], how, float(value))
    batch = four[1].rows(four[1].spread(8))
    torch.testing.assert_close(
        *(four[1].replay(n, batch) for n in (net, four[0])), rtol=0, atol=1e-4
    )
    moved = {n for n, layer in net.named_modules() if hasattr(layer, "transform")}
    best, copied, _ = error(four, variant)
    assert moved and moved == {n for n, o in copied.named_modules() if hasattr(o, "transform")}
    assert best < 0.8 * error(four, variant, "nearest")[0]
    assert best < 2 * error(four, "stored")[0]


def test_branches_and_int8_layers_cost_the_same_and_a_full_rank_leaves_no_error_of_weights(four):
    plain, full = error(four, "stored")[0], error(four, "lowrank=999")
    assert full[0] < 0.2 * plain and set(full[2]["errors"]) == {"0", "0.1", "1", "10"}
    few, _, row = error(four, "lowrank=2")
    assert full[0] < few < plain and 4.5 < row["weight_bits_mean"] < 8
    assert row["weight_bits_mean"] >= error(four, "int8=2")[2]["weight_bits_mean"] >= 4.5


def test_each_rung_adds_one_idea_and_the_last_is_the_shipped_recipe() -> None:
    names = [rung.name for rung in rungs()]
    assert all(rung.recipe.name == rung.name for rung in rungs())
    assert len(set(names)) == len(names) and set(families()) == {"W8A8", "W4A8"}
    for family, chain in families().items():
        assert chain[-1].name == family.lower() and chain[-1].full
        assert chain[-1].recipe == Recipe.load(family.lower())
        for before, after in itertools.pairwise(chain):
            found, suffix = changed(before, after), after.name.rpartition("-")[2]
            assert found, f"{after.name} changes nothing"
            assert found <= MAY.get(suffix, found), after.name
    paper = next(rung for rung in rungs() if rung.name == "ptq4dm")
    assert paper.recipe == Recipe.load("ptq4dm") and paper.full
    for chain in list(families().values())[1:]:
        # The base of fewer bits: scales alone.
        base = chain[0].recipe
        assert base.rounding.name == "nearest" and not base.rounding.bias and not base.layers.bits


@pytest.mark.parametrize(
    ("section", "values", "rung"),
    [
        ("weights", {"metric": "mse"}, "w8a8-scales"),
        ("rounding", {"name": "nearest", "bias": False}, None),
    ],
)
def test_the_rungs_follow_a_shipped_recipe_that_changes(monkeypatch, section, values, rung):
    load = Recipe.load.__func__
    base = Recipe.load("w8a8").override("rounding", name="gptq", bias=True)
    # Bias correction is behind the one that is looked at, so that it has a rung of its own.
    other = base.override(section, **values)
    monkeypatch.setattr(
        Recipe, "load", classmethod(lambda cls, name: other if name == "w8a8" else load(cls, name))
    )
    chain = families()["W8A8"]
    assert chain[-1].recipe == other
    if rung is not None:
        assert rung in [r.name for r in chain]
    for before, after in itertools.pairwise(chain):
        assert changed(before, after), after.name


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Rung]:
    """Two rungs of seconds instead of the real ones."""
    return use_two(monkeypatch)


def use_two(patch: pytest.MonkeyPatch) -> list[Rung]:
    gptq = SMALL.override("rounding", name="gptq")
    found = [
        Rung("plain", "W8A8", "nothing", replace(SMALL, name="plain")),
        Rung("w8a8", "W8A8", "GPTQ", replace(gptq, name="w8a8"), full=True),
    ]
    patch.setattr(module, "rungs", lambda: found)
    return found


def settings(out: Path, data: Path | None = None, **others: Any) -> LadderSettings:
    chosen: dict[str, Any] = {"steps": STEPS, "images": 3, "images_full": 6, "batch_size": 6}
    chosen |= {"source": str(saved("unconditional")), "out": out, "data": data and str(data)}
    return LadderSettings(**chosen | others)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ladder of two rungs and its folder of real images; do not write into them."""
    root = tmp_path_factory.mktemp("ladder")
    (root / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"data/{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        use_two(patch)
        ladder(settings(root / "out", root / "data"))
    return root / "out", root / "data"


@pytest.fixture
def copy(made: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    """A ladder that a test may write into."""
    shutil.copytree(made[0], tmp_path / "out")
    return tmp_path / "out", made[1]


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_results_have_the_documented_form(made: tuple[Path, Path]) -> None:
    out, found = made[0], read(made[0])
    assert set(found) == {"about", "float", "recipes", "ladder", "not_run", "failed"}
    assert not found["not_run"] and not found["failed"]
    assert set(found["recipes"]) == {"w8a8"}
    row = found["recipes"]["w8a8"]
    assert set(row) == {
        *("psnr_db_mean", "psnr_db_p05", "fed_lite0_vs_float", "fed_lite0_vs_data"),
        *("calibration_seconds", "bytes_packed", "float_layers", "images"),
    }
    assert row["images"] == 6 and row["psnr_db_p05"] <= row["psnr_db_mean"]
    assert row["fed_lite0_vs_float"] >= 0 and row["fed_lite0_vs_data"] > 0
    assert row["bytes_packed"] == sum(
        f.stat().st_size for f in (out / "w8a8/packed/unet").glob("*.safetensors")
    )
    assert all(layer["name"] and layer["reason"] for layer in row["float_layers"])
    assert [r["name"] for r in found["ladder"]] == ["plain", "w8a8"]
    assert [r["images"] for r in found["ladder"]] == [3, 6]
    floats = found["float"]
    assert floats["images"] == 6 and floats["fed_lite0_other_seeds"] > 0
    assert floats["fed_lite0_vs_data"] > 0 and floats["fed_lite0_vs_data_std_of_thirds"] >= 0
    assert found["about"]["steps"] == STEPS and "machine" in found["about"]


def test_the_figures_are_those_of_the_pictures(made: tuple[Path, Path]) -> None:
    out, rows = made[0], read(made[0])["ladder"]
    floats = np.load(next((out / "images").glob("float-*-0.npy"))).astype(np.float64)
    for row in rows:
        images = np.load(out / f"images/{row['name']}.npy")
        assert images.dtype == np.uint8 and images.shape == (row["images"], 16, 16, 3)
        error = ((floats[: len(images)] - images) ** 2).reshape(len(images), -1).mean(1)
        psnr = 10 * np.log10(255**2 / error)
        assert row["psnr_db_mean"] == pytest.approx(psnr.mean())
        assert row["psnr_db_p05"] == pytest.approx(np.percentile(psnr, 5))
        # Rungs are compared with each other on the same seeds.
        alike = row.get("first", row)
        assert alike["images"] == 3 and alike["psnr_db_mean"] == pytest.approx(psnr[:3].mean())
    # The same network as from the packed folder, the same seeds.
    pipe = module._Bench(settings(out, made[1])).sample(out / "plain/packed", 0, 3)
    assert np.array_equal(pipe, np.load(out / "images/plain.npy"))


def test_the_page_shows_every_rung_and_its_pictures(made: tuple[Path, Path]) -> None:
    out, text = made[0], (made[0] / "quality.md").read_text()
    row = {r["name"]: r for r in read(out)["ladder"]}["w8a8"]
    assert f"| w8a8, 6 images | {row['psnr_db_mean']:.2f} ± " in text
    assert f"| w8a8 | GPTQ | {row['first']['psnr_db_mean']:.2f} ± " in text
    assert "| plain | nothing |" in text and "The first 6 seeds, uncurated: float, w8a8" in text
    assert "DDIM, 4 steps" in text and "Not run" not in text and "Failed" not in text
    for name in ("quality/ladder.svg", "quality/pictures.png"):
        assert f"({name})" in text and (out / name).is_file()
    with Image.open(out / "quality/pictures.png") as image:
        assert image.size == (6 * 16 * 3, 2 * 16 * 3)
    svg = (out / "quality/ladder.svg").read_text()
    assert svg.lstrip().startswith("<svg") and svg.rstrip().endswith("</svg>")


def test_equal_stages_are_made_once_and_keep_their_seconds(made: tuple[Path, Path]) -> None:
    stages = [
        json.loads((made[0] / name / "manifest.json").read_text())["stages"]
        for name in ("plain", "w8a8")
    ]
    for stage in ("trace", "calibrate", "search"):
        assert stages[0][stage] == stages[1][stage], stage
    assert stages[0]["round"]["key"] != stages[1]["round"]["key"]
    rows = {row["name"]: row for row in read(made[0])["ladder"]}
    for name, stage in zip(("plain", "w8a8"), stages, strict=True):
        total = sum(entry["seconds"] for entry in stage.values())
        assert rows[name]["calibration_seconds"] == pytest.approx(total, abs=0.01)


def test_a_ladder_resumes(copy: Any, two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out, data = copy
    before = read(out)
    climb, names = module._climb, []

    def noted(bench: Any, rung: Rung) -> Any:
        names.append(rung.name)
        return climb(bench, rung)

    monkeypatch.setattr(module, "_climb", noted)
    ladder(settings(out, data))
    assert names == [] and read(out)["ladder"] == before["ladder"]
    # Killed before the last rung was written down.
    (out / "rungs/w8a8.json").unlink()
    ladder(settings(out, data))
    assert names == ["w8a8"]
    again = read(out)["recipes"]["w8a8"]
    same = set(again) - {"calibration_seconds"}
    assert {k: again[k] for k in same} == {k: before["recipes"]["w8a8"][k] for k in same}


def test_a_rung_of_another_recipe_is_made_again(copy, two, monkeypatch):
    out, data = copy
    two[0] = replace(two[0], recipe=two[0].recipe.override("weights", bits=4))
    module.collect(out)
    # Until then it is not shown as what it is not.
    assert read(out)["not_run"] == ["plain"]
    assert [row["name"] for row in read(out)["ladder"]] == ["w8a8"]
    ladder(settings(out, data))
    rows = {row["name"]: row for row in read(out)["ladder"]}
    assert rows["plain"]["weight_bits_mean"] == 4 and read(out)["not_run"] == []
    assert json.loads((out / "plain/manifest.json").read_text())["recipe"]["weights"]["bits"] == 4


def test_a_rung_that_quantempo_does_not_ship_is_made_in_memory(copy, two):
    out, data = copy
    two[0] = Rung("plain", "W8A8", "none", replace(FOUR, name="plain"), variant="lowrank=4")
    ladder(settings(out, data), only=("plain",))
    row = {row["name"]: row for row in read(out)["ladder"]}["plain"]
    assert (row["variant"], row["engine"]) == ("lowrank=4", "simulated")
    assert row["psnr_db_mean"] > 20
    assert set(row["stage_seconds"]) == {"trace", "variant"} and row["weight_bits_mean"] > 4.5
    two[0] = replace(two[0], variant="int8=4")
    module.collect(out)
    assert read(out)["not_run"] == ["plain"]


def test_another_protocol_is_refused(copy: Any, two: Any) -> None:
    out, data = copy
    before = (out / "ladder.json").read_text()
    for others in ({"steps": 5}, {"tf32": True}, {"override": {"trace": {"chains": 3}}}):
        with pytest.raises(QuantempoError, match=f"has {next(iter(others))} = .*another --out"):
            ladder(settings(out, data, **others))
    with pytest.raises(QuantempoError, match=r"has data = data, got None"):
        ladder(settings(out))
    assert (out / "ladder.json").read_text() == before


def test_a_failing_rung_does_not_lose_the_others(tmp_path, two, monkeypatch, caplog):
    finish = pipeline.finish

    def broken(session: Any) -> Any:
        if session.recipe.name == "plain":
            raise QuantempoError("out of luck")
        return finish(session)

    monkeypatch.setattr(pipeline, "finish", broken)
    out = tmp_path / "out"
    ladder(settings(out))
    found = read(out)
    assert found["failed"] == {"plain": "out of luck"} and found["not_run"] == ["plain"]
    assert found["recipes"]["w8a8"]["fed_lite0_vs_data"] is None
    text = (out / "quality.md").read_text()
    assert "Not run: plain." in text and "Failed: plain: out of luck" in text
    assert "plain failed: out of luck" in caplog.text
    monkeypatch.setattr(pipeline, "finish", finish)
    ladder(settings(out))
    assert read(out)["failed"] == {} and read(out)["not_run"] == []
    assert "Failed" not in (out / "quality.md").read_text()


def test_only_the_named_rungs_run(tmp_path: Path, two: Any) -> None:
    out = tmp_path / "out"
    text = ladder(settings(out), only=("plain",))
    found = read(out)
    assert [row["name"] for row in found["ladder"]] == ["plain"] and found["not_run"] == ["w8a8"]
    assert found["float"] is None and found["recipes"] == {} and not (out / "w8a8").exists()
    assert text == out / "quality.md" and "| plain | nothing |" in text.read_text()
    # No time left: nothing is started, what is there is shown.
    ladder(settings(out), minutes=0.0)
    assert read(out)["not_run"] == ["w8a8"]


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path: Path, two: Any) -> None:
    out = tmp_path / "out"
    with pytest.raises(
        QuantempoError, match=r"unknown rung 'w9a9'.*\(expected one of: float, plain, w8a8\)"
    ):
        ladder(settings(out), only=("plain", "w9a9"))
    with pytest.raises(QuantempoError, match="no folder"):
        ladder(settings(out, source=str(tmp_path / "nowhere")))
    with pytest.raises(QuantempoError, match="no image folder"):
        ladder(settings(out, tmp_path / "nowhere"))
    for wrong in ({"images": 2}, {"images_full": 5}, {"images": 9, "images_full": 8}):
        with pytest.raises(QuantempoError, match="expected at least"):
            settings(out, **wrong)
    assert not out.exists()
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(QuantempoError, match="not empty and no ladder"):
        ladder(settings(out))
    assert [file.name for file in out.iterdir()] == ["thesis.tex"]
