"""`compare`: models by images of equal seeds, the gate, resuming, what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.evaluation import psnr_db
from quantempo.pipeline.compare import compare
from tests.packed import packed, saved
from tests.tiny import tiny_unconditional

HOW: dict[str, Any] = {"steps": 3, "images": 8, "batch_size": 8, "engine": "simulated"}


@pytest.fixture(scope="module")
def models() -> list[str]:
    other = packed("unconditional")
    return [f"float={saved('unconditional')}", f"ours={other.run}", f"same={other.folder}"]


@pytest.fixture(scope="module")
def compared(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, compare(models, out, gate="psnr >= 1, ssim_p05>-1", **HOW)


def test_scores_are_those_of_the_images_that_are_kept(compared: tuple[Path, Any]) -> None:
    out, found = compared
    images = [
        np.stack([np.asarray(Image.open(out / name / f"{seed}.png")) for seed in range(8)])
        for name in ("float", "ours")
    ]
    score = found["scores"]["psnr"]["ours"]
    assert score["values"] == psnr_db(*images).tolist()
    assert score["low"] <= score["value"] <= score["high"]
    assert found["scores"]["psnr"].keys() == {"ours", "same"}
    rows = [row for row in found["verdicts"] if row["score"] == "psnr"]
    assert [(row["of"], row["against"], row["verdict"]) for row in rows] == [
        ("same", "ours", "tie")
    ]
    assert found["passed"] and [len(rules) for rules in found["gate"]["models"].values()] == [2, 2]
    assert set(found["missing"]) >= {"lpips", "dists", "clip", "fid"}
    assert {"fed_lite0", "fed_resnet", "kid_resnet"} <= set(found["scores"])


def test_a_run_resumes_and_a_later_gate_is_named(
    compared: tuple[Path, Any], models: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    out, _ = compared
    (out / "ours/3.png").unlink()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("*/*.png")}
    again = compare(models, out, gate="psnr >= 1, ssim_p05>-1", **HOW)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert not again["gate"]["after_images"] and not caplog.records
    later = compare(models, out, gate="psnr>=99", **HOW)
    assert later["gate"]["after_images"] and not later["passed"]
    assert "was given when images were there; before them: 'psnr >= 1, " in caplog.text


def test_the_exit_code_of_a_gate_that_is_not_met_is_one(
    cli: Any, compared: tuple[Path, Any], models: list[str]
) -> None:
    sampling = ("--images", 8, "--steps", 3, "--batch-size", 8, "--engine", "simulated")
    for gate, code, words in (("psnr>=99", 1, "gate: same: psnr >= 99: FAILED ("), ("x", 2, "")):
        result = cli("compare", *models, "--out", compared[0], *sampling, "--gate", gate)
        assert result.code == code and words in result.out
        assert ("psnr: same against ours: tie, +0 [" in result.out) == (code == 1)
    assert result.err.startswith("error: got the gate 'x'; expected")


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("psnr=40", "got the gate 'psnr=40'; expected"),
        ("psnr>=40,", "got the gate ''"),
        ("pnsr>=40", "did you mean 'psnr'"),
        ("sfed_resnet<1", "did you mean 'fed_resnet'"),
        ("fed_lite0_data<1", "got a gate on the score 'fed_lite0_data'"),
        ("lpips<=0.05", "the gate needs lpips: give --weights lpips=alexnet-owt-7be5be79.pth"),
    ],
)
def test_a_gate_that_cannot_be_read_makes_no_folder(models, tmp_path, gate, words):
    with pytest.raises(QuantempoError, match=words):
        compare(models, tmp_path / "out", gate=gate, **HOW)
    assert not (tmp_path / "out").exists()


def test_models_that_are_no_pairs_are_refused(models: list[str], tmp_path: Path) -> None:
    tiny_unconditional(size=8).save_pretrained(tmp_path / "small")
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (models[:1], {}, "got 1 models"),
        (models[:2], {"images": 7}, "got 7 images; intervals need at least 8"),
        ([models[0], models[0]], {}, "'float' is taken"),
        ([models[0], str(tmp_path / "small")], {}, r"small: size \[8, 8\], but .* has \[16, 16\]"),
        ([models[0], str(saved("dit"))], {"class_labels": [1]}, "takes no argument 'class_labels'"),
        ([models[0], str(saved("text"))], {}, r"text: takes \['prompt'.*, but .* has \[\]"),
        ([models[0], str(tmp_path / "no")], {}, "no folder"),
        ([models[0], str(tmp_path / "small")], {"engine": "onednn"}, "got --engine onednn, but"),
    ]
    for number, (some, call, words) in enumerate(cases):
        with pytest.raises(QuantempoError, match=words):
            how = {**HOW, "engine": "auto"} | {
                k: call.pop(k) for k in ("images", "engine") if k in call
            }
            compare(some, tmp_path / str(number), call=call, **how)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious").touch()
    with pytest.raises(QuantempoError, match="is not empty"):
        compare(models, tmp_path / "mine", **HOW)
