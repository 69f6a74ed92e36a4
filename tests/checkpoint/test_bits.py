"""Bits of each layer on their way through search, packing, files and loading."""

import functools
import json
import math
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantempo.checkpoint.diffusers_plugin import FORMAT_VERSION
from quantempo.engines.select import ENGINES, attach
from quantempo.models.layers import denoiser_of
from quantempo.models.load import load_pipeline
from quantempo.pipeline import stages as pipeline
from quantempo.pipeline.layer_table import describe, mean_weight_bits
from quantempo.quantized import quantized_layers, weight_only_layers
from quantempo.run_folder import RunFolder
from tests.packed import CALLS, recipe, saved

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENT = {"dit": "transformer", "unconditional": "unet"}
# Every width of weights and of activations, by name and by role.
DIT_BITS = {
    "transformer_blocks.0.attn1.to_q": "w2a8",
    "transformer_blocks.0.attn1.to_k": "w3a7",
    "transformer_blocks.0.attn1.to_v": "w4a6",
    "transformer_blocks.0.ff.*": "w5a5",
    "transformer_blocks.1.attn1.*": "w6a4",
    "transformer_blocks.1.ff.net.0.proj": "w7a3",
    "transformer_blocks.1.ff.net.2": "w8a2",
}
UNET_BITS = {"shortcut": "w8a8", "attention": "w8a6", "up_blocks.*": "w4a4"}
GROUP = {"dit": 0, "unconditional": 16}
BITS: dict[str, dict[str, str]] = {"dit": DIT_BITS, "unconditional": UNET_BITS}
each = pytest.mark.parametrize("kind", ["dit", "unconditional"])


@functools.cache
def mixed(kind: str) -> RunFolder:
    """Return the run folder of a tiny pipeline with bits of their own; do not write into it."""
    folder = tempfile.TemporaryDirectory(prefix="quantempo-bits-")
    FOLDERS.append(folder)
    run = Path(folder.name) / "run"
    settings = recipe(symmetric=kind != "dit", bits=BITS[kind])
    settings = settings.override("weights", group=GROUP[kind])
    pipeline.quantize(saved(kind), run, settings, call=CALLS[kind])
    return RunFolder(run)


FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def load(run: RunFolder) -> nn.Module:
    return denoiser_of(load_pipeline(run / "packed"))[1]


def config_of(run: RunFolder, kind: str) -> dict[str, Any]:
    text = (run / "packed" / COMPONENT[kind] / "config.json").read_text()
    return json.loads(text)["quantization_config"]


def stored_bytes(file: Path) -> dict[str, int]:
    """Return the bytes of each tensor, as the header of a safetensors file says."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    ends = {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: last - first for name, (first, last) in ends.items()}


@each
def test_codes_of_every_width_come_back_from_the_file(kind: str) -> None:
    run = mixed(kind)
    codes = run.read_safetensors("rounding.safetensors")
    sizes = stored_bytes(run / "packed" / COMPONENT[kind] / WEIGHTS)
    found = dict(quantized_layers(load(run)))
    if kind == "dit":
        widths = {bits for layer in found.values() for bits in (layer.weight_bits, layer.act_bits)}
        assert widths == set(range(2, 9))
    for name, layer in found.items():
        assert torch.equal(layer.weight_codes, codes[name]), name
        top, stored = layer.weight_format.qmax, layer.weight_int
        # Narrow, and searched for these bits: a large part of the grid is used.
        assert top / 2 < int(codes[name].abs().max()) <= top, (name, layer.weight_bits)
        out, inputs, *kernel = layer.weight_shape
        small, taps = layer.weight_bits <= 4, math.prod(kernel)
        assert stored.dtype == (torch.uint8 if small else torch.int8)
        if layer.weight_group is not None:
            assert sizes[f"{name}.weight_int"] == out * taps * ((inputs + 1) // 2)
            assert sizes[f"{name}.weight_group"] == out * taps * -(-inputs // GROUP[kind])
        else:
            length = (inputs * taps + 1) // 2 if small else inputs * taps
            assert sizes[f"{name}.weight_int"] == out * length
        # Nothing but the file's bytes is held by a layer that nobody ran.
        held = sum(value.nbytes for value in layer.buffers())
        assert held == sum(sizes[f"{name}.{key}"] for key in layer.state_dict())


@each
def test_scales_are_those_of_the_layers_own_bits(kind: str) -> None:
    run = mixed(kind)
    stats = run.read_safetensors("stats.safetensors")
    for name, layer in quantized_layers(load(run)):
        assert int(layer.act_zero_point.min()) >= 0
        assert int(layer.act_zero_point.max()) <= layer.act_qmax, (name, layer.act_bits)
        for scale, (low, high) in zip(
            layer.act_scale, stats[f"{name}.edges"].tolist(), strict=True
        ):
            # The whole grid over the range seen: clipped to a part of it, at most doubled by
            # symmetry. Taken for 8 bits, a grid of 4 would cover 1/17 of it.
            share = scale * layer.act_qmax / (max(high, 0.0) - min(low, 0.0))
            assert float(share.min()) > 0.12 and float(share.max()) < 2.2, (name, share)


@each
def test_the_file_says_the_bits_and_the_tables_show_them(kind: str) -> None:
    run = mixed(kind)
    config, found = config_of(run, kind), dict(quantized_layers(load(run)))
    assert config["format_version"] == FORMAT_VERSION == 5
    other = {n: [q.weight_bits, q.act_bits] for n, q in found.items()}
    groups = {n: [GROUP[kind]] * (q.weight_group is not None) for n, q in found.items()}
    written = {n: bits + groups[n] for n, bits in other.items() if bits != [8, 8]}
    assert config["bits"] == written != {} and any(groups.values()) == (kind != "dit")
    for rows in (run.read_json("layers.json"), describe(run / "packed", "cpu")[0]):
        shown = {r["name"]: [r["bits_weight"], r["bits_activation"]] for r in rows}
        assert {name: shown[name] for name in found} == other
    shown = {r["name"]: r["backend"].rpartition(", ")[2] for r in rows}
    assert {shown[n] for n in found if groups[n]} <= {"packed", "as bytes"}
    sizes = {name: math.prod(layer.weight_shape) for name, layer in found.items()}
    bits = {name: other[name][0] + sum(8 / group for group in groups[name]) for name in other}
    mean = sum(size * bits[name] for name, size in sizes.items()) / sum(sizes.values())
    assert mean_weight_bits(run.read_json("layers.json")) == pytest.approx(mean)
    assert mean_weight_bits([]) is None


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "openvino", "simulated"])
def test_a_loaded_model_of_mixed_bits_runs_on_every_engine(engine: str) -> None:
    if ENGINES.get(engine).missing() is not None:
        pytest.skip(str(ENGINES.get(engine).missing()))
    truth = denoiser_of(load_pipeline(saved("unconditional")))[1]
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted, net = truth(x, 500).sample, load(mixed("unconditional"))
    errors = []
    for name in ("simulated", engine):
        attach(net, name)
        errors.append(float((net(x, 500).sample - wanted).norm() / wanted.norm()))
    # Engines move codes of 4 bits now and then: another draw of the same error.
    assert errors[0] < 0.5 and abs(errors[1] / errors[0] - 1) < 0.35, errors


def test_a_folder_holds_packed_modulations_and_loads_as_it_was(tmp_path: Path) -> None:
    settings = recipe(symmetric=False).override("weights", bits=4, group=16)
    settings = settings.override("rounding", name="gptq")
    packed = pipeline.quantize(saved("dit"), tmp_path / "run", settings, call=CALLS["dit"])
    folder, file = packed / "transformer", WEIGHTS
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    names, network = config["weight_only"], denoiser_of(load_pipeline(packed))[1]
    assert names and all(config["bits"][name] == [4, 32, 16] for name in names)
    assert len(weight_only_layers(network)) == len(names)
    network.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    rows = [row for row in describe(packed, "cpu")[0] if row["name"] in names]
    assert {(r["bits_weight"], r["group"], r["bits_activation"]) for r in rows} == {(4, 16, 32)}
