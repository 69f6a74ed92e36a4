"""Fused blocks of transformers for GPUs against the same layers one by one, on a CPU."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import AdaLayerNormZeroSingle as SingleNorm
from torch import Tensor, nn

from quantempo.engines import attach
from quantempo.engines.cuda.joint import modulated
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, fused_modules, report, unfuse
from quantempo.engines.layerwise import execution
from quantempo.kernels import ops
from quantempo.quantized import WeightOnlyLinear, quantized_layers, weight_only_layers
from tests.engines import one_by_one as use
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")


@pytest.fixture(params=use.NETWORKS)
def kind(request) -> str:
    return request.param


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_each_block_equals_its_layers(kind, batch):
    network = use.fused(kind)
    assert use.reasons(network) == {None}
    found = use.errors(network, **use.call(kind, batch))
    # The last block of SD3 ends the text.
    counts = {"sd3": 5, "sd35": 5, "latte": 4, "dit": 3, "qwen": 4}
    counts |= dict.fromkeys(("flux", "schnell", "packed"), 8)
    assert len(found) == counts.get(kind, 2)
    use.check_errors(found)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_layers_with_a_scale_for_every_token_are_fused(kind, every):
    network = use.by_token(copy.deepcopy(use.quantized(kind)), every)
    assert use.reasons(network) == {None}
    use.check_errors(use.errors(network, **use.call(kind, 3)))


CODES = (torch.int8, torch.uint8)


def code_bytes() -> int:
    """Return the bytes of all tensors of codes there are, each once."""
    gc.collect()
    found = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype in CODES]
    total, end, stored = 0, 0, map(Tensor.untyped_storage, found)
    for first, size in sorted((s.data_ptr(), s.nbytes()) for s in stored):
        total += max(0, first + size - max(first, end))
        end = max(end, first + size)
    return total


def test_codes_are_in_memory_once(kind):
    given, others = use.quantized(kind), code_bytes()
    network = copy.deepcopy(given)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    use.ENGINE.attach(network)
    alone = sum(value.nbytes for value in before.values() if value.dtype in CODES)
    # Those of `before` are there too.
    assert code_bytes() - others == 2 * alone > 0
    layers = weight_only_layers(network)
    assert all(layer.kernel is ops.weight_only_linear for layer in layers)
    # Saved, copied or cut into shards each is its own bytes.
    for value in network.state_dict().values():
        assert value.untyped_storage().nbytes() == value.nbytes
    integers = [*layers, *dict(quantized_layers(network)).values()]
    held = [layer.weight_int.detach() for layer in integers]
    held += [layer.weight_group.detach() for layer in layers if layer.weight_group is not None]
    for _ in range(2):
        after = network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        use.ENGINE.detach(network)
    # Nothing keeps the others alive, nor a product of an engine that is gone.
    assert all(layer.kernel is None for layer in layers)
    after = [layer.weight_int.data_ptr() for layer in integers]
    after += [layer.weight_group.data_ptr() for layer in layers if kind == "packed"]
    assert after and not {value.data_ptr() for value in held} & {*after}


@torch.no_grad()
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16])
def test_modulations_of_one_block_are_float32_under_autocast(half):
    linear, temb = nn.Linear(32, 48), noise(2, 32).to(half)
    layer = WeightOnlyLinear(linear).fill(linear)
    y = modulated(layer, temb)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(modulated(layer, temb), y) and y.dtype == torch.float32
        assert modulated(linear, temb.float()).dtype == torch.bfloat16


@torch.no_grad()
def test_the_network_is_as_near_to_float_as_simulated(kind):
    # Of steep softmaxes: other inputs than those that gave the scales, where errors are small.
    network, arguments = use.fused(kind), use.call(kind, 3, seed=7 if kind == "sd3" else 0)
    if "sd3" in kind:
        arguments["block_controlnet_hidden_states"] = [noise(3, 9, 32, seed=5)]
    if kind == "flux":
        arguments["controlnet_block_samples"] = [noise(3, 9, 32, seed=5)]
        arguments["controlnet_single_block_samples"] = [noise(3, 9, 32, seed=s) for s in (6, 7)]
    truth, y = use.tiny(kind)(**arguments).sample, network(**arguments).sample
    unfuse(network)
    attach(network, "simulated")
    check_like_simulated(y, network(**arguments).sample, truth, use.LEVELS[kind])


@torch.no_grad()
def test_all_layers_of_blocks_are_fused_and_what_they_share_is_one_product(kind):
    network = use.fused(kind)
    blocks = {n: how for n, how in execution(network).items() if "blocks." in n}
    assert set(blocks.values()) == {"triton, fused"}
    forwards = [module.forward.active for module in fused_modules(network).values()]
    if "sd3" in kind or kind == "qwen":
        (shared,) = {m.shared for forward in forwards for m in forward.modulations}
        assert len(shared.layers) == 2 * len(forwards)
    elif kind in ("pixart", "latte", "sana", "wan"):
        (shared,) = {attention.contexts for f in forwards for attention in f.attentions}
        assert len(shared.attentions) == 2
    elif kind == "dit":
        (shared,) = {forward.time.shared for forward in forwards}
        assert len(shared.layers) == 2 and forwards[0].time._kept.value is None
    else:
        assert set(execution(network)) - set(blocks) >= {"context_embedder"}
        (shared,) = {m.shared for forward in forwards for m in forward.modulations}
        assert len(shared.layers) == 2 * 2 + 2
    network(**use.call(kind))
    # Read by the last block, then let go of.
    assert shared._kept.value is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_have_the_type_of_the_network(kind, dtype):
    network = copy.deepcopy(use.quantized(kind))
    nn.Module.to(network, dtype)
    use.ENGINE.attach(network)
    given = use.call(kind)
    for name, value in given.items():
        if isinstance(value, Tensor) and value.is_floating_point() and "ids" not in name:
            given[name] = value.to(dtype)
    y = network(**given).sample
    assert y.dtype == dtype and use.reasons(network) == {None}
    unfuse(network)
    assert relative(y, network(**given).sample) <= 2 * use.LEVELS[kind]
    # What the class clips is clipped, and nothing else.
    block, seen = _blocks(network)[0], []
    for layer in (layer for name, layer in block.named_modules() if name.endswith("net.2")):
        layer.bias += 1e9
    block.register_forward_hook(lambda _, args, y: seen.append([x.isfinite().all() for x in y]))
    network(**given)
    fuse(network, BLOCKS)
    network(**given)
    assert seen[0] == seen[1]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flux", "sd35", "dit", "pixart", "qwen", "sana", "wan"])
def test_a_network_compiles_whole_and_once(kind):
    network = use.by_token(copy.deepcopy(use.quantized(kind)), 5)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for times in ([0, 0], [1, 1]):
            arguments = use.call(kind)
            arguments["timestep"] = arguments["timestep"][times]
            assert torch.equal(compiled(**arguments).sample, network(**arguments).sample)


class Halved:
    """A processor that the user has written."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = self.processor(*args, **kwargs)
        return tuple(part / 2 for part in y) if isinstance(y, tuple) else y / 2


def _processors(network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "processor"):
            module.processor = Halved(module.processor)


def _adapted(name: str) -> Callable[[nn.Module], None]:
    return lambda network: network.set_submodule(name, use.Scaled(network.get_submodule(name)))


ADAPTED = (
    "transformer_blocks.0.attn.to_v", "transformer_blocks.1.ff_context.net.2",
    "single_transformer_blocks.0.proj_out", "single_transformer_blocks.1.norm.linear",
)  # fmt: skip


def _blocks(network: nn.Module) -> Any:
    return network.get_submodule("blocks" if hasattr(network, "blocks") else "transformer_blocks")


def _hook(network: nn.Module) -> None:
    def flip(module: nn.Module, given: Any, y: Any) -> Any:
        return (y[0], y[1].flip(2)) if isinstance(y, tuple) else y.flip(2)

    _blocks(network)[-1].register_forward_hook(flip)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((kind, change) for kind in use.NETWORKS for change in (_processors, _hook)),
        *(("flux", _adapted(name)) for name in ADAPTED),
    ],
)
def test_what_users_change_is_seen_by_the_next_call(kind, change, monkeypatch):
    monkeypatch.setattr(use.ENGINE, "devices", ("any",))
    network, arguments = copy.deepcopy(use.quantized(kind)), use.call(kind)
    attach(network, "simulated")
    change(network)
    expected = network(**arguments).sample
    network = copy.deepcopy(use.quantized(kind))
    attach(network, "triton")
    before = network(**arguments).sample
    change(network)
    y = network(**arguments).sample
    assert relative(y, expected) <= use.LEVELS[kind] < relative(y, before)
    # A layer of its own leaves other blocks fused.
    assert None in use.reasons(network) or change is _processors


@torch.no_grad()
def test_other_calls_of_a_joint_block_take_the_path_of_the_class():
    network = use.fused("sd35")
    x, text, temb = noise(2, 9, 32), noise(2, use.TEXT, 32, seed=1), noise(2, 32, seed=2)
    for block in network.transformer_blocks:
        plain = block(x, text, temb)
        y = block(hidden_states=x, encoder_hidden_states=text, temb=temb, joint_attention_kwargs={})
        assert torch.equal(plain[1], y[1])
        takes = block.forward.takes
        assert takes(x, text, temb, None) and not takes(x, text.half(), temb, None)
        assert not takes(x, text[:1], temb, None) and not takes(x, None, temb, None)
        other = block(x, text, temb, joint_attention_kwargs={"unread": 1})
        unfuse(network)
        assert torch.equal(other[1], block(x, text, temb)[1])
        assert not torch.equal(other[1], plain[1])
        fuse(network, BLOCKS)
    network.transformer_blocks[0].attn2.processor = Halved(JointAttnProcessor2_0())
    assert network.transformer_blocks[0].forward.parts.given(text, temb) is None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dit", "pixart"])
def test_other_calls_of_a_block_of_one_stream_take_the_path_of_the_class(kind):
    network = use.fused(kind)
    block, x, text = network.transformer_blocks[0], noise(2, 9, 32), noise(2, use.TEXT, 32, seed=1)
    how = {"timestep": noise(2, 6 * 32), "encoder_hidden_states": text, "class_labels": None}
    if kind == "dit":
        how = {"timestep": torch.tensor([900, 20]), "class_labels": torch.tensor([3, 4])}
    mask = torch.zeros(2, 1, 9)
    mask[..., 4:] = -10000
    plain, masked = block(x, **how), block(x, **how, attention_mask=mask)
    assert torch.equal(block(x, **how, cross_attention_kwargs={}), plain)
    other = block(x, **how, cross_attention_kwargs={"scale": None})
    unfuse(network)
    assert torch.equal(masked, block(x, **how, attention_mask=mask))
    assert torch.equal(other, block(x, **how)) and not torch.equal(other, plain)
    fuse(network, BLOCKS)
    takes, (time, labels) = block.forward.takes, (how["timestep"], how["class_labels"])
    assert takes(x, text, None, None, time, labels)
    assert not takes(x[0], text, None, None, time, labels)
    for odd in (None, time[:0]):
        assert not takes(x, text, None, None, odd, labels)
    if kind == "pixart":
        assert takes(x, text, mask[..., : use.TEXT], None, time, None)
        for odd in (mask, mask[:, 0, : use.TEXT], mask[..., : use.TEXT].half()):
            assert not takes(x, text, odd, None, time, None)
        for odd in (None, text[:1]):
            assert not takes(x, odd, None, None, time, None)


@torch.no_grad()
def test_masks_and_two_times_take_the_path_of_the_class_of_qwen():
    network = use.fused("qwen")
    block = network.transformer_blocks[0]
    x, text, temb = (noise(2, n, 32) for n in (9, use.TEXT, 1))
    temb, rotary = temb[:, 0], network.pos_embed([(1, 3, 3)], max_txt_seq_len=use.TEXT)
    index, mask = torch.zeros(2, 9).long(), torch.ones(2, use.TEXT, dtype=torch.bool).tril(1)
    given = block.forward.parts.given
    assert block.forward.takes(x, *given(text, None, temb, rotary))
    assert not block.forward.takes(x, *given(text, None, temb, rotary[:1] * 2))
    odd = [(None, temb, rotary, {"unread": 1}), (None, temb, None), (mask, temb, rotary)]
    for arguments in (*odd, (None, temb, rotary, None, index)):
        assert given(text, *arguments) is None
    plain = block(x, text, *odd[-1])
    unfuse(network)
    assert all(map(torch.equal, plain, block(x, text, *odd[-1])))


@torch.no_grad()
def test_times_by_token_and_odd_tables_take_the_path_of_the_class_of_wan():
    network = use.fused("wan")
    block, x, text = network.blocks[0], noise(2, 9, 32), noise(2, use.TEXT, 32, seed=1)
    times, tables = noise(2, 9, 6, 32), network.rope(noise(2, 4, 1, 6, 6))
    plain, y = block(x, text, times[:, 0], tables), block(x, text, times, tables)
    one = block(x, text, times[:, :1].expand_as(times), tables)
    assert relative(one, plain) <= use.LEVELS["wan"]
    short = [table[:, :8] for table in tables]
    takes = block.forward.takes
    assert takes(x, text, None, tables, times[:, 0], None)
    assert not takes(x, text, None, short, times[:, 0], None)
    assert not takes(x, text, None, torch.stack(tables), times[:, 0], None)
    unfuse(network)
    assert torch.equal(y, block(x, text, times, tables))


OTHER = "its attention has a class, processor or layers of its own"
NORM, MLP = "a norm in it is unknown", "its feed-forward layer is not a plain GELU"


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("sd35", lambda b: setattr(b.attn2, "processor", Halved(None)), OTHER),
        ("sd35", lambda b: setattr(b, "context_pre_only", True), OTHER),
        ("sd35", lambda b: setattr(b.attn, "norm_added_q", nn.LayerNorm(16)), NORM),
        ("sd35", lambda b: setattr(b, "norm1", nn.LayerNorm(32)), NORM),
        ("sd35", lambda b: setattr(b, "norm2_context", nn.LayerNorm(32)), NORM),
        ("sd35", lambda b: setattr(b, "use_dual_attention", False), NORM),
        ("sd35", lambda b: b.set_chunk_feed_forward(1), "its feed-forward layer runs in chunks"),
        ("dit", lambda b: setattr(b, "norm1", nn.LayerNorm(32)), NORM),
        ("dit", lambda b: setattr(b, "norm3", nn.LayerNorm(32)), NORM),
        ("dit", lambda b: setattr(b, "norm_type", "ada_norm"), "its norm is 'ada_norm', not"),
        ("pixart", lambda b: setattr(b, "pos_embed", nn.Identity()), "it adds an embedding of"),
        ("pixart", lambda b: setattr(b, "only_cross_attention", True), "its first attention reads"),
        ("pixart", lambda b: setattr(b.attn2, "processor", Halved(None)), "an attention in it has"),
        ("pixart", lambda b: setattr(b.attn1, "residual_connection", True), "an attention in it"),
        ("pixart", lambda b: setattr(b.ff.net[0], "approximate", "none"), MLP),
        ("wan", lambda b: setattr(b.attn2, "processor", Halved(None)), "an attention in it reads"),
        ("wan", lambda b: setattr(b.attn2, "add_k_proj", nn.Identity()), "an attention in it rea"),
        ("qwen", lambda b: setattr(b.attn, "processor", Halved(None)), OTHER),
        ("qwen", lambda b: setattr(b, "txt_norm2", nn.LayerNorm(32)), NORM),
        ("sana", lambda b: setattr(b.attn1, "processor", Halved(None)), "an attention in it has"),
        ("sana", lambda b: setattr(b.attn2, "norm_k", nn.LayerNorm(32)), "an attention in it does"),
        ("sana", lambda b: setattr(b.ff, "residual_connection", True), "its feed-forward layer"),
        ("wan", lambda b: setattr(b, "norm2", nn.LayerNorm(32)), NORM),
        ("wan", lambda b: setattr(b.attn1, "norm_k", nn.LayerNorm(32)), NORM),
        ("pixart", lambda b: b.ff.net[1].__init__(0.5) or b.ff.train(), "its dropout is active"),
        ("flux", lambda b: setattr(b.attn, "processor", Halved(None)), OTHER),
        ("flux", lambda b: setattr(b.ff.net[0], "approximate", "none"), MLP),
        ("flux", lambda b: setattr(b, "norm2", nn.RMSNorm(32)), NORM),
        ("flux", lambda b: setattr(b.norm1, "emb", nn.Identity()), NORM),
        ("flux", lambda b: setattr(b.attn, "norm_k", nn.LayerNorm(16)), NORM),
        ("flux", lambda b: b.ff.net[1].__init__(0.5) or b.ff.train(), "its dropout is active"),
        ("flux single", lambda b: setattr(b.attn, "fused_projections", True), OTHER),
        ("flux single", lambda b: setattr(b, "act_mlp", nn.SiLU()), "its activation is SiLU, not"),
        ("flux single", lambda b: setattr(b, "norm", type("N", (SingleNorm,), {})(32)), NORM),
    ],
)
def test_a_block_that_does_something_else_says_why(kind, change, reason):
    kind, _, single = kind.partition(" ")
    network = copy.deepcopy(use.quantized(kind))
    change((network.single_transformer_blocks if single else _blocks(network))[0])
    use.ENGINE.attach(network)
    (left,) = use.reasons(network) - {None}
    assert left.startswith(reason)
    assert [row.reason for row in report(network)].count(left) == 1


@pytest.mark.parametrize(
    ("kind", "exclude"),
    [
        ("sd35", "*.norm1_context.linear"), ("sd35", "*.0.attn2.to_k"),
        ("pixart", "*.1.attn2.to_k"), ("flux", "*.norm1.linear"), ("flux", "*.add_k_proj"),
        ("flux", "single_transformer_blocks.0.proj_mlp"),
    ],
)  # fmt: skip
def test_layers_left_in_float_are_read_or_refused(kind, exclude):
    network = use.fused(kind, exclude)
    left = use.reasons(network) - {None}
    assert left == (set() if "norm" in exclude else {"a projection in it is in float"})
    use.check_errors(use.errors(network, **use.call(kind)))
