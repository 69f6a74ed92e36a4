"""The change to diffusers of docs/upstream.md: applied to a copy, it loads without our import."""

import os
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from tests.packed import packed

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from diffusers import DiffusionPipeline
assert "quantempo" not in sys.modules
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
print(type(pipe.unet.hf_quantizer).__module__, pipe(num_inference_steps=1).images[0].size)
"""


def changed(folder: Path) -> Path:
    """Return a folder with the installed diffusers, by links, and the change in it."""
    installed = Path(diffusers.__file__).parent
    quantizers = folder / "diffusers/quantizers"
    quantizers.mkdir(parents=True)
    for file in {*installed.iterdir()} - {installed / "quantizers"}:
        (folder / "diffusers" / file.name).symlink_to(file)
    for file in {*(installed / "quantizers").iterdir()} - {installed / "quantizers/auto.py"}:
        (quantizers / file.name).symlink_to(file)
    page = (REPOSITORY / "docs/upstream.md").read_text()
    (quantizers / "quantempo.py").write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    text = (installed / "quantizers/auto.py").read_text()
    added = re.findall(r"^ (.+)\n\+(.+)$", page, re.M)
    assert len(added) == 3
    for before, line in added:
        assert text.count(f"{before}\n") == 1, before
        text = text.replace(f"{before}\n", f"{before}\n{line}\n")
    (quantizers / "auto.py").write_text(text)
    return folder


@pytest.mark.parametrize("patched", [True, False])
def test_it_loads_without_our_import(patched: bool, tmp_path: Path) -> None:
    folder = packed("unconditional").folder
    paths = [str(changed(tmp_path))] if patched else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(REPOSITORY / "src")])}
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if patched:
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == "quantempo.checkpoint.diffusers_plugin"
    else:
        assert "Unknown quantization type, got quantempo" in done.stderr
