"""Pipelines that denoise with two networks: both are quantized, written and counted, or one."""

import json
from pathlib import Path

import pytest
import torch

import quantempo
from quantempo.calibration.dataset import TraceSet
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
    # Each was traced where it runs: the first at the noisy end.
    early, late = (TraceSet(part.run / "trace").timesteps for part in session.parts)
    assert float(early.min()) > float(late.max())


@pytest.mark.parametrize("name", EXPERTS)
def test_one_of_them_alone(experts, tmp_path: Path, name: str) -> None:
    source, call = experts
    packed = quantempo.quantize(source, tmp_path / "run", SHORT, call=call, only=name)
    assert packed_parts(packed) == [name]
    session = quantempo.reopen(tmp_path / "run")
    assert session.component == name and len(session.parts) == 1
    assert not any(row["name"].startswith("transformer") for row in describe(packed, "cpu")[0])


def test_a_network_the_pipeline_has_not_is_refused(experts, tmp_path: Path) -> None:
    source, call = experts
    with pytest.raises(QuantempoError, match="denoises with: transformer, transformer_2"):
        load(source, tmp_path / "run", SHORT, call=call, only="unet")
    assert not (tmp_path / "run").exists()
