"""What a run folder holds is read as a stranger's, by one process at a time, or only read."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from quantempo import run_folder
from quantempo.errors import QuantempoError
from quantempo.pipeline import quality, samples
from quantempo.pipeline import stages as pipeline
from quantempo.report import render
from quantempo.run_folder import RunFolder
from tests.packed import packed, recipe, saved
from tests.tiny import tiny_unconditional

SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*"))
# Stages that are done when a file is read next.
DONE = {"trace": 1, "scales": 3, "layers": 5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a finished run that a test may write into."""
    return shutil.copytree(packed("unconditional").run, tmp_path / "run")


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def use(run: Path) -> None:
    """Read everything there is to read of a run."""
    session = pipeline.reopen(run)
    pipeline.finish(session)
    quality.summary(session)
    render(run)


@pytest.mark.parametrize(
    "name", ["trace/chunk-00000.safetensors", "scales.safetensors", "layers.json"]
)
def test_a_flipped_bit_does_not_go_into_the_model(run: Path, name: str) -> None:
    raw = bytearray((run / name).read_bytes())
    raw[-100] ^= 4
    (run / name).write_bytes(raw)
    done = list(json.loads((run / "manifest.json").read_text())["stages"])
    later = done[DONE[name.partition(".")[0].partition("/")[0]] :]
    edit(run / "manifest.json", lambda v: [v["stages"].pop(stage) for stage in later])
    if later:
        shutil.rmtree(run / "packed")
    with pytest.raises(QuantempoError, match=r"is not what|damaged"):
        use(run)
    # What the sentence asks for helps.
    (run / name).unlink()
    if "trace" in name:
        (run / "trace.json").unlink()
    pipeline.finish(pipeline.reopen(run))
    wanted = packed("unconditional").run / "rounding.safetensors"
    assert (run / "rounding.safetensors").read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("left", ["manifest.json", "model.json"])
def test_a_run_killed_in_its_first_second_goes_on(tmp_path: Path, left: str) -> None:
    run = tmp_path / "run"
    pipeline.load(saved("unconditional"), run, SMALL)
    for file in run.iterdir():
        if file.name != left:
            file.unlink()
    pipeline.trace(pipeline.load(saved("unconditional"), run, SMALL))
    assert RunFolder(run).stages().keys() == {"trace"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda v: v.pop("stages")),
        ("manifest.json", lambda v: v.pop("recipe")),
        ("manifest.json", lambda v: v.update(call=7)),
        ("manifest.json", lambda v: v["stages"].update(pack=3)),
        ("manifest.json", lambda v: v["stages"]["pack"].update(seconds="x", sha256=[])),
        ("manifest.json", lambda v: v["stages"]["trace"].pop("key")),
        ("model.json", lambda v: v.pop("sha256")),
        ("model.json", lambda v: v.update(path=7)),
        ("layers.json", lambda v: v[0].pop("macs")),
        ("trace.json", lambda v: v.pop("chunks")),
        ("trace.json", lambda v: v.update(settings=None)),
        ("metrics.json", lambda v: v.update(scores=3)),
    ],
)
def test_a_missing_entry_or_a_wrong_type_is_one_sentence(
    run: Path, name: str, change: Callable[[Any], Any]
) -> None:
    RunFolder(run).write_json("metrics.json", {"psnr_db_mean": 40.0, "scores": []})
    edit(run / name, change)
    # As of a version that noted no hashes, so that it is read at all.
    if name not in ("manifest.json", "model.json"):
        edit(run / "manifest.json", lambda v: [s.pop("sha256") for s in v["stages"].values()])
    with pytest.raises(QuantempoError) as caught:
        use(run)
    assert "\n" not in str(caught.value)


def test_damaged_pictures_are_made_again(tmp_path: Path) -> None:
    pipe = quality.open_model(packed("unconditional").folder, engine="simulated")
    how: dict[str, Any] = {"steps": 2, "batch_size": 1}
    wanted = quality.sample(pipe, tmp_path, range(4), **how)
    (tmp_path / "0.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    Image.new("RGB", (3, 3)).save(tmp_path / "1.png")
    shutil.copy(tmp_path / "3.png", tmp_path / "2.png")
    again = quality.sample(pipe, tmp_path, range(4), **how)
    assert np.array_equal(again, wanted)


def test_a_damaged_film_counts_as_none(tmp_path: Path) -> None:
    film = np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3)
    samples._write(RunFolder(tmp_path), 5, film, None)
    assert np.array_equal(samples._read(tmp_path / "5.npy"), film)
    raw = bytearray((tmp_path / "5.npy").read_bytes())
    raw[-100] ^= 1
    (tmp_path / "5.npy").write_bytes(raw)
    assert samples._read(tmp_path / "5.npy") is None


def test_a_read_only_run_is_evaluated_and_stays_as_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {f: f.stat().st_mtime_ns for f in run.rglob("*")}
    monkeypatch.setattr(os, "access", lambda *_, **__: False)

    def no_write(path: Path) -> Any:
        raise AssertionError(path)

    real = run_folder.private_folder
    monkeypatch.setattr(
        run_folder, "private_folder", lambda p: no_write(p) if run in p.parents else real(p)
    )
    session = pipeline.reopen(run)
    pipeline.finish(session)
    metrics = quality.evaluate(session, images=2, steps=2, engine="simulated")
    assert metrics["psnr_db_mean"] > 10
    assert {f: f.stat().st_mtime_ns for f in run.rglob("*")} == before


@pytest.mark.parametrize("place", ["file/run", "n" * 300])
def test_an_impossible_run_folder_is_one_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantempoError, match="cannot write"):
        pipeline.load(saved("unconditional"), tmp_path / place, SMALL)


def test_the_configuration_of_a_network_is_part_of_the_key(tmp_path: Path, run: Path) -> None:
    source = shutil.copytree(saved("unconditional"), tmp_path / "source")
    edit(run / "model.json", lambda v: v.update(path=str(source)))
    assert not pipeline.reopen(run).stale("pack")
    edit(source / "unet/config.json", lambda v: v.update(norm_eps=0.01))
    with pytest.raises(QuantempoError, match="made with other settings"):
        pipeline.reopen(run)


def test_a_dead_layer_packs(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    for layer in (pipe.unet.mid_block.resnets[0].conv2, pipe.unet.mid_block.attentions[0].to_q):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    pipe.save_pretrained(tmp_path / "source")
    folder = pipeline.quantize(tmp_path / "source", tmp_path / "run", SMALL)
    net = quality.open_model(folder, engine="simulated").unet
    assert net(torch.zeros(1, 3, 16, 16), 5).sample.isfinite().all()


def test_a_report_is_written_into_run_folders_only(tmp_path: Path) -> None:
    source = shutil.copytree(saved("unconditional"), tmp_path / "source")
    with pytest.raises(QuantempoError, match="no run folder"):
        render(source)
    assert not (source / "report.html").exists()


def test_seconds_are_of_what_is_packed(run: Path) -> None:
    entry = {"key": "k", "seconds": 762.0}
    RunFolder(run).update_manifest(stages={"sensitivity": entry})
    assert quality.summary(pipeline.reopen(run))["calibration_seconds"] < 700


WORK = """
import sys
from quantempo.pipeline import stages
from tests.pipeline.test_trust import SMALL
stages.quantize(sys.argv[1], sys.argv[2], SMALL)
"""


def test_processes_on_one_run_folder_take_turns(tmp_path: Path) -> None:
    source, run = saved("unconditional"), tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}"}
    how = {"env": environment, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", WORK, source, run], **how) as other:
        with RunFolder(run).lock():
            assert any("waiting for another process" in line for line in other.stderr)
        pipeline.quantize(source, run, SMALL)
        _, said = other.communicate(timeout=300)
    assert other.returncode == 0, said
    use(run)
    assert not list(run.glob(".*"))
