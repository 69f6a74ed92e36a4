"""Everything the main line can do at once, and every shipped recipe, on tiny models."""

from __future__ import annotations

import math
import shutil
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from safetensors.torch import load_file

from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline
from quantempo.models.sampling import call_pipeline
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.layer_table import describe
from quantempo.pipeline.quality import summary
from quantempo.quantized import quantized_layers
from quantempo.recipe import Recipe
from quantempo.rounding import reconstruct
from quantempo.run_folder import RunFolder
from tests.packed import recipe, saved

WEIGHTS = "packed/unet/diffusion_pytorch_model.safetensors"
SHIPPED = sorted(
    f.name[:-5] for f in (files("quantempo") / "recipes").iterdir() if "toml" in f.name
)
EARLY = ("trace.json", "stats.safetensors", "scales.safetensors", "rounding.safetensors")
# The middle, and one block with a shortcut that reads a skip input.
FEW = ("down_blocks.*", "up_blocks.0.*", "up_blocks.1.resnets.1.*", "up_blocks.1.upsamplers.*")


def everything() -> Recipe:
    """Return a recipe of seconds with everything switched on."""
    chosen = recipe(exclude=FEW, bits={"shortcut": "w8a8"}).override("rounding", name="gptq")
    chosen = chosen.override("rounding", bias=True).override("weights", bits=4)
    return chosen.override("activations", bits=4)


def tiny(name: str) -> Recipe:
    """Return a shipped recipe with few layers and small sizes, otherwise as it is."""
    chosen = Recipe.load(name).override("trace", steps=4, chains=2, picks=2)
    chosen = chosen.override("rounding", samples=4, iterations=2, batch=4)
    return chosen.override("layers", exclude=FEW)


def stamps(run: Path) -> dict[str, int]:
    """Return when each file of a run was written."""
    return {str(f.relative_to(run)): f.stat().st_mtime_ns for f in run.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Any]]:
    """A run with everything on, and the pipeline as it was in memory before it was saved."""
    run, held = tmp_path_factory.mktemp("everything") / "run", load_pipeline(saved("unconditional"))
    save = DDIMPipeline.save_pretrained

    def holding(self: Any, *args: Any, **kwargs: Any) -> None:
        held.unet = self.unet
        save(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DDIMPipeline, "save_pretrained", holding)
        pipeline.quantize(saved("unconditional"), run, everything())
    yield run, held


@pytest.fixture
def run(made: Any, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    shutil.copytree(made[0], tmp_path / "run")
    return tmp_path / "run"


def test_a_loaded_folder_samples_as_the_model_in_memory(made: Any) -> None:
    run, held = made
    loaded = DiffusionPipeline.from_pretrained(run / "packed")
    layers = dict(quantized_layers(loaded.unet))
    shortcuts = [n for n in layers if "shortcut" in n]
    assert shortcuts and {layers[n].weight_bits for n in shortcuts} == {8}
    assert {q.weight_bits for n, q in layers.items() if n not in shortcuts} == {4}
    assert {layers[n].act_bits for n in shortcuts} == {8}
    assert {q.act_bits for n, q in layers.items() if n not in shortcuts} == {4}
    images = []
    for pipe in (held, loaded):
        attach(pipe.unet, "simulated")
        images.append(call_pipeline(pipe, [1, 2], steps=4))
    assert np.array_equal(*images)
    # Biases are those of bias correction.
    tensors = load_file(run / "rounding.safetensors")
    assert any(not torch.equal(tensors[f"{n}.bias"], b) for n, b in float_biases(layers).items())


def float_biases(layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    source = load_file(saved("unconditional") / "unet/diffusion_pytorch_model.safetensors")
    return {name: source[f"{name}.bias"] for name in layers if f"{name}.bias" in source}


def test_the_tables_say_what_the_bits_are(made: Any) -> None:
    rows = RunFolder(made[0]).read_json("layers.json")
    integer = {row["name"]: row for row in rows if row["bits_activation"] <= 8}
    assert {row["bits_activation"] for row in integer.values()} == {4, 8}
    shares, matmuls = summary(pipeline.reopen(made[0])), rows[-1]
    assert matmuls["bits_activation"] == 32 and "stay in float" in matmuls["reason"]
    assert shares["int8_mac_share_with_attention"] == pytest.approx(
        shares["int8_mac_share"] * (1 - matmuls["macs"] / sum(row["macs"] for row in rows))
    )
    described = {row["name"]: row for row in describe(made[0] / "packed", "cpu")[0]}
    for row in rows:
        same = ("bits_weight", "bits_activation", "reason")
        assert {k: row[k] for k in same} == {k: described[row["name"]][k] for k in same}


def test_a_finished_run_repeats_nothing(run: Path) -> None:
    before = stamps(run)
    pipeline.finish(pipeline.reopen(run))
    after = stamps(run)
    # Who opened it last is noted; no stage wrote anything.
    assert {k for k in after if after[k] != before.get(k)} <= {"manifest.json", "model.json"}
    assert after.keys() == before.keys()


def test_a_run_killed_while_rounding_goes_on_from_its_blocks(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done, rounded = tmp_path / "run", reconstruct._Job.round, []
    shutil.copytree(made[0], run)
    (run / "rounding.safetensors").unlink()
    shutil.rmtree(run / "blocks")
    shutil.rmtree(run / "packed")

    def killed(job: Any, block: Any) -> Any:
        if len(rounded) == 3:
            raise KeyboardInterrupt
        rounded.append(block.name)
        return done(job, block)

    monkeypatch.setattr(reconstruct._Job, "round", killed)
    with pytest.raises(KeyboardInterrupt):
        pipeline.finish(pipeline.reopen(run))
    assert len(list((run / "blocks").iterdir())) == 3
    assert not (run / "rounding.safetensors").exists()
    first, rounded = rounded, []

    def counted(job: Any, block: Any) -> Any:
        rounded.append(block.name)
        return done(job, block)

    monkeypatch.setattr(reconstruct._Job, "round", counted)
    pipeline.finish(pipeline.reopen(run))
    assert rounded and not set(rounded) & set(first)
    for name in ("rounding.safetensors", WEIGHTS):
        assert (run / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_another_rounding_leaves_the_stages_before_it(run: Path) -> None:
    before = stamps(run)
    changed = everything().override("rounding", bias=False)
    with pytest.raises(QuantempoError, match=r"rounding\.safetensors was made with other settings"):
        pipeline.reopen(run, changed)
    assert stamps(run) == before
    pipeline.finish(pipeline.reopen(run, changed, force=True))
    after = stamps(run)
    assert all(after[name] == before[name] for name in EARLY[:-1])
    assert after[EARLY[-1]] != before[EARLY[-1]] and after[WEIGHTS] != before[WEIGHTS]
    stages = pipeline.reopen(run).seconds()
    assert set(stages) == {"trace", "calibrate", "search", "round", "pack"}
    assert summary(pipeline.reopen(run))["calibration_seconds"] == round(sum(stages.values()), 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forced_stage_that_is_killed_is_not_taken_for_the_old_one(run: Path, when: str) -> None:
    """The artefact of other settings is in place, the manifest still speaks of the one before."""
    wanted, write = (run / "scales.safetensors").read_bytes(), RunFolder.write_safetensors

    def killing(self: RunFolder, name: str, *args: Any, **kwargs: Any) -> None:
        if when == "after":
            write(self, name, *args, **kwargs)
        raise KeyboardInterrupt

    changed = everything().override("activations", metric="l1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "write_safetensors", killing)
        with pytest.raises(KeyboardInterrupt):
            pipeline.search(pipeline.reopen(run, changed, force=True))
    pipeline.search(pipeline.reopen(run, everything(), force=True))
    assert (run / "scales.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_runs(name: str, tmp_path: Path) -> None:
    shipped = Recipe.load(name)
    assert shipped.name == name
    assert Recipe.from_dict(tomllib.loads(shipped.to_toml())) == shipped
    folder = pipeline.quantize(saved("unconditional"), tmp_path / "run", tiny(name))
    net = DiffusionPipeline.from_pretrained(folder).unet
    attach(net, "simulated")
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 16, 16), 500).sample.isfinite().all()
    stored = load_file(tmp_path / "run" / WEIGHTS)
    layers = dict(quantized_layers(net))
    assert layers and any(q.weight_bits == shipped.weights.bits for q in layers.values())
    for layer_name, layer in layers.items():
        codes, inputs = stored[f"{layer_name}.weight_int"], math.prod(layer.weight_shape[1:])
        # Two to a byte up to 4 bits.
        bytes_wanted = layer.weight_shape[0] * (
            (inputs + 1) // 2 if layer.weight_bits <= 4 else inputs
        )
        assert codes.numel() * codes.element_size() == bytes_wanted, layer_name


def test_a_stage_is_not_built_on_what_is_missing_or_stale(run: Path) -> None:
    (run / "rounding.safetensors").unlink()
    shutil.rmtree(run / "packed")
    with pytest.raises(QuantempoError, match=r"round is not done .* before pack"):
        pipeline.pack(pipeline.reopen(run))
    other = everything().override("activations", metric="l1")
    with pytest.raises(QuantempoError, match="run quantempo search --force before round"):
        pipeline.round_weights(pipeline.reopen(run, other, force=True))
    assert not (run / "packed").exists()


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("rounding", {"name": "adaround", "start": "adaround"}, "needs a start itself"),
        ("rounding", {"name": "adaround", "start": "gtpq"}, "did you mean 'gptq'"),
        ("layers", {"bits": {"shortcutt": "w8a8"}}, "no role .*did you mean 'shortcut'"),
    ],
)
def test_a_recipe_that_cannot_end_well_is_refused_at_the_start(
    section: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    wrong = tiny("w8a8").override(section, **values)
    with pytest.raises(QuantempoError, match=message):
        pipeline.load(saved("unconditional"), tmp_path / "run", wrong)
    assert not (tmp_path / "run").exists()
