"""The model card of a packed folder, and its way to the hub."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

import quantempo
from quantempo.pipeline import stages
from tests.packed import recipe, saved


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(saved("unconditional"), folder / "mine")
    (folder / "mine/README.md").write_text("---\nlicense: openrail\ntags: [x]\n---\n# Mine\n")
    stages.quantize(folder / "mine", folder / "run", recipe())
    return folder / "run"


def test_a_card_is_written_from_the_run(run: Path, tmp_path: Path) -> None:
    card = run / "packed/README.md"
    before = card.read_text()
    assert before.startswith(
        "---\nlibrary_name: diffusers\nlicense: openrail\ntags:\n  - quantempo\n"
    )
    assert "# mine, int8" in before and "Not evaluated" in before and "`conv_in`" in before
    assert str(run.parent) not in before
    # What people add stays.
    card.write_text(before.replace("license: openrail", "license: openrail\nbase_model: me/mine"))
    quantempo.evaluate(quantempo.reopen(run), images=2, steps=2, engine="onednn")
    after = card.read_text()
    assert "base_model: me/mine" in after and "Seeds 0 to 1 for both models, DDIMScheduler" in after
    for picture in re.findall(r"!\[.*\]\((.+)\)", after):
        assert (card.parent / picture).is_file()
    code = re.search(r"```python\n(.*?)```", after, re.S)[1]
    assert code.startswith("import quantempo")
    exec(code.replace("path/to/this/folder", str(card.parent)), names := {})
    names["pipe"].save_pretrained(tmp_path / "again")


def test_results_are_of_what_is_packed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    session = quantempo.reopen(tmp_path / "run", recipe(buckets=1), force=True)
    stages.finish(session)
    quantempo.render(tmp_path / "run")
    assert "Not evaluated" in (tmp_path / "run/packed/README.md").read_text()


def test_push_is_the_upload_of_the_hub(run: Path, cli: Any, monkeypatch: Any) -> None:
    sent: list[Any] = []
    address = type("Url", (str,), {"repo_id": "me/mine-int8"})("https://hub/me/mine-int8")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **how: address)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **given: sent.append(given))
    done = cli("push", run, "mine-int8", "--private")
    assert done.code == 0 and "https://hub/me/mine-int8" in done.out
    assert sent == [{"repo_id": "me/mine-int8", "folder_path": run / "packed"}]
    assert 'from_pretrained("me/mine-int8")' in (run / "packed/README.md").read_text()
    assert DiffusionPipeline.from_pretrained(run / "packed")


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline mode"), LocalTokenNotFoundError("no token"),
        HTTPError("refused"), HFValidationError("no name"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_hub_that_refuses_is_one_sentence(run: Path, cli: Any, error: Any, monkeypatch: Any):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "create_repo", fail)
    done = cli("push", run, "me/mine")
    assert done.code == 2 and done.err.count("\n") == 1 and str(error) in done.err


def test_what_is_not_packed_is_not_pushed(tmp_path: Path, cli: Any) -> None:
    done = cli("push", tmp_path, "me/mine")
    assert done.code == 2 and "nothing is packed" in done.err
