"""Verdicts on known differences, the intervals' false alarms, gates, scores by given weights."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from quantempo.errors import QuantempoError
from quantempo.evaluation.features import Extractor, Features
from quantempo.evaluation.judge import interval, judge, parse_gate, passed, verdict
from quantempo.evaluation.learned import PAIRED, Measure, Tools, load_tools
from quantempo.run_folder import file_sha256
from tests.evaluation.test_evaluate_pairs import pictures
from tests.tiny import tiny_clip


@pytest.mark.parametrize(("count", "most"), [(4, 0.08), (8, 0.09), (64, 0.08)])
def test_equal_sets_are_told_apart_as_seldom_as_is_said(count: int, most: float) -> None:
    draws = np.random.default_rng(count).normal(size=(1000, count))
    alarms = np.mean([verdict(row, np.zeros(count), True)["verdict"] != "tie" for row in draws])
    # 5 to 7 %, of 1000: the bounds are 2.5 standard deviations of a binomial away.
    assert 0.03 < alarms < most


def test_a_difference_is_found_and_its_sign_follows_what_is_better() -> None:
    values = np.random.default_rng(0).normal(40, 5, 64)
    noise = np.random.default_rng(1).normal(0, 0.1, 64)
    words = [verdict(values + by + noise, values, up)["verdict"]
             for by in (1.0, -1.0, 0.0) for up in (True, False)]  # fmt: skip
    assert words == ["better", "worse", "worse", "better", "tie", "tie"]
    # Pairs: the spread over images (5) does not count.
    found = verdict(values + 1 + noise, values, True)
    assert found["low"] < 1 < found["high"] and found["high"] - found["low"] < 0.1
    assert interval(np.full(8, 3.0)) == (3.0, 3.0)


def _tools(**more: Measure) -> Tools:
    names = {"frechet": "fed_x", "spatial": "sfed_x", "kernel": "kid_x", "inception": "is_x"}

    def network(images: torch.Tensor) -> Features:
        pooled = images.float().mean((2, 3))
        return Features(pooled, pooled)

    return Tools({**PAIRED, **more}, [Extractor("x", "", "", network, names)], {"lpips": "get it"})


def test_sets_are_judged_by_pairs_and_by_parts() -> None:
    first, rng = pictures(32, side=8), np.random.default_rng(0)
    near, far = (np.clip(first + rng.normal(0, s, first.shape), 0, 255).astype(np.uint8)
                 for s in (2, 40))  # fmt: skip
    shift = Measure(lambda _, x, __: x.reshape(len(x), -1).mean(1), False, alone=True)
    sets = {"float": first, "near": near, "far": far}
    found = judge(sets, _tools(level=shift), data=first[:20])
    json.dumps(found, allow_nan=False)
    scores, words = found["scores"], {
        (row["score"], row["of"], row["against"]): row["verdict"] for row in found["verdicts"]
    }  # fmt: skip
    assert words["psnr", "far", "near"] == words["ssim", "far", "near"] == "worse"
    assert ("psnr", "near", "float") not in words and ("level", "near", "float") in words
    assert words["fed_x", "far", "near"] == "worse" and ("fed_x_data", "far", "float") in words
    assert scores["psnr_p05"]["far"]["value"] == np.percentile(scores["psnr"]["far"]["values"], 5)
    assert set(scores["level_p95"]) == set(scores["fed_x_data"]) == set(sets)
    few = judge({name: images[:16] for name, images in sets.items()}, _tools())
    assert "fed_x" in few["scores"] and not any(r["score"] == "fed_x" for r in few["verdicts"])
    few = judge({name: images[:7] for name, images in sets.items()}, _tools())
    assert not few["verdicts"] and "low" not in few["scores"]["psnr"]["near"]


def test_a_gate_is_met_by_the_mean_and_says_when_few_images_leave_it_open() -> None:
    rules = parse_gate(" psnr>=40,ssim_p05 < 1e-1 , fed_x<=-2.5", _tools())
    assert rules == [("psnr", ">=", 40), ("ssim_p05", "<", 0.1), ("fed_x", "<=", -2.5)]
    assert parse_gate("", _tools()) == []
    score = {"value": 41.0, "low": 39.0, "high": 43.0}
    assert passed(rules[0], score) == {
        "rule": "psnr >= 40", "value": 41.0, "open": True, "passed": True
    }  # fmt: skip
    assert not passed(("psnr", ">", 41.0), score)["passed"]
    assert not passed(("fed_x", "<", 3.0), {"value": 2.0})["open"]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stand in for torchvision where it is not installed: two trunks, and how it finds weights."""
    models, library = ModuleType("torchvision.models"), ModuleType("torchvision")

    def trunk(channels: list[int], convolutions: tuple[int, ...]) -> nn.Module:
        layers: list[nn.Module] = [nn.ReLU() for _ in range(30)]
        for place, (a, b) in zip(convolutions, zip([3, *channels], channels, strict=False),
                                 strict=True):  # fmt: skip
            layers[place] = nn.Conv2d(a, b, 3, padding=1)
        return nn.ModuleDict({"features": nn.Sequential(*layers)})

    def made(channels: list[int], convolutions: tuple[int, ...], name: str) -> Any:
        def make(weights: Any = None) -> Any:
            net = trunk(channels, convolutions)
            if weights is not None:
                url = f"https://nowhere.invalid/{weights}"
                net.load_state_dict(torch.hub.load_state_dict_from_url(url, progress=False))
            return SimpleNamespace(features=net["features"])

        setattr(models, name, make)
        return trunk(channels, convolutions)

    alex = made([64, 192, 384, 256, 256], (0, 3, 6, 8, 10), "alexnet")
    vgg = made([64, 128, 256, 512, 512], (0, 5, 10, 17, 24), "vgg16")
    models.AlexNet_Weights = SimpleNamespace(DEFAULT="alexnet-owt-7be5be79.pth")  # type: ignore
    models.VGG16_Weights = SimpleNamespace(DEFAULT="vgg16-397923af.pth")  # type: ignore
    library.models, library.trunks = models, {"lpips": alex, "dists": vgg}  # type: ignore
    for name, module in (("torchvision", library), ("torchvision.models", models)):
        monkeypatch.setitem(sys.modules, name, module)
    import torchmetrics.functional.image.dists as dists
    import torchmetrics.functional.image.lpips as lpips
    import torchmetrics.image.lpip as lpip

    for module in (dists, lpips, lpip):
        monkeypatch.setattr(module, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(dists, "vgg16", models.vgg16, raising=False)  # type: ignore
    monkeypatch.setattr(dists, "VGG16_Weights", models.VGG16_Weights, raising=False)  # type: ignore
    return library


def test_lpips_and_dists_are_torchmetrics_own_with_the_file_that_is_given(
    torchvision: Any, tmp_path: Path
) -> None:
    weights = []
    for name, net in torchvision.trunks.items():
        torch.save(net.state_dict(), tmp_path / name)
        weights.append(f"{name}={tmp_path / name}@{file_sha256(tmp_path / name)}")
    before = torch.hub.get_dir()
    tools = load_tools(weights, prompts=False)
    assert torch.hub.get_dir() == before and not {"lpips", "dists"} & set(tools.missing)
    first, other = pictures(3), pictures(3, seed=1)
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2) / 255 for x in (first, other))
    import torchmetrics.functional.image.lpips as lpips

    exact, trunk = lpips._NoTrainLpips(net="alex", pnet_rand=True), torchvision.trunks["lpips"]
    for part in exact.net.children():
        for place, layer in part.named_children():
            layer.load_state_dict(trunk["features"][int(place)].state_dict())
    wanted = exact(a, b, normalize=True).flatten().numpy()
    assert tools.measures["lpips"].values(first, other, []) == pytest.approx(wanted, 1e-4)
    assert not tools.measures["lpips"].higher
    found = tools.measures["dists"].values(first, other, [])
    assert ((found > 0) & (found < 1)).all()
    assert tools.measures["dists"].values(first, first, []) == pytest.approx(np.zeros(3), abs=1e-4)


def test_the_clip_score_is_the_cosine_of_image_and_prompt(tmp_path: Path) -> None:
    import transformers as hf

    tokenizer, text = tiny_clip()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = small | {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(
        text_config=text.config.to_dict(), vision_config=vision, projection_dim=8
    )
    pixels = hf.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    model = hf.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    hf.CLIPProcessor(pixels, tokenizer).save_pretrained(tmp_path)
    tools = load_tools([f"clip={tmp_path}"], prompts=True)
    images, prompts = pictures(2), ["a cat", "dogs"]
    found = tools.measures["clip"].values(images, images, prompts)
    assert tools.measures["clip"].higher and tools.measures["clip"].alone
    for image, prompt, value in zip(images, prompts, found, strict=True):
        both = {"text": [prompt], "images": [image]}
        inputs = hf.CLIPProcessor(pixels, tokenizer)(**both, return_tensors="pt")
        made = model(**inputs)
        cosine = torch.cosine_similarity(made.image_embeds, made.text_embeds)
        assert value == pytest.approx(max(0.0, 100 * float(cosine)), rel=1e-3, abs=1e-3)


def test_weights_that_are_none_are_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"junk")
    digest = file_sha256(tmp_path / "net.pth")
    for given, words in (
        (f"lpips={tmp_path / 'net.pth'}", "expected 7be5be79"),
        (f"lpips={tmp_path / 'net.pth'}@{digest}", "cannot load lpips from .*torchvision"),
        (f"dists={tmp_path / 'none.pth'}", "no weights file .*; get vgg16-397923af.pth from"),
        ("lpip=x", "did you mean 'lpips'"),
        ("lpips", "expected NAME=FILE"),
        (f"clip={tmp_path}", "but no prompts"),
    ):
        with pytest.raises(QuantempoError, match=words):
            load_tools([given], prompts=False)
