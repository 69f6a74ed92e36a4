"""Fused blocks of FLUX for GPUs against the same layers run one by one, on a CPU, tiny."""

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxIPAdapterAttnProcessor,
)
from torch import Tensor, nn

from quantempo.bench.networks import cast_floats
from quantempo.core import activation_format
from quantempo.engines import ENGINES, attach
from quantempo.engines.cuda.joint import SharedModulations, joined
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, fused_modules, report, unfuse
from quantempo.engines.layerwise import execution
from quantempo.quantized import Float16Linear
from tests.engines.one_by_one import by_token, check_errors, errors, randomized, reasons
from tests.engines.quantized import make_linear, quantize_network
from tests.engines.truth import check_like_simulated, relative
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")

ENGINE = ENGINES.get("triton")
# Multiples of nothing.
TEXT, IMAGE = 5, 9
# What quantization alone does to the output.
LEVEL = 0.02


@cache
def tiny(guidance: bool = True) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = FluxTransformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
            axes_dims_rope=(4, 6, 6), guidance_embeds=guidance,
        )  # fmt: skip
        return randomized(network)


def call(batch: int = 2, guidance: bool = True) -> dict[str, Tensor | None]:
    return {
        "hidden_states": noise(batch, IMAGE, 16),
        "encoder_hidden_states": noise(batch, TEXT, 32, seed=1),
        "pooled_projections": noise(batch, 32, seed=2),
        "timestep": torch.linspace(0.9, 0.1, batch),
        "img_ids": (noise(IMAGE, 3) * 4).round(),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((batch,), 3.5) if guidance else None,
    }


@cache
def quantized(guidance: bool = True, exclude: tuple[str, ...] = ()) -> nn.Module:
    inputs = [tuple(call(3, guidance).values())]
    return quantize_network(tiny(guidance), inputs, exclude=exclude)


def fused(**how: Any) -> nn.Module:
    network = copy.deepcopy(quantized(**how))
    ENGINE.attach(network)
    return network


@pytest.fixture
def exact(monkeypatch) -> None:
    """Keep the modulation in float32, whose 11 bits in float16 move codes."""
    monkeypatch.setattr(SharedModulations, "dtype", torch.float32)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("guidance", [True, False])
def test_each_block_equals_its_layers(batch, guidance):
    network = fused(guidance=guidance)
    assert reasons(network) == {None} and len(report(network)) == 4
    found = errors(network, **call(batch, guidance))
    assert len(found) == 8
    check_errors(found)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("every", [1, 2, 3])
def test_layers_with_a_scale_for_every_token_are_fused(every):
    network = by_token(copy.deepcopy(quantized()), every)
    assert reasons(network) == {None}
    check_errors(errors(network, **call(3)))
    # The operator has codes of 8 bits.
    layer = network.transformer_blocks[0].attn.to_q
    layer.act_format = activation_format(6)
    ENGINE.attach(network)
    assert ("a layer in it has a scale for every token" in reasons(network)) == layer.dynamic


@torch.no_grad()
@pytest.mark.parametrize("control", [False, True])
def test_the_network_is_as_near_to_float_as_simulated(control):
    network, arguments = fused(), call(3)
    if control:
        arguments["controlnet_block_samples"] = [noise(3, IMAGE, 32, seed=5)]
        arguments["controlnet_single_block_samples"] = [noise(3, IMAGE, 32, seed=s) for s in (6, 7)]
    truth, y = tiny()(**arguments).sample, network(**arguments).sample
    unfuse(network)
    attach(network, "simulated")
    check_like_simulated(y, network(**arguments).sample, truth, LEVEL)


def test_all_layers_are_listed_as_fused_and_modulated_by_one_product():
    network = fused()
    table = execution(network)
    left = {name for name, how in table.items() if how != "triton, fused"}
    assert left == {"context_embedder"}
    forwards = [module.forward.active for module in fused_modules(network).values()]
    modulations = [modulation for one in forwards for modulation in one.modulations]
    shared = modulations[0].shared
    assert len(shared.layers) == len(modulations) == 2 * 2 + 2
    assert all(modulation.shared is shared for modulation in modulations)
    doubles = [stream.projections for one in forwards[2:] for stream in one.streams]
    every = [*(one.projections for one in forwards[:2]), *(p for each in doubles for p in each)]
    assert len(every) == 2 * 2 + 2 and all(len(p.layers) == 1 for p in every)
    with torch.no_grad():
        network(**call())
    # Read by the last block, then let go of.
    assert shared._kept.value is None and shared._kept.given is None
    ENGINES.get("onednn").attach(network)
    assert reasons(network) == {"engine onednn has no fused form of it"}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_streams_have_the_type_of_the_network(dtype):
    network = copy.deepcopy(quantized())
    cast_floats(network, dtype)
    ENGINE.attach(network)
    given = {k: v if v is None or "ids" in k else v.to(dtype) for k, v in call().items()}
    y = network(**given).sample
    assert y.dtype == dtype and reasons(network) == {None}
    # The float network's time is another one: rounded too.
    unfuse(network)
    assert relative(y, network(**given).sample) <= 2 * LEVEL


@torch.no_grad()
def test_a_network_compiles_whole_and_once():
    network = copy.deepcopy(quantized())
    del network.transformer_blocks[1]
    by_token(network, 5)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time in (0.9, 0.1):
            arguments = call() | {"timestep": torch.full((2,), time)}
            assert torch.equal(compiled(**arguments).sample, network(**arguments).sample)


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_single_block_returns_is_joined_without_a_copy(batch):
    whole = noise(batch, TEXT + IMAGE, 32)
    text, image = whole.split([TEXT, IMAGE], 1)
    assert joined(text, image).data_ptr() == whole.data_ptr()
    other = noise(batch, 2 * IMAGE + TEXT, 32)
    gap, swapped = other.split([TEXT, IMAGE, IMAGE], 1), whole.split([IMAGE, TEXT], 1)
    apart = (whole[:1, :TEXT], whole[-1:, TEXT:])
    for first, second in ((text, image), (text, image + 1), swapped[::-1], gap[::2], apart):
        y = joined(first, second)
        assert torch.equal(y, torch.cat([first, second], 1)) and y.is_contiguous()


class Scaled(nn.Module):
    """What adapters put in the place of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 4


def _adapted(network: nn.Module, name: str) -> None:
    network.set_submodule(name, Scaled(network.get_submodule(name)))


class Halved(FluxAttnProcessor):
    """A processor that the user has written."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)
        return tuple(part / 2 for part in y) if isinstance(y, tuple) else y / 2


def _processors(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if name.endswith("attn"):
            module.processor = Halved()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        _processors,
        lambda network: _adapted(network, "transformer_blocks.0.attn.to_v"),
        lambda network: _adapted(network, "transformer_blocks.1.ff_context.net.2"),
        lambda network: _adapted(network, "single_transformer_blocks.0.proj_out"),
        lambda network: _adapted(network, "single_transformer_blocks.1.norm.linear"),
    ],
)
def test_what_users_change_is_seen_by_the_next_call(change, monkeypatch):
    monkeypatch.setattr(ENGINE, "devices", ("any",))
    network, arguments = copy.deepcopy(quantized()), call()
    attach(network, "simulated")
    change(network)
    expected = network(**arguments).sample
    network = copy.deepcopy(quantized())
    # Once before it is changed.
    attach(network, "triton")
    before, _ = network(**arguments).sample, change(network)
    y = network(**arguments).sample
    assert relative(y, expected) <= LEVEL < relative(y, before)
    assert None in reasons(network) if change is not _processors else reasons(network) != {None}


@torch.no_grad()
def test_arguments_for_processors_take_the_path_of_the_class():
    network = fused()
    block, single = network.transformer_blocks[0], network.single_transformer_blocks[0]
    x, text, temb = noise(2, IMAGE, 32), noise(2, TEXT, 32, seed=1), noise(2, 32, seed=2)
    mask = torch.ones(2, 1, 1, TEXT + IMAGE, dtype=torch.bool)
    mask[..., 2:4] = False
    for one in (block, single):
        plain = one(x, text, temb)
        masked = one(x, text, temb, joint_attention_kwargs={"attention_mask": mask})
        unfuse(network)
        expected = one(x, text, temb, joint_attention_kwargs={"attention_mask": mask})
        fuse(network, BLOCKS)
        for y, truth, other in zip(masked, expected, plain, strict=True):
            assert torch.equal(y, truth) and not torch.equal(y, other)
        same = one(x, text, temb, joint_attention_kwargs={})
        assert all(map(torch.equal, same, plain))
        takes = one.forward.takes
        assert takes(x, text, temb, None) and not takes(x, text.half(), temb, None)
        assert not takes(x, text, temb, (noise(3, 16), noise(3, 16)))
    block.attn.processor = FluxIPAdapterAttnProcessor(32, 32)
    assert block.forward.parts.given(text, temb) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b, s: setattr(b.attn, "processor", Halved()), "its attention has a class, "),
        (lambda b, s: setattr(s.attn, "fused_projections", True), "its attention has a class, "),
        (lambda b, s: setattr(b.ff.net[0], "approximate", "none"), "its feed-forward layer"),
        (lambda b, s: setattr(b, "norm2", nn.RMSNorm(32)), "a norm in it is unknown"),
        (lambda b, s: setattr(b.norm1, "emb", nn.Identity()), "a norm in it is unknown"),
        (lambda b, s: setattr(b.attn, "norm_k", nn.LayerNorm(16)), "a norm in it is unknown"),
        (lambda b, s: setattr(s, "act_mlp", nn.SiLU()), "its activation is SiLU, not GELU by tanh"),
        (lambda b, s: setattr(s, "norm", type("N", (AdaLayerNormZeroSingle,), {})(32)), "a norm"),
        (lambda b, s: b.ff.net[1].__init__(0.5) or b.ff.train(), "its dropout is active"),
    ],
)
def test_a_block_that_does_something_else_says_why(change, reason):
    network = copy.deepcopy(quantized())
    change(network.transformer_blocks[0], network.single_transformer_blocks[0])
    ENGINE.attach(network)
    (left,) = (row.reason for row in report(network) if row.reason is not None)
    assert left.startswith(reason)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    "exclude", ["*.norm1.linear", "single_transformer_blocks.0.proj_mlp", "*.add_k_proj"]
)
def test_layers_left_in_float_are_read_or_refused(exclude):
    network = fused(exclude=(exclude,))
    assert reasons(network) - {None} == (
        set() if "norm" in exclude else {"a projection in it is in float"}
    )
    check_errors(errors(network, **call()))


def test_modulations_in_integers_are_computed_by_each_block():
    network = copy.deepcopy(quantized())
    for name, layer in list(network.named_modules()):
        if isinstance(layer, Float16Linear) and "blocks" in name:
            clock = network.quantempo_clock
            network.set_submodule(name, make_linear(32, layer.out_features, clock=clock))
    ENGINE.attach(network)
    assert reasons(network) == {None}
    check_errors(errors(network, **call(3)))


@torch.no_grad()
@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["attn.to_k", "proj_mlp"])
def test_projections_of_other_grids_are_quantized_apart(name):
    network = copy.deepcopy(quantized())
    network.single_transformer_blocks[0].get_submodule(name).act_scale[0, 1] *= 1.5
    ENGINE.attach(network)
    single = network.single_transformer_blocks[0].forward
    assert len(single.projections.layers) == (3 if name == "attn.to_k" else 1)
    assert not single.together or name == "attn.to_k"
    check_errors(errors(network, **call(3)))
