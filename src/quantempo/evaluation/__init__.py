"""Judge images and noise predictions, whoever made them; never sees a quantizer."""

from pathlib import Path
from typing import Any

import numpy as np

from quantempo.evaluation.features import extract, load_extractor
from quantempo.evaluation.fidelity import check_pairs, eps_sqnr, paired, psnr_db, sqnr_pairs, ssim
from quantempo.evaluation.scores import compare_sets, load_images, reference_tie, score_set

__all__ = [
    "compare_sets", "eps_sqnr", "evaluate_outputs", "evaluate_pairs", "load_images", "psnr_db",
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
    motion = sqnr_pairs(*(np.diff(films.astype(np.float32), axis=1) for films in (first, other)))
    return result | {"psnr_db_by_frame": by_frame, "motion_sqnr_db": float(motion.mean())}


def evaluate_pairs(
    float_images: np.ndarray, other_images: np.ndarray, *, reference: str | Path | None = None,
    extractor: str = "lite0", weights: str | Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the images of a float and a quantized model that started from the same seeds.

    reference: a folder of real images, against which both sets are then also scored; extractor,
    weights: of `load_extractor`; "lite0" works offline, "inception" gives FID and needs weights.
    Returns a dict for JSON. Paired: see `paired`. Scores under the names of the extractor, X
    standing for lite0: fed_X, sfed_X, kid_X (quantized against float samples), is_X_float,
    is_X_int8; with a reference also fed_X_reference_float, fed_X_reference_int8, the same for sfed
    and kid, and fed_X_reference_tie (see `reference_tie`). images, extractor, extractor_note, and
    `scores`: one dict per score with its whole provenance.
    Raises QuantempoError: images not in pairs, fewer than 2, see `load_extractor`, `load_images`.
    """
    check_pairs(float_images, other_images)
    network = load_extractor(extractor, weights)
    result = paired(float_images, other_images) | {
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
        result |= reference_tie(network, sets, real)
    return result | {"scores": scores}
