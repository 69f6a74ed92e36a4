"""Fused blocks of SD3 for GPUs against the same layers run one by one, on a CPU, tiny."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from torch import Tensor, nn

from quantempo.bench.networks import cast_floats
from quantempo.engines import ENGINES, attach
from quantempo.engines.cuda.joint import SharedModulations
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, fused_modules, unfuse
from quantempo.engines.layerwise import execution
from tests.engines.one_by_one import by_token, check_errors, errors, randomized, reasons
from tests.engines.quantized import quantize_network
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")

ENGINE = ENGINES.get("triton")
# Multiples of nothing; 9 tokens of the image.
TEXT, SIZE = 5, 6
# What quantization alone does to the output; without norms of q and k some softmaxes are steep.
LEVELS = {"3": 0.15, "3.5": 0.03}
LEVEL = LEVELS["3.5"]
# SD3; SD3.5 medium, whose first blocks attend to the image alone as well.
KINDS: dict[str, dict[str, Any]] = {
    "3": {},
    "3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
}


@cache
def tiny(kind: str = "3.5") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SD3Transformer2DModel(
            sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=48, caption_projection_dim=32,
            pooled_projection_dim=32, pos_embed_max_size=8, **KINDS[kind],
        )  # fmt: skip
        return randomized(network)


def call(batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {
        "hidden_states": noise(batch, 4, SIZE, SIZE, seed=seed),
        "encoder_hidden_states": noise(batch, TEXT, 48, seed=seed + 1),
        "pooled_projections": noise(batch, 32, seed=seed + 2),
        "timestep": torch.linspace(900, 100, batch),
    }


@cache
def quantized(kind: str = "3.5", exclude: tuple[str, ...] = ()) -> nn.Module:
    inputs = [tuple(call(3, seed).values()) for seed in (0, 10)]
    return quantize_network(tiny(kind), inputs, exclude=exclude)


def fused(*args: Any) -> nn.Module:
    network = copy.deepcopy(quantized(*args))
    ENGINE.attach(network)
    return network


@pytest.fixture
def exact(monkeypatch) -> None:
    """Keep the modulation in float32, whose 11 bits in float16 move codes."""
    monkeypatch.setattr(SharedModulations, "dtype", torch.float32)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_block_equals_its_layers(kind, batch):
    network = fused(kind)
    assert reasons(network) == {None}
    found = errors(network, **call(batch))
    # The last block ends the text.
    assert len(found) == 2 * 3 - 1
    check_errors(found)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("every", [1, 2, 3])
def test_layers_with_a_scale_for_every_token_are_fused(every):
    network = by_token(copy.deepcopy(quantized()), every)
    assert reasons(network) == {None}
    check_errors(errors(network, **call(3)))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_as_near_to_float_as_simulated(kind):
    network, arguments = fused(kind), call(3)
    arguments["block_controlnet_hidden_states"] = [noise(3, 9, 32, seed=5)]
    truth, y = tiny(kind)(**arguments).sample, network(**arguments).sample
    unfuse(network)
    attach(network, "simulated")
    check_like_simulated(y, network(**arguments).sample, truth, LEVELS[kind])


@torch.no_grad()
def test_all_layers_of_blocks_are_fused_and_modulated_by_one_product():
    network = fused()
    blocks = {n: how for n, how in execution(network).items() if "transformer_blocks" in n}
    assert set(blocks.values()) == {"triton, fused"}
    forwards = [module.forward.active for module in fused_modules(network).values()]
    shared = forwards[0].modulations[0].shared
    assert len(shared.layers) == 2 * 3
    assert all(m.shared is shared for forward in forwards for m in forward.modulations)
    network(**call())
    assert shared._kept.value is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_have_the_type_of_the_network(dtype):
    network = copy.deepcopy(quantized())
    cast_floats(network, dtype)
    ENGINE.attach(network)
    given = {name: value.to(dtype) for name, value in call().items()}
    y = network(**given).sample
    assert y.dtype == dtype and reasons(network) == {None}
    unfuse(network)
    assert relative(y, network(**given).sample) <= 2 * LEVEL


@torch.no_grad()
def test_a_network_compiles_whole_and_once():
    network = by_token(copy.deepcopy(quantized()), 5)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time in (900.0, 100.0):
            arguments = call() | {"timestep": torch.full((2,), time)}
            assert torch.equal(compiled(**arguments).sample, network(**arguments).sample)


class Halved(JointAttnProcessor2_0):
    """A processor that the user has written."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        return tuple(part / 2 for part in y) if isinstance(y, tuple) else y / 2


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.set_attn_processor(Halved()),
        lambda n: setattr(n.transformer_blocks[0].attn2, "processor", Halved()),
        lambda n: n.transformer_blocks[2].register_forward_hook(
            lambda m, a, y: (None, y[1].flip(2))
        ),
    ],
)
def test_what_users_change_is_seen_by_the_next_call(change, monkeypatch):
    monkeypatch.setattr(ENGINE, "devices", ("any",))
    network, arguments = copy.deepcopy(quantized()), call()
    attach(network, "simulated")
    change(network)
    expected = network(**arguments).sample
    network = copy.deepcopy(quantized())
    attach(network, "triton")
    before = network(**arguments).sample
    change(network)
    y = network(**arguments).sample
    assert relative(y, expected) <= LEVEL < relative(y, before)


@torch.no_grad()
def test_other_calls_take_the_path_of_the_class():
    network = fused()
    x, text, temb = noise(2, 9, 32), noise(2, TEXT, 32, seed=1), noise(2, 32, seed=2)
    for block in network.transformer_blocks:
        plain = block(x, text, temb)
        y = block(hidden_states=x, encoder_hidden_states=text, temb=temb, joint_attention_kwargs={})
        assert all(torch.equal(*pair) for pair in zip(plain, y, strict=True) if pair[0] is not None)
        given, takes = block.forward.parts.given, block.forward.takes
        assert given(text, temb, {"attention_mask": None}) is None
        assert takes(x, text, temb, None) and not takes(x, text.half(), temb, None)
        assert not takes(x, text[:1], temb, None) and not takes(x, None, temb, None)
        other = block(x, text, temb, joint_attention_kwargs={"unread": 1})
        unfuse(network)
        expected = block(x, text, temb)
        fuse(network, BLOCKS)
        assert torch.equal(other[1], expected[1]) and not torch.equal(other[1], plain[1])
    network.transformer_blocks[0].attn2.processor = FusedJointAttnProcessor2_0()
    assert network.transformer_blocks[0].forward.parts.given(text, temb) is None


OTHER = "its attention has a class, processor or layers of its own"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: setattr(b.attn, "processor", Halved()), OTHER),
        (lambda b: setattr(b.attn2, "processor", Halved()), OTHER),
        (lambda b: setattr(b, "context_pre_only", True), OTHER),
        (lambda b: setattr(b.attn, "norm_added_q", nn.LayerNorm(16)), "a norm in it is unknown"),
        (lambda b: setattr(b, "norm1", nn.LayerNorm(32)), "a norm in it is unknown"),
        (lambda b: setattr(b, "norm2_context", nn.LayerNorm(32)), "a norm in it is unknown"),
        (lambda b: setattr(b.ff.net[0], "approximate", "none"), "its feed-forward layer is not"),
        (lambda b: b.ff.net[1].__init__(0.5) or b.ff.train(), "its dropout is active"),
        (lambda b: setattr(b, "use_dual_attention", False), "a norm in it is unknown"),
        (lambda b: b.set_chunk_feed_forward(1), "its feed-forward layer runs in chunks"),
    ],
)
def test_a_block_that_does_something_else_says_why(change, reason):
    network = copy.deepcopy(quantized())
    change(network.transformer_blocks[0])
    ENGINE.attach(network)
    (left,) = reasons(network) - {None}
    assert left.startswith(reason)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("exclude", ["*.norm1_context.linear", "*.0.attn2.to_k", "*.1.ff.net.2"])
def test_layers_left_in_float_are_read_or_refused(exclude):
    network = fused("3.5", (exclude,))
    left = reasons(network) - {None}
    assert left == (set() if "norm" in exclude else {"a projection in it is in float"})
    check_errors(errors(network, **call()))
