"""Losses of single layers, bits chosen by them, and that nothing else is touched."""

import copy
import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from quantempo import mixed_precision as sensitivity
from quantempo.core import weight_format
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.evaluation import psnr_db
from quantempo.mixed_precision import choose
from quantempo.mixed_precision import losses as losses_module
from quantempo.models.layers import denoiser_of, sites
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import call_pipeline, run_pipeline, swap_scheduler
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.session import Session
from quantempo.quantized import QLayer, find_clock
from quantempo.recipe import parse_bits
from tests.packed import CALLS, KINDS, recipe, saved
from tests.tiny import tiny_unconditional

# Eight layers, those of the middle.
SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*")).override("weights", group=16)
OPTIONS = ("w3a8", "w8a3", "w8a8")
STEPS = SMALL.trace.steps
SHORT: dict[str, Any] = {"chains": 2, "steps": 3}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figure out where only numbers are looked at: drawing it takes half a second."""
    monkeypatch.setattr(losses_module, "draw", lambda table: "<svg></svg>")


def load(run: Path, chosen: Any = SMALL, kind: str = "unconditional", **how: Any) -> Session:
    return pipeline.load(saved(kind), run, chosen, call=CALLS[kind], **how)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with its sensitivity; do not write into it."""
    run = tmp_path_factory.mktemp("sensitivity") / "run"
    sensitivity.measure(load(run), OPTIONS, **SHORT)
    return run


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    shutil.copytree(measured, tmp_path / "run")
    return tmp_path / "run"


def table(run: Path) -> dict[str, Any]:
    return json.loads((run / "sensitivity.json").read_text())


def losses(run: Path) -> dict[str, dict[str, float]]:
    return {row["name"]: row["losses"] for row in table(run)["layers"]}


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "heun", "dpm++sde"])
def test_the_last_latent_is_what_the_picture_is_made_of(scheduler: str) -> None:
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    latent = sensitivity.last_latent(pipe, [5, 6], 4, {})
    assert latent.shape == (2, 3, 16, 16) and latent.dtype == torch.float64
    image = call_pipeline(pipe, [5, 6], steps=4)
    shown = (latent / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(shown, torch.from_numpy(image).double(), rtol=0, atol=1e-6)
    assert "step" not in pipe.scheduler.__dict__


@pytest.mark.parametrize(
    ("kind", "name", "bits"),
    [
        ("unconditional", "mid_block.resnets.0.conv1", "w3a8"),
        ("unconditional", "up_blocks.1.resnets.0.conv_shortcut", "w8a3"),
        ("text", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "w4a4"),
        ("dit", "transformer_blocks.1.ff.net.2", "w4a8"),
    ],
)
def test_the_loss_is_that_of_a_packed_model_with_one_integer_layer(kind, name, bits, tmp_path):
    others = [s.name for s in sites(denoiser_of(load_pipeline(saved(kind)))[1]) if s.name != name]
    # Not float16 either: the layers of the time embedding are left alone here.
    alone = recipe(symmetric=True, exclude=tuple(others), bits={name: bits})
    session = load(tmp_path / "run", alone.override("weights", group=16), kind)
    found = sensitivity.measure(session, [bits], **SHORT)
    (row,) = found["layers"]
    assert row["name"] == name
    packed = load_pipeline(pipeline.finish(session))
    attach(denoiser_of(packed)[1], "simulated")
    seeds = [found["settings"]["seed"] + i for i in range(SHORT["chains"])]
    latents = [
        sensitivity.last_latent(pipe, seeds, SHORT["steps"], CALLS[kind])
        for pipe in (session.pipe, packed)
    ]
    expected = float((latents[0] - latents[1]).square().mean())
    assert expected > 0
    # The same kernels and integers in another place.
    assert row["losses"][bits] == pytest.approx(expected, rel=1e-9)
    assert found["signal"] == pytest.approx(float(latents[0].square().mean()), rel=1e-9)


def test_fewer_bits_lose_more(measured: Path) -> None:
    found = losses(measured)
    assert len(found) == 8 and all(name.startswith("mid_block.") for name in found)
    for name, of in found.items():
        assert set(of) == set(OPTIONS)
        assert 0 < of["w8a8"] < min(of["w3a8"], of["w8a3"]), name


def test_the_float_denoiser_is_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = load(run)
    before = copy.deepcopy(session.denoiser.state_dict())
    modules = {name: id(m) for name, m in session.denoiser.named_modules()}

    def unchanged() -> None:
        after = session.denoiser.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert {name: id(m) for name, m in session.denoiser.named_modules()} == modules
        assert not session.denoiser._forward_pre_hooks and find_clock(session.denoiser) is None

    sensitivity.measure(session, ["w2a8"], **SHORT)
    unchanged()
    calls = itertools.count()
    real = sensitivity.last_latent
    monkeypatch.setattr(
        losses_module, "last_latent", lambda *args: 1 / 0 if next(calls) else real(*args)
    )
    with pytest.raises(ZeroDivisionError):
        sensitivity.measure(session, ["w2a2"], **SHORT)
    unchanged()
    assert session.pipe.unet is session.denoiser


def test_a_killed_measurement_resumes(measured, tmp_path, monkeypatch):
    calls = itertools.count()
    real = sensitivity.last_latent

    def counted(*args: Any) -> Any:
        if next(calls) == fail_at:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(losses_module, "last_latent", counted)
    # The float trajectory, two whole layers, one of three options.
    fail_at = 1 + 2 * len(OPTIONS) + 1
    with pytest.raises(KeyboardInterrupt):
        sensitivity.measure(load(tmp_path / "run"), OPTIONS, **SHORT)
    assert [len(of) for of in losses(tmp_path / "run").values()] == [3, 3, 0, 0, 0, 0, 0, 0]
    fail_at, calls = -1, itertools.count()
    sensitivity.measure(load(tmp_path / "run"), OPTIONS, **SHORT)
    assert next(calls) == 1 + 6 * len(OPTIONS)
    assert losses(tmp_path / "run") == losses(measured)
    # Done: nothing is computed again; another option costs that option alone.
    calls = itertools.count()
    sensitivity.measure(load(tmp_path / "run"), OPTIONS[1:], **SHORT)
    assert next(calls) == 0
    sensitivity.measure(load(tmp_path / "run"), ["w8a8", "w2a8"], **SHORT)
    assert next(calls) - 1 == 1 + 8


def test_bits_of_the_recipe_do_not_matter_other_settings_do(run: Path) -> None:
    bits = {"mid_block.*": "w2a2"}
    other = SMALL.override("layers", bits=bits).override("weights", bits=4)
    session = load(run, other.override("activations", bits=6))
    assert sensitivity.measure(session, OPTIONS, **SHORT)["layers"] == table(run)["layers"]
    before = losses(run)
    others = [(SMALL, SHORT | {"steps": 4}), (SMALL, SHORT | {"seed": 1})]
    for changed, how in (*others, (SMALL.override("weights", metric="mse"), SHORT)):
        with pytest.raises(QuantempoError, match="made with other settings"):
            sensitivity.measure(load(run, changed), OPTIONS, **how)
    assert losses(run) == before
    forced = load(run, SMALL, force=True)
    sensitivity.measure(forced, ["w8a8"], **{**SHORT, "steps": 4})
    assert all(set(of) == {"w8a8"} for of in losses(run).values())


def test_what_cannot_be_measured(run: Path, tmp_path: Path) -> None:
    session = load(run)
    with pytest.raises(QuantempoError, match="expected bits of 2 to 8"):
        sensitivity.measure(session, ["w4a16"], **SHORT)
    with pytest.raises(QuantempoError, match="no options"):
        sensitivity.measure(session, [], **SHORT)
    with pytest.raises(QuantempoError, match="got 0 chains"):
        sensitivity.measure(session, OPTIONS, chains=0)
    with pytest.raises(QuantempoError, match="no budget"):
        sensitivity.choose_bits(session)
    session.parts *= 2
    with pytest.raises(QuantempoError, match="one network at a time"):
        sensitivity.choose_bits(session, budget_bytes=1)
    nothing = load(tmp_path / "other", SMALL.override("layers", exclude=("*",)))
    with pytest.raises(QuantempoError, match="keeps every layer in float"):
        sensitivity.measure(nothing, OPTIONS, **SHORT)


def test_a_choice_is_packed_and_its_bytes_are_those_of_the_file(run: Path) -> None:
    shapes = [row["weight_shape"] for row in table(run)["layers"]]
    low, high = (sum(weight_format(bits, 16).nbytes(shape) for shape in shapes) for bits in (3, 8))
    session, budget = load(run), (low + high) // 2
    assert {plan.weight_bits for plan in session.plans} == {8}
    choice = sensitivity.choose_bits(session, budget_bytes=budget, options=OPTIONS, **SHORT)
    assert low < choice["spent"]["bytes"] <= budget
    # Nothing is paid for activations here, so 3-bit ones are never worth it.
    assert set(choice["bits"].values()) == {"w3a8", "w8a8"}
    found = losses(run)
    total = math.fsum(found[name][option] for name, option in choice["bits"].items())
    assert choice["bound"] <= total == pytest.approx(choice["loss"], rel=1e-12)
    folder = pipeline.finish(session)
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    # Integer layers only: those stored in 12 bits have scales too.
    kinds = ("weight_int", "weight_group", "weight_scale")
    keys = [f"{name}.{kind}" for name in choice["bits"] for kind in kinds]
    stored = [tensors[key] for key in keys if key in tensors]
    assert sum(t.numel() * t.element_size() for t in stored) == choice["spent"]["bytes"]
    net = denoiser_of(load_pipeline(folder))[1]
    layers = {name: layer for name, layer in net.named_modules() if isinstance(layer, QLayer)}
    assert {name: f"w{q.weight_bits}a{q.act_bits}" for name, q in layers.items()} == choice["bits"]
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["recipe"]["layers"]["bits"] == choice["bits"]
    assert manifest["recipe_sha256"] == session.recipe.sha256
    rows = json.loads((run / "layers.json").read_text())
    shown = {r["name"]: f"w{r['bits_weight']}a{r['bits_activation']}" for r in rows}
    assert shown | choice["bits"] == shown
    assert pipeline.reopen(run).recipe == session.recipe


def test_both_budgets_hold(run: Path) -> None:
    rows = table(run)["layers"]
    macs = sum(row["macs"] for row in rows)
    budgets = {
        "budget_bytes": sum(weight_format(8).nbytes(row["weight_shape"]) for row in rows) * 9 // 10,
        "budget_bops": macs * 45,
    }
    options = [*OPTIONS, "w3a3"]
    choice = sensitivity.choose_bits(load(run), **budgets, options=options, **SHORT)
    assert choice["spent"]["bytes"] <= budgets["budget_bytes"]
    assert choice["spent"]["bops"] <= budgets["budget_bops"]
    pairs = {row["name"]: parse_bits(choice["bits"][row["name"]], "") for row in rows}
    assert choice["spent"]["bops"] == sum(math.prod(pairs[r["name"]]) * r["macs"] for r in rows)
    with pytest.raises(QuantempoError, match="a budget of bops = 1; the options need at least"):
        sensitivity.choose_bits(load(run), budget_bops=1, options=options, **SHORT)


def test_the_command_prints_the_largest_loss_first(cli: Any, run: Path) -> None:
    args = ("sensitivity", "--run", run, "--options", ",".join(OPTIONS))
    args = (*args, "--chains", SHORT["chains"], "--steps", SHORT["steps"])
    code, out, _ = cli(*args)
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split() == ["layer", "role", "MACs", "bytes", "w3", "bytes", "w8", *OPTIONS]
    found = losses(run)
    order = sorted(found, key=lambda name: -max(found[name].values()))
    assert [line.split()[0] for line in lines] == order
    assert f"{found[order[0]]['w3a8']:.2e}" in lines[0]
    code, out, _ = cli(*args, "--json")
    assert [row["name"] for row in json.loads(out)["layers"]] == order
    assert (run / "sensitivity.svg").read_text().startswith("<svg")
    code, out, err = cli("sensitivity", "--run", run, "--options", "w4a8,w9a8")
    assert code == 2 and out == "" and "expected bits of 2 to 8" in err


def test_quantize_with_a_budget_resumes_and_refuses_another(cli: Any, tmp_path: Path) -> None:
    file, run = tmp_path / "small.toml", tmp_path / "run"
    # Without groups, as w8a8 is: those of w4a8 then.
    file.write_text(SMALL.override("weights", group=0).to_toml())
    command = ("quantize", saved("unconditional"), "--run", run, "--recipe", file)
    code, _, err = cli(*command, "--budget-bytes", 10)
    assert code == 2 and "a budget of bytes = 10; the options need at least" in err
    # Said before the long part.
    assert not (run / "sensitivity.json").exists()
    short = ("--chains", SHORT["chains"], "--steps", SHORT["steps"])
    assert cli("sensitivity", "--run", run, "--options", "w4a8,w8a8", *short)[0] == 0
    layers = table(run)["layers"]
    assert all(set(row["losses"]) == {"w4a8", "w8a8"} for row in layers)
    budget = sum(weight_format(4, 16).nbytes(row["weight_shape"]) for row in layers) * 4 // 3
    code, _, err = cli(*command, "--budget-bytes", budget)
    assert code == 0, err
    choice = table(run)["choice"]
    assert set(choice["bits"].values()) == {"w4a8", "w8a8"}
    tensors = load_file(run / "packed/unet/diffusion_pytorch_model.safetensors")
    kinds = ("weight_int", "weight_group", "weight_scale")
    stored = [tensors.get(f"{name}.{kind}") for name in choice["bits"] for kind in kinds]
    assert sum(t.nbytes for t in stored if t is not None) == choice["spent"]["bytes"] <= budget
    assert sum(t is None for t in stored) == [*choice["bits"].values()].count("w8a8")
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    assert {"trace", "calibrate", "sensitivity", "search", "round", "pack"} <= set(stages)
    assert cli(*command, "--budget-bytes", budget)[0] == 0
    assert json.loads((run / "manifest.json").read_text())["stages"] == stages
    # Another budget, or none, is another choice: not without --force.
    for args in (("--budget-bytes", budget + 10**6), ()):
        code, _, err = cli(*command, *args)
        assert code == 2 and "made with other settings" in err


def test_a_loss_in_db_is_kept_end_to_end_and_a_killed_run_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = partial(choose.open_model, engine="simulated")
    counted = Mock(side_effect=[simulated, RuntimeError("killed")])
    monkeypatch.setattr(choose, "open_model", lambda *a, **k: counted()(*a, **k))
    with pytest.raises(RuntimeError, match="killed"):
        sensitivity.limit_loss(load(run), 1.0)
    monkeypatch.setattr(choose, "open_model", simulated)
    recalled = sensitivity.recall(run, SMALL, max_loss_db=1.0)
    session = load(run, recalled)
    found = sensitivity.limit_loss(session, 1.0)
    trials = table(run)["trials"][found["request"]]
    whole, kept = (np.array(trials[str(count)]) for count in (8, found["kept"]))
    assert 0 < found["kept"] < 8 and len(trials) <= 5
    assert found["loss_db"] == (whole - kept).mean() <= 1.0
    # One layer fewer was tried, and loses more.
    assert (whole - trials[str(found["kept"] - 1)]).mean() > 1.0
    pair = [run_pipeline(pipe, range(losses_module.SEED, losses_module.SEED + 16), steps=STEPS)
            for pipe in (session.pipe, simulated(session.require_packed()))]  # fmt: skip
    assert psnr_db(*pair) == pytest.approx(kept)
    packed = load_pipeline(run / "packed").unet
    bits = [layer.weight_bits for layer in packed.modules() if isinstance(layer, QLayer)]
    assert sorted(bits) == [4] * (8 - found["kept"]) + [8] * found["kept"]
    monkeypatch.setattr(choose, "open_model", Mock(side_effect=AssertionError("sampled again")))
    again = sensitivity.limit_loss(load(run, sensitivity.recall(run, SMALL, max_loss_db=1.0)), 1.0)
    assert again == found
    for loss, words in ((-1.0, "got a loss of -1.0 dB"), (math.nan, "got a loss of nan dB")):
        with pytest.raises(QuantempoError, match=words):
            sensitivity.limit_loss(load(run, recalled, force=True), loss)
    with pytest.raises(QuantempoError, match="give one of them"):
        sensitivity.recall(run, SMALL, max_loss_db=1.0, budget_bytes=9)


def test_a_choice_that_is_refused_leaves_the_run_as_it_was(run: Path) -> None:
    pipeline.finish(load(run))
    before = {name: (run / name).read_bytes() for name in ("manifest.json", "sensitivity.json")}
    least = sum(weight_format(3, 16).nbytes(row["weight_shape"]) for row in table(run)["layers"])
    with pytest.raises(QuantempoError, match="made with other settings"):
        sensitivity.choose_bits(load(run), budget_bytes=least, options=OPTIONS)
    assert before == {name: (run / name).read_bytes() for name in before}
    pipeline.reopen(run).require_packed()


def test_bytes_alone_leave_the_activations_of_the_recipe(tmp_path: Path) -> None:
    session = load(tmp_path / "run", SMALL.override("activations", bits=6))
    choice = sensitivity.choose_bits(session, budget_bytes=10**9, **SHORT)
    assert set(choice["bits"].values()) == {"w8a6"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pipeline_is_measured(kind: str, tmp_path: Path) -> None:
    found = sites(denoiser_of(load_pipeline(saved(kind)))[1])
    kept = [s.name for s in found if s.role == "attention"][:2]
    others = tuple(s.name for s in found if s.name not in kept)
    session = load(tmp_path / "run", recipe(exclude=others), kind)
    result = sensitivity.measure(session, ["w2a8"], chains=1, steps=2)
    assert [row["name"] for row in result["layers"]] == kept
    assert all(row["losses"]["w2a8"] > 0 for row in result["layers"])
