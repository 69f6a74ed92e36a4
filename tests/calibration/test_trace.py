"""Tracing: what is kept, checked against a full recording; resuming, refusals, reading back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantempo.calibration.dataset import CalibrationData, MemorySet, TraceBatch, TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import deal_targets, trace
from quantempo.errors import QuantempoError
from quantempo.models.sampling import call_pipeline, swap_scheduler
from tests.tiny import tiny_dit, tiny_embeds, tiny_text, tiny_unconditional

PLAN: dict[str, Any] = {"steps": 6, "chains": 5, "picks": 3, "seed": 70, "batch_size": 2}


def run(pipe: Any, folder: Path, **changes: Any) -> TraceSet:
    plan = {**PLAN, "time_sampler": make_time_sampler("ndtc"), **changes}
    return trace(pipe, denoiser_in(pipe), folder, **plan)


def denoiser_in(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def full_recording(pipe: Any, call: dict[str, Any]) -> list[list[tuple[tuple, dict, Any]]]:
    """Return all (args, kwargs, output) of the denoiser, a list a batch of chains."""
    batches: list[list[tuple[tuple, dict, Any]]] = []
    handle = denoiser_in(pipe).register_forward_hook(
        lambda module, args, kwargs, output: batches[-1].append((args, kwargs, output[0])),
        with_kwargs=True,
    )
    for first in range(0, PLAN["chains"], PLAN["batch_size"]):
        batches.append([])
        last = min(first + PLAN["batch_size"], PLAN["chains"])
        seeds = range(PLAN["seed"] + first, PLAN["seed"] + last)
        call_pipeline(pipe, seeds, first=first, steps=PLAN["steps"], **call)
    handle.remove()
    return batches


CASES = [
    ("unconditional", "ddim", {}, 1),
    ("unconditional", "ddpm", {}, 1),
    ("unconditional", "dpm++", {}, 1),
    ("unconditional", "euler", {}, 1),
    ("text", "ddim", tiny_embeds(3), 2),
    ("text", "ddim", {**tiny_embeds(3), "guidance_scale": 1.0}, 1),
    ("text", "euler", {"prompt": ["a cat", "dog"]}, 2),
    ("dit", "ddim", {"class_labels": [7, 8, 9]}, 2),
    ("dit", "ddpm", {"class_labels": 5}, 2),
]
BUILD = {"unconditional": tiny_unconditional, "text": tiny_text, "dit": tiny_dit}


@pytest.mark.parametrize(("family", "scheduler", "call", "halves"), CASES)
def test_rows_are_the_nearest_calls_of_a_full_recording(
    tmp_path: Path, family: str, scheduler: str, call: dict, halves: int
) -> None:
    pipe = swap_scheduler(BUILD[family](), scheduler)
    everything = full_recording(pipe, call)
    data = run(pipe, tmp_path / "trace", call=call)
    assert len(data) == PLAN["chains"] * PLAN["picks"] * halves
    rows = data.rows(torch.arange(len(data)))
    replayed = torch.cat([data.replay(denoiser_in(pipe), batch) for batch in data.batches(4)])
    order = list(zip(*(data.column(c).tolist() for c in ("chain", "pick", "half")), strict=True))
    assert order == sorted(order)
    assert len(set(order)) == len(order)

    targets = data.column("target")
    for row, (chain, _, half) in enumerate(order):
        calls = everything[chain // PLAN["batch_size"]]
        width = min(PLAN["batch_size"], PLAN["chains"] - chain // 2 * 2)
        times = [
            torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None))
            for args, kwargs, _ in calls
        ]
        values = torch.stack([t.double().reshape(-1)[0] for t in times])
        nearest = int((values - targets[row]).abs().argmin())
        assert int(data.column("call")[row]) == nearest
        args, kwargs, output = calls[nearest]
        place = half * width + chain % PLAN["batch_size"]
        # exactly what the network received, in its dtype
        assert data.timesteps.dtype == times[nearest].dtype
        assert rows.t[row] == times[nearest].reshape(-1)[0]
        assert torch.equal(rows.x_t[row], args[0][place])
        for name, value in rows.cond.items():
            if isinstance(value, Tensor):
                assert torch.equal(value[row], kwargs[name][place])
        # another batch size sums in another order: float32 over a few hundred terms
        torch.testing.assert_close(replayed[row], output[place], rtol=1e-4, atol=1e-5)


def test_guidance_halves_belong_to_their_chain(tmp_path: Path) -> None:
    embeds = tiny_embeds(3)
    data = run(tiny_text(), tmp_path / "text", call=embeds)
    states = data.rows(torch.arange(len(data))).cond["encoder_hidden_states"]
    for row, (chain, half) in enumerate(
        zip(data.column("chain"), data.column("half"), strict=True)
    ):
        source = "prompt_embeds" if half else "negative_prompt_embeds"
        assert torch.equal(states[row], embeds[source][int(chain) % 3])
    assert data.rows(torch.arange(1)).cond["cross_attention_kwargs"] is None

    data = run(tiny_dit(), tmp_path / "dit", call={"class_labels": [7, 8, 9]})
    labels = data.rows(torch.arange(len(data))).cond["class_labels"]
    # this pipeline puts the labelled half first
    wanted = torch.where(data.column("half") == 1, 1000, 7 + data.column("chain") % 3)
    assert torch.equal(labels, wanted)


def test_heun_keeps_both_of_its_stages(tmp_path: Path) -> None:
    pipe = swap_scheduler(tiny_unconditional(), "heun")
    data = run(pipe, tmp_path / "trace", chains=8, picks=6)
    # call 0 is the first stage of step 0; calls 2 j - 1 and 2 j the stages at the j-th later time
    calls = data.column("call")
    assert {int(c) % 2 for c in calls[calls > 0]} == {0, 1}
    times = data.timesteps.unique(sorted=True).flip(0)
    assert torch.equal(data.timesteps, times[(calls + 1) // 2])


def test_targets_follow_the_law_and_are_dealt_evenly() -> None:
    law = make_time_sampler("ndtc")
    targets = deal_targets(law, chains=32, picks=8, steps=50, seed=4)
    assert targets.shape == (32, 8)
    # no chain keeps a step twice unless a step was drawn more often than there are chains
    assert all(len(set(row)) == 8 for row in targets.tolist())
    assert torch.equal(targets, deal_targets(law, 32, 8, 50, 4))
    assert not torch.equal(targets, deal_targets(law, 32, 8, 50, 5))
    # 256 draws: the mean lies within 5 standard errors of the law's (false alarms 6e-7)
    index = torch.arange(50, dtype=torch.float64)
    density = law.density(50)
    mean = float(index @ density)
    error = math.sqrt(float((index - mean) ** 2 @ density) / 256)
    assert abs(float(targets.double().mean()) - mean) < 5 * error


def test_every_step_is_kept_when_every_step_is_asked_for(tmp_path: Path) -> None:
    """Index i is the i-th smallest time: linspace over all steps keeps each once a chain."""
    law = make_time_sampler("linspace")
    pipe = tiny_unconditional()
    data = run(pipe, tmp_path / "trace", time_sampler=law, picks=6)
    assert data.timesteps.view(5, 6).tolist() == [[0, 166, 332, 498, 664, 830]] * 5
    assert data.info["target_steps"] == [[0, 1, 2, 3, 4, 5]] * 5
    assert data.info["seeds"] == [70, 71, 72, 73, 74]


class Scaled(nn.Module):
    """Hand the wrapped denoiser t / T and nested conditioning, as some pipelines do."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.inner = Inner(unet)
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        extra = {"ids": torch.arange(3.0), "maps": [sample + 1, sample[:, :1] * 2], "none": None}
        return self.inner(sample, timestep / 1000, added={"a": extra, "empty": {}}, flag=True)


class Inner(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, added: dict, flag: bool) -> Any:
        assert flag
        assert added["empty"] == {}
        offset = added["a"]["maps"][0] - added["a"]["ids"].sum()
        return self.unet(sample + offset, timestep * 1000)


def test_other_units_and_nested_conditioning(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    wrapped = Scaled(pipe.unet)
    pipe.unet = wrapped
    plan = {**PLAN, "time_sampler": make_time_sampler("linspace"), "picks": 6}
    data = trace(pipe, wrapped.inner, tmp_path / "trace", **plan)
    assert data.timesteps.dtype == torch.float32
    times = torch.tensor([0, 166, 332, 498, 664, 830]) / 1000
    assert torch.equal(data.timesteps.view(5, 6), times.expand(5, 6))
    batch = next(data.batches())
    extra = batch.cond["added"]["a"]
    assert torch.equal(extra["maps"][0], batch.x_t + 1)
    assert torch.equal(extra["maps"][1], batch.x_t[:, :1] * 2)
    # not one row a sample: kept once
    assert torch.equal(extra["ids"], torch.arange(3.0))
    assert extra["none"] is None
    assert batch.cond["added"]["empty"] == {}
    assert batch.cond["flag"] is True
    assert data.replay(wrapped.inner, batch).shape == batch.x_t.shape


class Reusing(nn.Module):
    """Overwrite the tensors it called the denoiser with."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        x, t = sample.clone(), timestep.clone()
        output = self.unet(x, t)
        x.fill_(torch.nan)
        t.fill_(-1)
        return output


def test_what_is_kept_is_a_copy(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    pipe.unet = Reusing(pipe.unet)
    plan = {**PLAN, "time_sampler": make_time_sampler("linspace"), "picks": 6}
    data = trace(pipe, pipe.unet.unet, tmp_path / "trace", **plan)
    assert torch.isfinite(data.column("x_t")).all()
    assert int(data.timesteps.min()) == 0


class Nesting(nn.Module):
    """Take nested arguments and hand the tensors in them on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Tensor, more: Any, h: Any) -> Tensor:
        return sample * self.weight


def test_nested_arguments_come_back_as_they_were(tmp_path: Path) -> None:
    pipe, net = tiny_unconditional(), Nesting()
    given = {"a.b": {"c": [1, {"d": None}], "e": {}}, "f": (2.5, "x"), "g": True}

    class Calling(nn.Module):
        def __init__(self, unet: nn.Module) -> None:
            super().__init__()
            self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device

        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            rows = sample.flatten(1)[:, :2]
            net(sample, timestep, given, h={"rows": rows, "all": torch.arange(3)})
            return SimpleNamespace(sample=sample)

    pipe.unet = Calling(pipe.unet)
    plan = {**PLAN, "time_sampler": make_time_sampler("linspace")}
    data = trace(pipe, net, tmp_path / "trace", **plan)
    batch = data.rows(torch.arange(len(data)))
    nested = batch.cond.pop("h")
    assert torch.equal(nested["rows"], batch.x_t.flatten(1)[:, :2])
    assert torch.equal(nested["all"], torch.arange(3))
    assert batch.cond == {"more": given}


def test_a_set_in_memory_is_that_of_its_calls() -> None:
    unet, g = tiny_text().unet, torch.Generator().manual_seed(0)
    calls = [
        {
            "sample": torch.randn(rows, 4, 8, 8, generator=g),
            "timestep": t,
            "encoder_hidden_states": torch.randn(rows, 8, 16, generator=g),
            "cross_attention_kwargs": {"scale": torch.tensor(2.0)},
        }
        for rows, t in ((1, 900), (3, torch.tensor([1, 2, 3])))
    ]
    data: CalibrationData = MemorySet.of_calls(unet, calls, 1000)
    assert len(data) == 4 and data.timesteps.tolist() == [900, 1, 2, 3] and data.times.count == 1000
    batch = data.rows(torch.tensor([2, 0]))
    assert torch.equal(batch.x_t, torch.stack([calls[1]["sample"][1], calls[0]["sample"][0]]))
    states = [call["encoder_hidden_states"] for call in calls]
    assert torch.equal(batch.cond["encoder_hidden_states"], torch.cat(states)[[2, 0]])
    assert batch.cond["cross_attention_kwargs"]["scale"] == 2
    assert [len(b.t) for b in data.batches(3)] == [3, 1]
    plain = {**calls[0], "cross_attention_kwargs": None}
    one = MemorySet.of_calls(unet, [plain, {**calls[1], "cross_attention_kwargs": None}], 1000)
    with torch.no_grad():
        wanted = unet(**plain).sample
        assert torch.equal(one.replay(unet, one.rows(torch.arange(1))), wanted)
    fraction = MemorySet(torch.zeros(2, 1), torch.tensor([0.5, 1.0]))
    assert fraction.times.index(fraction.timesteps).tolist() == [0, 1]
    with pytest.raises(QuantempoError, match="no calls"):
        MemorySet.of_calls(unet, [], 1000)
    # What all rows share may change between calls, which are then run one by one.
    other = {**calls[1], "cross_attention_kwargs": {"scale": torch.tensor(3.0)}}
    mixed = MemorySet.of_calls(unet, [calls[0], other], 1000)
    assert [len(rows) for rows in mixed.calls(torch.arange(4), 4)] == [1, 3]


def test_reading_back(tmp_path: Path) -> None:
    data = run(tiny_text(), tmp_path / "trace", call=tiny_embeds(3))
    opened = TraceSet(tmp_path / "trace")
    assert len(opened) == 30 == len(data)
    assert opened.times.count == 1000
    assert opened.timesteps.shape == (30,)
    batches = list(opened.batches(4))
    assert [len(b.t) for b in batches] == [4, 4, 4, 4, 4, 4, 4, 2]
    joined = torch.cat([b.x_t for b in batches])
    assert joined.dtype == torch.float32
    assert torch.equal(joined, opened.column("x_t"))
    assert torch.equal(torch.cat([b.t for b in opened.batches()]), opened.timesteps)
    index = torch.tensor([29, 0, 13, 13])
    picked = opened.rows(index)
    assert isinstance(picked, TraceBatch)
    assert torch.equal(picked.x_t, joined[index])
    assert torch.equal(picked.t, opened.timesteps[index])
    states = torch.cat([b.cond["encoder_hidden_states"] for b in batches])
    assert torch.equal(picked.cond["encoder_hidden_states"], states[index])
    with pytest.raises(QuantempoError, match="30"):
        opened.rows(torch.tensor([30]))
    # nothing but safetensors and JSON
    assert {file.suffix for file in (tmp_path / "trace").iterdir()} == {".safetensors"}
    chunk = load_file(tmp_path / "trace" / "chunk-00002.safetensors")
    assert chunk["t"].tolist() == opened.timesteps[24:].tolist()
    json.loads((tmp_path / "trace.json").read_text())


def test_half_precision_inputs_are_stored_exactly(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    pipe.unet.to(torch.bfloat16)
    data = run(pipe, tmp_path / "trace")
    x_t = data.column("x_t")
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, x_t.bfloat16().float())
    assert data.replay(pipe.unet, next(data.batches())).dtype == torch.bfloat16
