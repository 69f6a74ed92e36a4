"""Tracing again: interrupted, torn, finished, other settings; and what cannot be traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.calibration.dataset import TraceSet
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.errors import QuantempoError
from quantempo.models.sampling import swap_scheduler
from tests.tiny import tiny_unconditional

PLAN: dict[str, Any] = {"steps": 6, "chains": 5, "picks": 3, "seed": 70, "batch_size": 2}


def run(pipe: Any, folder: Path, **changes: Any) -> TraceSet:
    plan = {**PLAN, "time_sampler": make_time_sampler("ndtc"), **changes}
    return trace(pipe, pipe.unet, folder, **plan)


def contents(folder: Path) -> dict[str, bytes]:
    files = [*sorted(folder.glob("*")), folder.with_name(folder.name + ".json")]
    return {file.name: file.read_bytes() for file in files}


@pytest.mark.parametrize(("scheduler", "calls_a_chunk"), [("ddpm", 6), ("heun", 11)])
def test_an_interrupted_trace_continues_bit_for_bit(
    tmp_path: Path, scheduler: str, calls_a_chunk: int
) -> None:
    whole = run(swap_scheduler(tiny_unconditional(), scheduler), tmp_path / "whole")
    pipe = swap_scheduler(tiny_unconditional(), scheduler)
    # A trace begins with two probes of one and of two images.
    seen = 0

    def fail_in_second_chunk(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3 * calls_a_chunk + 3:
            raise KeyboardInterrupt

    handle = pipe.unet.register_forward_hook(fail_in_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "torn")
    handle.remove()
    left = [file.name for file in (tmp_path / "torn").iterdir()]
    assert left == ["chunk-00000.safetensors"]
    with pytest.raises(QuantempoError, match=r"torn\.json|trace first|run quantempo"):
        TraceSet(tmp_path / "torn")
    # the trace's own hook is gone after the failure
    assert not pipe.unet._forward_pre_hooks

    before = (tmp_path / "torn" / left[0]).stat().st_mtime_ns
    calls = count_calls(pipe)
    run(pipe, tmp_path / "torn")
    assert (tmp_path / "torn" / left[0]).stat().st_mtime_ns == before
    assert calls["n"] == 4 * calls_a_chunk
    assert contents(tmp_path / "torn") == {
        name.replace("whole", "torn"): data for name, data in contents(tmp_path / "whole").items()
    }
    assert len(whole) == 15


def count_calls(pipe: Any) -> dict[str, int]:
    calls = {"n": 0}

    def count(*_: Any) -> None:
        calls["n"] += 1

    pipe.unet.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign"])
def test_a_torn_chunk_is_made_again(tmp_path: Path, damage: str) -> None:
    pipe = tiny_unconditional()
    run(pipe, tmp_path / "trace")
    good = contents(tmp_path / "trace")
    file = tmp_path / "trace" / "chunk-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-5] ^= 1
    else:
        data = bytearray(b"not a tensor file")
    file.write_bytes(data)
    calls = count_calls(pipe)
    run(pipe, tmp_path / "trace")
    assert calls["n"] == 3 * PLAN["steps"]
    assert contents(tmp_path / "trace") == good


def test_a_finished_trace_is_not_run_again(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    first = run(pipe, tmp_path / "trace")
    calls = count_calls(pipe)
    again = run(pipe, tmp_path / "trace")
    assert calls["n"] == 0
    assert torch.equal(first.timesteps, again.timesteps)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 7}, ("steps 6, now 7",)),
        ({"seed": 71}, ("seed 70, now 71",)),
        ({"time_sampler": make_time_sampler("uniform")}, ("time_sampler", "uniform")),
        ({"model_hash": "other"}, ("model", "other")),
        ({"call": {"eta": 1.0}}, ("arguments", "eta")),
    ],
)
def test_other_settings_are_refused_unless_forced(
    tmp_path: Path, changes: dict, words: tuple[str, ...]
) -> None:
    pipe = tiny_unconditional()
    run(pipe, tmp_path / "trace")
    before = contents(tmp_path / "trace")
    with pytest.raises(QuantempoError) as error:
        run(pipe, tmp_path / "trace", **changes)
    assert all(word in str(error.value) for word in (*words, "delete", str(tmp_path / "trace")))
    assert contents(tmp_path / "trace") == before
    data = run(pipe, tmp_path / "trace", force=True, **changes)
    fresh = run(pipe, tmp_path / "fresh", **changes)
    assert contents(data.folder.path).keys() == {
        name.replace("fresh", "trace") for name in contents(fresh.folder.path)
    }
    assert torch.equal(data.column("x_t"), fresh.column("x_t"))


def test_a_model_with_other_weights_is_refused(tmp_path: Path) -> None:
    run(tiny_unconditional(), tmp_path / "trace")
    with pytest.raises(QuantempoError, match="model"):
        run(tiny_unconditional(seed=1), tmp_path / "trace")


def test_forced_rerun_leaves_no_chunk_of_the_old_trace(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    run(pipe, tmp_path / "trace")
    data = run(pipe, tmp_path / "trace", force=True, batch_size=5)
    assert [file.name for file in data.folder.path.iterdir()] == ["chunk-00000.safetensors"]
    assert len(data) == 15


def test_an_interrupted_forced_rerun_is_not_taken_for_complete(tmp_path: Path) -> None:
    pipe = tiny_unconditional()
    run(pipe, tmp_path / "trace")

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    pipe.unet.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, tmp_path / "trace", force=True, seed=71)
    with pytest.raises(QuantempoError):
        TraceSet(tmp_path / "trace")


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config, self.dtype = tiny_unconditional().unet.config, torch.float32
        self.device = torch.device("cpu")

    def forward(self, sample: Tensor, timestep: Tensor, extra: Any = None, late: Any = None) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda n: {"extra": object()}, ("extra", "object")),
        (lambda n: {"extra" if n < 3 else "late": torch.zeros(2)}, ("change",)),
        (lambda n: {"extra": torch.zeros(7 + n)}, ("extra", "grows")),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, arguments: Any, words: tuple[str, ...]
) -> None:
    pipe = tiny_unconditional()
    odd, unet, calls = Odd(), pipe.unet, iter(range(1000))

    def forward(sample: Tensor, timestep: Tensor, **_: Any) -> Any:
        return unet(sample, timestep)

    odd.forward = forward  # type: ignore[method-assign]

    class Outer(Odd):
        def forward(self, sample: Tensor, timestep: Tensor, **_: Any) -> Any:
            return odd(sample, timestep, **arguments(next(calls)))

    pipe.unet = Outer()
    plan = {**PLAN, "time_sampler": make_time_sampler("linspace"), "picks": 6}
    with pytest.raises(QuantempoError) as error:
        trace(pipe, odd, tmp_path / "trace", **plan)
    assert all(word in str(error.value) for word in words)


def test_a_module_the_pipeline_does_not_call_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QuantempoError, match="never called"):
        trace(
            tiny_unconditional(),
            tiny_unconditional().unet,
            tmp_path / "trace",
            **PLAN,
            time_sampler=make_time_sampler("uniform"),
        )
