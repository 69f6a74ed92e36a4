"""Exported graphs against `simulated`, run by onnxruntime and by plain OpenVINO."""

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import Tensor, nn

from quantempo.engines.openvino import engine as openvino_engine
from quantempo.engines.select import attach
from quantempo.engines.simulated import once
from quantempo.errors import QuantempoError
from quantempo.export import graphs
from quantempo.export.onnx_graph import onnx_program
from quantempo.models.layers import denoisers_of
from quantempo.models.load import load_pipeline
from quantempo.quantized import QConv2d, QLinear, StepClock
from quantempo.quantized.layers import QPatches
from tests.engines.openvino_nets import LAYERS, fill_from_ranges
from tests.packed import packed

SUMS = ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat")


class Layers(nn.Module):
    """Integer layers beside each other, each with an input of its own, and their clock."""

    def __init__(self) -> None:
        super().__init__()
        self.quantempo_clock = StepClock(torch.arange(10) * 3 // 10)
        self.layers, self.shapes = nn.ModuleList(), []
        for layer, shape in LAYERS.values():
            self.add(QConv2d if isinstance(layer, nn.Conv2d) else QLinear, layer, shape)
        self.add(QLinear, nn.Linear(40, 8), (2, 7, 40), (24, 16), act_bits=6)
        self.add(QConv2d, nn.Conv2d(12, 8, 3, padding=1), (2, 12, 5, 5), (4, 8))
        self.add(QLinear, nn.Linear(48, 24), (2, 5, 48), weight_bits=4)
        self.add(QLinear, nn.Linear(48, 24), (2, 5, 48), buckets=0)
        self.add(QPatches, nn.Conv2d(4, 8, 2, stride=2), (2, 4, 6, 6))

    def add(
        self, kind: Any, of: Any, shape: Any, parts: Any = (), buckets: int = 3, **bits: int
    ) -> None:
        layer = kind.like(of, self.quantempo_clock, parts, buckets, **bits)
        flat = copy.copy(of)
        if kind is QPatches:
            flat.weight = nn.Parameter(of.weight.flatten(1))
        span = torch.tensor([-2.0, 3.0])[:, None].expand(2, sum(layer.segments))
        fill_from_ranges(layer, flat, span[None])
        if layer.weight_bits == 4:
            layer.regroup(16)
        self.layers.append(layer)
        self.shapes.append(shape)

    def inputs(self) -> list[Tensor]:
        torch.manual_seed(0)
        return [1.5 * torch.randn(shape) for shape in self.shapes]


def run(net: Any, t: Tensor, *given: Tensor) -> list[Tensor]:
    clock = net.quantempo_clock
    clock.call.bucket = clock.bucket_of.index_select(0, clock.times.index(t)).squeeze()
    rows = [
        x if len(x) == len(t) or len(t) == 1 else x.repeat(2, *[1] * (x.ndim - 1)) for x in given
    ]
    return [layer(x) for layer, x in zip(net.layers, rows, strict=True)]


@pytest.mark.parametrize("times", [[5], [1, 9]])
def test_layers_are_those_of_simulated(times: list[int]) -> None:
    torch.manual_seed(0)
    net, t = Layers(), torch.tensor(times)
    with torch.no_grad():
        program = onnx_program(net, run, [t, *net.inputs()])
    made = program.model_proto
    session = onnxruntime.InferenceSession(made.SerializeToString())
    given = dict(zip([i.name for i in session.get_inputs()], [t, *net.inputs()], strict=True))
    found = session.run(None, {name: value.numpy() for name, value in given.items()})
    for layer in net.layers:
        layer.kernel = lambda x, layer=layer: once(layer, True, x)
    for layer, y, right in zip(net.layers, found, run(net, t, *net.inputs()), strict=True):
        # Equal sums: what is left is the order of two products of scales.
        np.testing.assert_allclose(y, right.detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=layer)
    assert sum(node.op_type in SUMS for node in made.graph.node) == len(net.layers) + 2


def networks(kind: str) -> Any:
    (found,) = denoisers_of(load_pipeline(packed(kind).folder)).items()
    return found


def inputs_of(facts: dict[str, Any], t: int) -> dict[str, Tensor]:
    """Return inputs of a graph at a time-step."""
    torch.manual_seed(t)
    made = {}
    for name, what in facts["inputs"].items():
        kind = getattr(torch, what["dtype"])
        made[name] = (
            torch.randn(what["shape"])
            if kind.is_floating_point
            else torch.ones(what["shape"], dtype=kind)
        )
    return made | {"timestep": torch.full_like(made["timestep"], t)}


@pytest.mark.parametrize("kind", ["unconditional", "dit"])
def test_onnx_of_a_pipeline_runs_as_simulated(kind: str, tmp_path: Path) -> None:
    made = graphs.write(packed(kind).folder, tmp_path / "x", format="onnx", call=packed(kind).call)
    name, network = networks(kind)
    facts = json.loads((tmp_path / "x" / f"{name}.json").read_text())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "x" / f"{name}.onnx", options)
    kernels = [n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert sum(map(kernels.count, SUMS)) >= made[name]["integer_layers"] > 0
    attach(network, "simulated")
    errors = []
    for t in (20, 300, 500, 700, 900):
        given = inputs_of(facts, t)
        (y,) = session.run(None, {n: v.numpy() for n, v in given.items()})
        with torch.no_grad():
            right = network(**given, return_dict=False)[0].numpy()
        errors.append(np.square(y - right).sum() / np.square(right).sum())
    # A code that the last digit of a float moves is seen at some times, a wrong graph at all.
    assert np.median(errors) < 1e-8 and max(errors) < 1e-2


def test_openvino_ir_is_the_graph_of_the_engine(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(openvino_engine, "has_bfloat16", lambda: False)
    graphs.write(packed("unconditional").folder, tmp_path / "x", format="openvino")
    name, network = networks("unconditional")
    facts = json.loads((tmp_path / "x" / f"{name}.json").read_text())
    how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(tmp_path / "x" / f"{name}.xml", "CPU", how)
    attach(network, "openvino")
    for t in (20, 980):
        given = inputs_of(facts, t)
        y = compiled({n: v.numpy() for n, v in given.items()})["output"]
        with torch.no_grad():
            right = network(**given, return_dict=False)[0].numpy()
        np.testing.assert_allclose(y, right, rtol=0, atol=1e-6)


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    folder, out = packed("unconditional").folder, tmp_path / "x"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(QuantempoError, match=r"is not empty.*--force"):
        graphs.write(folder, out, format="onnx")
    monkeypatch.setattr(graphs, "_MOST", 1000)
    with pytest.raises(QuantempoError, match="GB, and a graph holds at most"):
        graphs.write(folder, tmp_path / "y", format="openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantempoError, match=r"pip install 'quantempo\[onnx\]'"):
        graphs.write(folder, tmp_path / "y", format="onnx")
    assert not (tmp_path / "y").exists() and [p.name for p in out.iterdir()] == ["mine"]
