"""Fused transformers for GPUs against the same layers run one by one, on a CPU, on tiny U-Nets."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from quantempo.engines import ENGINES, attach
from quantempo.engines.cuda.transformer import FusedTransformer, FusedTransformerBlock
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, fused_modules, unfuse
from quantempo.engines.layerwise import execution
from quantempo.models.fusion import find_parts
from quantempo.models.fusion_transformer import TransformerBlockParts, TransformerParts
from quantempo.quantized import quantized_layers
from tests.engines.quantized import quantize_network
from tests.engines.truth import block_calls, check_like_simulated, relative
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")

ENGINE = ENGINES.get("triton")
# Tokens of the text, a multiple of nothing.
TEXT = 7
WIDTH = 48


def tiny(linear: bool = False, layers: int = 1, **more: Any) -> UNet2DConditionModel:
    """Make a U-Net of two levels, transformers of four heads in the lower one and the middle."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=4,
            cross_attention_dim=WIDTH, use_linear_projection=linear,
            transformer_layers_per_block=layers,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
        )  # fmt: skip
        for module in unet.modules():
            if isinstance(module, nn.LayerNorm | nn.GroupNorm):
                # Else a norm without its weights would pass.
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return unet.eval()


def call(batch: int, steps: str = "one") -> tuple[Tensor, Tensor, Tensor]:
    t = torch.tensor([970, 10, 450])[:batch] if steps == "mixed" else torch.tensor(450)
    return noise(batch, 4, 8, 8), t, noise(batch, TEXT, WIDTH, seed=1)


INPUTS = [
    (noise(3, 4, 8, 8, seed=t), torch.tensor(t), noise(3, TEXT, WIDTH, seed=seed))
    for seed, t in enumerate((900, 450, 20))
]
# What quantization alone does to the outputs of these networks.
LEVEL = 0.06
KINDS = {"conv": {}, "linear": {"linear": True, "layers": 2}}


@pytest.fixture(scope="module")
def floats() -> dict[str, UNet2DConditionModel]:
    return {kind: tiny(**how) for kind, how in KINDS.items()}


@pytest.fixture(scope="module")
def packed(floats) -> dict[str, nn.Module]:
    return {kind: quantize_network(network, INPUTS) for kind, network in floats.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def network(packed, kind) -> nn.Module:
    network = copy.deepcopy(packed[kind])
    ENGINE.attach(network)
    return network


@torch.no_grad()
def calls(network: nn.Module, *arguments: Tensor) -> dict[str, tuple[tuple, dict, Tensor]]:
    """Return for each transformer and each block of one what it was given and gave, not fused."""
    unfuse(network)
    seen = block_calls(network, ("Transformer2DModel", "BasicTransformerBlock"), *arguments)
    fuse(network, BLOCKS)
    for name in seen:
        network.get_submodule(name).forward.prepare(torch.device("cpu"))
    return seen


@torch.no_grad()
def errors(network: nn.Module, seen: dict[str, tuple[tuple, dict, Tensor]]) -> list[float]:
    found = []
    for name, (args, kwargs, expected) in seen.items():
        y = network.get_submodule(name)(*args, **kwargs)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype == expected.dtype == torch.float32
        if y.ndim == 4:
            assert y.is_contiguous(memory_format=torch.channels_last)
        found.append(relative(y, expected))
        for cut in ((0,), (-1,), (..., 0), (..., -1)):
            # A code that moves in there weighs more.
            assert relative(y[cut], expected[cut]) <= 3e-2, name
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", ["one", "mixed"])
def test_each_transformer_equals_its_layers(network, kind, batch, steps):
    seen = calls(network, *call(batch, steps))
    found = sorted(errors(network, seen))
    assert len(found) == 4 * (1 + KINDS[kind].get("layers", 1))
    # A code of 255 that moves by one costs about 1e-3; where none does, nothing hides an error.
    assert found[-1] <= 8e-3 and found[len(found) // 4] <= 2e-6, found


@torch.no_grad()
@pytest.mark.parametrize("steps", ["one", "mixed"])
def test_the_network_is_as_near_to_float_as_simulated(floats, network, kind, steps):
    arguments = call(3, steps)
    truth, fused = floats[kind](*arguments).sample, network(*arguments).sample
    assert fused.dtype == torch.float32
    unfuse(network)
    unfused = network(*arguments).sample
    attach(network, "simulated")
    simulated = network(*arguments).sample
    check_like_simulated(fused, simulated, truth, LEVEL)
    check_like_simulated(unfused, simulated, truth, LEVEL)


def test_all_layers_are_listed_as_fused(network, kind):
    assert set(execution(network).values()) == {"triton, fused"}
    forwards = [module.forward.active for module in fused_modules(network).values()]
    blocks = [f for f in forwards if isinstance(f, FusedTransformerBlock)]
    assert len(blocks) == 4 * KINDS[kind].get("layers", 1)
    assert sum(isinstance(f, FusedTransformer) for f in forwards) == 4
    for block in blocks:
        own, cross = block.attentions
        assert (len(own.of_tokens), own.contexts) == (1, None)
        assert len(cross.of_tokens) == len(cross.contexts.groups) == 1
    shared = [block.attentions[1].contexts for block in blocks]
    assert all(contexts is shared[0] for contexts in shared)
    assert sorted(block.attentions[1].index for block in blocks) == list(range(len(blocks)))
    # All are fused: what is between them is in half precision.
    assert network.conv_in.forward.dtype == torch.float16
    unfuse(network)
    assert set(execution(network).values()) == {"triton"}


class Count(TorchDispatchMode):
    """Count the operations that are launches on a GPU."""

    views = frozenset({
        "view", "_unsafe_view", "transpose", "permute", "unbind", "split", "slice", "select",
        "split_with_sizes",
        "unsqueeze", "detach", "expand", "alias", "t", "as_strided", "empty_like", "chunk",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.views:
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_nothing_is_copied_added_or_read_twice(packed):
    network = copy.deepcopy(packed["conv"])
    ENGINE.attach(network)
    x, context = noise(2, 32, 4, 4).half(), noise(2, TEXT, WIDTH, seed=1)
    x = x.contiguous(memory_format=torch.channels_last)
    with Count() as count:
        network.mid_block.attentions[0](x, encoder_hidden_states=context, return_dict=False)
    seen = count.seen
    attention = {name: seen.pop(name) for name in list(seen) if "attention" in name}
    assert sum(attention.values()) == 2
    # Projections of the transformer 2, of attentions 2 + 3, of the feed-forward 2; quantized are
    # the image, three norms, the context and two attentions.
    assert seen == {"gn_act_quant": 7, "qgemm": 9, "native_layer_norm": 3}


@torch.no_grad()
def test_a_context_is_multiplied_once_for_all_layers(packed):
    network = copy.deepcopy(packed["conv"])
    x, t, text = call(2)
    ENGINE.attach(network)
    with Count() as fused:
        first = network(x, t, text).sample
    # Four transformers: 8 products each but those of the context, and one of the context.
    assert fused.seen["qgemm"] == 4 * 8 + 1
    contexts = network.mid_block.attentions[0].transformer_blocks[0].forward.attentions[1].contexts
    assert contexts._kept.value is None and contexts._kept.given is None
    # A block alone, at a time of its own, and the text changed in place: nothing is left of that.
    for block in (network.mid_block.attentions[0], network.down_blocks[1].attentions[0]):
        block(first.new_zeros(2, 32, 8, 8), text, return_dict=False)
        assert contexts._kept.value is not None
        for time in (torch.tensor(20), t):
            expected = network(x, time, text.clone()).sample
            block(first.new_zeros(2, 32, 8, 8), text, return_dict=False)
            assert torch.equal(network(x, time, text).sample, expected)
    network.mid_block.attentions[0](first.new_zeros(2, 32, 8, 8), text, return_dict=False)
    text.mul_(2)
    doubled = network(x, t, text).sample
    assert contexts._kept.value is None
    assert not torch.equal(doubled, first)
    assert torch.equal(doubled, network(x, t, text.clone()).sample)
    with pytest.raises(ValueError, match="got a context of 7 channels; expected"):
        network(x, t, text[..., :7])


@torch.no_grad()
@pytest.mark.parametrize("other", ["attn1.to_k", "attn1.to_v", "attn2.to_v"])
def test_projections_of_other_grids_are_quantized_apart(packed, other):
    network = copy.deepcopy(packed["conv"])
    block = network.mid_block.attentions[0].transformer_blocks[0]
    # In one time bucket alone.
    block.get_submodule(other).act_scale[0, 1] *= 1.5
    ENGINE.attach(network)
    own, cross = block.forward.attentions
    assert len(own.of_tokens) == (3 if "attn1" in other else 1)
    # One layer of all that read the context.
    sizes = sorted(len(group) for _, group in cross.contexts.groups)
    assert sizes == ([1, 7] if "attn2" in other else [8])
    found = sorted(errors(network, calls(network, *call(2))))
    assert found[-1] <= 8e-3 and found[len(found) // 4] <= 2e-6, found


@torch.no_grad()
def test_a_network_compiles_whole_and_once(packed):
    network = copy.deepcopy(packed["conv"])
    ENGINE.attach(network)
    torch._dynamo.reset()
    products: list[str] = []

    def backend(graph, inputs):
        products.extend(str(n.target) for n in graph.graph.nodes if "qgemm" in str(n.target))
        return aot_eager(graph, inputs)

    compiled = torch.compile(network, backend=backend, fullgraph=True)
    x, _, text = call(2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in (450, 10, 999):
            step = torch.tensor(t)
            assert torch.equal(compiled(x, step, text).sample, network(x, step, text).sample)
    # Traced too, the text is multiplied once.
    assert len(products) == 4 * 8 + 1


@torch.no_grad()
def test_masks_and_arguments_for_processors_take_the_original_path(floats, network, kind):
    x, t, text = call(2)
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[:, 3:] = False
    plain = network(x, t, text).sample
    masked = network(x, t, text, encoder_attention_mask=mask).sample
    truth = floats[kind](x, t, text, encoder_attention_mask=mask).sample
    short = network(x, t, text[:, :3]).sample
    assert relative(plain, masked) > LEVEL
    assert relative(masked, truth) <= LEVEL and relative(short, truth) <= LEVEL
    # Nothing said is not a reason.
    assert torch.equal(network(x, t, text, cross_attention_kwargs={}).sample, plain)
    transformer = network.mid_block.attentions[0]
    image = noise(2, 32, 4, 4).half()
    y = transformer(image, encoder_hidden_states=text)
    assert torch.equal(y.sample, transformer(image, text, return_dict=False)[0])
    given = transformer(image, text, cross_attention_kwargs={"scale": None}).sample
    assert given.dtype == y.sample.dtype == torch.float16
    assert relative(given, y.sample) <= 2e-2
    block = transformer.transformer_blocks[0].forward
    assert not block.takes(noise(2, 16, 32), None) and not block.takes(noise(2, 16, 32), (text,))


@torch.no_grad()
def test_a_block_with_a_layer_of_its_own_kind_is_not_fused(packed, floats):
    name = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
    left = quantize_network(floats["conv"], INPUTS, exclude=(name,))
    ENGINE.attach(left)
    table = execution(left)
    assert table["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] == "triton"
    assert table["mid_block.attentions.0.proj_in"] == "triton, fused"
    # A layer in float is between: so is all.
    assert left.conv_in.forward.dtype is None
    arguments = call(2)
    assert relative(left(*arguments).sample, floats["conv"](*arguments).sample) <= LEVEL


@torch.no_grad()
def test_joined_weights_are_kept_once_and_given_back(packed):
    network = copy.deepcopy(packed["conv"])
    ENGINE.attach(network)
    block = network.mid_block.attentions[0].transformer_blocks[0]
    joined = block.forward.attentions[0].of_tokens[0].weights[0]
    for i, layer in enumerate((block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)):
        assert layer.weight_int.data_ptr() == joined[32 * i].data_ptr()
    ENGINE.detach(network)
    for (name, layer), (_, before) in zip(
        quantized_layers(network), quantized_layers(packed["conv"]), strict=True
    ):
        codes = layer.weight_codes
        assert torch.equal(codes, before.weight_codes), name
        assert not 0 <= codes.data_ptr() - joined.data_ptr() < joined.nbytes, name


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "norm_type", "ada_norm"),
        lambda block: setattr(block, "pos_embed", nn.Identity()),
        lambda block: setattr(block, "fuser", nn.Identity()),
        lambda block: setattr(block, "only_cross_attention", True),
        lambda block: setattr(block.attn1, "residual_connection", True),
        lambda block: setattr(block.attn2, "norm_q", nn.LayerNorm(8)),
        lambda block: setattr(block.attn2, "rescale_output_factor", 2.0),
        lambda block: setattr(block.attn2, "is_cross_attention", False),
        lambda block: setattr(block.attn2, "processor", nn.Identity()),
        lambda block: block.ff.net.__setitem__(0, nn.GELU()),
    ],
)
def test_only_plain_blocks_are_listed(change):
    network = tiny()
    change(network.mid_block.attentions[0].transformer_blocks[0])
    found = [parts for _, _, parts in find_parts(network)]
    parts = [p for p in found if not isinstance(p, str)]
    # The one that was changed says why.
    assert len(found) == len(parts) + 1
    blocks = {p.name for p in parts if isinstance(p, TransformerBlockParts)}
    assert len(blocks) == 3 and not any(name.startswith("mid_block") for name in blocks)
    assert sum(isinstance(p, TransformerParts) for p in parts) == 4
