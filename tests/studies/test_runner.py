"""Cells and how they are shared: names that depend on settings only, loads that are even."""

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from quantempo.calibration.timesteps import TIME_SAMPLERS, make_time_sampler
from quantempo.errors import QuantempoError
from studies.ptq4dm import STUDIES, Plan, make_plan
from studies.ptq4dm import cells as cells_module
from studies.ptq4dm.__main__ import _end_with_parent
from studies.ptq4dm.cells import Cell, Row, Sampler
from studies.ptq4dm.runner import Job, jobs_of, share

PLAN = make_plan()
REPOSITORY = Path(__file__).resolve().parents[2]


def cells(plan: Plan = PLAN) -> list[Cell]:
    rows = [row for name in STUDIES.names() for row in STUDIES.get(name).rows(plan)]
    return [cell for row in rows for cell in row.cells(plan.seeds)]


def test_every_item_of_the_paper_is_there() -> None:
    assert set(STUDIES.names()) == {"T1", "T2", "F3", "F4", "T3", "T4", "T5", "Legacy", "Ours"}
    for name in STUDIES.names():
        study = STUDIES.get(name)
        rows = study.rows(PLAN)
        assert study.title and study.question.endswith((".", "?"))
        assert len({(row.group, row.label) for row in rows}) == len(rows), name


def test_the_main_tables_have_their_images() -> None:
    for row in STUDIES.get("T3").rows(PLAN):
        assert row.images == 10_000
        assert sum(cell.images for cell in row.cells(3)) >= row.images
    samplers = {str(row.sampler) for row in STUDIES.get("T5").rows(PLAN)}
    names = {"DDIM 50", "DDIM 100", "DDIM 250", "DDPM 1000", "DPM++ 20", "Euler 30"}
    assert samplers == names


def test_equal_settings_are_one_cell_whoever_asks() -> None:
    t3, t5 = (STUDIES.get(name).rows(PLAN) for name in ("T3", "T5"))
    law = next(row for row in t3 if row.label == "ndtc_repo" and row.group == "recipe ptq4dm")
    own = next(row for row in t5 if row.images == 10_000 and "ptq4dm" in row.label)
    assert [c.key("m") for c in law.cells(3)] == [c.key("m") for c in own.cells(3)]


def test_the_name_of_a_cell_is_its_settings() -> None:
    cell = Row("any", Sampler("ddim", 10), 6, PLAN.recipe).cells(3)[0]
    assert cell.images == 2
    renamed = replace(cell, recipe=replace(PLAN.recipe, name="other"))
    assert renamed.key("m") == cell.key("m") != cell.key("another model")
    changes = {
        "sampler": Sampler("ddim", 10, eta=1.0),
        "recipe": PLAN.law("uniform"),
        "calibrated": Sampler("euler", 10),
        "graph": "output",
        "measured": ("eps",),
        "released": True,
        "sites": ("eps",),
        "repetition": 1,
        "images": 3,
    }
    keys = {replace(cell, **{name: value}).key("m") for name, value in changes.items()}
    assert len(keys | {cell.key("m")}) == len(changes) + 1


def test_published_cells_keep_their_names() -> None:
    """Every line of the published file is a cell of today's plan, by the key it was saved as."""
    identity = "81c9f6c73d6b9e12ebb74350f150b6ca5f0316a358c96fb8c95bca7b5efbfb9b"
    lines = (REPOSITORY / "docs/study/cells.jsonl").read_text().splitlines()
    published = {row["key"]: row for row in map(json.loads, lines) if "cell" in row}
    plan = make_plan(images=10_000, few=768)
    today = {cell.key(identity): cell for cell in cells(plan)}
    assert len(published) >= 184 and not set(published) - set(today)
    for key, row in published.items():
        assert json.loads(json.dumps(today[key].describe())) == row["cell"]


def test_other_defaults_of_a_distribution_are_other_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results made at 0.4 T must not pass for those of another usual fraction."""
    cell = Row("any", Sampler("ddim", 10), 6, PLAN.law("single")).cells(3)[0]
    given = replace(cell, recipe=PLAN.law("single", fraction=0.4))
    before = cell.key("m")
    assert cell.describe()["recipe"]["trace"]["time_sampler_args"] == {}

    @dataclass(frozen=True)
    class Later:
        fraction: float = 0.8

    monkeypatch.setattr(cells_module, "make_time_sampler", lambda name, args: Later(**args))
    assert cell.key("m") != before
    assert cell.describe()["recipe"]["trace"]["time_sampler_args"] == {"fraction": 0.8}
    assert given.describe()["recipe"]["trace"]["time_sampler_args"] == {"fraction": 0.4}


def test_the_usual_parameters_are_those_of_the_library() -> None:
    for name in TIME_SAMPLERS.names():
        cell = Row("any", PLAN.sampler, 6, PLAN.law(name)).cells(3)[0]
        known = name in cells_module.USUAL or not fields(make_time_sampler(name))
        assert known == (cell.describe()["recipe"]["trace"]["time_sampler_args"] == {}), name


def test_what_a_recipe_adds_names_the_cell() -> None:
    cell = Row("any", PLAN.sampler, 6, PLAN.recipe).cells(3)[0]
    keys = {cell.key("m")}
    for section, changes in (
        ("rounding", {"name": "gptq"}),
        ("rounding", {"bias": True}),
        ("rounding", {"name": "gptq", "samples": 17}),
        ("layers", {"bits": {"conv": "w4a8"}}),
    ):
        keys.add(replace(cell, recipe=PLAN.recipe.override(section, **changes)).key("m"))
    assert len(keys) == 5


def test_shares_are_whole_even_and_the_same_every_time() -> None:
    jobs = [Job(i, cost) for i, cost in enumerate((5, 9, 1, 7, 3, 3, 8, 2, 6, 4))]
    parts = share(jobs, 3)
    assert sorted(i for part in parts for i in part) == list(range(10))
    loads = [sum(jobs[i].cost for i in part) for part in parts]
    assert max(loads) - min(loads) <= 1
    assert share(jobs, 3) == parts
    for part in parts:
        costs = [jobs[i].cost for i in part]
        assert costs == sorted(costs)
    assert share(jobs, 1) == [sorted(range(10), key=lambda i: jobs[i].cost)]


def test_a_lower_rank_comes_first() -> None:
    jobs = [Job("dear but first", 100, 0), Job("cheap", 1, 1)]
    assert share(jobs, 1) == [["dear but first", "cheap"]]


def test_rare_structures_stay_together() -> None:
    common = [Job(f"c{i}", 1_000_000, 0, {"common"}) for i in range(6)]
    rare = [Job(f"r{i}", 100_000, 0, {"rare"}) for i in range(4)]
    parts = share(common + rare, 3)
    assert sum(any(name.startswith("r") for name in part) for part in parts) == 1


def test_jobs_of_one_sampler_share_a_process() -> None:
    main, other = PLAN.sampler, Sampler("euler", 30)
    under = [
        Row("a", other, 6, PLAN.recipe),
        Row("b", main, 6, PLAN.recipe, other),
        Row("c", other, 6, PLAN.recipe, main),
        Row("float", other, 6),
    ]
    groups = {row.cells(3)[1].group(main) for row in under}
    assert len(groups) == 1
    assert groups != {under[0].cells(3)[2].group(main)}


def test_cells_of_one_calibration_come_one_after_the_other() -> None:
    main, other = PLAN.sampler, Sampler("ddpm", 1000)
    rows = [Row("own", other, 6, PLAN.recipe), Row("there", main, 6, PLAN.recipe, other),
            Row("here", other, 6, PLAN.recipe, main), Row("float", other, 6)]  # fmt: skip
    todo = {row.label: (row.cells(3)[0], row.label, 0) for row in rows}
    (job,) = jobs_of(todo, PLAN, compiled=True)
    assert sorted(job.work) == sorted(todo) and len(job.structures) == 1
    assert abs(job.work.index("own") - job.work.index("there")) == 1
    assert job.cost == sum(cell.cost for cell, _, _ in todo.values())


@pytest.mark.parametrize(("images", "seeds"), [(5, 3), (3, 2), (1, 1)])
def test_too_few_images_are_refused(images: int, seeds: int) -> None:
    with pytest.raises(QuantempoError, match="two images a seed"):
        make_plan(images=images, seeds=seeds)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_study(number):
    read, write = os.pipe()
    study = os.fork()
    if not study:
        worker = subprocess.Popen(["sleep", "60"], preexec_fn=_end_with_parent)
        os.write(write, str(worker.pid).encode())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
        os._exit(0)
    worker = Path("/proc") / os.read(read, 20).decode() / "stat"
    assert worker.exists()
    os.kill(study, number)
    os.waitpid(study, 0)
    deadline = time.monotonic() + 10
    while worker.exists() and " Z " not in worker.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
