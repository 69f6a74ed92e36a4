"""Scales by time or by token: what is measured, which is chosen, and that files keep it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from quantempo.calibration.dataset import MemorySet
from quantempo.calibration.statistics import collect_statistics
from quantempo.checkpoint.diffusers_plugin import mark_quantized
from quantempo.cli.app import app
from quantempo.engines import attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.pipeline import stages
from quantempo.pipeline.quality import summary
from quantempo.pipeline.quantize import quantize
from quantempo.pipeline.session import reopen
from quantempo.quantized import quantized_layers
from quantempo.recipe import Recipe
from quantempo.rounding.base import dequantized_input
from quantempo.run_folder import RunFolder
from quantempo.scales import make_metric
from tests.packed import CALLS, recipe, saved

TOKENS, WIDTH = 5, 24


class Net(nn.Module):
    """Linear layers alone that read the same tokens: as they are, of one sign, some far larger."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.even, self.positive, self.outliers = (nn.Linear(WIDTH, 8) for _ in range(3))
            self.joined = nn.Linear(2 * WIDTH, 8)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        size = torch.tensor([1, 1, 1, 1, 60.0])[:, None]
        wide = torch.cat([x, x * size], -1)
        return {"even": x, "positive": x.abs(), "outliers": x * size, "joined": wide}

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return sum(getattr(self, name)(x) for name, x in self.inputs(sample).items())


def data() -> MemorySet:
    g = torch.Generator().manual_seed(1)
    # Of one size in each half of time.
    times = torch.arange(48) * 20
    x = torch.rand(48, TOKENS, WIDTH, generator=g) * 2 - 1
    return MemorySet(x * (1 + (times >= 480))[:, None, None], times, num_train_timesteps=1000)


def chosen(granularity: str, **settings: Any) -> Recipe:
    made = recipe(symmetric=False, buckets=2, float_roles=())
    return made.override("activations", granularity=granularity, **settings)


@pytest.mark.parametrize(("metric", "power"), [("mse", 2), ("l1", 1), ("lp", 2.4)])
def test_the_error_of_tokens_is_that_of_all_inputs(
    metric: str, power: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantempo.scales.histogram.DEVICE_PIECE", 7 * WIDTH)
    inputs = {"outliers": (), "joined": (16, 2 * WIDTH - 16)}
    whole, how = data(), make_metric(metric, 2.4)
    found = collect_statistics(Net(), inputs, whole, tokens=how)
    plain = collect_statistics(Net(), inputs, whole)
    assert {f"{name}.token_error" for name in inputs} == found.keys() - plain.keys()
    assert all(torch.equal(found[key], value) for key, value in plain.items())
    seen = Net().inputs(whole.rows(torch.arange(48)).x_t)
    for name, segments in inputs.items():
        parts = seen[name].double().split(segments or (WIDTH,), -1)
        for i, x in enumerate(parts):
            for bits in range(2, 9):
                step = x.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
                wanted = ((x / step).round() * step - x).abs().pow(power).mean()
                got = found[f"{name}.token_error"][i, bits - 2]
                assert float(got) == pytest.approx(float(wanted), rel=1e-4), (name, bits)


@pytest.mark.parametrize("metric", ["mse", "l1"])
def test_auto_takes_the_lower_error_as_layers_measure_it(metric: str) -> None:
    found = {
        g: quantize(Net(), data(), chosen(g, metric=metric)) for g in ("time", "token", "auto")
    }
    seen, how = Net().inputs(data().rows(torch.arange(48)).x_t), make_metric(metric)
    errors: dict[str, dict[str, float]] = {}
    for kind, made in found.items():
        net = made.install(Net(), copy=True)
        net.quantempo_clock.set(data().rows(torch.arange(48)).t)
        errors[kind] = {
            name: float(how(x.flatten(), dequantized_input(layer, x).flatten()))
            for name, x in seen.items()
            for layer in [net.get_submodule(name)]
        }
        for plan in made.plans:
            assert (plan.reason is None) == (kind == "time")
    buckets = {kind: {p.name: p.buckets for p in made.plans} for kind, made in found.items()}
    assert set(buckets["token"].values()) == {0} and 0 not in buckets["time"].values()
    # Tokens of one size and sign would lose a bit of sign.
    assert buckets["auto"] | {"even": 0} == {"even": 0, "positive": 2, "outliers": 0, "joined": 0}
    for plan in found["auto"].plans:
        token, time = (errors[kind][plan.name] for kind in ("token", "time"))
        assert (plan.buckets == 0) == (token < time)
        said = [float(word) for word in (plan.reason or "").split() if word[0].isdigit()]
        # A histogram stands for the inputs of static scales.
        assert said == pytest.approx([token, time], rel=0.02), plan
    # A pass over the row has to be worth it.
    kept = quantize(Net(), data(), chosen("auto", metric=metric, min_gain=1.0))
    assert {p.name: p.buckets for p in kept.plans} == dict.fromkeys(seen, 1)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
@pytest.mark.parametrize("granularity", ["auto", "token"])
def test_roundings_and_bits_of_layers(rounding: str, granularity: str) -> None:
    how = chosen(granularity).override("layers", bits={"outliers": "w8a5"})
    how = how.override("rounding", name=rounding, bias=True, samples=16)
    net = quantize(Net(), data(), how).install(Net(), copy=True)
    assert net.outliers.dynamic and net.outliers.act_zero_point.tolist() == [16]
    attach(net, "simulated")
    x, t = data().rows(torch.arange(48))[:2]
    # Of 5 bits: 1 / (15 sqrt(12)) of a uniform input, whose root mean square is 1 / sqrt(3).
    assert (net(x, t) - Net()(x, t)).norm() <= 0.04 * Net()(x, t).norm()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(QuantempoError, match=r"'colour' \(expected one of: time, token, auto"):
        chosen("colour")
    for metric in ("kl", "cosine", "linf"):
        with pytest.raises(QuantempoError, match="no mean over elements; expected a metric of"):
            quantize(Net(), data(), chosen("auto", metric=metric))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("tokens") / "run"
    stages.quantize(saved("dit"), folder, chosen("auto", symmetric=True), call=CALLS["dit"])
    return RunFolder(folder)


def test_a_folder_gives_back_every_bit(run: RunFolder, tmp_path: Path) -> None:
    pipe = load_pipeline(run / "packed")
    net = denoiser_of(pipe)[1]
    scales = run.read_safetensors("scales.safetensors")
    dynamic = {name for name, layer in quantized_layers(net) if layer.dynamic}
    assert dynamic and len(dynamic) < len(list(quantized_layers(net)))
    for name, layer in quantized_layers(net):
        assert torch.equal(layer.act_scale, scales[f"{name}.act_scale"])
        assert torch.equal(layer.act_zero_point, scales[f"{name}.act_zero_point"])
    pipe.save_pretrained(tmp_path / "again")
    folders = [folder / "transformer" for folder in (run / "packed", tmp_path / "again")]
    weights = [folder / "diffusion_pytorch_model.safetensors" for folder in folders]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    settings, again = (config["quantization_config"] for config in configs)
    assert settings == again
    assert {name for name, count in settings["buckets"].items() if count == 0} == dynamic
    names = {name for name, _ in quantized_layers(net)}
    assert settings["reasons"].keys() == names - {"pos_embed.proj"}
    table = run.read_json("layers.json")
    assert {row["name"] for row in table if row["buckets"] == 0} == dynamic
    # Which scales were chosen is no reason to be in float.
    left = {row["name"] for row in summary(reopen(run.path))["float_layers"]}
    assert left == {row["name"] for row in table} - names
    said = CliRunner().invoke(app, ["inspect", str(run.path), "--device", "cpu"]).output
    lines = {line.split()[0]: line for line in said.splitlines()}
    for row in table[:-1]:
        assert ("a token" in lines[row["name"]]) == (row["name"] in dynamic)
        assert (row["reason"] or "") in lines[row["name"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, layer, c: layer.act_zero_point.fill_(127), "from 127 to 127; expected 128 to"),
        (lambda n, layer, c: c.buckets.update({"pos_embed.proj": 0}), "expected 1 or more"),
        (lambda n, layer, c: c.buckets.update({n: -1}), "expected 0 or more"),
        (lambda n, layer, c: c.buckets.pop(n), "act_scale as .* of shape"),
        (lambda n, layer, c: setattr(c, "reasons", [1]), "quantization_config"),
    ],
)
def test_a_folder_that_says_otherwise_is_refused(
    change: Any, message: str, run: RunFolder, tmp_path: Path
) -> None:
    net = denoiser_of(load_pipeline(run / "packed"))[1]
    config = net.hf_quantizer.quantization_config
    change(*next((n, m) for n, m in quantized_layers(net) if m.dynamic), config)
    mark_quantized(net, config)
    net.save_pretrained(tmp_path / "net")
    with pytest.raises(QuantempoError, match=message) as caught:
        type(net).from_pretrained(tmp_path / "net")
    assert "\n" not in str(caught.value)


def test_statistics_are_made_again_for_tokens(run: RunFolder, tmp_path: Path) -> None:
    folder = RunFolder(shutil.copytree(run.path, tmp_path / "run"))
    before = (folder / "stats.safetensors").stat().st_mtime_ns
    for granularity in ("token", "time"):
        how = chosen(granularity, symmetric=True)
        stages.quantize(saved("dit"), folder.path, how, call=CALLS["dit"], force=True)
        same = (folder / "stats.safetensors").stat().st_mtime_ns == before
        stats = folder.read_safetensors("stats.safetensors")
        known = any("token_error" in key for key in stats)
        assert same == known == (granularity == "token")
