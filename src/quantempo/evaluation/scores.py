"""Scores of image sets: Frechet and kernel distances, inception score, and their spread."""

import importlib
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from quantempo.errors import QuantempoError
from quantempo.evaluation.features import Extractor, Features

__all__ = [
    "ImageSet", "distances", "frechet_distance", "import_torchmetrics", "inception_score",
    "kernel_distance", "load_images",
]  # fmt: skip

SUFFIXES = (".png", ".jpg", ".jpeg")
KERNEL_SUBSET = 1000
KERNEL_SUBSETS = 50
IMAGES_PER_SPLIT = 1000


def import_torchmetrics(module: str) -> Any:
    """Import a module of torchmetrics; QuantempoError where it, or its torchvision, fails."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        text = f"image scores need torchmetrics ({error})"
        raise QuantempoError(f"{text}; pip install 'quantempo[eval]'") from error
    except (ImportError, RuntimeError) as error:
        raise QuantempoError(
            f"torchmetrics does not import here ({error}); uninstall torchvision and "
            "torch-fidelity, or install the torchvision built for this torch"
        ) from error


def _metric(module: str, name: str, features: Tensor, **settings: Any) -> Any:
    kind = getattr(import_torchmetrics(f"torchmetrics.image.{module}"), name)
    with warnings.catch_warnings():
        # That features are kept in memory is the point here: they are there already.
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        # float64 statistics: metric states follow the features, which come in double.
        # Not synchronised: processes of one group score images of their own.
        # Features are computed already, so that each image is run once.
        network: Any = nn.Identity()
        network.num_features = features.shape[1]
        settings |= {"feature": network, "sync_on_compute": False}
        return kind(**settings).to(features.device)


def _check_sets(first: Tensor, second: Tensor) -> None:
    """Raise QuantempoError unless these are features (n, D) and (m, D), n and m at least 2."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        text = f"got feature sets of shapes {tuple(first.shape)} and {tuple(second.shape)}"
        raise QuantempoError(f"{text}; expected (n, D) and (m, D) from one extractor")
    if min(len(first), len(second)) < 2:
        text = "a distance of image sets needs at least 2 images in each"
        raise QuantempoError(f"{text}; got {len(first)} and {len(second)}")


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Compute the Frechet distance between Gaussians fitted to two feature sets.

    d = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), unbiased covariances.

    Sets are (n, D) and (m, D), any float dtype. Those with n + m < D are first rotated into their
    common span: rotations do not change d, and the eigenvalue problem shrinks from D to n + m.
    Error: float64; about 1e-6 of the trace for singular covariances (n <= D). The value itself is
        biased upwards for small n; compare only equal n and m.
    Source: Heusel et al., 2017, https://arxiv.org/abs/1706.08500, equation 6.
    """
    _check_sets(first, second)
    a, b = first.double(), second.double()
    # Distances do not change when both sets move; a centred origin keeps digits in the sums.
    origin = torch.cat([a, b]).mean(dim=0)
    a, b = a - origin, b - origin
    if len(a) + len(b) < a.shape[1]:
        basis = torch.linalg.qr(torch.cat([a, b]).T).Q
        a, b = a @ basis, b @ basis
    metric = _metric("fid", "FrechetInceptionDistance", a)
    metric.update(a, real=True)
    metric.update(b, real=False)
    # Rounding can leave a distance of equal sets a hair below zero.
    return max(0.0, float(metric.compute()))


def kernel_distance(first: Tensor, second: Tensor, seed: int = 0) -> tuple[float, float]:
    """Compute the kernel distance (unbiased MMD^2, cubic kernel) of two feature sets.

    k(x, y) = (x.y / D + 1)^3; (mean, standard deviation) over 50 subsets of 1000 images, which
    `seed` draws, or (the one value of all, 0) when both sets have the same size of at most 1000.
    Source: Binkowski et al., 2018, https://arxiv.org/abs/1801.01401
    """
    _check_sets(first, second)
    size = min(KERNEL_SUBSET, len(first), len(second))
    subsets = 1 if size == len(first) == len(second) else KERNEL_SUBSETS
    metric = _metric("kid", "KernelInceptionDistance", first, subsets=subsets, subset_size=size)
    metric.update(first.double(), real=True)
    metric.update(second.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float | None, int]:
    """Compute exp(E_x KL(p(y|x) || p(y))) from class logits (n, K), n > 0.

    They are split at random into one part per 1000 images, at most 10, as published scores do;
    small sets stay whole. Returns (mean, std over the splits or None for one, their number).
    Source: Salimans et al., 2016, https://arxiv.org/abs/1606.03498
    """
    if logits.ndim != 2 or len(logits) == 0:
        raise QuantempoError(f"got logits of shape {tuple(logits.shape)}; expected (n, K), n > 0")
    splits = max(1, min(10, len(logits) // IMAGES_PER_SPLIT))
    metric = _metric("inception", "InceptionScore", logits, splits=splits)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # One split has no spread; torch warns about the NaN that becomes None below.
        warnings.filterwarnings("ignore", message=".*degrees of freedom.*")
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), None if splits == 1 else float(std), splits


def distances(extractor: Extractor, samples: Features, other: Features) -> dict[str, float]:
    """Return each distance of samples to another set under its name with this extractor."""
    label, a, b = extractor.score_names, samples, other
    found = {label["frechet"]: frechet_distance(a.pooled, b.pooled)}
    if a.spatial is not None and b.spatial is not None:
        found[label["spatial"]] = frechet_distance(a.spatial, b.spatial)
    return found | {label["kernel"]: kernel_distance(a.pooled, b.pooled)[0]}


class ImageSet(NamedTuple):
    """Hold images (n, H, W, 3) uint8, the name of their folder, and how many were resized."""

    images: np.ndarray
    source: str
    resized: int


def load_images(
    folder: str | Path, size: tuple[int, int] | None = None, limit: int | None = None
) -> ImageSet:
    """Load the PNG and JPEG images of a folder and its subfolders, in sorted path order.

    Those of another `size` (H, W) are cropped centrally to its aspect, resized (bicubic,
    antialiased) and counted; None: all must have one size. `limit`: that many, evenly spread.
    Raises QuantempoError: no such folder, no images in it, one that cannot be read, several sizes.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    root = Path(folder)
    if not root.is_dir():
        raise QuantempoError(f"no image folder {root}; pass a folder with PNG or JPEG files")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise QuantempoError(f"no PNG or JPEG images in {root} or its subfolders")
    if limit is not None and limit < len(paths):
        if limit < 1:
            raise QuantempoError(f"got a limit of {limit} images; expected at least 1")
        paths = [paths[i * len(paths) // limit] for i in range(limit)]
    arrays: list[np.ndarray] = []
    resized = 0
    for path in paths:
        try:
            with Image.open(path) as stored:
                image = stored.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise QuantempoError(f"cannot read image {path} ({error}); delete it") from error
        found = (image.height, image.width)
        if size is None and arrays and found != arrays[0].shape[:2]:
            raise QuantempoError(
                f"{path} is {found[0]} x {found[1]} but {paths[0]} is {arrays[0].shape[0]} x "
                f"{arrays[0].shape[1]}; pass the size (H, W) to which all should be brought"
            )
        if size is not None and found != size:
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
            resized += 1
        arrays.append(np.asarray(image))
    return ImageSet(np.stack(arrays), root.name, resized)
