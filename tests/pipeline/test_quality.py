"""Sampling into folders, pairs of images, and the figures of a run folder."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.models.sampling import run_pipeline
from quantempo.pipeline import quality
from quantempo.pipeline import stages as pipeline
from tests.packed import packed, saved

HOW: dict[str, Any] = {"steps": 3, "batch_size": 2}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return quality.open_model(packed("unconditional").folder, engine="simulated")


def test_images_are_named_by_seed_and_are_those_of_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    images = quality.sample(pipe, tmp_path / "out", [7, 3, 5], **HOW)
    names = {"3.png", "5.png", "7.png", "settings.json"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    assert np.array_equal(images, run_pipeline(pipe, [7, 3, 5], **HOW))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/3.png")), images[1])


def test_a_killed_run_makes_only_what_is_missing(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = quality.sample(pipe, out, range(4), **HOW)
    (out / "2.png").unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*.png")}
    again = quality.sample(pipe, out, range(4), **HOW)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    # One image instead of a batch of two may round one level differently.
    assert np.abs(again.astype(int) - whole.astype(int)).max() <= 1
    assert np.array_equal(np.delete(again, 2, 0), np.delete(whole, 2, 0))


def test_labels_stay_with_their_seeds_when_a_run_resumes(tmp_path: Path) -> None:
    model = quality.open_model(packed("dit").folder, engine="simulated")
    call = {"class_labels": [1, 2, 3], "guidance_scale": 1.0}
    whole = quality.sample(model, tmp_path, range(5), call=call, **HOW)
    for seed in (1, 3):
        (tmp_path / f"{seed}.png").unlink()
    again = quality.sample(model, tmp_path, range(5), call=call, **HOW)
    assert np.abs(again.astype(int) - whole.astype(int)).max() <= 1


def test_images_of_other_settings_are_refused_and_replaced_by_force(pipe, tmp_path):
    out = tmp_path / "out"
    first = quality.sample(pipe, out, [1, 2], **HOW)
    with pytest.raises(QuantempoError, match="'num_inference_steps' cannot be given"):
        quality.sample(pipe, out, [1], call={"num_inference_steps": 2}, **HOW)
    changes: list[dict[str, Any]] = [{"steps": 2}, {"identity": "another model"}]
    for change in changes:
        with pytest.raises(QuantempoError, match="another model or other settings"):
            quality.sample(pipe, out, [1, 2], **{**HOW, **change})
    assert np.array_equal(quality.sample(pipe, out, [1, 2], **HOW), first)
    second = quality.sample(pipe, out, [1], **{**HOW, "steps": 2}, force=True)
    assert not np.array_equal(second[0], first[0])
    assert not (out / "2.png").exists()


def test_a_folder_of_something_else_is_refused_and_untouched(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_text("precious")
    for force in (False, True):
        with pytest.raises(QuantempoError, match="not empty"):
            quality.sample(pipe, tmp_path, [1], **HOW, force=force)
    assert [f.read_text() for f in tmp_path.iterdir()] == ["precious"]


def test_a_float_model_takes_no_engine() -> None:
    for how in ({"engine": "onednn"}, {"packed": "unpack"}):
        with pytest.raises(QuantempoError, match="float model; leave out --engine, --packed"):
            quality.open_model(saved("unconditional"), **how)
    with pytest.raises(QuantempoError, match=r"onedn.*onednn"):
        quality.open_model(packed("unconditional").folder, engine="onedn")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(packed("unconditional").run, run)
    session = pipeline.reopen(run)
    return run, quality.evaluate(session, images=3, engine="simulated", **HOW)


def test_metrics_hold_what_the_report_and_the_issue_ask_for(evaluated: Any) -> None:
    run, metrics = evaluated
    assert pipeline.reopen(run).run.read_json("metrics.json") == metrics
    assert {
        "psnr_db_mean", "psnr_db_p05", "ssim_mean", "fed_lite0", "engine", "int8_mac_share",
        "bytes_float32", "bytes_packed", "calibration_seconds", "float_layers", "seeds", "steps",
    } <= set(metrics)  # fmt: skip
    assert metrics["engine"] == "simulated" and metrics["seeds"] == [0, 1, 2]
    assert metrics["sampler"] == "DDIMScheduler"


def test_psnr_is_that_of_the_pictures_on_disk(evaluated: Any) -> None:
    run, metrics = evaluated
    for i, got in enumerate(metrics["psnr_db"]):
        pair = [
            np.asarray(Image.open(run / f"samples/{kind}/{i}.png"), dtype=np.float64)
            for kind in ("float", "int8")
        ]
        wanted = 10 * np.log10(255**2 / np.mean((pair[0] - pair[1]) ** 2))
        assert got == pytest.approx(wanted, abs=1e-6)


def test_the_summary_counts_bytes_and_work(evaluated: Any) -> None:
    run, metrics = evaluated
    rows = pipeline.reopen(run).run.read_json("layers.json")
    layers = [row for row in rows if row["kind"] != "matmul"]
    integer = sum(row["macs"] for row in layers if row["reason"] is None)
    assert metrics["int8_mac_share"] == pytest.approx(integer / sum(r["macs"] for r in layers))
    assert 0.9 < metrics["int8_mac_share"] < 1
    net = quality.open_model(saved("unconditional")).unet
    assert metrics["bytes_float32"] == sum(p.nbytes for p in net.parameters())
    files = (run / "packed").rglob("*.safetensors")
    assert metrics["bytes_packed"] == sum(file.stat().st_size for file in files)
    assert {row["name"] for row in metrics["float_layers"]} == {
        row["name"] for row in rows if row["reason"]
    }


def test_the_error_of_eps_is_there_for_every_part_of_time(evaluated: Any) -> None:
    table = evaluated[1]["eps_sqnr_db"]
    assert len(table["t"]) == len(table["sqnr_db"]) >= 2
    assert all(10 < value < 80 for value in table["sqnr_db"])
