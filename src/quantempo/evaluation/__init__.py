"""Judge images and noise predictions, whoever made them; never sees a quantizer."""

from pathlib import Path
from typing import Any

import numpy as np

from quantempo.evaluation.features import load_extractor
from quantempo.evaluation.fidelity import (
    PSNR_CAP_DB,
    check_pairs,
    eps_sqnr,
    psnr_db,
    sqnr_pairs,
    ssim,
)
from quantempo.evaluation.judge import judge
from quantempo.evaluation.learned import PAIRED, Tools, load_tools
from quantempo.evaluation.scores import load_images

__all__ = [
    "eps_sqnr", "evaluate_outputs", "evaluate_pairs", "load_images", "load_tools", "psnr_db",
    "ssim",
]  # fmt: skip


def evaluate_outputs(first: np.ndarray, other: np.ndarray, **how: Any) -> dict[str, Any]:
    """Compare what a float and a quantized model made from the same seeds: `how` as evaluate_pairs.

    Pictures (n, H, W, C) uint8 as there. Films (n, F, H, W, C) uint8 frame by frame likewise, and
    psnr_db_by_frame (mean of films) and motion_sqnr_db, the SQNR of what changes from frame to
    frame (mean of films). Others (n, ...): sqnr_db of each pair, mean and p05.
    """
    if first.dtype != np.uint8:
        found = sqnr_pairs(first, other)
        mean, p05 = float(found.mean()), float(np.percentile(found, 5))
        return {"sqnr_db": found.tolist(), "sqnr_db_mean": mean, "sqnr_db_p05": p05}
    if first.ndim == 4:
        return evaluate_pairs(first, other, **how)
    result = evaluate_pairs(*(f.reshape(-1, *f.shape[2:]) for f in (first, other)), **how)
    by_frame = np.reshape(result["psnr_db"], first.shape[:2]).mean(axis=0).tolist()
    # Frames of one film are not independent.
    result.pop("psnr_db_interval", None)
    motion = sqnr_pairs(*(np.diff(films.astype(np.float32), axis=1) for films in (first, other)))
    return result | {"psnr_db_by_frame": by_frame, "motion_sqnr_db": float(motion.mean())}


def evaluate_pairs(
    float_images: np.ndarray, other_images: np.ndarray, *, reference: str | Path | None = None,
    extractor: str = "lite0", weights: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the images of a float and a quantized model that started from the same seeds.

    reference: a folder of real images, against which both sets are then also scored; extractor,
    weights: of `load_extractor`; "lite0" works offline, "inception" gives FID and needs weights.
    Returns a dict for JSON. Paired: psnr_db_mean, psnr_db_p05, psnr_db of each (at most
    psnr_db_cap), psnr_db_interval (95 %, from 8 images on), psnr_identical, ssim_mean, ssim_p05.
    Scores under the names of the extractor, X standing for lite0: fed_X, sfed_X, kid_X (quantized
    against float samples), is_X_float, is_X_int8; with a reference also fed_X_reference_float,
    fed_X_reference_int8, the same for sfed and kid, and fed_X_reference_tie (the verdict of
    `judge`, None of too few images). images, extractor, extractor_note, and `scores`: one dict per
    score with what it is of.
    Raises QuantempoError: images not in pairs, fewer than 2, see `load_extractor`, `load_images`.
    """
    check_pairs(float_images, other_images)
    network, size = load_extractor(extractor, weights), float_images.shape[1:3]
    real = None if reference is None else load_images(reference, size)
    sets, data = {"float": float_images, "int8": other_images}, real and real.images
    found = judge(sets, Tools(PAIRED, [network], {}), data=data)
    scores, same = found["scores"], (float_images == other_images).reshape(len(other_images), -1)
    psnr, count = scores["psnr"]["int8"], len(float_images)
    result: dict[str, Any] = {"psnr_db": psnr["values"], "psnr_db_cap": PSNR_CAP_DB}
    for name, key in {"psnr": "psnr_db_mean", "psnr_p05": "psnr_db_p05", "ssim": "ssim_mean",
                      "ssim_p05": "ssim_p05"}.items():  # fmt: skip
        result[key] = scores[name]["int8"]["value"]
    result |= {"psnr_db_interval": [psnr["low"], psnr["high"]]} if "low" in psnr else {}
    result |= {"psnr_identical": int(same.all(axis=1).sum()), "images": count, "scores": []}
    result |= {"extractor": network.name, "extractor_note": network.note}
    about = {"extractor": network.name, "weights_sha256": network.sha256, "images": count}
    for score, rows in list(scores.items())[4:]:
        name, end = score.removesuffix("_data"), "_reference" * score.endswith("_data")
        to: tuple[str | None, int] = (None, 0) if "float" in rows else ("float samples", count)
        to = (real.source, len(real.images)) if end and real is not None else to
        for of, row in rows.items():
            result[f"{name}{end}_{of}" if "float" in rows else name] = row["value"]
            row = {"name": name, "set": of, "value": row["value"], **about, "note": network.note}
            result["scores"].append(row | {"reference": to[0], "reference_images": to[1]})
    if real is not None:
        fed = network.score_names["frechet"]
        words = {row["score"]: row["verdict"] for row in found["verdicts"]}
        tie = words[f"{fed}_data"] == "tie" if f"{fed}_data" in words else None
        result[f"{fed}_reference_tie"] = tie
    return result
