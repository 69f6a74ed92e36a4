"""The OpenVINO engine as the forward of a denoiser: shapes, arguments, batches, refusals."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from quantempo.engines import select as engines
from quantempo.engines.openvino import engine as module
from quantempo.engines.openvino.engine import MAX_GRAPHS, MAX_ROWS, OpenVinoEngine
from quantempo.errors import QuantempoError
from quantempo.quantized import install_clock
from tests.engines import openvino_nets as nets
from tests.tiny import tiny_dit, tiny_text, tiny_unconditional

pytestmark = nets.needs_openvino


@torch.no_grad()
def test_batches_of_mixed_time_steps_and_odd_sizes(engine_unet: nn.Module) -> None:
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([5, 400, 999, 6, 950])
    mixed = engine_unet(x, t).sample
    for i in range(5):
        # The same integers up to the amplified last bits; another bucket is 25 % off in scale.
        alone = engine_unet(x[i : i + 1], t[i]).sample
        assert nets.sqnr_db(alone, mixed[i : i + 1]) > 30
    same = engine_unet(x, torch.full((5,), 400)).sample
    assert torch.equal(same, engine_unet(x, 400).sample)


@torch.no_grad()
def test_time_steps_in_every_form_and_outputs_of_the_models_class(unet, engine_unet):
    x = torch.randn(2, 3, 16, 16)
    first = engine_unet(x, 400)
    assert type(first) is type(unet(x, 400))
    forms = [torch.tensor(400), torch.tensor([400]), torch.tensor([400, 400], dtype=torch.int32)]
    for t in (*forms, torch.tensor(400.0), 400.0):
        assert torch.equal(engine_unet(x, t).sample, first.sample), t
    assert torch.equal(engine_unet(sample=x, timestep=400).sample, first.sample)
    answer = engine_unet(x, 400, return_dict=False)
    assert type(answer) is tuple and torch.equal(answer[0], first.sample)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not transposed.is_contiguous()
    assert torch.equal(engine_unet(transposed, 400).sample, first.sample)
    kept = first.sample.clone()
    engine_unet(-x, 1)
    assert torch.equal(first.sample, kept), "an output must survive the next call"


@torch.no_grad()
def test_conditioning_reaches_the_graph() -> None:
    text = tiny_text().unet
    given = {"encoder_hidden_states": torch.randn(2, 8, 16)}
    net = nets.packed(text, **given)
    OpenVinoEngine().attach(net)
    reference = nets.simulated(nets.packed(text, **given))
    x = torch.randn(2, 4, 8, 8)
    other = {"encoder_hidden_states": given["encoder_hidden_states"].flip(0) * 3}
    for condition in (given, other):
        truth, expected = text(x, 10, **condition).sample, reference(x, 10, **condition).sample
        found = net(x, 10, **condition).sample
        assert nets.sqnr_db(expected, found) > nets.sqnr_db(truth, expected) - 2
    assert nets.sqnr_db(net(x, 10, **given).sample, net(x, 10, **other).sample) < 20
    dit = tiny_dit().transformer
    labels = torch.tensor([3, 1000])
    net, t = nets.packed(dit, class_labels=labels), torch.tensor([10, 10])
    OpenVinoEngine().attach(net)
    reference = nets.simulated(nets.packed(dit, class_labels=labels))
    truth = dit(x, t, class_labels=labels).sample
    expected = reference(x, t, class_labels=labels).sample
    found = net(x, t, class_labels=labels).sample
    assert nets.sqnr_db(expected, found) > nets.sqnr_db(truth, expected) - 2
    assert all(row.int8 for net in (net,) for row in nets.kernel_table(net) if row.quantized)


def test_nested_arguments_and_what_is_refused() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 1)

        def forward(
            self, sample: Tensor, timestep: Any, added: Any = None, factor: float = 1.0
        ) -> dict[str, Any]:
            extra = added["pair"][1] if added else 0
            return {"out": [self.layer(sample) * factor + extra, timestep], "none": None}

    net = Nested()
    install_clock(net, torch.zeros(nets.STEPS, dtype=torch.int64))
    plain = copy.deepcopy(net)
    OpenVinoEngine().attach(net)
    x = torch.randn(2, 2, 4, 4)
    extra = {"pair": [torch.zeros(1), torch.ones(2, 1, 1, 1)], "unused": None}
    with torch.no_grad():
        for factor in (1.0, 2.0):
            expected = plain(x, torch.tensor([4, 4]), added=extra, factor=factor)
            found = net(x, 4, added=extra, factor=factor)
            assert list(found) == ["out", "none"] and found["none"] is None
            assert torch.allclose(found["out"][0], expected["out"][0], rtol=0, atol=1e-6)
            assert torch.equal(found["out"][1], torch.tensor([4, 4]))
        with pytest.raises(QuantempoError, match="got a object"):
            net(x, 4, added=object())


@torch.no_grad()
def test_a_half_precision_model_keeps_its_weights_and_answers_in_kind(unet: nn.Module) -> None:
    net = nets.packed(unet)
    for name, parameter in net.named_parameters():
        assert "weight_scale" not in name
        parameter.data = parameter.data.bfloat16()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    OpenVinoEngine().attach(net)
    x = torch.randn(1, 3, 16, 16)
    found = net(x.bfloat16(), 4).sample
    assert found.dtype == torch.bfloat16
    # The network in float32 with the same weights, which the check of the first call sees too.
    wide = copy.deepcopy(net).float()
    OpenVinoEngine().attach(wide)
    assert torch.equal(wide(x.bfloat16().float(), 4).sample.bfloat16(), found)
    # Float layers with weights of 8 bits cost 2^-9 each.
    assert nets.sqnr_db(unet(x, 4).sample, found.float()) > 25
    after = net.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype == v.dtype for k, v in before.items())


@torch.no_grad()
def test_graphs_are_kept_per_shape(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    net, compiled = nets.one_layer(nn.Conv2d(8, 8, 1)), []
    original = module._Runner._compile

    def count(*args: Any) -> Any:
        compiled.append(args)
        return original(*args)

    monkeypatch.setattr(module._Runner, "_compile", count)
    OpenVinoEngine().attach(net)
    for batch in (1, 2, 1, 2):
        net(torch.randn(batch, 8, 4, 4), 3)
    assert len(compiled) == 2
    for batch in range(3, 3 + MAX_GRAPHS):
        net(torch.randn(batch, 8, 4, 4), 3)
    net(torch.randn(1, 8, 4, 4), 3)
    assert len(compiled) == 2 + MAX_GRAPHS + 1


@torch.no_grad()
def test_a_large_batch_runs_in_parts() -> None:
    net = nets.one_layer(nn.Conv2d(8, 8, 3, padding=1), exponents=(-5, -2))
    rows = 2 * MAX_ROWS + 3
    x, t = nets.draw_inputs((rows, 8, 4, 4)), torch.arange(rows) * 999 // (rows - 1)
    OpenVinoEngine().attach(net)
    buckets = (t * 2 // nets.STEPS).tolist()
    assert torch.equal(net(x, t).double(), nets.integer_output(net.layer, x, buckets))
    assert torch.equal(net(x, 3).double(), nets.integer_output(net.layer, x, [0] * rows))

    class Frames(nn.Module):
        """Two rows of `frames` for each sample: not to be cut by the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, sample: Tensor, timestep: Tensor, frames: Tensor) -> Tensor:
            return self.layer(sample) + frames.reshape(len(sample), 2, 1).sum(1)

    many = Frames()
    plain = copy.deepcopy(many)
    install_clock(many, torch.zeros(nets.STEPS, dtype=torch.int64))
    OpenVinoEngine().attach(many)
    x, frames = torch.randn(rows, 1), torch.randn(2 * rows)
    assert torch.allclose(many(x, 3, frames), plain(x, t, frames), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("step", ["torch.jit.trace", "quantempo.engines.openvino.rewrite.rewrite"])
def test_attaching_leaves_the_module_as_it_was(unet, monkeypatch, step):
    net = nets.packed(unet)
    layers = dict(net.named_modules())
    engines.attach(net, "openvino")
    x = torch.randn(1, 3, 16, 16)
    monkeypatch.setattr(step, lambda *args, **kwargs: 1 / 0)
    with pytest.raises(QuantempoError, match=r"cannot convert UNet2DModel.*division"):
        net(x, 4)
    assert dict(net.named_modules()) == layers
    monkeypatch.undo()
    net(x, 4)
    assert dict(net.named_modules()) == layers
    engines.detach(net)
    assert "forward" not in net.__dict__
    with pytest.raises(QuantempoError, match="before an engine was attached"):
        net(x, 4)


@torch.no_grad()
def test_a_pipeline_just_works() -> None:
    pipe = tiny_unconditional()
    assert isinstance(pipe.scheduler, DDIMScheduler)

    def images() -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        output = pipe(batch_size=2, generator=generators, num_inference_steps=4, output_type="np")
        return torch.from_numpy(output.images)

    net = nets.packed(pipe.unet, buckets=2)
    truth = images()
    pipe.unet = nets.simulated(net)
    expected = images()
    pipe.unet = net
    engines.attach(net, "openvino")
    found = images()
    loss = nets.sqnr_db(truth, expected)
    assert loss > 20
    assert nets.sqnr_db(expected, found) > loss - 3


def test_without_openvino_it_says_so(monkeypatch: pytest.MonkeyPatch, unet: nn.Module) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    reason = OpenVinoEngine().missing()
    assert reason is not None and "pip install 'quantempo[openvino]'" in reason
    with pytest.raises(
        QuantempoError, match="'openvino' cannot run this model here: OpenVINO is not"
    ):
        engines.attach(nets.packed(unet), "openvino")


def test_a_cpu_whose_sums_saturate_is_refused() -> None:
    """OneDNN can be told to leave VNNI alone; it then adds pairs of products in 16 bits."""
    code = "from quantempo.engines.openvino.engine import OpenVinoEngine as E; print(E().missing())"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "int8 sums saturate" in done.stdout or "computes int8 layers in f32" in done.stdout


def test_layers_that_it_cannot_take_are_refused() -> None:
    net = nets.one_layer(nn.Conv2d(16, 16, 1, groups=2), (3, 4), segments=(8, 8))
    with pytest.raises(QuantempoError, match="cannot take layer: groups and a split input"):
        OpenVinoEngine().attach(net)


@torch.no_grad()
@pytest.mark.parametrize("factor", [-50.0, 0.6])
def test_a_graph_that_is_wrong_is_named_and_not_used(unet, monkeypatch, caplog, factor):
    """Also where it is a loss of a few dB."""
    from quantempo.engines.openvino import graph

    net, x, name = nets.packed(unet), torch.randn(1, 3, 16, 16), "mid_block.resnets.1.conv2"
    right = graph._LayerConverter._sum

    def wrong(self: Any, call: Any, *how: Any) -> Any:
        y = right(self, call, *how)
        return graph.ops.multiply(y, graph.constant(factor)) if call.name == name else y

    monkeypatch.setattr(graph._LayerConverter, "_sum", wrong)
    engines.attach(net, "openvino")
    y = net(x, 400).sample
    assert f"on UNet2DModel, from {name} on: onednn runs it instead" in caplog.text
    assert engines.attached(net) == "onednn"
    engines.attach(net, "onednn")
    assert torch.equal(net(x, 400).sample, y)
