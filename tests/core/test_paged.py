"""Tensors that lie in files: values, what stays paged, what is refused."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quantempo.core import paged
from quantempo.core.paged import Paged, held, page_out, paged_tensors, save_tensors
from quantempo.errors import QuantempoError
from tests.tiny import noise


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    x = noise(6, 4)
    every = {str(dtype): x.abs().to(dtype) for dtype in paged._NAMES}
    return every | {"empty": x[:0].clone(), "é": x[0, 0].clone(), "turned": x.clone().t()}


def test_files_are_those_of_safetensors(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    ours, theirs = tmp_path / "a", tmp_path / "b"
    for metadata in (None, {"format": "pt"}):
        save_file({k: v.contiguous() for k, v in tensors.items()}, theirs, metadata)
        for given in (tensors, paged_tensors(theirs)):
            save_tensors(ours, given, metadata)
            assert ours.read_bytes() == theirs.read_bytes()


def test_a_layer_computes_what_it_does_in_memory(tmp_path: Path) -> None:
    save_file({"w": noise(8, 4).bfloat16(), "b": noise(8, seed=1).half()}, tmp_path / "a")
    found = paged_tensors(tmp_path / "a")
    layer, lazy = nn.Linear(4, 8), nn.Linear(4, 8)
    for name, leaf in (("weight", "w"), ("bias", "b")):
        value = found[leaf].like(torch.float32)
        setattr(layer, name, nn.Parameter(value.load()))
        setattr(lazy, name, nn.Parameter(value, requires_grad=False))
    for shape in ((4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)):
        assert torch.equal(layer(noise(*shape)), lazy(noise(*shape)))
    same = copy.deepcopy(lazy).to("cpu").float()
    assert all(isinstance(p, Paged) and isinstance(p, nn.Parameter) for p in same.parameters())
    assert all(isinstance(value, Paged) for value in same.state_dict().values())
    # Rounded, not told to be of another type.
    assert torch.equal(lazy.half().weight, layer.weight.half())
    assert isinstance(same.to("meta").weight, Paged) and same.weight.device.type == "meta"


def test_nothing_writes_to_one_and_a_changed_file_is_named(tmp_path: Path) -> None:
    save_file({"a": noise(4, 4)}, tmp_path / "a")
    value = paged_tensors(tmp_path / "a")["a"]
    with pytest.raises(QuantempoError, match=r"writes to .*a; load the network whole"):
        value.add_(1)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(QuantempoError, match="any more, was it changed"):
            value + 1
        (tmp_path / "a").unlink(missing_ok=True)


def test_a_module_is_paged_out_but_for_small_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(paged, "_SMALL", 16)
    layer, x = nn.Linear(4, 8), noise(2, 4)
    expected = layer(x)
    page_out(layer, tmp_path / "sub/a.safetensors")
    assert isinstance(layer.weight, Paged) and not isinstance(layer.bias, Paged)
    assert torch.equal(layer(x), expected)
    # Also where what is done in it fails.
    for write in (False, True):
        with pytest.raises(OSError, match="full"), held(layer, write=write):
            assert not isinstance(layer.weight, Paged)
            raise OSError("full")
        assert isinstance(layer.weight, Paged) and torch.equal(layer(x), expected)


@pytest.mark.cuda
def test_tensors_read_one_after_the_other_reach_the_gpu(tmp_path: Path) -> None:
    values = {str(seed): noise(2**20, seed=seed).bfloat16() for seed in range(20)}
    save_file(values, tmp_path / "a")
    found = {
        k: v.like(torch.float32, "cuda").load() for k, v in paged_tensors(tmp_path / "a").items()
    }
    assert all(torch.equal(found[name].cpu(), value.float()) for name, value in values.items())
