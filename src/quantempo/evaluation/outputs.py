"""Judge what two models made of the same seeds, pictures or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quantempo.evaluation import evaluate_pairs
from quantempo.evaluation.fidelity import SQNR_CAP_DB, sqnr_db

__all__ = ["evaluate_outputs"]


def evaluate_outputs(first: np.ndarray, other: np.ndarray, **how: Any) -> dict[str, Any]:
    """Compare what a float and a quantized model made from the same seeds: `how` as evaluate_pairs.

    Pictures (n, H, W, C) uint8 as there. Films (n, F, H, W, C) uint8 frame by frame likewise, and
    psnr_db_by_frame (mean of films) and motion_sqnr_db, the SQNR of what changes from frame to
    frame (mean of films). Others (n, ...): sqnr_db of each pair, mean and p05.
    """
    if first.dtype != np.uint8:
        found = _sqnr(first, other)
        mean, p05 = float(found.mean()), float(np.percentile(found, 5))
        return {"sqnr_db": found.tolist(), "sqnr_db_mean": mean, "sqnr_db_p05": p05}
    if first.ndim == 4:
        return evaluate_pairs(first, other, **how)
    result = evaluate_pairs(*(f.reshape(-1, *f.shape[2:]) for f in (first, other)), **how)
    by_frame = np.reshape(result["psnr_db"], first.shape[:2]).mean(axis=0).tolist()
    motion = _sqnr(*(np.diff(films.astype(np.float32), axis=1) for films in (first, other)))
    return result | {"psnr_db_by_frame": by_frame, "motion_sqnr_db": float(motion.mean())}


def _sqnr(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the SQNR of each pair; that of nothing but noise is minus the cap."""
    pairs = zip(torch.from_numpy(first).split(1), torch.from_numpy(other).split(1), strict=True)
    return np.clip([sqnr_db(*pair) for pair in pairs], -SQNR_CAP_DB, SQNR_CAP_DB)
