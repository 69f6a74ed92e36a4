"""Pipelines that denoise with two networks: both are quantized, written and counted, or one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import quantempo
from quantempo.bench.networks import run_network
from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.trace import affordable
from quantempo.errors import QuantempoError
from quantempo.models.load import load_pipeline
from quantempo.pipeline.layer_table import describe, int8_share
from quantempo.pipeline.stages import load
from quantempo.quantized import find_clock
from quantempo.recipe import Recipe
from tests.pipelines.videos import VIDEOS

EXPERTS = ("transformer", "transformer_2")
SHORT = Recipe.load("w8a8").override("trace", steps=4, chains=2, picks=2)
SHORT = SHORT.override("rounding", name="nearest", bias=False)
SHORT = SHORT.override("layers", exclude=("condition_embedder.*",))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe, call = VIDEOS["Wan 2.2, two experts"]()
    folder = tmp_path_factory.mktemp("experts") / "float"
    pipe.save_pretrained(folder)
    return folder, call


def packed_parts(folder: Path) -> list[str]:
    pipe = load_pipeline(folder)
    return [name for name in EXPERTS if find_clock(getattr(pipe, name)) is not None]


def test_both_experts_are_packed_reported_and_run(experts, tmp_path: Path) -> None:
    source, call = experts
    run = tmp_path / "run"
    packed = quantempo.quantize(source, run, SHORT, call=call)
    assert packed == run / "packed" and packed_parts(packed) == list(EXPERTS)
    assert not [*run.rglob("unfinished")]
    rows = json.loads((run / "layers.json").read_text())
    second = [row for row in rows if row["name"].startswith("transformer_2.")]
    assert len(second) * 2 == len(rows)
    assert [row["name"] for row in describe(packed, "cpu")[0]] == [row["name"] for row in rows]
    session = quantempo.reopen(run)
    metrics = quantempo.evaluate(session, images=1, steps=4, engine="simulated")
    assert metrics["int8_mac_share"] == int8_share(rows)["int8_mac_share"] > 0.4
    total = sum(sum(p.numel() for p in part.denoiser.parameters()) for part in session.parts)
    assert metrics["bytes_float32"] == 4 * total and len(session.parts) == 2
    assert {"eps_sqnr_db", "eps_sqnr_db_transformer_2"} <= set(metrics)
    # Each was traced where it runs: the first at the noisy end, none crowded at the boundary.
    early, late = sets = [TraceSet(part.run / "trace") for part in session.parts]
    assert float(early.timesteps.min()) > float(late.timesteps.max())
    assert all(torch.equal(data.column("target"), data.column("place")) for data in sets)


@pytest.mark.parametrize("name", EXPERTS)
def test_one_of_them_alone(experts, tmp_path: Path, name: str) -> None:
    source, call = experts
    packed = quantempo.quantize(source, tmp_path / "run", SHORT, call=call, only=name)
    assert packed_parts(packed) == [name]
    session = quantempo.reopen(tmp_path / "run")
    assert session.component == name and len(session.parts) == 1
    network = run_network(session)
    assert find_clock(network.packed) is not None
    network.packed(**network.inputs(1))
    assert not any(row["name"].startswith("transformer") for row in describe(packed, "cpu")[0])


@pytest.mark.parametrize("boundary", [0.0, 2.0])
def test_an_expert_that_is_never_called_stays_in_float(
    experts, tmp_path: Path, caplog: pytest.LogCaptureFixture, boundary: float
) -> None:
    pipe = load_pipeline(experts[0])
    pipe.register_to_config(boundary_ratio=boundary)
    idle, runs = EXPERTS if boundary else EXPERTS[::-1]
    # A budget is measured of the one that is called.
    few = replace(SHORT.trace, steps=4, chains=2**19)
    assert affordable(pipe, few, experts[1], 0.0)["chains"] == 2
    packed = quantempo.quantize(pipe, tmp_path / "run", SHORT, call=experts[1])
    assert packed_parts(packed) == [runs] and f"{idle} stays in float" in caplog.text
    rows = json.loads((tmp_path / "run" / "layers.json").read_text())
    mine = [row for row in rows if row["name"].startswith("transformer_2.") == (idle == EXPERTS[1])]
    assert all("never runs" in row["reason"] or row["kind"] == "matmul" for row in mine)
    assert int8_share(rows)["int8_mac_share"] > 0.4 and len(mine) * 2 == len(rows)
    session = quantempo.reopen(tmp_path / "run")
    quantempo.evaluate(session, images=1, steps=4, engine="simulated")
    assert find_clock(run_network(session).packed) is not None
    with pytest.raises(QuantempoError, match="never called"):
        quantempo.quantize(pipe, tmp_path / "alone", SHORT, call=experts[1], only=idle)


def test_a_network_the_pipeline_has_not_is_refused(experts, tmp_path: Path) -> None:
    source, call = experts
    with pytest.raises(QuantempoError, match="denoises with: transformer, transformer_2"):
        load(source, tmp_path / "run", SHORT, call=call, only="unet")
    assert not (tmp_path / "run").exists()
