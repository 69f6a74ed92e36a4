"""Where the rows are is measured: equal sizes of shared and of per-row arguments mislead nobody."""

import json
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from quantempo.calibration.dataset import MemorySet
from quantempo.calibration.rows import Place, alike, by_row, dump, join, laws, load, measure, take
from quantempo.calibration.timesteps import make_time_sampler
from quantempo.calibration.trace import trace
from quantempo.errors import QuantempoError
from tests.tiny import tiny_text, tiny_unconditional

PLAN: dict[str, Any] = {"steps": 4, "chains": 5, "picks": 2, "seed": 7}
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16, 20)


def arguments(x: Tensor, caption: int = 0) -> dict[str, Any]:
    """Return what pipelines give a denoiser beside x_t, each a function of its rows."""
    rows = x.flatten(1).mean(1)
    return {
        # Token ids, rotary tables: as many as there are rows, a multiple, a divisor.
        "shared": [torch.arange(float(size)) for size in SIZES],
        "frames": rows.repeat_interleave(3)[:, None].expand(-1, 2),
        "tiles": rows.repeat(3),
        "nested": {"b": (rows[:, None], None, {"across": x.flatten(1)[:, :4].T})},
        "shapes": [[(1, 2, 2), (1, 4, 4)]] * len(x),
        "lengths": [round(float(r) * 1e4) for r in rows],
        "items": list(x),
        "packed": rows.repeat_interleave(6)[None],
        "number": 2 * len(x),
        "constant": (1, [2.5, "text"], True),
        "caption": rows[:, None, None].expand(-1, 4 + caption, 3),
        # As captions of one length need none.
        "mask": rows[:, None] > 0 if caption else None,
        "empty": {},
    }


def equal(got: Any, wanted: Any) -> bool:
    """Return whether two values agree in types, structure and bits."""
    if type(got) is not type(wanted):
        return False
    if isinstance(got, Tensor):
        return torch.equal(got, wanted)
    if isinstance(got, dict):
        return got.keys() == wanted.keys() and all(equal(got[k], wanted[k]) for k in got)
    if isinstance(got, list | tuple):
        return len(got) == len(wanted) and all(map(equal, got, wanted))
    return bool(got == wanted)


class Probe(nn.Module):
    """A denoiser that takes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, sample: Tensor, timestep: Any, **given: Any) -> Tensor:
        return sample * self.weight


class Calling(nn.Module):
    """Call a probe with `arguments` in place of a U-Net."""

    def __init__(self, unet: nn.Module, probe: Probe, halves: int = 1) -> None:
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.inner, self.calls, self.halves = (probe,), 0, halves

    def forward(self, sample: Tensor, timestep: Tensor, *_: Any, **given: Any) -> Any:
        # The caption grows with the caption's own numbers, not with the rows.
        states = given.get("encoder_hidden_states")
        caption = 0 if states is None else round(float(states.amax()) * 1e3) % 3
        x = torch.cat([sample] * self.halves)
        output = self.inner[0](x, timestep, given=arguments(x, caption))
        return UNet2DOutput(sample=output[: len(sample)])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("halves", [1, 2])
def test_a_trace_tells_rows_from_what_they_share(
    tmp_path: Any, batch_size: int, halves: int
) -> None:
    pipe, probe = tiny_unconditional(size=8), Probe()
    pipe.unet = Calling(pipe.unet, probe, halves)
    law = make_time_sampler("linspace")
    plan = {**PLAN, "time_sampler": law, "batch_size": batch_size}
    data = trace(pipe, probe, tmp_path / "trace", **plan)
    assert len(data) == 10 * halves
    index = torch.tensor([9, 0, 4, 4])
    for batch in [data.rows(index), *data.batches(4)]:
        assert equal(batch.cond["given"], arguments(batch.x_t))
        assert equal(data.arguments(batch, probe.weight)["given"], arguments(batch.x_t))
    wanted = data.rows(torch.arange(len(data))).x_t
    assert torch.equal(data.rows(index).x_t, wanted[index])


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_ragged_rows_are_run_in_calls_of_equal_length(tmp_path: Any, batch_size: int) -> None:
    pipe, probe = tiny_text(), Probe()
    pipe.unet = Calling(pipe.unet, probe)
    plan = {**PLAN, "batch_size": batch_size, "time_sampler": make_time_sampler("linspace")}
    embeds = torch.arange(5.0)[:, None, None].expand(-1, 8, 16) / 1000
    call = {"prompt_embeds": embeds, "guidance_scale": 1.0}
    data = trace(pipe, probe, tmp_path / "trace", call=call, **plan)
    calls = data.calls(torch.arange(len(data)), 4)
    assert sorted(torch.cat(calls).tolist()) == list(range(len(data)))
    lengths = [data.rows(rows).cond["given"]["caption"].shape[1] for rows in calls]
    assert len(set(lengths)) > 1
    for rows in [*calls, *data.calls(torch.tensor([3, 3, 3]), 4)]:
        batch = data.rows(rows)
        caption = batch.cond["given"]["caption"].shape[1] - 4
        assert equal(batch.cond["given"], arguments(batch.x_t, caption))
    first = [next(r for r, n in zip(calls, lengths, strict=True) if n == k) for k in set(lengths)]
    with pytest.raises(QuantempoError, match="whose arguments differ"):
        data.rows(torch.cat(first))


def test_values_are_taken_joined_written_and_read() -> None:
    x = torch.randn(6, 3, 4, 4)
    law = measure(arguments(x[:2]), arguments(x[:4]), torch.arange(2), 4)
    assert law["['tiles']"] == Place(0, 3, tiled=True)
    assert law["['shared'][1]"] is None and law["['frames']"] == Place(0, 3)
    assert law["['nested']['b'][2]['across']"] == Place(1, 1) and law["['number']"] == Place(0, 2)
    parts = [arguments(x[:4]), arguments(x[4:])]
    assert alike(law, parts[0], 4)[0][0] == alike(law, parts[1], 2)[0][0]
    assert equal(join(law, parts), arguments(x))
    assert equal(take(law, arguments(x), torch.tensor([5, 1, 1])), arguments(x[[5, 1, 1]]))
    tensors: dict[str, Tensor] = {}
    assert equal(
        load(json.loads(json.dumps(dump(arguments(x), tensors, "c"))), tensors), arguments(x)
    )
    (tiles,) = by_row(law, arguments(x)["tiles"], 6, "['tiles']")
    assert torch.equal(tiles, x.flatten(1).mean(1)[:, None].expand(-1, 3))
    for wrong in ({"frames": x}, {"late": x}):
        with pytest.raises(QuantempoError, match="was not measured like this"):
            alike(law, wrong, 6)
    for one, two in ((x[0], x[:2]), (torch.eye(2), torch.eye(4)), ([1, 2], [1, 2, 3])):
        with pytest.raises(QuantempoError, match="expected one that grows"):
            measure(one, two, torch.arange(2), 4)


def test_blocks_are_measured_where_they_run() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor, *, tiled: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            return x.T, table

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> None:
            self.inner(x.repeat_interleave(2, 0), tiled=x.repeat(2, 1), table=torch.ones(4, 4))

    net, x = Net(), torch.randn(5, 4)
    law = laws({"a": net.inner}, lambda index: net(x[index]), torch.tensor([1, 3]))["a"]
    assert law == {
        "[0][0]": Place(0, 2),
        "[1]['tiled']": Place(0, 2, tiled=True),
        "[1]['table']": None,
        "[2][0]": Place(1, 2),
        "[2][1]": None,
    }


def test_calls_in_memory_need_another_number_of_rows() -> None:
    x = torch.randn(7, 3, 4, 4)

    def given(x: Tensor) -> dict[str, Any]:
        return {**arguments(x), "tiles": None}

    calls = [{"sample": part, "timestep": 5, "given": given(part)} for part in x.split([1, 4, 2])]
    data = MemorySet.of_calls(Probe(), calls, 1000)
    assert equal(data.rows(torch.tensor([6, 2])).cond["given"], given(x[[6, 2]]))
    with pytest.raises(QuantempoError, match="another number of rows"):
        MemorySet.of_calls(Probe(), calls[:1], 1000)
