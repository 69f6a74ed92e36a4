"""What the command line says of itself, of a run folder, of this machine."""

import json

import pytest

from quantempo import __version__
from quantempo.cli.app import cpu_quota
from quantempo.cli.common import show_summary
from quantempo.engines import ENGINES
from quantempo.pipeline import stages as pipeline
from tests.packed import packed, recipe, saved


def test_version(cli):
    assert cli("--version") == (0, f"quantempo {__version__}\n", "")


def test_engines_are_those_of_the_registry_with_a_reason_where_one_is_missing(cli):
    code, out, _ = cli("engines", "--json")
    rows = {row["engine"]: row for row in json.loads(out)["engines"]}
    assert code == 0 and list(rows) == list(ENGINES.names())
    for name, row in rows.items():
        reason = ENGINES.get(name).missing()
        assert row["works"] == (reason is None)
        assert row["reason"] == (reason or ENGINES.get(name).handicap())


def test_status_names_the_stages_done_and_the_command_that_goes_on(cli, tmp_path):
    session = pipeline.load(saved("unconditional"), tmp_path / "a run", recipe())
    pipeline.trace(session)
    code, out, _ = cli("status", tmp_path / "a run", "--json")
    found = json.loads(out)
    assert code == 0 and found["stages"]["trace"] > 0 and found["stages"]["calibrate"] is None
    assert found["next"].startswith("quantempo quantize ")
    assert found["next"].endswith(f"--run '{tmp_path / 'a run'}'")
    run = packed("unconditional").run
    code, out, _ = cli("status", run)
    assert code == 0 and "not done" not in out and f"quantempo evaluate --run {run}" in out


def test_status_of_what_is_no_run_is_one_sentence(cli, tmp_path):
    code, out, err = cli("status", tmp_path)
    assert code == 2 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert f"run quantempo quantize MODEL --run {tmp_path} first" in err


@pytest.mark.parametrize(
    ("db", "words"),
    [(42.9, "not visible"), (36, "hardly visible"), (30, "side by side"), (20, "at a glance")],
)
def test_the_last_screen_says_in_words_what_was_lost(capsys, tmp_path, db, words):
    values = {"bytes_packed": 9.5e6, "bytes_float32": 36.1e6, "int8_mac_share": 0.98}
    values |= {"psnr_db_mean": db, "psnr_db_p05": db - 3, "seeds": [0, 1]}
    show_summary(values, tmp_path, "quantempo report")
    out = capsys.readouterr().out
    assert out.startswith("\n9.5 MB, 3.8x smaller; ") and words in out.splitlines()[1]
    assert f"{db:.1f} dB" in out and out.endswith("quantempo report\n")


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_threads_are_those_that_the_control_group_grants(tmp_path, files, cpus):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == cpus
