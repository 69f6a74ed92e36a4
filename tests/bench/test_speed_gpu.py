"""`bench --device cuda`: the same path on a CPU with an injected timer, its files and mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from quantempo.bench import cuda as speed_gpu
from quantempo.bench import run as speed
from quantempo.bench.cuda import (
    bench_cuda,
    bench_model,
    gpu_machine,
    results_of,
    run_workload,
    text_table,
    write_results,
)
from quantempo.bench.workloads import model_workload, quick_workload
from quantempo.cli import main
from quantempo.engines.select import ENGINES
from quantempo.errors import QuantempoError
from quantempo.pipeline import stages as pipeline
from quantempo.report.sections import _times
from quantempo.run_folder import RunFolder
from tests.packed import packed, saved
from tests.tiny import tiny_text, tiny_unet

PLAIN = ("bf16/eager", "ours/eager")


class Steady:
    """A timer that calls once; every call takes as long as the one before and 1 ms more."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def sample(self, call: Any, count: int) -> float:
        call()
        if call not in self.seen:
            self.seen.append(call)
        return 10.0 / (1 + self.seen.index(call))


def test_a_model_is_timed_without_a_run_folder() -> None:
    workload = quick_workload("tiny", tiny_text().unet)
    found = bench_model(
        workload, [1, 3], candidates=PLAIN, rounds=2, seconds=0.0, steps=2,
        engine="simulated", timer=Steady(),
    )  # fmt: skip
    assert "timing" in found["scales"] and found["dtype"] == "bfloat16"
    assert list(found["batches"]) == ["1", "3"]
    row = found["batches"]["1"]
    assert row["ms_per_forward"] == {"bf16/eager": 10.0, "ours/eager": 5.0}
    assert row["speedup_vs_best_bf16"] == 2.0 and row["failed"] == {}
    speed = row["images_per_second"]["ours"]
    # One image, two steps of 5 ms; the run itself by the timer, which had seen three calls.
    assert speed["from_forwards"] == pytest.approx(100.0)
    assert speed["measured"] == pytest.approx(1000 / 2.5)
    assert speed["steps"] == 2 and speed["candidate"] == "ours/eager"


def test_a_loop_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("shape")

    monkeypatch.setattr(speed_gpu, "ddim_loop", broken)
    workload = quick_workload("tiny", tiny_unet())
    found = bench_model(
        workload, [1], candidates=["bf16/eager"], rounds=1, seconds=0.0, steps=2, timer=Steady()
    )
    speed = found["batches"]["1"]["images_per_second"]
    assert speed == {
        "bf16": {
            "candidate": "bf16/eager",
            "steps": 2,
            "from_forwards": 50.0,
            "failed": "RuntimeError: shape",
        }
    }


def test_a_folder_is_quantized_without_data() -> None:
    workload = model_workload(str(saved("unconditional")), "cpu")
    assert workload.name == "unconditional" and workload.scheduler is not None
    assert workload.packed is not None and workload.inputs(2)["sample"].shape == (2, 3, 16, 16)
    with pytest.raises(QuantempoError, match="no model 'nothing'"):
        model_workload("nothing", "cpu")


def test_a_run_folder_is_timed_and_keeps_its_other_results(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(packed("unconditional").run, run)
    folder = RunFolder(run)
    folder.write_json("bench.json", {"batches": {"8": {"ms_per_forward": {"a/float32": 1.0}}}})
    settings = {"candidates": PLAIN, "rounds": 1, "seconds": 0.0, "engine": "simulated"}
    results = bench_cuda(
        pipeline.reopen(run), batches=[2], device="cpu", out=tmp_path / "r.json", timer=Steady(),
        **settings,
    )  # fmt: skip
    written = folder.read_json("bench.json")
    assert written["batches"]["8"] and written["cuda"] == json.loads(json.dumps(results))
    assert _times(folder) == written["batches"]
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["speedup_vs_best_bf16"] == {"unconditional_b2": 2.0}
    # Scales of a run folder are those of its recipe, by time bucket.
    workload = run_workload(pipeline.reopen(run))
    assert workload.scales == "run folder"
    scales = {m.act_scale.dtype for m in workload.packed.modules() if hasattr(m, "act_scale")}
    assert scales == {torch.float32}
    # Only a GPU was timed: the CPU table falls back to the scores.
    folder.write_json("bench.json", {"cuda": written["cuda"]})
    assert _times(folder) == {}


def test_on_a_cpu_engines_of_a_gpu_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(packed("unconditional").run, run)
    folder = RunFolder(run)
    folder.write_json("bench.json", {"batches": {}, "cuda": {"machine": "kept"}})
    # As on a machine with a GPU.
    monkeypatch.setattr(type(ENGINES.get("triton")), "missing", lambda self: None)
    monkeypatch.setattr(speed, "interleave", lambda calls, rounds: {n: [1.0] for n in calls})
    monkeypatch.setattr(speed, "choose", lambda device: ENGINES.get("simulated"))
    found = speed.bench_run(pipeline.reopen(run), batches=[2], rounds=1, compiled=False)
    names = found["batches"]["2"]["ms_per_forward"]
    assert "simulated/int8" in names and "triton/int8" not in names
    assert folder.read_json("bench.json")["cuda"] == {"machine": "kept"}


def test_the_record_and_the_table_say_everything() -> None:
    row = {
        "ms_per_forward": {"bf16/eager": 4.0, "ours/graph": 2.0},
        "ms_min": {"bf16/eager": 3.9, "ours/graph": 1.9},
        "sqnr_db": {"bf16/eager": 40.0, "ours/graph": None},
        "prepare_seconds": {"bf16/eager": 1.0, "ours/graph": 7.0},
        "peak_bytes": {"bf16/eager": 3e6, "ours/graph": 2e6},
        "failed": {"torchao/int8": "torchao is not installed"},
        "best_bf16": "bf16/eager",
        "best_ours": "ours/graph",
        "speedup_vs_best_bf16": 2.0,
        "images_per_second": {
            "ours": {"candidate": "ours/graph", "steps": 100, "from_forwards": 9, "measured": 8}
        },
    }
    kernels = {
        "limits": {"bf16_tflops": 700.0, "int8_tflops": 1400.0, "copy_tbytes": 3.0},
        "rows": [
            {
                "op": "qgemm", "shape": "8x8x8", "failed": {"fp8 rowwise": "needs sm_89"},
                "ms": {"ours": 0.5, "bf16": 1.0}, "checked": True, "tflops": 9.0, "tbytes": 1.0,
                "roofline_fraction": 0.5, "speedup_vs_bf16": 2.0,
            },
            {"op": "qconv2d", "shape": "bad", "failed": {"ours": "sums differ"}, "ms": {}},
        ],
    }  # fmt: skip
    results = {"models": [{"model": "m", "batches": {"16": row}}], "ops": kernels, "machine": {}}
    record = results_of(results)
    assert (
        record["speedup_vs_best_bf16"] == {"m_b16": 2.0, "qgemm": 2.0} and record["machine"] == {}
    )
    kinds = [entry["kind"] for entry in record["rows"]]
    assert kinds == ["forward"] * 3 + ["images_per_second", "limits", "op", "op"]
    assert record["rows"][2]["failed"] == "torchao is not installed"
    text = "\n".join(text_table(results))
    for word in (
        "m, batch 16", "exact", "torchao/int8", "not timed: torchao", "8 images a second",
        "speedup_vs_best_bf16: 2.0", "2.00x bf16", "50.0 %", "needs sm_89", "sums differ",
    ):  # fmt: skip
        assert word in text, word
    # The fastest first.
    assert text.index("ours/graph") < text.index("bf16/eager")


def test_records_are_merged_and_written_once(tmp_path: Path) -> None:
    one = {"models": [], "machine": gpu_machine()}
    merged = results_of(one, one)
    write_results(tmp_path / "a/results.json", merged)
    assert json.loads((tmp_path / "a/results.json").read_text()) == merged
    assert merged["machine"]["versions"]["torch"] and "cpu" in merged["machine"]


def cli(monkeypatch: pytest.MonkeyPatch, capfd: Any, *args: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["quantempo", "bench", *map(str, args)])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capfd.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((), "nothing to time"),
        (("--device", "cuda"), "nothing to time"),
        (("--device", "cuda", "--model", "sd16"), "did you mean 'sd15'"),
        (("--device", "cuda", "--ops", "--candidate", "our/*"), "no candidate matches"),
        (("--device", "cuda", "--model", "sd15", "--run", "x"), "got both"),
        (("--model", "sd15"), "add --device cuda"),
        (("--ops",), "add --device cuda"),
        (("--device", "cudo", "--ops"), "cannot use --device cudo"),
    ],
)
def test_mistakes_are_one_sentence(
    args: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    code, err = cli(monkeypatch, capfd, *args)
    assert code == 2 and words in err and err.startswith("error: ")
    assert err.count("\n") == 1, err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_it_says_so(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    code, err = cli(monkeypatch, capfd, "--device", "cuda", "--model", "sd15")
    assert code == 2 and err.startswith("error: cannot use --device cuda") and err.count("\n") == 1
