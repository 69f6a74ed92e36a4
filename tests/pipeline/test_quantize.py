"""The pure core: the same numbers as the stages, no run folder, few files to read."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quantempo
from quantempo.calibration.dataset import MemorySet, TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.engines.fusion import report
from quantempo.engines.layerwise import execution
from quantempo.engines.select import attach
from quantempo.errors import QuantempoError
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.pipeline import stages
from quantempo.pipeline.layer_table import describe
from quantempo.pipeline.quantize import error_shares, quantize
from quantempo.quantized import find_clock, quantized_layers
from quantempo.recipe import Recipe
from quantempo.run_folder import RunFolder
from tests.far import far_device
from tests.packed import packed, recipe, saved
from tests.tiny import tiny_flux, tiny_unet

PACKAGE = Path(quantempo.__file__).parent
SMALL = recipe(exclude=("down_blocks.*", "up_blocks.*")).override("rounding", bias=True)
GROUPS = SMALL.override("weights", bits=4, group=16).override("rounding", correct=1.0)


def random_set() -> MemorySet:
    g = torch.Generator().manual_seed(0)
    times = torch.randint(0, 1000, (16,), generator=g)
    return MemorySet(torch.randn(16, 3, 16, 16, generator=g), times, num_train_timesteps=1000)


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_the_core_gives_what_the_stages_write(rounding: str, tmp_path: Path) -> None:
    chosen = SMALL.override("rounding", name=rounding)
    made = load_pipeline(stages.quantize(saved("unconditional"), tmp_path / "run", chosen)).unet
    net = load_pipeline(saved("unconditional")).unet
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = quantize(net, TraceSet(tmp_path / "run/trace"), chosen)
    written = RunFolder(tmp_path / "run").read_safetensors("rounding.safetensors")
    assert found.codes and all(torch.equal(found.codes[n], written[n]) for n in found.codes)
    copy = found.install(net, copy=True)
    state, wanted = copy.state_dict(), made.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    # The float network is left as it was, and shares what stays float with its copy.
    assert find_clock(net) is None and net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert copy.conv_in.weight is net.conv_in.weight


def test_a_quantized_copy_runs_without_a_folder() -> None:
    net = tiny_unet()
    found = quantize(net, random_set(), SMALL)
    copy, g = found.install(net, copy=True), torch.Generator().manual_seed(1)
    assert attach(copy, "simulated") == "simulated"
    assert {name for name, _ in quantized_layers(copy)} == set(found.codes)
    x = torch.randn(2, 3, 16, 16, generator=g)
    with torch.no_grad():
        wanted, got = net(x, 400).sample, copy(x, 400).sample
    assert 0 < float((got - wanted).square().mean()) < 1e-3 * float(wanted.square().mean())
    with pytest.raises(QuantempoError, match="quantized already"):
        quantize(copy, random_set(), SMALL)


COSTLY = "up_blocks.1.resnets.1.conv_shortcut"


@torch.no_grad()
def costly_unet() -> torch.nn.Module:
    """Return a network in which one shortcut makes most error for its work."""
    net = tiny_unet()
    net.get_submodule(COSTLY).weight *= 20
    return net


def test_a_shortcut_that_costs_more_than_it_saves_stays_in_float() -> None:
    net, some = costly_unet(), recipe(float_macs=0.01)
    found = quantize(net, random_set(), some)
    (kept,) = (p for p in found.plans if "measured" in (p.reason or ""))
    said = re.fullmatch(r"measured: (\d+)% of the output's error for 0.8% of the work", kept.reason)
    assert kept.name == COSTLY and kept.kind == "float" and 10 < int(said[1]) < 100
    copy = found.install(net, copy=True)
    assert copy.get_submodule(COSTLY).weight is net.get_submodule(COSTLY).weight
    # Not one whose bits are named, nor one of more work than may stay; the rest as before.
    for other in ({"float_macs": 0.002}, {"bits": {"shortcut": "w8a8"}}):
        whole = quantize(net, random_set(), some.override("layers", **other))
        assert found.codes.keys() == whole.codes.keys() - {COSTLY} < whole.codes.keys()


def test_shares_of_the_error_add_up() -> None:
    net, data, some = costly_unet(), random_set(), recipe()
    found = quantize(net, data, some)
    shares = error_shares(net, found.install(net, copy=True), data, list(found.codes))
    errors, work = (sum(column) for column in zip(*shares.values(), strict=True))
    # To first order; layers in float do the rest of the work.
    assert errors == pytest.approx(1, abs=0.1) and 0.9 < work < 1
    assert max(shares, key=lambda name: shares[name][0] / shares[name][1]) == COSTLY
    # What others have hung on a layer acts once.
    copy = found.install(net, copy=True)
    for layer in (net.get_submodule(COSTLY), copy.get_submodule(COSTLY)):
        layer.register_forward_pre_hook(lambda _, args: (-args[0],))
        layer.register_forward_hook(lambda _, args, y: -y)
    assert error_shares(net, copy, data, [COSTLY])[COSTLY] == pytest.approx(shares[COSTLY], rel=0.5)
    # Of calls that cannot be joined, those of the most rows.
    data._batches = [data.rows(rows) for rows in torch.arange(16).split((4, 12))]
    data.pieces = [("one", 4), ("other", 12)]
    assert error_shares(net, found.install(net, copy=True), data, [COSTLY])[COSTLY][0] > 0.1


def test_what_stays_in_float_is_named_in_the_packed_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantempo.pipeline.quantize.WORTH", 0.0)
    run = tmp_path / "run"
    stages.quantize(saved("unconditional"), run, SMALL)
    before = (run / "stats.safetensors").stat().st_mtime_ns
    more = SMALL.override("layers", float_macs=1.0, exclude=("down_blocks.*", "mid_block.*"))
    net = load_pipeline(stages.quantize(saved("unconditional"), tmp_path / "more", more)).unet
    rows = {row["name"]: row for row in describe(tmp_path / "more/packed", "cpu")[0]}
    kept = [name for name, row in rows.items() if "measured" in (row["reason"] or "")]
    assert kept and all(row["role"] == "shortcut" for row in map(rows.get, kept))
    source = load_pipeline(saved("unconditional")).unet
    for name in kept:
        assert rows[name]["bits_activation"] == 32
        assert torch.equal(net.get_submodule(name).weight, source.get_submodule(name).weight)
    # Statistics are those of any choice.
    stages.quantize(
        saved("unconditional"), run, SMALL.override("layers", float_macs=1.0), force=True
    )
    assert (run / "stats.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(("tokens", "rounding"), [(4, "gptq"), (8, "gptq"), (16, "adaround")])
def test_a_flux_with_as_many_tokens_as_rows(tokens: int, rounding: str, tmp_path: Path) -> None:
    """Shared rotary tables and ids of as many tokens as a call has rows, or a multiple."""
    pipe, call = tiny_flux(tokens)
    plan = {"steps": 4, "chains": 6, "picks": 4, "seed": 3, "batch_size": 4}
    law = make_time_sampler("linspace")
    net, how = pipe.transformer, {**plan, "time_sampler": law, "call": call}
    data = trace(pipe, net, tmp_path / "trace", **how)
    chosen = recipe().override("rounding", name=rounding, bias=True, samples=24, batch=4)
    found = quantize(net, data, chosen).install(net, copy=True)
    attach(found, "simulated")
    with torch.no_grad():
        calls = [[data.replay(n, b) for n in (net, found)] for b in data.batches(5)]
    wanted, got = (torch.cat(parts).double() for parts in zip(*calls, strict=True))
    assert (got - wanted).square().mean() < 1e-3 * wanted.square().mean()


def files_of(call: Any) -> set[str]:
    """Return the project's files whose functions a call runs."""
    found = set()

    def see(frame: Any, event: str, arg: Any) -> None:
        found.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {path for path in found if Path(path).is_relative_to(PACKAGE)}


def test_a_reader_opens_few_files(tmp_path: Path) -> None:
    default = Recipe.load("w8a8").override("layers", exclude=("down_blocks.*", "up_blocks.*"))
    net, data = tiny_unet(), random_set()
    core = files_of(lambda: quantize(net, data, default))
    assert len(core) <= 27, sorted(core)
    # The whole command, with what loads, traces, caches and packs.
    small = SMALL.override("rounding", name="gptq")
    whole = files_of(lambda: stages.quantize(saved("unconditional"), tmp_path / "run", small))
    assert len(whole) <= 51, sorted(whole)


def test_the_denoiser_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def counted(source: Any, **options: Any) -> Any:
        loaded.append(source)
        return load_pipeline(source, **options)

    monkeypatch.setattr("quantempo.models.load.load_pipeline", counted)
    session = stages.load(saved("unconditional"), tmp_path / "run", SMALL)
    stages.finish(session)
    assert len(loaded) == 1
    assert session.pipe.unet is session.denoiser is denoiser_of(session.pipe)[1]
    assert not dict(quantized_layers(session.denoiser))


def test_the_table_names_what_runs_each_layer_on_the_device() -> None:
    for kind in ("unconditional", "dit"):
        rows, unfused, notes = describe(packed(kind).folder, "cpu")
        assert notes == {"--memory": "for a GPU only"}
        net = denoiser_of(load_pipeline(packed(kind).folder))[1]
        engine, runs = attach(net), execution(net)
        integer = {row["name"]: row["backend"] for row in rows if row["bits_activation"] <= 8}
        assert integer == {n: engine if how == "none" else how for n, how in runs.items()}
        assert {row["backend"] for row in rows if row["name"] not in integer} == {"float"}
        assert unfused == {row.name: row.reason for row in report(net) if row.reason}
    with pytest.raises(QuantempoError, match="cannot use --device nowhere"):
        describe(packed("dit").folder, "nowhere")


def test_nothing_of_groups_stays_on_the_host() -> None:
    chosen = recipe(exclude=("down_blocks.*", "mid_block.*", "*attentions*"), float_macs=0.4)
    chosen = chosen.override("weights", bits=4, group=16)
    chosen = chosen.override("rounding", name="gptq", correct=1.0, bias=True)
    found, data, errors = tiny_unet(), random_set(), []

    def add_error() -> None:
        copy, rows = (
            quantize(found, data, chosen).install(found, copy=True),
            data.rows(torch.arange(8)),
        )
        attach(copy, "simulated")
        with torch.no_grad():
            both = [data.replay(network, rows) for network in (copy, found)]
        errors.append(float((both[0] - both[1]).square().mean()))
        assert {layer.weight_int.device for _, layer in quantized_layers(copy)} == {found.device}

    add_error()
    with far_device(found):
        add_error()
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


@pytest.mark.cuda
@pytest.mark.parametrize("start", [SMALL, GROUPS], ids=["bytes", "groups"])
@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_the_core_and_the_stages_run_on_a_device(
    start: Recipe, rounding: str, tmp_path: Path
) -> None:
    chosen = start.override("rounding", name=rounding, iterations=2)
    found, data = tiny_unet().cuda(), random_set()
    rows = data.rows(torch.arange(len(data)))
    x, t = rows.x_t.cuda(), rows.t.cuda()
    copy = quantize(found, MemorySet(x, t), chosen).install(found, copy=True)
    attach(copy, "simulated")
    assert copy(x, t).sample.isfinite().all()
    stages.quantize(saved("unconditional"), tmp_path / "run", chosen, device="cuda")
    assert describe(tmp_path / "run/packed")
