"""What several processes make together is what one makes, byte for byte; one that dies is named."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantempo.cli.app import _joined
from quantempo.core import ranks
from quantempo.errors import QuantempoError
from quantempo.pipeline import quality
from quantempo.pipeline.stages import finish, load
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder
from tests.pipeline.test_large import same
from tests.tiny import tiny_text

CALL = {"prompt": ["a", "b"]}
# Three calls of the pipeline, two batches of the statistics, several layers of one step.
RECIPES = {
    name: Recipe.load(name)
    .override("trace", steps=2, chains=33, picks=1)
    .override("layers", exclude=["down_blocks.*", "mid_block.*", "up_blocks.1.*"])
    .override("activations", buckets=2)
    .override("rounding", samples=8, **more)
    for name, more in {"w8a8": {}, "w4a8-adaround": {"iterations": 2}}.items()
}  # fmt: skip


def together(count: int, work: Callable[[], None]) -> list[int]:
    """Do the work in `count` processes, as `torchrun` starts them; return their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one(number: int) -> None:
        given = {"RANK": number, "LOCAL_RANK": number, "GROUP_RANK": 0, "MASTER_PORT": port}
        given |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {key: str(value) for key, value in given.items()}
        ranks.start()
        known = RunFolder.foreign
        # The others look late.
        RunFolder.foreign = lambda run: bool(time.sleep(ranks.rank())) or known(run)  # type: ignore
        work()

    # Forked, so that nothing is imported again.
    fork = multiprocessing.get_context("fork")
    every = [fork.Process(target=one, args=(number,)) for number in range(count)]
    for process in every:
        process.start()
    for process in every:
        process.join()
    return [process.exitcode for process in every]  # type: ignore[misc]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "float"
    tiny_text().save_pretrained(folder)
    return folder


def made(run: Path, source: Path, name: str) -> None:
    """Quantize and evaluate."""
    session = load(source, run, RECIPES[name], call=CALL)
    finish(session)
    quality.evaluate(session, images=9, steps=2, batch_size=2, engine="simulated")


def taken(run: Path) -> dict[str, Any]:
    """Take the figures out of a run, without seconds."""
    found = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").unlink()
    return {k: v for k, v in found.items() if k not in ("calibration_seconds", "json_sha256")}


@pytest.fixture(scope="module")
def alone(source: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """What one process makes: the run, and its figures."""
    runs = {name: source.with_name(name) for name in RECIPES}
    for name, run in runs.items():
        made(run, source, name)
    return {name: (run, taken(run)) for name, run in runs.items()}


@pytest.mark.parametrize("count, name", [(2, "w8a8"), (3, "w4a8-adaround")])
def test_the_same_bytes_and_figures(
    source: Path,
    alone: dict[str, tuple[Path, dict[str, Any]]],
    tmp_path: Path,
    count: int,
    name: str,
) -> None:
    run = tmp_path / "run"
    assert together(count, lambda: made(run, source, name)) == [0] * count
    assert taken(run) == alone[name][1]
    same(alone[name][0], run)


def test_a_rank_that_dies_is_named_and_another_number_goes_on(
    source: Path, alone: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    recipe, run, prompts = (tmp_path / name for name in ("recipe.toml", "run", "prompts.txt"))
    recipe.write_text(RECIPES["w8a8"].to_toml())
    prompts.write_text("\n".join(CALL["prompt"]))
    # After --: torchrun would take --run for one of its own options.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--"]
    command += ["quantempo", "quantize", source, "--run", run, "--recipe", recipe]
    command += ["--prompts", prompts]
    job = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    while not (run / "blocks/0001.safetensors").exists():
        assert job.poll() is None
        time.sleep(0.005)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    (second,) = (
        pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    os.kill(int(second), signal.SIGKILL)
    said = job.communicate()[1]
    assert job.returncode
    (sentence,) = re.findall("^error: .*", said, re.MULTILINE)
    assert sentence.startswith("error: rank 1 of 2 ended during round; run the same command again")
    assert len(re.findall("5/5|4/5", said)) == 0 and said.count("3/5") == 1
    assert not (run / "rounding.safetensors").exists()
    assert together(3, lambda: made(run, source, "w8a8")) == [0] * 3
    assert taken(run) == alone["w8a8"][1]
    same(alone["w8a8"][0], run)


@pytest.mark.parametrize("verb", ["quantize", "sample"])
def test_a_folder_that_another_process_begins_just_now(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def work() -> None:
        if verb == "quantize":
            load(source, tmp_path / "out", RECIPES["w8a8"], call=CALL)
        else:
            quality.sample(quality.open_model(source), tmp_path / "out", [0], steps=1, call=CALL)

    before = RunFolder.foreign

    def foreign(out: RunFolder) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "foreign", before)
            work()
        return before(out)

    monkeypatch.setattr(RunFolder, "foreign", foreign)
    work()


def test_images_stay_until_others_can_be_made(source: Path, tmp_path: Path) -> None:
    def work(fails: int | None, seeds: int = 1, **how: Any) -> None:
        pipe = quality.open_model(source)
        if ranks.rank() == fails:
            pipe.unet.register_forward_pre_hook(lambda *_: 1 / 0)
        quality.sample(pipe, tmp_path, range(seeds), steps=1, call=CALL, **how)

    work(None)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    more: Any = {"identity": "other", "force": True, "batch_size": 1}
    for fails in (0, 2):
        assert any(together(3, lambda fails=fails: work(fails, 3, **more)))
        assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    # One of them has none to make.
    assert together(3, lambda: work(None, 2, **more)) == [0] * 3
    assert len([*tmp_path.glob("*.png")]) == 2
    assert "other" in (tmp_path / "settings.json").read_text()


@pytest.mark.parametrize(
    "said, kind, match",
    [
        ("[gloo/pair.cc:1] Connection closed by peer", QuantempoError, "ended, or the job was"),
        ("[gloo/buffer.cc:8] Timed out waiting 9ms", QuantempoError, "silent for 1:00:00 during"),
        ("CUDA error: out of memory", RuntimeError, "out of memory"),
    ],
)
def test_what_went_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, said: str, kind: type[Exception], match: str
) -> None:
    def gather(*_: Any) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr(ranks._job, "size", 2)
    monkeypatch.setattr(ranks.signal, "signal", lambda *_: None)
    with pytest.raises(kind, match=match) as raised:
        ranks.everyone(1)
    assert type(raised.value) is kind


def test_a_wrong_option_is_said_before_any_process_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setattr(ranks, "start", lambda: calls.append("start"))
    monkeypatch.setattr(ranks, "told", lambda _: calls.append("told"))
    for code, met in ((2, ["start", "told"]), (0, ["start"])):
        with pytest.raises(SystemExit), _joined():
            sys.exit(code)
        assert calls == met
        calls.clear()
