"""The engines that this machine can run are there: every other test of them skips without them."""

import importlib.util
import platform
import shutil
from pathlib import Path

import pytest

from quantempo.engines import ENGINES
from quantempo.engines.select import choose
from quantempo.kernels.cpu import fused, onednn


def has_vnni() -> bool:
    """Read it from the system, not from what the engines ask."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    flags = Path("/proc/cpuinfo").read_text().split()
    return "avx512_vnni" in flags or "avx_vnni" in flags


def test_engines_that_can_run_here_are_not_missing():
    # C that does not compile, a wrong zero point, an operator renamed in torch: here they fail.
    if not has_vnni():
        pytest.skip("needs Linux on x86-64 with VNNI")
    assert onednn.missing() is None
    if shutil.which("gcc") or shutil.which("cc"):
        assert fused.missing() is None
        assert choose("cpu").name == "onednn"
    if importlib.util.find_spec("openvino"):
        assert ENGINES.get("openvino").missing() is None
