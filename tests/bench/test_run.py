"""`quantempo bench` on a CPU with an injected timer: its rows, its files and its mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantempo.bench import forwards
from quantempo.bench.candidates import select
from quantempo.bench.networks import model_network, quick_network, run_network
from quantempo.bench.results import Results, text_table
from quantempo.bench.run import bench, bench_network
from quantempo.engines import ENGINES
from quantempo.errors import QuantempoError
from quantempo.pipeline import stages as pipeline
from quantempo.report.answers import timed
from quantempo.run_folder import RunFolder
from tests.bench.timers import Steady
from tests.packed import packed, saved
from tests.tiny import tiny_text, tiny_unet

PLAIN = ("bf16/eager", "ours/simulated")
HEAD = {"device": "cpu", "engine": "simulated", "machine": {}}


def rows_of(record: dict[str, Any], kind: str = "forward") -> list[dict[str, Any]]:
    return [row for row in record["rows"] if row["kind"] == kind]


def test_a_network_is_timed_without_a_run_folder() -> None:
    results = Results(HEAD)
    # First calls, turns of two, then whole runs of DDIM.
    timer = Steady(99.0, 99.0, 10.0, 5.0, 40.0, 20.0)
    network = quick_network("tiny", tiny_text().unet)
    bench_network(
        network, [1], select(PLAIN, "cpu"), results, rounds=2, seconds=0.0, steps=2, timer=timer
    )
    record = results.record()
    assert [row["ms_per_forward"] for row in rows_of(record)] == [10.0, 5.0]
    assert all("timing" in row["scales"] for row in rows_of(record))
    assert record["speedup_vs_best_bf16"] == {"tiny_b1": 2.0}
    assert record["speedup_vs_best_fp32"] == {"tiny_b1": None}
    bf16, ours = rows_of(record, "images_per_second")
    # One image, two steps.
    assert bf16["candidate"] == "bf16/eager" and ours["candidate"] == "ours/simulated"
    assert (bf16["from_forwards"], bf16["measured"]) == (50.0, 25.0)
    assert (ours["from_forwards"], ours["measured"], ours["steps"]) == (100.0, 50.0, 2)


def test_a_loop_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("shape")

    monkeypatch.setattr(forwards, "ddim_loop", broken)
    results = Results(HEAD)
    bench_network(
        quick_network("tiny", tiny_unet()), [1], select(["bf16/eager"], "cpu"), results,
        rounds=1, seconds=0.0, steps=2, timer=Steady(),
    )  # fmt: skip
    (row,) = rows_of(results.record(), "images_per_second")
    assert row["failed"] == "RuntimeError: shape" and "measured" not in row
    assert "RuntimeError: shape images a second" in "\n".join(text_table(results.record()))


def test_a_folder_is_quantized_without_data() -> None:
    network = model_network(str(saved("unconditional")), "cpu")
    assert network.name == "unconditional" and network.scheduler is not None
    assert network.packed is not None and network.inputs(2)["sample"].shape == (2, 3, 16, 16)
    with pytest.raises(QuantempoError, match="no model 'nothing'"):
        model_network("nothing", "cpu")


def test_a_run_folder_is_timed_and_keeps_its_other_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(packed("unconditional").run, run)
    folder = RunFolder(run)
    folder.write_json("bench.json", {"cuda": {"rows": [], "machine": "kept", "engine": "x"}})
    folder.write_json("metrics.json", {"psnr_db_mean": 40.0})
    record = bench(
        pipeline.reopen(run), batches=[2], candidates=["*/eager", "ours/*"], engines=["simulated"],
        out=tmp_path / "r.json", rounds=1, seconds=0.0,
        timer=Steady(*[99.0] * 3, 20.0, 10.0, 5.0),
    )  # fmt: skip
    names = ["fp32/eager", "bf16/eager", "ours/simulated"]
    assert [row["candidate"] for row in rows_of(record)] == names
    written = folder.read_json("bench.json")
    assert written["cuda"]["machine"] == "kept"
    assert written["cpu"] == json.loads(json.dumps(record))
    assert written["cpu"] == json.loads((tmp_path / "r.json").read_text())
    assert record["machine"]["versions"]["torch"]
    expected = {
        "ms_per_forward": {"fp32/eager": 20.0, "bf16/eager": 10.0, "ours/simulated": 5.0},
        "speedup_vs_best_fp32": 4.0,
        "speedup_vs_best_bf16": 2.0,
    }
    (shown,) = timed(folder)
    assert (shown.device, shown.batch) == ("cpu", 2) and shown.ours["ms_per_forward"] == 5.0
    assert shown.floats == {"bfloat16": 10.0, "float32": 20.0}
    assert folder.read_json("metrics.json") == {"psnr_db_mean": 40.0, **expected}


def test_a_run_folder_gives_its_own_scales_and_inputs() -> None:
    network = run_network(pipeline.reopen(packed("unconditional").run))
    assert network.scales == "run folder" and network.dtype == torch.float32
    inputs = network.inputs(40)
    # Recorded rows, again and again, at one time as in sampling.
    assert inputs["sample"].shape[0] == 40 and inputs["timestep"].numel() == 1
    assert torch.equal(inputs["sample"][:3], network.inputs(3)["sample"])


@torch.no_grad()
def test_a_transformer_of_a_run_gets_times_in_a_row() -> None:
    # FLUX and its like refuse one number for all rows.
    network = run_network(pipeline.reopen(packed("dit").run))
    assert network.inputs(3)["timestep"].shape == (3,)
    assert torch.isfinite(network.floating(**network.inputs(3)).sample).all()


def test_on_a_cpu_engines_of_a_gpu_are_not_timed() -> None:
    record = bench(
        model=str(saved("unconditional")), batches=[1], candidates=["ours/*"], rounds=1,
        seconds=0.0, timer=Steady(),
    )  # fmt: skip
    names = {row["candidate"] for row in rows_of(record)}
    assert "ours/simulated" in names and "ours/triton" not in names
    timed = next(row for row in rows_of(record) if row["candidate"] == "ours/simulated")
    assert timed["rounds"] == 1 and timed["engine"] == "simulated"
    layers = rows_of(record, "layer")
    assert bool(layers) == bool(ENGINES.get(record["engine"]).copies)
    assert len({name for row in layers for name in row["layers"]}) in (0, 39)
    assert all(row["batch"] == 1 and row["w4a8_ms"] > 0 for row in layers)


def test_only_the_engine_asked_for_is_judged() -> None:
    row = {"kind": "forward", "model": "m", "batch": 8}
    results = Results({"engine": "onednn"})
    results.put(
        row | {"candidate": "fp32/eager", "ms_per_forward": 40.0},
        row | {"candidate": "fp32/compile", "ms_per_forward": 30.0},
        row | {"candidate": "bf16/eager", "ms_per_forward": 20.0},
        row | {"candidate": "bf16/compile", "failed": "no compiler"},
        row | {"candidate": "ours/onednn", "ms_per_forward": 10.0, "engine": "onednn"},
        row | {"candidate": "ours/openvino", "ms_per_forward": 1.0, "engine": "openvino"},
        row | {"candidate": "torch/int8", "ms_per_forward": 19.0},
        row | {"candidate": "torch/fp8", "ms_per_forward": 15.0},
    )
    record = results.record()
    assert record["speedup_vs_best_8bit"] == {"m_b8": 1.5}
    assert record["speedup_vs_best_fp32"] == {"m_b8": 3.0}
    assert record["speedup_vs_best_bf16"] == {"m_b8": 2.0}
    # The same candidate again takes the place of the one before.
    results.put(row | {"candidate": "bf16/eager", "ms_per_forward": 25.0})
    assert len(results.record()["rows"]) == 8
    assert results.record()["speedup_vs_best_bf16"] == {"m_b8": 2.5}


def test_the_table_says_everything() -> None:
    head = {"kind": "forward", "model": "m", "batch": 16}
    forward = {"sqnr_db": 40.0, "prepare_seconds": 7.0, "peak_bytes": 3e6, "ms_min": 1.0}
    op = {"kind": "op", "failed": {}}
    results = Results({"engine": "triton"})
    results.put(
        head | forward | {"candidate": "bf16/eager", "ms_per_forward": 4.0},
        head | forward | {"candidate": "ours/graph", "ms_per_forward": 2.0, "engine": "triton"},
        head | {"candidate": "torch/int8", "failed": "no kernel"},
        head | {"kind": "layer", "shape": "4x8 by 2x8", "layers": ["a", "b"],
                "w4a8_ms": 0.5, "w8a8_ms": 0.25},
        head | {"kind": "images_per_second", "candidate": "ours/graph", "steps": 100,
                "from_forwards": 9, "measured": 8},
        {"kind": "limits", "bf16_tflops": 700.0, "int8_tflops": 1400.0, "copy_tbytes": 3.0},
        op | {"op": "qgemm", "shape": "8x8x8", "ms": {"ours": 0.5, "bf16": 1.0}, "checked": True,
              "tflops": 9.0, "tbytes": 1.0, "roofline_fraction": 0.5, "speedup_vs_bf16": 2.0,
              "failed": {"fp8 rowwise": "needs sm_89"}},
        op | {"op": "qconv2d", "shape": "bad", "failed": {"ours": "sums differ"}, "ms": {}},
    )  # fmt: skip
    record = results.record()
    assert record["speedup_vs_best_bf16"] == {"m_b16": 2.0, "qgemm": 2.0}
    text = "\n".join(text_table(record))
    for words in (
        "m, batch 16", "2 layers: W4A8 0.5000 ms, W8A8 0.2500 ms: W8A8 is faster",
        "not timed: no kernel", "8 images a second", "1400.0 TFLOP/s",
        "speedup_vs_best_bf16 of triton: 2.0", "2.00x bf16", "50.0 %", "needs sm_89", "sums differ",
    ):  # fmt: skip
        assert words in text, words
    # The fastest first.
    assert text.index("ours/graph") < text.index("bf16/eager")


@pytest.mark.parametrize(("ratios", "least"), [((2.0, 1.5, 1.0), 1.5), ((2.0, None, 1.0), None)])
def test_an_operator_is_judged_by_its_first_two_shapes(ratios: Any, least: Any) -> None:
    results = Results({})
    for i, ratio in enumerate(ratios):
        row = {"kind": "op", "op": "qgemm", "shape": str(i)}
        results.put(row | ({} if ratio is None else {"speedup_vs_bf16": ratio}))
    assert results.record()["speedup_vs_best_bf16"] == {"qgemm": least}


KILLED = """
import sys
from quantempo.bench.run import bench

class Stuck:
    calls = 0
    def __call__(self, call, count):
        call()
        self.calls += 1
        if self.calls == 2:
            print("stuck", flush=True)
            sys.stdin.read()
        return 2.0

bench(model={model!r}, batches=[1], candidates=["bf16/eager", "ours/simulated"],
      out={out!r}, rounds=2, seconds=0.0, timer=Stuck())
"""


def test_a_killed_bench_keeps_what_it_has(tmp_path: Path) -> None:
    # While the second candidate is prepared.
    out = tmp_path / "r.json"
    code = KILLED.format(model=str(saved("unconditional")), out=str(out))
    run = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None and run.stdout.readline() == "stuck\n"
    os.kill(run.pid, signal.SIGKILL)
    run.communicate()
    record = json.loads(out.read_text())
    (row,) = rows_of(record)
    assert (row["candidate"], row["ms_per_forward"], row["rounds"]) == ("bf16/eager", 2.0, 0)
    assert record["machine"]["cpu"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "nothing to time"),
        (("--model", "sd15", "--run", "x"), "got both"),
        (("--model", "sd16"), "did you mean 'sd15'"),
        (("--model", "sd15", "--engine", "onednm"), "unknown engine 'onednm'"),
        (("--model", "sd15", "--candidate", "ours/graph"), "no candidate on cpu matches"),
        (("--model", "sd15", "--out", "."), "is a folder"),
        (("--device", "cudo", "--model", "sd15"), "cannot use --device cudo"),
    ],
)
def test_mistakes_are_one_sentence(args, words, cli):
    code, _, err = cli("bench", *args)
    assert code == 2 and words in err and err.startswith("error: ")
    assert err.count("\n") == 1, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so(cli: Any) -> None:
    code, _, err = cli("bench", "--device", "cuda", "--model", "sd15")
    assert code == 2 and err.startswith("error: cannot use --device cuda") and err.count("\n") == 1
