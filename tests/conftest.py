"""One thread a test process, lanes by folder, tests of a device, and `--no-skips`.

`cuda` marks what needs a CUDA device: `make test-gpu` runs it. Without a device it is skipped, and
only that is: under `--no-skips`, which `.ci/run` asks for, a skip for another reason is a failure.
"""

import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from quantempo.cli import main

# Tiny tensors lose more to waiting threads than they gain; processes of tests are told so, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is imported stays: no collection of garbage need look at its million objects.
gc.disable()

# Marker -> tests in its lane, by how their name begins.
LANES = {
    "compiled": ("gpu/", "kernels/test_ops_tracing.py", "bench/test_candidates.py"),
    "study": ("studies/",),
    "slow": (
        "bench/test_run.py",
        "checkpoint/test_fresh_process.py",
        "checkpoint/test_plugin.py::test_the_bundled_model",
        "checkpoint/test_upstream.py",
        "engines/test_fused_modulated.py::test_a_network_compiles",
        "engines/test_fused_gpu.py::test_a_network_compiles",
        "engines/test_fused_transformer.py::test_a_network_compiles",
        "engines/test_fusion.py::test_an_engine_is_like_simulated_and_leaves_no_trace[openvino",
        "engines/test_low_bits.py::test_openvino",
        "engines/test_openvino",
        "evaluation/test_evaluate_pairs.py",
        "fuzz/",
        "evaluation/test_features.py::test_lite0_equals",
        "evaluation/test_scores.py::test_kernel_distance_of_large",
        "kernels/test_fused_cpu.py::test_a_damaged",
        "kernels/test_fused_cpu.py::test_the_avx2",
        "kernels/test_fused_cpu.py::test_the_cache",
        "kernels/test_fused_cpu.py::test_what_others",
        "kernels/test_fused_cpu.py::test_without",
        "kernels/test_onednn.py::test_kernels_without",
        "mixed_precision/test_sensitivity.py",
        "pipelines/",
        "pipeline/test_denoisers.py",
        "pipeline/test_golden.py",
        "pipeline/test_quantize.py::test_a_reader_opens",
        "pipeline/test_trust.py::test_processes",
        "pipeline/test_pipeline.py",
        "report/test_report.py::test_times",
        "rounding/test_adaround.py",
        "rounding/test_reconstruct.py",
        "test_architecture.py::test_heavy",
        "test_cli.py::test_json_is_one",
        "test_docs.py::test_snippets",
        "test_repository.py::test_wheel",
        "test_uses.py::test_a_network_that_was_changed",
        "test_uses.py::test_use[openvino",
    ),
}
NO_DEVICE = "needs a CUDA device"
# What a skip may want: a device, another one, or that there is none.
DEVICE = re.compile(r"Skipped: .*(CUDA|GPU|Hopper)")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help=f"fail skips, unless: {NO_DEVICE}")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_itemcollected(item: pytest.Item) -> None:
    where = f"{item.path.relative_to(Path(__file__).parent).as_posix()}::{item.name}"
    for marker, begins in LANES.items():
        if where.startswith(begins):
            item.add_marker(marker)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("cuda")
    if marker is None:
        return
    if not torch.cuda.is_available():
        pytest.skip(NO_DEVICE)
    wanted, major = marker.kwargs.get("major"), torch.cuda.get_device_capability()[0]
    if wanted not in (None, major):
        pytest.skip(f"{NO_DEVICE} of capability {wanted}, got {major}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    return strict(item.config, (yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    return strict(collector.config, (yield))


class Result(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _level_of_the_log() -> Iterator[None]:
    """Take back what --quiet or --verbose of a test left, so that later ones hear warnings."""
    log, level = logging.getLogger("quantempo"), logging.getLogger("quantempo").level
    yield
    log.setLevel(level)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run `quantempo ARGS` as the console script does."""

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["quantempo", *map(str, args)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def strict(config: pytest.Config, report: Any) -> Any:
    """Return the report of a test or a file, a failure if `--no-skips` does not allow its skip."""
    text = str(report.longrepr)
    if report.skipped and config.getoption("no_skips") and not DEVICE.search(text):
        report.outcome, report.longrepr = "failed", f"skipped, against --no-skips: {text}"
    return report
