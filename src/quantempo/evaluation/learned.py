"""What sets of images are scored by: pairs as they are, networks whose weights a user gives."""

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from quantempo.errors import QuantempoError
from quantempo.evaluation.features import EXTRACTORS, Extractor, check_weights, load_extractor
from quantempo.evaluation.fidelity import psnr_db, ssim
from quantempo.evaluation.scores import import_torchmetrics
from quantempo.registry import check_known

__all__ = ["LEARNED", "PAIRED", "Measure", "Tools", "load_tools"]


class Measure(NamedTuple):
    """A score of each image: `values(reference, images, prompts)` (n,).

    higher: more is better; alone: of an image by itself, so that the reference has one too.
    """

    values: Callable[[np.ndarray, np.ndarray, list[str]], np.ndarray]
    higher: bool = True
    alone: bool = False
    sha256: str = ""


class Tools(NamedTuple):
    """What sets are scored by, and what would be: name -> what it needs."""

    measures: dict[str, Measure]
    extractors: list[Extractor]
    missing: dict[str, str]


PAIRED = {
    "psnr": Measure(lambda first, other, _: psnr_db(first, other)),
    "ssim": Measure(lambda first, other, _: ssim(first, other)),
}


@contextmanager
def _downloaded(path: Path, name: str) -> Iterator[None]:
    """Let torchvision find a file where it keeps what it has downloaded."""
    # It unpickles freely; this proves first that the file holds tensors only.
    torch.load(path, map_location="cpu", weights_only=True)
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / name).symlink_to(path.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


def _lpips(path: Path) -> Callable[..., Any]:
    library = import_torchmetrics("torchmetrics.image.lpip")
    with _downloaded(path, LEARNED["lpips"][0]):
        metric = library.LearnedPerceptualImagePatchSimilarity("alex", normalize=True)
    return lambda first, other, _: metric(first / 255, other / 255)


def _dists(path: Path) -> Callable[..., Any]:
    library = import_torchmetrics("torchmetrics.functional.image.dists")
    # The network alone: the function around it loads it again in each call.
    with _downloaded(path, LEARNED["dists"][0]):
        network = library.DISTSNetwork()
    return lambda first, other, _: network(first / 255, other / 255)


def _clip(path: Path) -> Callable[..., Any]:
    from transformers import CLIPModel, CLIPProcessor

    library = import_torchmetrics("torchmetrics.multimodal.clip_score")
    model, processor = CLIPModel.from_pretrained(path), CLIPProcessor.from_pretrained(path)
    for name in ("get_image_features", "get_text_features"):
        # transformers 5 returns more than the tensor that torchmetrics takes.
        own = getattr(model, name)
        setattr(model, name, lambda *a, own=own: getattr(f := own(*a), "pooler_output", f))
    metric = library.CLIPScore(lambda: (model, processor))
    return lambda _, other, prompt: metric(other, [prompt])


# Name -> its file, where that is, the head of its SHA-256, what reads it.
_TORCH = "https://download.pytorch.org/models"
LEARNED: dict[str, tuple[str, str, str, Callable[[Path], Callable[..., Any]]]] = {
    "lpips": ("alexnet-owt-7be5be79.pth", _TORCH, "7be5be79", _lpips),
    "dists": ("vgg16-397923af.pth", _TORCH, "397923af", _dists),
    "clip": ("FOLDER", "a hub: CLIP in safetensors with its processor", "", _clip),
}


def load_tools(weights: Sequence[str], prompts: bool) -> Tools:
    """Load the scores that need nothing, and those of NAME=FILE or NAME=FILE@SHA256.

    prompts: whether images have them, which "clip" needs. "inception" gives FID and KID.
    Raises QuantempoError: an unknown name, or a file that is none, has another hash or fails.
    """
    given, missing = dict[str, tuple[Path, str | None]](), dict[str, str]()
    for text in weights:
        match = re.fullmatch(r"(\w+)=(.+?)(?:@([0-9a-fA-F]{8,64}))?", text)
        if match is None:
            raise QuantempoError(f"got --weights {text}; expected NAME=FILE or NAME=FILE@SHA256")
        check_known([match[1]], [*LEARNED, "inception"], "got weights of")
        given[match[1]] = Path(match[2]), match[3]
    if "clip" in given and not prompts:
        raise QuantempoError("got weights of clip, but no prompts; give them (--prompts FILE)")
    measures, extractors = dict(PAIRED), []
    for name, (file, source, _, _) in LEARNED.items():
        if name in given:
            measures[name] = _measure(name, *given[name])
        else:
            missing[name] = f"give --weights {name}={file}, from {source}"
    for name in EXTRACTORS.names():
        try:
            extractors.append(load_extractor(name, *given.get(name, ())))
        except QuantempoError as error:
            if name in given:
                raise
            missing["fid" if name == "inception" else f"fed_{name}"] = str(error)
    return Tools(measures, extractors, missing)


def _measure(name: str, path: Path, sha256: str | None) -> Measure:
    """Load a learned score from its file (of "clip" a folder), whose hash is checked."""
    file, source, head, load = LEARNED[name]
    clip = name == "clip"
    hint = f"get {file} from {source}"
    digest = check_weights(path / "model.safetensors" if clip else path, sha256 or head, hint)
    try:
        one = load(path)
    except Exception as error:
        text = f"cannot load {name} from {path}: {' '.join(str(error).split())[:200]}"
        raise QuantempoError(f"{text}; it needs torchvision (clip: transformers)") from error

    @torch.inference_mode()
    def values(first: np.ndarray, other: np.ndarray, prompts: list[str]) -> np.ndarray:
        sets = (torch.from_numpy(x).movedim(-1, 1).expand(-1, 3, -1, -1) for x in (first, other))
        pairs = zip(*(x.split(1) for x in sets), prompts or [""] * len(first), strict=True)
        return np.array([float(one(*pair)) for pair in pairs])

    return Measure(values, clip, clip, digest)
