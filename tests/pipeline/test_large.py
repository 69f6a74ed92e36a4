"""A network that stays in its files is quantized to the same bytes as one in memory."""

import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import quantempo
from quantempo import run_folder
from quantempo.checkpoint import write
from quantempo.core import paged
from quantempo.core.paged import Paged
from quantempo.models import large
from quantempo.models import load as load_module
from quantempo.models.call import call_pipeline
from quantempo.models.large import room
from quantempo.models.layers import DENOISERS, Block, denoiser_of
from quantempo.models.load import load_pipeline, model_digest
from quantempo.pipeline.quantize import Quantized
from quantempo.pipeline.stages import Session, finish, load, reopen, trace
from quantempo.recipe import Recipe
from quantempo.rounding.reconstruct import _Job
from tests.tiny import tiny_dit, tiny_text


def short(recipe_name: str, **rounding: Any) -> Recipe:
    recipe = Recipe.load(recipe_name).override("trace", steps=2, chains=2, picks=2)
    return recipe.override("rounding", samples=2, **rounding)


NEAREST = short("w8a8", name="nearest", bias=False)
LEARNED = short("w4a8-adaround", iterations=2)
RECIPES = {"nearest": NEAREST, "gptq": short("w8a8"), "adaround": LEARNED}
BESIDE = ("README.md", "vocab.json", "merges.txt", "spiece.model", "more.d/notes.txt")
CASES = [("unet", "gptq"), *(("transformer", name) for name in RECIPES)]


@pytest.fixture(scope="module")
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    made: dict[str, Any] = {"unet": (tiny_text, {"prompt": ["a", "b"]})}
    build, call = made.get(request.param, (tiny_dit, {"class_labels": [1, 2]}))
    pipe = build()
    denoiser_of(pipe)[1].to(torch.bfloat16)
    pipe.vae.half()
    getattr(pipe, "text_encoder", pipe.vae).half()
    folder = tmp_path_factory.mktemp("large") / "float"
    pipe.save_pretrained(folder, variant="fp16", max_shard_size="40KB")
    return folder, call


@pytest.fixture(autouse=True)
def all_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "_SMALL", 200)


def same(one: Path, two: Path) -> None:
    """Assert that all files are equal but the manifest, which has times."""
    files = sorted(f.relative_to(one) for f in one.rglob("*") if f.is_file())
    assert files == sorted(f.relative_to(two) for f in two.rglob("*") if f.is_file())
    names = [str(name) for name in files if name.name != "manifest.json"]
    assert filecmp.cmpfiles(one, two, names, shallow=False)[1:] == ([], [])


def counted(
    patch: pytest.MonkeyPatch, owner: Any, name: str, kill: int = 0, error: Any = KeyboardInterrupt
) -> list[int]:
    """Return a list that grows by each call of a function; call number `kill` raises."""
    calls, known = list[int](), getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == kill:
            raise error
        return known(*args, **kwargs)

    patch.setattr(owner, name, call)
    patch.setattr(run_folder, "_PAUSE", 0)
    return calls


@pytest.mark.parametrize("source, name", CASES, indirect=["source"])
def test_the_same_bytes_also_after_a_kill_in_a_block(
    source: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, call = source
    caplog.set_level("INFO", "quantempo")

    def opened(run: str, memory: int) -> Session:
        return load(folder, tmp_path / run, RECIPES[name], call=call, memory=memory)

    finish(whole := opened("whole", 2**40))
    assert not any(isinstance(p, Paged) for p in whole.denoiser.parameters())
    assert "read from its files" not in caplog.text
    paged, before = opened("paged", 1), _Job.round
    assert whole.identity == paged.identity
    networks = [part for part in paged.pipe.components.values() if isinstance(part, nn.Module)]
    weights = [p for part in networks for p in part.parameters() if p.numel() >= 200]
    assert all(isinstance(p, Paged) for p in weights)
    assert "more than --memory 0.0: read from its files, slower" in caplog.text
    assert any(isinstance(p, Paged) for p in paged.denoiser.parameters())

    def killed(job: _Job, block: Block) -> Any:
        if block is job.blocks[1]:
            raise KeyboardInterrupt
        return before(job, block)

    if name != "nearest":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_Job, "round", killed)
            finish(paged)
        paged = opened("paged", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch, write.Shards, "write", 10)
        finish(paged)
    with monkeypatch.context() as patch:
        calls = counted(patch, Quantized, "_fill")
        finish(opened("paged", 1))
    # Nine layers lay where they will be.
    rows = json.loads((tmp_path / "whole/layers.json").read_text())
    assert len(calls) == sum((row["bits_weight"] or 32) < 32 for row in rows) - 9 > 0
    same(tmp_path / "whole", tmp_path / "paged")
    # The limit is kept for whoever continues, and another one makes nothing stale.
    again = reopen(tmp_path / "paged")
    assert again.memory == 1 and any(isinstance(p, Paged) for p in again.denoiser.parameters())
    assert opened("paged", 2**40).require_packed() and reopen(tmp_path / "paged").memory == 2**40


@pytest.mark.parametrize("source", ["unet"], indirect=True)
def test_components_are_copied_and_variants_get_plain_names(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder, call = shutil.copytree(source[0], tmp_path / "float"), source[1]
    for name in (*BESIDE, "model.onnx", "flax_model.msgpack", "flax_model.msgpack.index.json"):
        (folder / "vae" / name).parent.mkdir(exist_ok=True)
        (folder / "vae" / name).write_text("no JSON")
    # A hub name is what its folder in the cache is.
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **how: folder)
    caplog.set_level("INFO", "quantempo")
    packed = quantempo.quantize("some/name", tmp_path / "run", NEAREST, call=call, memory=1)
    assert "read from its files" in caplog.text and reopen(tmp_path / "run").source == "some/name"
    assert not list(packed.rglob("*fp16*"))
    assert not [f for kind in ("onnx", "msgpack*") for f in packed.rglob(f"*.{kind}")]
    for name in BESIDE:
        assert (packed / "vae" / name).read_text() == "no JSON"
    for file in folder.rglob("*.safetensors"):
        if file.parent.name not in DENOISERS:
            copy = packed / file.parent.name / file.name.replace(".fp16", "")
            assert copy.read_bytes() == file.read_bytes()
    assert load_pipeline(packed).vae.dtype == torch.float32


def test_a_lora_beside_components_that_stay_in_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, layer = tiny_text(), "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pipe.save_pretrained(tmp_path / "float")
    width = pipe.unet.get_submodule(layer).weight.shape
    names, sizes = (
        ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        ((2, width[1]), (width[0], 2)),
    )
    pairs = {n.format(layer): torch.ones(size) for n, size in zip(names, sizes, strict=True)}
    save_file(pairs, tmp_path / "lora.safetensors")
    before = large.paged_networks

    def others(*given: Any) -> dict[str, nn.Module]:
        return {name: part for name, part in before(*given).items() if name != "unet"}

    monkeypatch.setattr(load_module, "paged_networks", others)
    how: Any = {"call": {"prompt": ["a", "b"]}, "lora": [str(tmp_path / "lora.safetensors")]}
    session = load(tmp_path / "float", tmp_path / "run", NEAREST, memory="0.000001MB", **how)
    assert reopen(tmp_path / "run").memory == "0.000001MB" and finish(session)
    file = "text_encoder/model.safetensors"
    one, two = ((tmp_path / folder / file).read_bytes() for folder in ("float", "run/packed"))
    assert one == two


def test_room_is_what_the_control_group_grants(tmp_path: Path) -> None:
    whole = room("cpu", tmp_path)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        for text, found in (("max\n", whole), (f"{2**62}\n", whole), ("3000000\n", 1_000_000)):
            (tmp_path / name).write_text(text)
            assert room("cpu", tmp_path) == found
        (tmp_path / name).unlink()


@pytest.mark.parametrize("source", ["transformer"], indirect=True)
def test_a_network_is_written_as_diffusers_does(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, call = source
    packed = quantempo.quantize(folder, tmp_path / "run", NEAREST, call=call)
    network = denoiser_of(load_pipeline(packed))[1]
    for size in ("10GB", "10KB"):
        monkeypatch.setattr(write, "_SHARD", size)
        write.save_network(network, tmp_path / size / "ours")
        network.save_pretrained(tmp_path / size / "theirs", max_shard_size=size)
        same(tmp_path / size / "ours", tmp_path / size / "theirs")


@pytest.mark.parametrize("source", ["unet"], indirect=True)
def test_what_only_the_trace_runs_is_freed_and_read_when_asked(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, call = source
    for worth, kinds in ((2**28, {False}), (0, {True})):
        monkeypatch.setattr(large, "_WORTH", worth)
        session = load(folder, tmp_path / str(worth), NEAREST, call=call)
        before = call_pipeline(session.pipe, [0, 1], steps=2, **call)
        trace(session)
        parts = session.pipe.vae, session.pipe.text_encoder
        weights = [p for part in parts for p in part.parameters() if p.numel() >= 200]
        assert {isinstance(p, Paged) for p in weights} == kinds
        assert not any(isinstance(p, Paged) for p in session.denoiser.parameters())
        assert (call_pipeline(session.pipe, [0, 1], steps=2, **call) == before).all()
        finish(session)
    same(tmp_path / str(2**28), tmp_path / "0")


@torch.no_grad()
def test_a_text_encoder_of_tied_and_prefixed_names_is_paged(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    t5, clip = T5EncoderModel(T5Config(vocab_size=40, **size)), tiny_text().text_encoder
    ids, file = torch.arange(8)[None], tmp_path / "text_encoder/model.safetensors"
    for made, prefix in ((t5, ""), (clip, "text_model.")):
        made.save_pretrained(file.parent)
        save_file({prefix + k: v.bfloat16() for k, v in load_file(file).items()}, file)
        index = {"text_encoder": ["transformers", type(made).__name__]}
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        how = tmp_path, {"text_encoder": [file]}, torch.float32
        found = large.paged_networks(*how, 1)["text_encoder"]
        assert not found.training and not large.paged_networks(*how, 2**30)
        exact = type(made).from_pretrained(file.parent, dtype=torch.float32)
        assert model_digest(found) == model_digest(exact)
        assert torch.equal(found(ids)[0], exact(ids)[0])


def test_names_have_one_prefix_or_none() -> None:
    network = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"a": nn.Linear(2, 2)})})
    names, shapes = list(network.state_dict()), [v.shape for v in network.state_dict().values()]
    for start in ("", "model."):
        whole = {start + n: torch.empty(s) for n, s in zip(names, shapes, strict=True)}
        assert [*large._places(network, whole)] == names  # type: ignore[arg-type]
        # Another one of the same end and shape is none.
        del whole[f"{start}a.weight"]
        assert [*large._places(network, whole)] == names[1:]  # type: ignore[arg-type]
