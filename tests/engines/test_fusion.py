"""What is fused and why the rest is not; protocols of kernels and fused forwards, by registry."""

import copy
import logging

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from torch import Tensor, nn

from quantempo.engines import ENGINES
from quantempo.engines.base import BACKENDS, Kernel
from quantempo.engines.fusion import BlockRow, FusedBlock, fused_modules, report, unfuse
from quantempo.engines.layerwise import LayerwiseEngine
from quantempo.engines.per_forward import PerForward
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.quantized import quantized_layers
from tests.engines.quantized import quantize_network, quantized_unet
from tests.engines.truth import check_like_simulated
from tests.tiny import noise, tiny_dit, tiny_unet

pytestmark = pytest.mark.usefixtures("on_a_cpu")

EVERY = {name: ENGINES.get(name) for name in ENGINES.names()}
LAYERWISE = {name: one for name, one in EVERY.items() if isinstance(one, LayerwiseEngine)}
FUSING = [name for name, engine in LAYERWISE.items() if engine.blocks is not None]


@pytest.fixture
def engine(name: str) -> LayerwiseEngine:
    engine = LAYERWISE[name]
    reason = engine.missing() or engine.handicap() if name in FUSING else engine.missing()
    if reason is not None:
        pytest.skip(reason)
    return engine


def dit() -> nn.Module:
    label = torch.tensor([0, 1])
    network = tiny_dit().transformer
    for block in network.transformer_blocks:
        block.ff.net[0].approximate = "none"
    x = noise(2, network.config.in_channels, 8, 8)
    return quantize_network(network, [(x, torch.tensor([450, 20]), label)])


def cogvideo() -> nn.Module:
    network = CogVideoXTransformer3DModel(
        in_channels=16, out_channels=16, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        time_embed_dim=16, text_embed_dim=16, max_text_seq_length=5, sample_frames=1,
        sample_width=4, sample_height=4,
    ).eval()  # fmt: skip
    x, text = noise(2, 1, 16, 4, 4), noise(2, 5, 16)
    return quantize_network(network, [(x, text, torch.tensor([9, 450]))])


@pytest.mark.parametrize("name", FUSING)
def test_every_block_of_a_plain_network_is_fused_and_counted(engine, name, caplog):
    network = quantized_unet()
    with caplog.at_level(logging.INFO, "quantempo"):
        engine.attach(network)
    rows = report(network)
    assert all(row.reason is None for row in rows)
    kinds = [row.kind for row in rows]
    assert kinds.count("ResnetBlock2D") == 8 and kinds.count("UpBlock2D") == 1
    assert {row.name for row in rows} - set(fused_modules(network)) == {""}
    assert f"fused {len(rows)} of {len(rows)} blocks of UNet2DModel" in caplog.messages
    unfuse(network)
    assert report(network) == []


@pytest.mark.parametrize("name", FUSING)
def test_each_refusal_is_kept_and_counted_once(engine, name, caplog):
    network = quantized_unet(exclude=("up_blocks.0.resnets.0.conv1", "mid_block.resnets.*.conv1"))
    network.mid_block.attentions[0].rescale_output_factor = 2.0
    with caplog.at_level(logging.INFO, "quantempo"):
        engine.attach(network)
    left = {row.name: row.reason for row in report(network) if row.reason is not None}
    assert left == {
        "mid_block.attentions.0": "its output is scaled or not added to its input",
        "mid_block.resnets.0": "a convolution in it is in float",
        "mid_block.resnets.1": "a convolution in it is in float",
        "up_blocks.0": "a residual block in it is not fused",
        "up_blocks.0.resnets.0": "a convolution in it is in float",
    }
    (line,) = (text for text in caplog.messages if text.startswith("fused "))
    rows = len(report(network))
    assert f"fused {rows - 5} of {rows} blocks" in line
    assert "5 not: ResnetBlock2D: a convolution in it is in float (3); " in line


DIT = "its feed-forward layer is not a plain GELU by tanh"
UNKNOWN = "no fused form is known"
# Of each block: (what of it, its class, why it is not fused); without a reason by `triton` alone.
NOT_FUSED = {
    dit: [("", "BasicTransformerBlock", DIT), (".ff", "FeedForward", None)],
    cogvideo: [
        (".attn1", "Attention", UNKNOWN),
        ("", "CogVideoXBlock", UNKNOWN),
        (".ff", "FeedForward", None),
    ],
}


@pytest.mark.parametrize("name", FUSING)
@pytest.mark.parametrize("make", NOT_FUSED)
def test_what_is_not_fused_is_said_and_a_feed_forward_layer_of_it_is(engine, name, make, caplog):
    network = make()
    with caplog.at_level(logging.INFO, "quantempo"):
        engine.attach(network)
    rows = [
        BlockRow(f"transformer_blocks.{i}{part}", *found)
        for part, *found in NOT_FUSED[make]
        for i in (0, 1)
        if name == "triton" or found[1] is not None
    ]
    assert sorted(map(str, report(network))) == sorted(map(str, rows))
    (said,) = (r for r in caplog.records if r.message.startswith("fused "))
    fused = sum(row.reason is None for row in rows)
    counts = f"fused {fused} of {len(rows)} blocks of {type(network).__name__}; {len(rows) - fused}"
    assert said.message.startswith(f"{counts} not: ")
    assert said.levelno == (logging.INFO if fused else logging.WARNING)


@pytest.mark.parametrize("name", LAYERWISE)
def test_kernels_and_forwards_implement_their_protocols(engine, name):
    network = quantized_unet()
    engine.attach(network)
    cpu = torch.device("cpu")
    for _, layer in quantized_layers(network):
        assert isinstance(layer.kernel, Kernel) and layer.kernel.backend == name
        layer.kernel.prepare(cpu)
        assert layer.kernel.here(cpu) is layer.kernel.here(cpu)
    forwards = [module.forward.active for module in fused_modules(network).values()]
    blocks = [forward for forward in forwards if hasattr(forward, "parts")]
    assert bool(blocks) == (name in FUSING)
    for forward in blocks:
        if hasattr(forward, "own"):
            assert isinstance(forward, FusedBlock)
        if hasattr(forward, "prepare"):
            forward.prepare(cpu)


@pytest.mark.parametrize("name", ENGINES.names())
@torch.no_grad()
def test_an_engine_is_like_simulated_and_leaves_no_trace(name):
    engine, float_network = ENGINES.get(name), tiny_unet()
    if engine.missing() is not None:
        pytest.skip(engine.missing())
    network = quantized_unet()
    before = {n: buffer.clone() for n, buffer in network.named_buffers()}
    modules = dict(network.named_modules())
    call = noise(3, 3, 16, 16, seed=1), torch.tensor([970, 10, 450])
    simulated = copy.deepcopy(network)
    ENGINES.get("simulated").attach(simulated)
    engine.attach(network)
    y, truth = network(*call).sample, float_network(*call).sample
    assert y.dtype == truth.dtype and torch.equal(network(*call).sample, y)
    other = copy.deepcopy(network)
    engine.attach(other)
    assert torch.equal(other(*call).sample, y)
    for _, layer in quantized_layers(other):
        layer.weight_int.zero_()
    assert torch.equal(network(*call).sample, y)
    if name != "simulated":
        check_like_simulated(y, simulated(*call).sample, truth, 0.03)
    engine.detach(network)
    assert dict(network.named_modules()) == modules
    assert not [n for n, m in modules.items() if "forward" in m.__dict__]
    assert all(layer.kernel is None for _, layer in quantized_layers(network))
    for n, buffer in network.named_buffers():
        assert buffer.is_contiguous() and torch.equal(buffer, before[n]), n


def test_every_backend_has_an_engine_and_every_engine_its_backend():
    assert set(BACKENDS.names()) == set(LAYERWISE)


@pytest.mark.skipif(fused_cpu.missing() is not None, reason=str(fused_cpu.missing()))
@torch.no_grad()
def test_a_block_called_twice_in_a_forward_is_right_both_times():
    network = quantized_unet()
    ENGINES.get("onednn").attach(network)
    first, second = network.mid_block.resnets
    x, temb, other = noise(2, 32, 8, 8), noise(2, 64), noise(2, 64, seed=1)
    alone = [first(x, temb), first(x, other), second(x, temb)]
    together = [first(x, temb), first(x, other), second(x, temb), first(x, temb)]
    for y, expected in zip(together, [*alone, alone[0]], strict=True):
        assert torch.equal(y, expected)


class Doubled(PerForward):
    made = 0

    def make(self, given: Tensor) -> Tensor:
        self.made += 1
        return given * 2


@pytest.mark.parametrize("inference", [False, True])
def test_a_value_of_one_forward_is_never_stale(inference):
    with torch.inference_mode(inference):
        cache, x, y = Doubled(2), torch.ones(3), torch.full((3,), 5.0)

        def check(reader: int, given: Tensor) -> None:
            assert torch.equal(cache.read(reader, given), given * 2)

        # Made by the first reader, read by the last, then let go of.
        check(0, x)
        check(1, x)
        assert cache.made == 1 and cache._kept.value is None and cache._kept.given is None
        # The same reader again, before and after the last; another input in between.
        for reader, given in ((0, x), (0, x), (1, x), (1, x), (0, y), (0, x), (1, x)):
            check(reader, given)
        # Changed in place after a forward that was broken off, and read by the same block first.
        check(0, x)
        x.mul_(3)
        check(0, x)
        check(1, x)
        # At another time.
        check(0, x)
        now = torch.zeros(())
        assert torch.equal(cache.read(0, x, now), x * 2)
        # What came with it was changed in place.
        before = cache.made
        now.add_(1)
        cache.read(0, x, now)
        assert cache.made == before + 1
