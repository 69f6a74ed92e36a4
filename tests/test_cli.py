"""The command line: one sentence and exit code 2 for each mistake, and nothing of the user lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file, save_file

from quantempo.cli import app
from quantempo.pipeline.stages import reopen
from tests.conftest import Result
from tests.packed import packed, recipe, saved

SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*"))
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe file of seconds."""
    file = tmp_path / "small.toml"
    file.write_text(SMALL.to_toml())
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A float pipeline folder that a test may damage."""
    shutil.copytree(saved("unconditional"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small_packed(tmp_path: Path) -> Path:
    """A packed folder that a test may damage."""
    shutil.copytree(packed("unconditional").folder, tmp_path / "packed")
    return tmp_path / "packed"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def refused(result: Result, *words: str) -> None:
    """Assert one `error:` line that says these words, exit code 2 and nothing else."""
    assert result.code == 2, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in result.err, result.err
    assert result.err.splitlines()[-1] == errors[0]
    assert result.out == ""
    for word in words:
        assert word in errors[0], errors[0]


def nan(folder: Path) -> None:
    tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    tensors["conv_out.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, folder / WEIGHTS)


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])


def not_diffusers(folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    (folder / "model_index.json").rename(folder / "notes.json")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ("no folder", "expected a diffusers pipeline folder")),
        (not_diffusers, ("is not a diffusers pipeline", "model_index.json")),
        (nan, ("weight 'conv_out.weight' holds NaN",)),
        (cut, ("damaged or truncated", WEIGHTS)),
    ],
)
@pytest.mark.parametrize("verb", ["quantize", "trace"])
def test_a_bad_source_writes_nothing(cli, model, tmp_path, small, verb, damage, words):
    damage(model)
    before = tree(tmp_path)
    refused(cli(verb, model, "--run", tmp_path / "run", "--recipe", small), *words)
    assert tree(tmp_path) == before and not (tmp_path / "run").exists()


def test_a_component_is_told_from_a_pipeline(cli: Any, model: Path, tmp_path: Path) -> None:
    refused(cli("quantize", model / "unet", "--run", tmp_path / "run"), "give the folder above it")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[activations]\nmetrik = 'mse'\n", ("'activations.metrik'", "mean 'activations.metric'?")),
        ("[activations]\nmetric = 'msee'\n", ("msee", "mse")),
        ("[trace]\ntime_sampler = 'ndct'\n", ("ndct", "ndtc")),
        ("[trace]\nsource = 'mimick'\n", ("mimick", "did you mean 'mimic'?")),
        ("[trace]\nsource = 'mimic'\n", ("'mimic' needs images", "--data")),
        ("[rounding]\nname = 'nearst'\n", ("nearst", "nearest")),
        ("[activations]\nbits = 'eight'\n", ("activations.bits", "int")),
        ("[activations]\nbits = 16\n", ("activations.bits = 16", "2 to 8")),
        ("bits = = 3", ("not valid TOML",)),
    ],
)
def test_a_bad_recipe_writes_nothing(cli, tmp_path, model, text, words):
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    result = cli("quantize", model, "--run", tmp_path / "run", "--recipe", file)
    refused(result, *words)
    assert not (tmp_path / "run").exists()


def test_unknown_names_say_which_are_known(cli: Any, tmp_path: Path, model: Path) -> None:
    run = ("--run", tmp_path / "run")
    refused(cli("quantize", model, *run, "--recipe", "w8a9"), "no recipe 'w8a9'", "w8a8")
    refused(cli("quantize", model, *run, "--scheduler", "dimm"), "unknown scheduler", "ddim")
    refused(cli("quantize", model, *run, "--prompts", tmp_path / "none.txt"), "no file")
    refused(cli("quantize", model, *run, "--class-labels", "1,two"), "expected integers")
    assert not (tmp_path / "run").exists()


def test_a_text_model_without_prompts_asks_for_them(cli: Any, tmp_path: Path, small: Path) -> None:
    command = ("quantize", saved("text"), "--run", tmp_path / "run", "--recipe", small)
    refused(cli(*command), "needs a prompt", "--prompts FILE")
    (tmp_path / "prompts.txt").write_text("a b\n\nc d\n")
    assert cli(*command, "--prompts", tmp_path / "prompts.txt").code == 0


def test_arguments_are_given_by_file_setting_and_option(cli: Any, tmp_path: Path, small: Path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa b\r\nc\u2028d\n".encode())
    (tmp_path / "call.toml").write_text("guidance_scale = 3.0\neta = 0.5\nclip_skip = 'None'\n")
    run, prompts = tmp_path / "run", ("--prompts", tmp_path / "prompts.txt")
    command = (
        "trace",
        saved("text"),
        "--run",
        run,
        "--recipe",
        small,
        *prompts,
        "--set",
        "eta=0.25",
    )
    options = ("--negative-prompt", "e", "--height", 16, "--width", 16, "--guidance-scale", "2")
    assert cli(*command, "--set", "eta=0.25", "--call", tmp_path / "call.toml", *options).code == 0
    assert reopen(run).call == {
        "prompt": ["a b", "c\u2028d"], "negative_prompt": "e", "guidance_scale": 2.0, "eta": 0.25,
        "clip_skip": None, "height": 16, "width": 16,
    }  # fmt: skip
    other = ("trace", saved("text"), "--run", tmp_path / "other", "--recipe", small, *prompts)
    refused(cli(*other, "--set", "hight=3"), "no argument 'hight'", "did you mean 'height'")
    refused(cli(*other, "--set", "hight"), "expected key=value")
    refused(cli(*other, "--call", tmp_path / "none.toml"), "expected a TOML file")
    refused(cli(*other, "--strength", "0.5"), "no argument 'strength'")
    refused(cli(*other, "--dtype", "half"), "unknown dtype", "bfloat16")
    assert not (tmp_path / "other").exists()


def test_an_error_of_diffusers_is_a_sentence_and_its_trace_on_request(cli, tmp_path, small):
    (tmp_path / "prompts.txt").write_text("a\n")
    command = ("trace", saved("text"), "--run", tmp_path / "run", "--recipe", small)
    command += ("--prompts", tmp_path / "prompts.txt", "--set", "timesteps=[9, 5]")
    words = ("StableDiffusionPipeline failed", "set_timesteps", "check timesteps, prompt")
    refused(cli(*command), *words)
    for place in (0, len(command)):
        said = cli(*command[:place], "--debug", *command[place:])
        assert said.code == 2 and "Traceback" in said.err and "ValueError" in said.err


@pytest.mark.parametrize("stage", ["start", "stats.safetensors", "packed"])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    cli: Any, tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    run = tmp_path / "run"
    command = ("quantize", saved("unconditional"), "--run", run, "--recipe", small)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        if stage == "start":
            patch.setattr(Path, "write_text", full)
        elif stage == "packed":
            import diffusers

            patch.setattr(diffusers.DDIMPipeline, "save_pretrained", full)
        else:
            from quantempo import run_folder as runs

            save = runs.save_tensors

            def filling(path: Path, *args: Any) -> None:
                if stage in str(path):
                    path.write_bytes(b"half")
                    full()
                save(path, *args)

            patch.setattr(runs, "save_tensors", filling)
        refused(cli(*command), "the disk is full while writing", "free some space")
    assert not (run / stage).exists() and not list(tmp_path.rglob("*.tmp"))
    assert cli(*command).code == 0
    assert (run / "packed/model_index.json").is_file()


def test_damaged_and_newer_packed_models(cli: Any, small_packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "images"
    config = small_packed / "unet/config.json"
    text = config.read_text()
    newer = json.loads(text)
    newer["quantization_config"]["format_version"] = 99
    config.write_text(json.dumps(newer))
    for command in (("sample", small_packed, "--out", out), ("inspect", small_packed)):
        refused(cli(*command), "format_version 99", "upgrade quantempo")
    config.write_text(text)
    cut(small_packed)
    for command in (("sample", small_packed, "--out", out), ("inspect", small_packed)):
        refused(cli(*command), "damaged or truncated")
    assert not out.exists()


def test_run_folders_of_others_stay_as_they_are(cli: Any, model: Path, tmp_path: Path, small: Path):
    run = packed("dit").run
    before = tree(run)
    refused(cli("quantize", model, "--run", run, "--recipe", small), "belongs to another model")
    assert tree(run) == before
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("precious")
    refused(cli("quantize", model, "--run", home, "--recipe", small), "not empty and no run folder")
    done = cli("quantize", model, "--run", home, "--recipe", small, "--force")
    refused(done, "not empty and no run folder")
    assert tree(home) == {"thesis.tex": b"precious"}


def test_a_packed_model_is_no_source(cli: Any, tmp_path: Path) -> None:
    folder = packed("unconditional").folder
    before = tree(folder)
    refused(cli("quantize", folder, "--run", tmp_path / "run"), "quantized already")
    assert tree(folder) == before and not (tmp_path / "run").exists()


def test_sampling_mistakes(cli: Any, tmp_path: Path) -> None:
    float_model, model = saved("unconditional"), packed("unconditional").folder
    out = tmp_path / "images"
    refused(cli("sample", float_model, "--out", out, "--engine", "onednn"), "is a float model")
    refused(cli("sample", model, "--out", out, "--engine", "onednm"), "onednm", "onednn")
    done = cli("sample", model, "--out", out, "--packed", "byte")
    refused(done, "packed 'byte' (expected one of: keep,")
    refused(cli("sample", float_model, "--out", out, "--packed", "auto"), "is a float model")
    refused(cli("sample", tmp_path / "none", "--out", out), "no folder")
    refused(cli("sample", model, "--out", out, "--scheduler", "eulr"), "eulr", "euler")
    assert not out.exists()
    out.mkdir()
    (out / "0.png").write_text("precious")
    for extra in ((), ("--force",)):
        refused(cli("sample", model, "--out", out, "--engine", "simulated", *extra), "not empty")
    assert tree(out) == {"0.png": b"precious"}


@pytest.mark.parametrize("verb", ["calibrate", "search", "round", "pack", "evaluate", "bench"])
def test_stages_without_a_run_folder(cli: Any, tmp_path: Path, verb: str) -> None:
    refused(cli(verb, "--run", tmp_path / "none"), "none")
    assert not (tmp_path / "none").exists()


def test_reports_and_tables_of_nothing(cli: Any, tmp_path: Path) -> None:
    refused(cli("report", "--run", tmp_path / "none"), "none")
    refused(cli("inspect", saved("unconditional")), "is a float model")
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_object_on_stdout(cli: Any, tmp_path: Path, small: Path) -> None:
    run, source = tmp_path / "run", saved("unconditional")
    commands = [
        ("trace", source, "--run", run, "--recipe", small),
        *((verb, "--run", run) for verb in ("calibrate", "search", "round", "pack")),
        ("quantize", source, "--run", run, "--recipe", small),
        ("sample", run / "packed", "--out", tmp_path / "a", "--images", 2, "--steps", 2),
        ("inspect", run),
    ]
    keys = ("rows", "calibrate", "search", "round", "pack", "packed", "images", "layers")
    for command, key in zip(commands, keys, strict=True):
        extra = ("--engine", "simulated") if command[0] == "sample" else ()
        result = cli(*command, *extra, "--json")
        assert result.code == 0, result.err
        values = json.loads(result.out)
        assert isinstance(values, dict) and key in values, command
        assert cli(*command, *extra).code == 0
    table = cli("inspect", run / "packed").out
    assert "mid_block.resnets.0.conv1" in table and "excluded by 'down_blocks.*'" in table
    assert re.search(r"^W8A8: \d+ layers, \d\.\d\d MB of weights$", table, re.MULTILINE)


VERBS = [command.callback.__name__ for command in app.registered_commands]


def test_every_verb_is_there() -> None:
    group = typer.main.get_command(app)
    assert set(group.commands) == {
        *("quantize", "trace", "calibrate", "search", "round", "pack"),
        *(
            "sample",
            "evaluate",
            "export",
            "import",
            "push",
            "report",
            "inspect",
            "bench",
            "demo",
            "sensitivity",
            "status",
            "engines",
            "compare",
        ),
    }


@pytest.mark.parametrize("verb", [name.removesuffix("_weights").rstrip("_") for name in VERBS])
def test_help_ends_with_a_command_to_paste(cli: Any, verb: str) -> None:
    result = cli(verb, "--help")
    assert result.code == 0 and result.err == ""
    assert f"Example: quantempo {verb}" in " ".join(result.out.split())


def test_unknown_flags_are_refused_by_the_parser(cli: Any) -> None:
    for args in (("sample",), ("quantise", "x"), ("demo", "--imges", "3"), ("demo", "--images", 0)):
        result = cli(*args)
        assert result.code == 2 and "Traceback" not in result.err


def test_the_trace_takes_its_images_from_data(cli: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "raw.toml"
    recipe.write_text(SMALL.override("trace", source="raw").to_toml())
    (tmp_path / "images").mkdir()
    for level in (0, 255):
        Image.new("RGB", (16, 16), (level, 0, 0)).save(tmp_path / f"images/{level}.png")
    command = ("trace", saved("unconditional"), "--run", tmp_path / "run", "--recipe", recipe)
    refused(cli(*command, "--data", tmp_path / "none"), "no image folder")
    result = cli(*command, "--data", tmp_path / "images", "--json")
    assert result.code == 0, result
    rows = load_file(tmp_path / "run/trace/chunk-00000.safetensors")["x_t"]
    assert json.loads(result.out)["rows"] == len(rows)
    assert rows[:, 0].unique().tolist() == [-1, 1] and rows[:, 1:].unique().tolist() == [-1]
