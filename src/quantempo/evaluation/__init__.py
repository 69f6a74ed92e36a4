"""Judge images and noise predictions, whoever made them.

Here: `evaluate_pairs`, the one call behind the evaluate stage; paired fidelity, feature extractors
and scores are in the modules. Not here: generating images. Never sees a quantizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from quantempo.evaluation.features import Extractor, Features, extract, load_extractor
from quantempo.evaluation.fidelity import PSNR_CAP_DB, check_pairs, eps_sqnr, psnr_db, ssim
from quantempo.evaluation.scores import (
    compare_sets,
    frechet_distance,
    load_images,
    score_set,
    spread_over_parts,
    tie,
)

__all__ = ["compare_sets", "eps_sqnr", "evaluate_pairs", "load_images", "psnr_db", "ssim"]

# Fewer images than this in each of four parts say nothing about spread.
IMAGES_PER_PART = 8


def evaluate_pairs(
    float_images: np.ndarray,
    other_images: np.ndarray,
    *,
    reference: str | Path | None = None,
    extractor: str = "lite0",
    weights: str | Path | None = None,
    sha256: str | None = None,
) -> dict[str, Any]:
    """Compare the images of a float and a quantized model that started from the same seeds.

    Args:
        float_images, other_images: (n, H, W, 3) or (n, H, W, 1) uint8, same seeds in same places.
        reference: a folder of real images; both sets are then also scored against it.
        extractor, weights, sha256: of `load_extractor`; "lite0" works offline, "inception" gives
            FID and needs weights.

    Returns:
        JSON-ready dict. Paired: psnr_db (list), psnr_db_mean, psnr_db_p05, psnr_db_cap,
        psnr_identical (count), ssim_mean, ssim_p05. Scores under the names of the extractor, X
        standing for lite0: fed_X, sfed_X, kid_X (quantized against float samples), is_X_float,
        is_X_int8; with a reference also fed_X_reference_float, fed_X_reference_int8, the same for
        sfed and kid, and fed_X_reference_tie (see `_tie`). images, extractor, extractor_note, and
        `scores`: one dict per score with its whole provenance.

    Raises:
        QuantempoError: images that cannot be paired, fewer than 2, or what `load_extractor` and
            `load_images` raise.
    """
    check_pairs(float_images, other_images)
    network = load_extractor(extractor, weights, sha256)
    result = _paired(float_images, other_images) | {
        "images": len(float_images),
        "extractor": network.name,
        "extractor_note": network.note,
    }
    sets = {"float": extract(network, float_images), "int8": extract(network, other_images)}
    scores = compare_sets(network, sets["int8"], sets["float"], ("int8", "float samples"))
    result |= {row["name"]: row["value"] for row in scores}
    for name, features in sets.items():
        row = score_set(network, features, name)
        result[f"{row['name']}_{name}"] = row["value"]
        scores.append(row)
    if reference is not None:
        images = load_images(reference, (float_images.shape[1], float_images.shape[2]))
        real = extract(network, images.images)
        for name, features in sets.items():
            rows = compare_sets(network, features, real, (name, images.source))
            for row in rows:
                row["reference_resized"] = images.resized
                result[f"{row['name']}_reference_{name}"] = row["value"]
            scores += rows
        result |= _tie(network, sets, real)
    return result | {"scores": scores}


def _paired(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    psnr, similarity = psnr_db(first, second), ssim(first, second)
    identical = (first == second).reshape(len(first), -1).all(axis=1)
    return {
        "psnr_db_mean": float(psnr.mean()),
        "psnr_db_p05": float(np.percentile(psnr, 5)),
        "psnr_db": psnr.tolist(),
        "psnr_db_cap": PSNR_CAP_DB,
        "psnr_identical": int(identical.sum()),
        "ssim_mean": float(similarity.mean()),
        "ssim_p05": float(np.percentile(similarity, 5)),
    }


def _tie(extractor: Extractor, sets: dict[str, Features], real: Features) -> dict[str, Any]:
    """Return the spread of the Frechet distance to the reference over 4 parts, and the verdict."""
    parts = 4
    key = f"{extractor.score_names['frechet']}_reference"
    if len(sets["float"]) < parts * IMAGES_PER_PART:
        return {f"{key}_tie": None}

    def distance(part: Features) -> float:
        return frechet_distance(part.pooled, real.pooled)

    found = {name: spread_over_parts(distance, features, parts) for name, features in sets.items()}
    result: dict[str, Any] = {f"{key}_{name}_std": value.std for name, value in found.items()}
    return result | {f"{key}_tie": tie(found["float"], found["int8"])}
