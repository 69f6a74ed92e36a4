"""Inputs that follow from the block before are those recorded from the network's start."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantempo.core import page_out, paged
from quantempo.models.layers import blocks
from quantempo.quantized import quantized_layers
from quantempo.recipe import RoundingSettings
from quantempo.rounding import reconstruct, round_denoiser
from quantempo.rounding.chain import links
from tests.engines.one_by_one import NETWORKS, call
from tests.rounding.networks import case
from tests.tiny import noise, tiny_unet

QUICK = RoundingSettings(name="gptq", samples=14, batch=4)


@pytest.mark.parametrize("budget", [2**30, 1])
@pytest.mark.parametrize("kind", ["unconditional", "dit"])
def test_the_same_integers_from_one_recording(
    kind: str, budget: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(paged, "_SMALL", 16)
    made, seen, record = case(kind), list[str](), reconstruct.record
    monkeypatch.setattr(reconstruct, "record", lambda m, *how: seen.extend(m) or record(m, *how))

    def rounded(on_disk: bool = False) -> tuple[dict[str, Tensor], list[str]]:
        seen.clear()
        copied = made.copied()
        for name, layer in quantized_layers(copied) if on_disk else ():
            page_out(layer, tmp_path / "copy" / name)
        found = round_denoiser(made.denoiser, copied, made.data, QUICK, budget=budget)
        assert not [*(tmp_path / "copy").rglob("inputs/**/*.safetensors")]
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return found, [*seen]

    (found, once), (lazy, again) = rounded(), rounded(on_disk=True)
    monkeypatch.setattr(reconstruct, "links", lambda *_: {})
    plain, every = rounded()
    assert found.keys() == plain.keys() == lazy.keys()
    for name, value in plain.items():
        assert torch.equal(value, found[name]) and torch.equal(value, lazy[name])
    # Halved inputs are not exact: then those on disk are.
    assert set(again) < set(every) and set(once) == set(again if budget > 1 else every)


def linked(network: nn.Module, **given: Any) -> list[str]:
    modules = {block.name: block.module for block in blocks(network)}
    order = dict.fromkeys(modules)
    return [n for n in order if n in links(modules, [lambda: network(**given)] * 2)]


def test_blocks_of_flux_follow_each_other_those_behind_a_skip_do_not() -> None:
    network = NETWORKS["flux"]().eval()
    found = linked(network, **call("flux"))
    count = len(network.transformer_blocks) + len(network.single_transformer_blocks)
    assert len(found) == count - 1 and "transformer_blocks.0" not in found
    found = linked(tiny_unet(), sample=noise(2, 3, 16, 16), timestep=torch.tensor([1, 2]))
    assert found and not [name for name in found if name.startswith("up_blocks.0.resnets")]


class _Chain(nn.Module):
    def __init__(self, between: Any) -> None:
        super().__init__()
        self.one, self.two, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


@pytest.mark.parametrize("between, follows", [
    (lambda y: y, True), (lambda y: y + 0, False), (lambda y: y.mul_(2), False),
    (lambda y: y.t(), False),
])  # fmt: skip
@torch.no_grad()
def test_what_is_changed_on_the_way_does_not_follow(between: Any, follows: bool) -> None:
    network, x = _Chain(between), noise(4, 4)
    found = links({"one": network.one, "two": network.two}, [lambda: network(x)])
    assert list(found) == ["two"] * follows
    for link in found.values():
        assert link.follow(x, ((x,), {})) == ((x,), {})
        assert link.follow([x], ((x,), {})) is None
