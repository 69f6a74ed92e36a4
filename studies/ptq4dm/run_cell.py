"""Run one cell: calibrate, sample, measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from quantempo.evaluation import eps_sqnr, psnr_db, ssim
from quantempo.evaluation.features import Features
from quantempo.evaluation.fidelity import SQNR_CAP_DB
from quantempo.evaluation.scores import distances, frechet_distance, inception_score
from quantempo.models.layers import denoiser_of
from quantempo.quantized import plan_layers
from quantempo.run_folder import atomic_path, read_tensors
from studies.ptq4dm.cells import Cell
from studies.ptq4dm.networks import Frontend
from studies.ptq4dm.tools import IMAGES, STRIDE, Tools

__all__ = ["pooled", "run_cell"]

# Images in the strip that a cell leaves for looking.
SHOWN = 8
# Cells of fewer images are not pooled over seeds.
POOLED_FROM = 300


def run_cell(tools: Tools, cell: Cell) -> dict[str, Any]:
    """Return the results of a cell as JSON types; writes its strip of images and its features.

    Of the results, psnr_db and ssim are means over pairs of images, identical the share of images
    equal in every bit, sqnr_db the mean over steps of the SQNR of the network's output on float
    trajectories; fed_float is the Frechet distance to the float images of the same seeds (for the
    float model to those of another repetition, the distance that seeds alone make); fed_data,
    sfed_data and kid_data are distances to the reference images, is a score of the images alone.
    """
    start = time.perf_counter()
    exact = tools.float_images(cell.sampler, cell.repetition, cell.images)
    key = cell.key(tools.identity)
    result: dict[str, Any] = {"images": len(exact), "curve": None}
    if cell.recipe is None:
        images, result["float_layers"] = exact, len(tools.networks.sites)
    else:
        pipe = tools.quantized(cell)
        first = IMAGES + cell.repetition * STRIDE
        images = tools.sample(pipe, cell.sampler, first, cell.images)
        result |= _paired(exact, images, tools.settings.device) | {
            "float_layers": _float_layers(tools, cell)
        }
        result["curve"] = _curve(tools, cell, denoiser_of(pipe)[1])
        result["sqnr_db"] = float(np.mean(result["curve"]["sqnr_db"]))
        if min(result["curve"]["sqnr_db"]) == SQNR_CAP_DB:
            # Nothing quantized in the network itself.
            result |= {"curve": None, "sqnr_db": None}
    features = tools.features(images)
    result |= _scores(tools, cell, features)
    result["picture"] = _picture(tools.settings.out, key, images) if not cell.repetition else None
    if len(images) >= POOLED_FROM:
        _keep(tools.settings.out / "features" / f"{key}.safetensors", features)
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def _float_layers(tools: Tools, cell: Cell) -> int:
    assert cell.recipe is not None
    if cell.graph == "float":
        return len(tools.networks.sites)
    if cell.graph == "output":
        return sum(site.role == "attention" for site in tools.networks.sites)
    plans = plan_layers(tools.networks.sites, cell.recipe)
    return sum(plan.kind != "int8" for plan in plans)


def _paired(exact: np.ndarray, images: np.ndarray, device: str) -> dict[str, Any]:
    equal = (exact == images).reshape(len(exact), -1).all(axis=1)
    return {
        "psnr_db": float(psnr_db(exact, images).mean()),
        "ssim": float(ssim(exact, images, device=device).mean()),
        "identical": float(equal.mean()),
    }


def _curve(tools: Tools, cell: Cell, network: Frontend) -> dict[str, list[float]]:
    data = tools.probe(cell.sampler)
    # What the float network says to them is the same for every cell of a sampler.
    known = iter(tools.probe_outputs(cell.sampler, data))
    network.compiled = False
    try:
        here = network.device
        return eps_sqnr(lambda **arguments: next(known).to(here), network, tools.calls(data))
    finally:
        network.compiled = tools.settings.compiled and network.fast is not None


def _scores(tools: Tools, cell: Cell, features: Features) -> dict[str, Any]:
    beside = cell.repetition if cell.recipe is not None else cell.beside
    result: dict[str, Any] = {}
    if beside is not None:
        exact = tools.float_features(cell.sampler, beside, cell.images)
        result["fed_float"] = frechet_distance(features.pooled, exact.pooled)
    label = tools.extractor.score_names
    short = {"frechet": "fed_data", "spatial": "sfed_data", "kernel": "kid_data"}
    names = {label[kind]: name for kind, name in short.items()}
    found = distances(tools.extractor, features, tools.data_features)
    result |= {names[name]: value for name, value in found.items()}
    result["is"] = inception_score(features.logits)[0]
    return result


def _picture(out: Path, key: str, images: np.ndarray) -> str:
    strip = np.concatenate(list(images[:SHOWN]), axis=1)
    path = out / "pictures" / f"{key}.png"
    with atomic_path(path) as temporary:
        Image.fromarray(strip.squeeze()).save(temporary, format="PNG")
    return f"pictures/{key}.png"


def _keep(path: Path, features: Features) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        save_file({"pooled": features.pooled.cpu().contiguous()}, temporary)


def pooled(tools: Tools, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """Return the Frechet distances of a row's images of all repetitions together, or None.

    None where the images are too few or a repetition is missing.
    """
    paths = [
        tools.settings.out / "features" / f"{cell.key(tools.identity)}.safetensors"
        for cell in cells
    ]
    if not all(path.is_file() for path in paths):
        return None
    device = tools.settings.device
    features = torch.cat([read_tensors(path)[0]["pooled"] for path in paths]).to(device)
    result = {
        "images": len(features),
        "fed_data": frechet_distance(features, tools.data_features.pooled),
    }
    if cells[0].recipe is not None:
        exact = [tools.float_features(c.sampler, c.repetition, c.images).pooled for c in cells]
        result["fed_float"] = frechet_distance(features, torch.cat(exact))
    return result
