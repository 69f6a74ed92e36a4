"""Fused blocks of FLUX for GPUs against the same layers run one by one, on a CPU, tiny."""

import copy

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

from quantempo.core import activation_format
from quantempo.engines import ENGINES
from quantempo.engines.cuda.joint import joined
from quantempo.engines.cuda.unet import BLOCKS
from quantempo.engines.fusion import fuse, fused_modules, unfuse
from quantempo.engines.layerwise import execution
from quantempo.quantized import WeightOnlyLinear
from tests.engines import one_by_one as use
from tests.engines.quantized import make_linear
from tests.tiny import noise

pytestmark = pytest.mark.usefixtures("on_a_cpu")

IMAGE = 9


def test_scales_for_every_token_are_of_8_bits():
    network = use.by_token(copy.deepcopy(use.quantized("flux")), 2)
    layer = network.transformer_blocks[0].attn.to_q
    layer.act_format = activation_format(6)
    use.ENGINE.attach(network)
    assert ("a layer in it has a scale for every token" in use.reasons(network)) == layer.dynamic


def test_all_layers_are_listed_as_fused_and_modulated_by_one_product():
    network = use.fused("flux")
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
        network(**use.call("flux"))
    # Read by the last block, then let go of.
    assert shared._kept.value is None and shared._kept.given is None
    ENGINES.get("onednn").attach(network)
    assert use.reasons(network) == {"engine onednn has no fused form of it"}


@pytest.mark.parametrize("batch", [1, 3])
def test_what_a_single_block_returns_is_joined_without_a_copy(batch):
    whole = noise(batch, use.TEXT + IMAGE, 32)
    text, image = whole.split([use.TEXT, IMAGE], 1)
    assert joined(text, image).data_ptr() == whole.data_ptr()
    other = noise(batch, 2 * IMAGE + use.TEXT, 32)
    gap, swapped = other.split([use.TEXT, IMAGE, IMAGE], 1), whole.split([IMAGE, use.TEXT], 1)
    apart = (whole[:1, : use.TEXT], whole[-1:, use.TEXT :])
    for first, second in ((text, image), (text, image + 1), swapped[::-1], gap[::2], apart):
        y = joined(first, second)
        assert torch.equal(y, torch.cat([first, second], 1)) and y.is_contiguous()


@torch.no_grad()
def test_arguments_for_processors_take_the_path_of_the_class():
    network = use.fused("flux")
    block, single = network.transformer_blocks[0], network.single_transformer_blocks[0]
    x, text, temb = noise(2, IMAGE, 32), noise(2, use.TEXT, 32, seed=1), noise(2, 32, seed=2)
    mask = torch.ones(2, 1, 1, use.TEXT + IMAGE, dtype=torch.bool)
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
        # The class reads two tables from one tensor too.
        assert not takes(x, text, temb, noise(2, use.TEXT + IMAGE, 16))
    block.attn.processor = FluxIPAdapterAttnProcessor(32, 32)
    assert block.forward.parts.given(text, temb) is None


def test_modulations_in_integers_are_computed_by_each_block():
    network = copy.deepcopy(use.quantized("flux"))
    for name, layer in list(network.named_modules()):
        if isinstance(layer, WeightOnlyLinear):
            clock = network.quantempo_clock
            network.set_submodule(name, make_linear(32, layer.out_features, clock=clock))
    use.ENGINE.attach(network)
    assert use.reasons(network) == {None}
    use.check_errors(use.errors(network, **use.call("flux", 3)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["attn.to_k", "proj_mlp"])
def test_projections_of_other_grids_are_quantized_apart(name):
    network = copy.deepcopy(use.quantized("flux"))
    network.single_transformer_blocks[0].get_submodule(name).act_scale[0, 1] *= 1.5
    use.ENGINE.attach(network)
    single = network.single_transformer_blocks[0].forward
    assert len(single.projections.layers) == (3 if name == "attn.to_k" else 1)
    assert not single.together or name == "attn.to_k"
    use.check_errors(use.errors(network, **use.call("flux", 3)))
