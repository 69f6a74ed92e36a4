"""Scores of feature sets against closed forms and independent float64 formulas."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.evaluation import scores
from quantempo.evaluation.features import Extractor, Features
from quantempo.evaluation.scores import (
    distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    load_images,
)


def _normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _whitened(n: int, d: int, seed: int) -> torch.Tensor:
    """Return samples whose mean is exactly 0 and whose unbiased covariance is exactly I."""
    x = _normal(n, d, seed)
    x = x - x.mean(0)
    factor = torch.linalg.cholesky(x.T @ x / (n - 1))
    return torch.linalg.solve_triangular(factor, x.T, upper=False).T


def _frechet_by_eigh(a: np.ndarray, b: np.ndarray) -> float:
    """Use tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), which needs symmetric matrices only."""
    mean = np.square(a.mean(0) - b.mean(0)).sum()
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(ca)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cb @ root), 0, None)).sum()
    return float(mean + np.trace(ca) + np.trace(cb) - 2 * cross)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    s1 = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    s2 = torch.tensor([1.5, 1.0, 0.1, 4.0], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.25], dtype=torch.float64)
    a = _whitened(50, 4, 0) * s1
    b = _whitened(70, 4, 1) * s2 + shift
    expected = float((shift**2).sum() + ((s1 - s2) ** 2).sum())
    # Sample moments are exact by construction; float64 rounding only.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 24), (20, 30, 120), (10, 40, 45)])
def test_frechet_equals_an_independent_formula(n: int, m: int, d: int) -> None:
    """The second case is rotated into the span of the samples, the third is singular but not."""
    mix = _normal(d, d, 2)
    a, b = _normal(n, d, 3) @ mix, _normal(m, d, 4) @ mix * 1.3 + 0.5
    expected = _frechet_by_eigh(a.numpy(), b.numpy())
    # Both take square roots of eigenvalues that are zero up to 2^-52: 1e-8 of the trace each.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(300, 16), (16, 300)])
def test_frechet_of_a_set_with_itself_is_zero_and_order_is_free(n: int, d: int) -> None:
    a = _normal(n, d, 5).float() + 3
    b = _normal(n, d, 6).float()
    trace = float(a.var(0).sum())
    assert 0.0 <= frechet_distance(a, a.clone()) < 1e-6 * trace
    assert frechet_distance(a.flip(0), b) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_frechet_keeps_float64_at_a_large_offset() -> None:
    # Features of mean 1e5 and spread 1: float32 sums of squares would lose the covariance whole.
    a, b = _whitened(60, 3, 7) + 1e5, _whitened(60, 3, 8) * 2 + 1e5
    assert frechet_distance(a, b) == pytest.approx(3.0, rel=1e-8)


def _mmd_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    def k(p: np.ndarray, q: np.ndarray) -> float:
        return (float(p @ q) / len(p) + 1) ** 3

    n = len(x)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    xy = sum(k(p, q) for p in x for q in y) / (n * n)
    return xx + yy - 2 * xy


def test_kernel_distance_equals_the_double_sum() -> None:
    x, y = _normal(12, 5, 9), _normal(12, 5, 10) + 0.7
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(_mmd_by_hand(x.numpy(), y.numpy()), rel=1e-12)
    assert std == 0.0
    assert kernel_distance(x.flip(0), y)[0] == pytest.approx(mean, rel=1e-12)


def test_kernel_distance_of_uneven_sets_is_seeded_and_leaves_the_global_generator_alone() -> None:
    x, y = _normal(12, 5, 11), _normal(40, 5, 12)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = kernel_distance(x, y, seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert first == kernel_distance(x, y, seed=3) != kernel_distance(x, y, seed=4)
    assert first[1] > 0


def test_kernel_distance_of_large_sets_is_over_50_subsets_of_1000_from_seed_0() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid", reason="extra 'eval'")
    x, y = _normal(1001, 2, 21), _normal(1002, 2, 22)
    features = torch.nn.Identity()
    features.num_features = 2
    metric = kid.KernelInceptionDistance(features, subsets=50, subset_size=1000)
    metric.update(x, real=True)
    metric.update(y, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = [float(value) for value in metric.compute()]
    # One permutation more or less, another size or seed: the standard deviation shows it.
    assert list(kernel_distance(x, y)) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_certain_and_of_uniform_predictions() -> None:
    # Four classes, each predicted with certainty by a quarter of the images: exp(KL) = 4.
    certain = 60.0 * torch.eye(4, dtype=torch.float64).repeat(5, 1)
    assert inception_score(certain)[0] == pytest.approx(4.0, rel=1e-12)
    mean, std, splits = inception_score(torch.zeros(20, 4))
    assert (mean, std, splits) == (pytest.approx(1.0, rel=1e-12), None, 1)


def test_inception_score_equals_the_formula_in_any_order_and_splits_large_sets() -> None:
    logits = _normal(2100, 6, 13) * 2
    p = torch.softmax(logits[:900], 1).numpy()
    kl = [sum(row[c] * math.log(row[c] / p[:, c].mean()) for c in range(6)) for row in p]
    mean, _, _ = inception_score(logits[:900])
    assert mean == pytest.approx(math.exp(np.mean(kl)), rel=1e-12)
    assert inception_score(logits[:900].flip(0))[0] == pytest.approx(mean, rel=1e-12)
    split = inception_score(logits)
    assert split[2] == 2 and split[1] is not None and split[1] > 0
    assert split == inception_score(logits)


def test_distances_refuse_what_they_cannot_compare() -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(QuantempoError, match="one extractor"):
            distance(_normal(5, 3, 0), _normal(5, 4, 0))
        with pytest.raises(QuantempoError, match="at least 2"):
            distance(_normal(5, 3, 0), _normal(1, 3, 0))
    with pytest.raises(QuantempoError, match="n > 0"):
        inception_score(torch.zeros(0, 5))


def _extractor() -> Extractor:
    names = {"frechet": "fed_x", "spatial": "sfed_x", "kernel": "kid_x", "inception": "is_x"}
    return Extractor("x", "ab" * 32, "a note", lambda images: Features(images, images), names)


def test_distances_have_the_names_of_the_extractor() -> None:
    a = Features(_normal(6, 3, 0), _normal(6, 4, 1), _normal(6, 5, 2))
    b = Features(_normal(8, 3, 3), _normal(8, 4, 4), _normal(8, 5, 5))
    found = distances(_extractor(), a, b)
    assert list(found) == ["fed_x", "sfed_x", "kid_x"]
    assert found["fed_x"] == frechet_distance(a.pooled, b.pooled)
    assert found["sfed_x"] == frechet_distance(a.spatial, b.spatial)
    assert len(distances(_extractor(), Features(a.pooled, a.logits), b)) == 2


def _save(path: Path, size: tuple[int, int], colour: tuple[int, int, int] = (9, 9, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size[1], size[0]), colour).save(path)


def test_folder_is_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for i, name in enumerate(["b/1.png", "a/2.jpg", "a/1.JPEG", "c.png"]):
        _save(tmp_path / name, (8, 12), (i * 40, 0, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    found = load_images(tmp_path)
    assert found.images.shape == (4, 8, 12, 3) and found.images.dtype == np.uint8
    assert (found.source, found.resized) == (tmp_path.name, 0)
    # Sorted: a/1 (80), a/2 (40), b/1 (0), c (120); JPEG may move a value by a few levels.
    np.testing.assert_allclose(found.images[:, 0, 0, 0], [80, 40, 0, 120], atol=4)
    np.testing.assert_array_equal(load_images(tmp_path, limit=2).images, found.images[[0, 2]])


def test_folder_of_mixed_sizes_is_resized_only_when_told(tmp_path: Path) -> None:
    _save(tmp_path / "a.png", (8, 8))
    _save(tmp_path / "b.png", (16, 24), (200, 100, 50))
    with pytest.raises(QuantempoError, match=r"16 x 24 but .* is 8 x 8"):
        load_images(tmp_path)
    found = load_images(tmp_path, size=(8, 8))
    assert found.images.shape == (2, 8, 8, 3) and found.resized == 1
    # A flat colour stays flat under cropping and bicubic resizing.
    assert (found.images[1] == [200, 100, 50]).all()


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(QuantempoError, match="no image folder"):
        load_images(tmp_path / "absent")
    with pytest.raises(QuantempoError, match="no PNG or JPEG"):
        load_images(tmp_path)
    _save(tmp_path / "a.png", (8, 8))
    with pytest.raises(QuantempoError, match="no image folder"):
        load_images(tmp_path / "a.png")
    _save(tmp_path / "b.png", (8, 8))
    with pytest.raises(QuantempoError, match="at least 1"):
        load_images(tmp_path, limit=0)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(QuantempoError, match=r"cannot read image .*c\.png"):
        load_images(tmp_path)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'torchmetrics'"), r"quantempo\[eval\]"),
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision"),
    ],
)
def test_torchmetrics_that_does_not_import(monkeypatch, error, words):
    def fail(name: str):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(QuantempoError, match=words):
        scores.import_torchmetrics("torchmetrics.image.fid")
