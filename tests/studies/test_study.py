"""Whole tiny studies: the same bits every time, alone or shared, resumed or whole."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from quantempo.errors import QuantempoError
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder
from studies.command import process_state
from studies.ptq4dm import STUDIES, Settings, make_plan, run_study, runner
from studies.ptq4dm import __main__ as command
from studies.ptq4dm.cells import Row
from studies.ptq4dm.main import read_cells
from studies.ptq4dm.tools import Tools
from tests.packed import packed, saved

ITEMS = ("Legacy", "T1", "F3")
PLAN = make_plan(compare=None, images=4, seeds=2, small=True)


def settings(out: Path, **changes: Any) -> Settings:
    how: dict[str, Any] = {"reference": 4, "batch_size": 4, "probe": (1, 2), **changes}
    return Settings(source=str(saved("unconditional")), out=out, **how)


def cells(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results by name, without their times."""
    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        if path.name.startswith(("figure", "pooled")):
            continue
        found[path.name] = json.loads(path.read_text())
        found[path.name].pop("seconds", None)
    return found


def legacy(whole: Path, folder: Path, without: str) -> Path:
    """Write the finished cells of `Legacy` but some, for `known`."""
    lines = (whole / "cells.jsonl").read_text().splitlines(keepends=True)
    file = folder / "known.jsonl"
    file.write_text("".join(r for r in lines if '"Legacy ' in r and not re.search(without, r)))
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("study") / "whole"
    run_study(settings(out), PLAN, only=ITEMS)
    return out


def test_a_study_leaves_tables_plots_page_and_text(whole: Path) -> None:
    about = json.loads((whole / "study.json").read_text())
    assert about["failed"] == about["not_run"] == []
    for name in ITEMS:
        item = json.loads((whole / f"items/{name}.json").read_text())
        assert item["claims"] and (whole / f"items/{name}.svg").is_file()
        for row in item["rows"]:
            assert row["seeds"] == 2 and row["images"] == 4 and row["failed"] == 0
            assert row["fed_data"]["std"] is not None
            assert (whole / row["picture"]).is_file()
    assert (whole / "items/T1.csv").read_text().count("\n") == 13
    text = (whole / "study.md").read_text()
    assert "## Claim by claim" in text and "Everything ran." in text
    assert (whole / "study.html").stat().st_size > 20_000
    assert not list((whole / "scratch").iterdir())


def test_sigma_is_idle_under_ddim_and_not_under_ddpm(whole: Path) -> None:
    rows = json.loads((whole / "items/T1.json").read_text())["rows"]
    sigma = {row["group"]: row for row in rows if row["label"] == "Sigma"}
    assert sigma["DDIM 6"]["identical"] == 4 and sigma["DDIM 6"]["psnr_db"] is None
    assert 10 < sigma["DDPM 6"]["psnr_db"]["mean"] < 90
    claims = json.loads((whole / "items/T1.json").read_text())["claims"]
    assert claims[-1]["verdict"] == "confirmed"


def test_several_processes_give_the_same_bits(whole: Path, tmp_path: Path) -> None:
    out, known = tmp_path / "shared", legacy(whole, tmp_path, without=" seed 1")
    file = tmp_path / "shared.py"
    file.write_text(f"""import sys; sys.path.insert(0, '.')
from tests.studies.test_study import PLAN, settings, run_study, Path
run_study(settings(Path({str(out)!r})), PLAN, only=('Legacy',), known=Path({str(known)!r}))
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    mine = cells(out)
    assert len(mine) == 10 and mine.items() <= cells(whole).items()
    tables = [json.loads((o / "items/Legacy.json").read_text()) for o in (out, whole)]
    for row in (row for table in tables for row in table["rows"]):
        del row["seconds"]
    assert tables[0] == tables[1]


def test_a_killed_study_resumes(whole, tmp_path, monkeypatch, caplog):
    out, real = tmp_path / "killed", runner.run_cell
    done: list[Any] = []

    def killed(tools: Any, cell: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(cell)
        return real(tools, cell)

    monkeypatch.setattr(runner, "run_cell", killed)
    with pytest.raises(KeyboardInterrupt):
        run_study(settings(out), PLAN, only=("Legacy",))
    assert len(cells(out)) == 3 and not (out / "study.html").exists()
    assert len((out / "cells.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(runner, "run_cell", real)
    with caplog.at_level(logging.INFO, "quantempo"):
        run_study(settings(out), PLAN, only=("Legacy",))
    assert "10 cells, 3 done before" in caplog.text and "[7/7]" in caplog.text
    mine = cells(out)
    assert len(mine) == 10 and mine.items() <= cells(whole).items()


def test_a_failed_cell_loses_no_other_and_is_tried_again(whole, tmp_path, monkeypatch):
    out, real = tmp_path / "failing", runner.run_cell

    def failing(tools: Any, cell: Any) -> Any:
        if cell.graph == "output" and cell.repetition == 1:
            raise RuntimeError("out of memory")
        return real(tools, cell)

    monkeypatch.setattr(runner, "run_cell", failing)
    known = legacy(whole, tmp_path, without=r"on outputs.* seed 1")
    page = run_study(settings(out), PLAN, only=("Legacy",), known=known)
    about = json.loads((out / "study.json").read_text())
    assert len(about["failed"]) == 2 and "out of memory" in page.read_text()
    rows = json.loads((out / "items/Legacy.json").read_text())["rows"]
    assert [row["seeds"] for row in rows] == [2, 2, 2, 1, 1]
    monkeypatch.setattr(runner, "run_cell", real)
    run_study(settings(out), PLAN, only=("Legacy",))
    assert json.loads((out / "study.json").read_text())["failed"] == []
    assert cells(out).items() <= cells(whole).items()
    # What is asked for later joins what is there; another batch size may go on with it.
    again = settings(out, batch_size=3)
    text = run_study(again, PLAN, only=("F3",)).with_suffix(".md").read_text()
    assert "## F3" in text and "## Legacy" in text
    tables = run_study(again, PLAN, only=("Legacy",))
    assert json.loads((out / "study.json").read_text())["items"] == ["F3", "Legacy"]
    assert "failed" not in tables.with_suffix(".md").read_text()


def test_what_time_did_not_allow_is_listed(tmp_path: Path) -> None:
    out = tmp_path / "late"
    run_study(settings(out), PLAN, only=("T1",), minutes=0)
    about = json.loads((out / "study.json").read_text())
    assert len(about["not_run"]) == 24
    assert {"item": "T1", "row": "DDIM 6: Sigma, seed 1", "reason": "not started"} in about[
        "not_run"
    ]
    item = json.loads((out / "items/T1.json").read_text())
    assert {claim["verdict"] for claim in item["claims"]} == {"not run"}


def test_real_images_are_the_reference(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 20, 20, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
    out = tmp_path / "study"
    plan = make_plan(compare=None, images=2, seeds=1, small=True)
    run_study(settings(out, data=str(folder), reference=4), plan, only=("T2",))
    about = json.loads((out / "study.json").read_text())
    assert about["data"] == {"source": "data", "images": 4} and about["failed"] == []
    with pytest.raises(QuantempoError, match="another model, data or precision"):
        run_study(settings(out), plan, only=("F3",))
    assert json.loads((out / "study.json").read_text()) == about


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "T1,T9"), "unknown study 'T9'"),
        (("--images", "2"), "two images a seed"),
        (("--data", "nowhere"), "no image folder nowhere"),
        (("--recipe", "w8a9"), "no recipe 'w8a9'"),
        (("--device", "cuda:99"), "cannot use --device"),
        (("--device", "cuda", "--workers", "9"), "cannot use --device cuda"),
        (("--steps", "9"), "--small with --steps"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capfd, arguments, said):
    out = tmp_path / "out"
    model = str(saved("unconditional"))
    monkeypatch.setattr(
        sys, "argv", ["studies.ptq4dm", model, "--small", "--out", str(out), *arguments]
    )
    with pytest.raises(SystemExit) as stop:
        command.main()
    error = capfd.readouterr().err
    assert stop.value.code == 2 and said in error and "Traceback" not in error
    assert not out.exists()


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(QuantempoError, match="not empty and no study"):
        run_study(settings(tmp_path), PLAN, only=("F3",))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(QuantempoError, match="is quantized; study the float model"):
        run_study(Settings(source=str(packed("unconditional").folder), out=tmp_path / "new"), PLAN)
    assert not (tmp_path / "new").exists()


def test_a_copy_that_is_refilled_is_a_new_one(tmp_path: Path) -> None:
    """Two calibrations, one after the other in one network, against each in its own."""
    plain = PLAN.base()
    learned = plain.override("rounding", name="gptq", bias=True, samples=4)
    first, second = (Row("", PLAN.sampler, 4, recipe).cells(2)[0] for recipe in (plain, learned))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    outputs = []
    for order in ((first, second), (second, first)):
        tools = Tools(settings(tmp_path))
        for cell in order:
            network = tools.quantized(cell).unet
            with torch.no_grad():
                outputs.append(network(x, 500).sample.clone())
        tools.close()
    assert torch.equal(outputs[0], outputs[3]) and torch.equal(outputs[1], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.cuda
def test_cells_run_on_a_device(tmp_path: Path) -> None:
    """One of every kind: quantizers on inputs and outputs, sampler tensors, sources, GPTQ."""
    plan = make_plan(compare="w8a8", images=4, seeds=2, small=True)
    out = tmp_path / "device"
    how = {"device": "cuda", "tf32": True, "batch_size": 2}
    run_study(settings(out, **how), plan, only=("Legacy", "T1", "T2", "Ours"), tables=False)
    failed = [path.read_text() for path in (out / "cells").glob("*.failed.json")]
    assert not failed and len(cells(out)) > 80


def test_what_was_known_is_not_run_again_unless_it_is_void(whole: Path, tmp_path: Path) -> None:
    out, known = tmp_path / "again", tmp_path / "cells.jsonl"
    rows = [json.loads(line) for line in (whole / "cells.jsonl").read_text().splitlines()]
    legacy = [row for row in rows if row.get("name", "").startswith("Legacy")]
    assert len(legacy) == 10
    void, left_out = legacy[3], legacy[5]
    void |= {"note": "scores void", "fed_data": None}
    known.write_text("".join(json.dumps(row) + "\n" for row in rows if row is not left_out))
    ran: list[str] = []
    real = runner.run_cell

    def noted(tools: Any, cell: Any) -> Any:
        ran.append(cell.key(tools.identity))
        return real(tools, cell)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_cell", noted)
        run_study(settings(out), PLAN, only=("Legacy",), known=known, tables=False)
    assert set(ran) == {void["key"], left_out["key"]}
    assert not (out / "study.html").exists()
    kinds = [path.read_text().splitlines() for path in (out / "cells.jsonl", whole / "cells.jsonl")]
    again, first = ({row["key"]: row for row in map(json.loads, lines)} for lines in kinds)
    for row in (*again.values(), *first.values()):
        row.pop("seconds", None)
    assert again == first
    # Files may be joined in any order: what is void gives way.
    for order in ((known, whole / "cells.jsonl"), (whole / "cells.jsonl", known)):
        joined = RunFolder(tmp_path / order[0].parent.name / "joined")
        for file in order:
            read_cells(joined, file)
        assert "note" not in joined.read_json(f"cells/{void['key']}.json")
    # Tables from the lines alone: the same, figures of the first run included.
    run_study(settings(out), PLAN, only=("F3",), minutes=0)
    assert (out / "items/F3.json").read_text() == (whole / "items/F3.json").read_text()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    known = tmp_path / "cells.jsonl"
    known.write_text('{"name": "no key"}\n')
    with pytest.raises(QuantempoError, match=r"cannot read .*expected cells.jsonl of a study"):
        run_study(settings(tmp_path / "out"), PLAN, only=("F3",), known=known, minutes=0)


def test_the_state_of_the_process_comes_back() -> None:
    matmul, dynamo = torch.backends.cuda.matmul, torch._dynamo.config
    before = (matmul.allow_tf32, torch.backends.cudnn.allow_tf32, dynamo.recompile_limit)
    with pytest.raises(KeyError), process_state(tf32=not matmul.allow_tf32):
        assert matmul.allow_tf32 is not before[0] and dynamo.recompile_limit == 64
        raise KeyError
    after = (matmul.allow_tf32, torch.backends.cudnn.allow_tf32, dynamo.recompile_limit)
    assert after == before


def test_a_shipped_recipe_beside_the_published_one(tmp_path: Path) -> None:
    """Its rounding looks at inputs, its layers are not all integers."""
    ours = Recipe.load("w8a8").override("rounding", samples=4).override("activations", buckets=2)
    plan = make_plan(compare=ours, images=4, seeds=2, small=True)
    rows = STUDIES.get("Ours").rows(plan)
    assert {row.recipe.name for row in rows if row.recipe} == {"ptq4dm", "w8a8"}
    tools = Tools(settings(tmp_path))
    row = next(row for row in rows if row.recipe is not None and row.recipe.name == "w8a8")
    result = runner.run_cell(tools, row.cells(2)[0])
    tools.close()
    assert result["float_layers"] > 0 and 10 < result["psnr_db"] < 90
