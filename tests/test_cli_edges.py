"""Command lines that no file, no device and no memory can serve: one sentence, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantempo.errors import QuantempoError
from quantempo.models.call import generators
from quantempo.recipe import Recipe
from tests.packed import packed

LONG = "n" * 300


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", 2**64),
        ("--seed", -(2**63)),
        ("--device", "meta"),
        ("--device", "mps"),
        ("--prompts", LONG),
        ("--out", LONG),
        ("--out", os.fsdecode(b"\xff\xfe")),
    ],
)
def test_what_cannot_be_is_one_sentence(cli, tmp_path, options, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    command = ("sample", packed("unconditional").folder, "--engine", "simulated", "--steps", 1)
    out = () if options[0] == "--out" else ("--out", tmp_path / "out")
    code, _, err = cli(*command, "--images", 1, *out, *options)
    assert code == 2 or b"\xff" in os.fsencode(str(options[1]))
    assert "Traceback" not in err and len(err) < 2000


@pytest.mark.parametrize("verb", ["quantize", "inspect", "evaluate", "report", "bench", "status"])
def test_names_that_are_too_long(cli, tmp_path, verb):
    place = ("--run", tmp_path / LONG) if verb not in ("inspect", "status") else (tmp_path / LONG,)
    source = (packed("unconditional").source,) if verb == "quantize" else ()
    code, _, err = cli(verb, *source, *place)
    assert code == 2 and "Traceback" not in err, err


@pytest.mark.parametrize("option", ["--images", "--steps", "--batch-size"])
def test_a_thousand_million_of_anything_is_refused(cli, tmp_path, option):
    folder = packed("unconditional").folder
    code, _, err = cli("sample", folder, "--out", tmp_path / "out", option, 10**9)
    assert code == 2 and "1000000" in err


def test_seeds_have_63_bits():
    with pytest.raises(QuantempoError, match=r"got seed 1844.*expected one below 2\*\*63"):
        generators([1, 2**64])
    with pytest.raises(QuantempoError, match=r"trace\.seed"):
        Recipe().override("trace", seed=2**70)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_output_into_a_full_or_closed_pipe():
    command = [sys.executable, "-m", "quantempo", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done
    assert "Exception ignored" not in done.stderr
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        done = subprocess.run(
            command, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment, timeout=60
        )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done
