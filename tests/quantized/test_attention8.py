"""Attention on integers: the formulas, what softmax ignores, errors, fallbacks, names that stay."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantempo.engines.layerwise import execution
from quantempo.engines.select import attach, choose
from quantempo.errors import QuantempoError
from quantempo.kernels.cpu import fused as fused_cpu
from quantempo.kernels.cpu import onednn
from quantempo.models.attention import attention_blocks
from quantempo.quantized import (
    install_int8_attention,
    int8_attention,
    int8_attention_blocks,
    restore_int8_attention,
)
from quantempo.quantized.attention import _weighted_sums
from tests.engines.quantized import quantize_network
from tests.tiny import tiny_dit, tiny_embeds, tiny_text, tiny_unet


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formulas of the module one by one: int64 products, the rest in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    q = q / math.sqrt(q.shape[-1])
    k = k - k.mean(-2, keepdim=True)
    s_q = q.abs().amax((-2, -1), keepdim=True) / 127
    s_k = k.abs().amax((-2, -1), keepdim=True) / 127
    s_v = v.abs().amax(-2, keepdim=True) / 127
    q8, k8, v8 = (torch.round(x / s).long() for x, s in ((q, s_q), (k, s_k), (v, s_v)))
    scores = torch.einsum("bhld,bhsd->bhls", q8, k8) * (s_q * s_k)
    if mask is not None:
        scores = scores + mask.double()
    p8 = torch.round(255 * (scores - scores.amax(-1, keepdim=True)).exp()).long()
    sums = torch.einsum("bhls,bhsd->bhld", p8, v8)
    return sums.double() / p8.sum(-1, keepdim=True) * s_v


@pytest.mark.parametrize(
    ("tokens", "dim"),
    [((1, 1), 1), ((1, 1), 64), ((3, 17), 8), ((3, 17), 1100), ((40, 40), 64), ((9, 1100), 8)],
)
def test_against_the_formulas_in_int64_and_float64(tokens: tuple[int, int], dim: int) -> None:
    q, k, v = draw(2, 3, tokens[0], dim), draw(2, 3, tokens[1], dim, seed=1), draw(
        2, 3, tokens[1], dim, seed=2
    )  # fmt: skip
    mask = None if tokens[0] == 3 else torch.where(draw(2, 1, *tokens, seed=3) > 1, -1e4, 0.0)
    ours, exact = int8_attention(q, k, v, mask), reference(q, k, v, mask)
    # A code that stands half way between two integers may fall to either side in float32: of p
    # that is one part in 255 of the row's largest weight.
    off = (ours - exact).abs() / exact.abs().amax((-2, -1), keepdim=True)
    assert float(off.max()) < 8e-3
    assert float((off < 1e-5).double().mean()) > 0.9


def test_sums_are_exact_however_many_tokens() -> None:
    p8 = torch.full((1, 1, 1, 5000), 255.0)
    v8 = torch.full((1, 1, 5000, 2), 127.0)
    v8[..., 1] = torch.where(torch.arange(5000) % 2 == 0, 127.0, -126.0)
    assert _weighted_sums(p8, v8).flatten().tolist() == [5000 * 255 * 127, 2500 * 255]


def test_the_mean_of_k_does_not_matter() -> None:
    q, k, v = draw(2, 2, 20, 16), draw(2, 2, 20, 16, seed=1), draw(2, 2, 20, 16, seed=2)
    shifted = k + 40 * draw(2, 2, 1, 16, seed=3)
    plain, moved = int8_attention(q, k, v), int8_attention(q, shifted, v)
    # Float32 loses 40 / 2^24 of k; a few codes move by one.
    assert float((plain - moved).abs().max()) < 0.02
    # Without taking it off, the mean would use up the codes.
    scale = shifted.abs().amax((-2, -1), keepdim=True) / 127
    rough = F.scaled_dot_product_attention(q, torch.round(shifted / scale) * scale, v)
    exact = F.scaled_dot_product_attention(q, k, v)
    assert float((rough - exact).abs().mean()) > 5 * float((moved - exact).abs().mean())


def test_a_constant_v_comes_out_and_so_do_zeros() -> None:
    q, k = draw(1, 2, 50, 8), draw(1, 2, 600, 8, seed=1)
    v = draw(1, 2, 1, 8, seed=2).expand(1, 2, 600, 8)
    torch.testing.assert_close(int8_attention(q, k, v), v[:, :, :50], rtol=1e-6, atol=0)
    zeros = torch.zeros(1, 1, 4, 8)
    assert int8_attention(zeros, zeros, zeros).tolist() == zeros.tolist()


@pytest.mark.parametrize("tokens", [16, 256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_stays_small_with_many_tokens(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = (draw(1, 2, tokens, 32, seed=s).to(dtype) for s in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    ours = int8_attention(q, k, v).double()
    # Weights, scores and v each lose about half a code of 127 at the most; 3 % in all, and weights
    # divided before rounding (p / 255) would lose nearly everything at 1024 tokens.
    assert float((ours - exact).norm() / exact.norm()) < 0.03


def unet_calls(network: nn.Module, count: int = 2) -> list[Any]:
    inputs = [draw(2, 3, 16, 16, seed=10 + i) for i in range(count)]
    return [lambda x=x: network(x, 500).sample for x in inputs]


def cases() -> list[tuple[str, nn.Module, Any]]:
    text, dit = tiny_text().unet, tiny_dit().transformer
    prompt = tiny_embeds(2)["prompt_embeds"]
    unet = tiny_unet()
    return [
        ("unet", unet, lambda n: n(draw(2, 3, 16, 16), 500).sample),
        ("text", text, lambda n: n(draw(2, 4, 8, 8), 500, encoder_hidden_states=prompt).sample),
        (
            "dit",
            dit,
            lambda n: (
                n(
                    draw(2, 4, 8, 8), torch.tensor([500, 500]), class_labels=torch.tensor([1, 2])
                ).sample
            ),
        ),
    ]


@pytest.mark.parametrize("case", range(3))
def test_self_and_cross_attention_of_every_kind_of_network(case: int) -> None:
    _, network, call = cases()[case]
    blocks = [name for name, _ in attention_blocks(network)]
    assert len(blocks) == len([m for m in network.modules() if type(m).__name__ == "Attention"])
    with torch.no_grad():
        before = call(network)
        # Float products first: the processor itself changes nothing but the order of sums.
        restore_int8_attention(network, [])
        found = install_int8_attention(network, [lambda: call(network)], 0.99)
        assert found.names == blocks and not found.left and set(found.cosines) == set(blocks)
        after = call(network)
    assert int8_attention_blocks(network) == blocks
    error = float((after - before).norm() / before.norm())
    assert 0 < error < 0.02


def test_the_processor_with_float_products_is_the_block() -> None:
    from quantempo.models.attention import set_products

    def products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    for _, network, call in cases():
        with torch.no_grad():
            before = call(network)
            for _, block in attention_blocks(network):
                set_products(block, products)
            torch.testing.assert_close(call(network), before, rtol=1e-5, atol=1e-6)


def test_a_mask_is_added_to_the_scores() -> None:
    network = tiny_text().unet
    prompt = tiny_embeds(2)["prompt_embeds"]
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]).bool()

    def call(rows: Tensor) -> Tensor:
        with torch.no_grad():
            return network(
                draw(2, 4, 8, 8), 500, encoder_hidden_states=rows, encoder_attention_mask=mask
            ).sample

    before = call(prompt)
    install_int8_attention(network, [lambda: call(prompt)], 0.99)
    hidden = torch.where(mask[..., None], prompt, 100.0 * prompt)
    after = call(prompt)
    assert float((after - before).norm() / before.norm()) < 0.02
    # What is masked has no weight; it still enters the mean and the scales, which cost precision.
    assert float((call(hidden) - before).norm() / before.norm()) < 0.3


def rig(block: nn.Module) -> None:
    """Let one key channel dwarf the others, which then have no codes left."""
    with torch.no_grad():
        block.to_k.weight[0] *= 3e3
        block.to_q.weight[0] *= 1e-5


def test_a_block_that_changes_too_much_stays_in_float(caplog: pytest.LogCaptureFixture) -> None:
    network = tiny_unet()
    blocks = dict(attention_blocks(network))
    first = next(iter(blocks))
    with torch.no_grad():
        blocks[first].to_q.weight[1:] *= 300
    rig(blocks[first])
    found = install_int8_attention(network, unet_calls(network), 0.999)
    assert "the cosine to its float output is" in found.left[first]
    assert f"attention of {first} stays in floating point" in caplog.text
    assert found.names and first not in found.names == int8_attention_blocks(network)
    assert found.cosines[first] < 0.999 <= min(found.cosines[name] for name in found.names)


def test_values_that_are_not_finite_and_blocks_without_calls_stay_in_float() -> None:
    network = tiny_unet()
    name, block = next(iter(attention_blocks(network)))
    with torch.no_grad():
        block.to_v.weight[0, 0] = torch.inf
    found = install_int8_attention(network, unet_calls(network, 1), 0.0)
    assert found.left[name] == "a value in it is not finite"
    untouched = install_int8_attention(tiny_unet(), [], 0.0)
    assert not untouched.names and not untouched.cosines
    assert set(untouched.left.values()) == {"no calibration call reached it"}


def test_an_error_in_a_call_leaves_the_float_products() -> None:
    network = tiny_unet()

    def fail() -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        install_int8_attention(network, [fail])
    assert int8_attention_blocks(network) == []


def test_names_come_back_and_unknown_ones_are_refused() -> None:
    network = tiny_unet()
    names = [name for name, _ in attention_blocks(network)][1:]
    restore_int8_attention(network, names)
    assert int8_attention_blocks(network) == names
    assert int8_attention_blocks(copy.deepcopy(network)) == names
    with pytest.raises(QuantempoError, match="no_such"):
        restore_int8_attention(network, ["no_such"])


def packed() -> nn.Module:
    x = draw(2, 3, 16, 16)
    return quantize_network(tiny_unet(), [(x, 500), (x, 20)])


def test_engines_run_it_or_say_that_they_cannot() -> None:
    network = packed()
    names = [name for name, _ in attention_blocks(network)][:1]
    restore_int8_attention(network, names)
    with pytest.raises(QuantempoError, match="cannot run 8-bit attention"):
        attach(network, "openvino")
    assert choose("cpu", network).name in ("onednn", "simulated")
    attach(network, "simulated")
    with torch.no_grad():
        expected = network(draw(2, 3, 16, 16), 500).sample
    if onednn.missing() is None:
        attach(network, "onednn")
        table = execution(network)
        fused = "onednn, fused" if fused_cpu.missing() is None else "onednn"
        assert table[f"{names[0]}.to_q"] == "onednn"
        others = [key for key in table if key.endswith("to_q") and not key.startswith(names[0])]
        assert {table[key] for key in others} == {fused}
        with torch.no_grad():
            ours = network(draw(2, 3, 16, 16), 500).sample
        # Codes move by one where bfloat16 or the order of sums differs.
        assert float((ours - expected).norm() / expected.norm()) < 0.05


def test_a_fused_block_is_not_watched() -> None:
    if onednn.missing() is not None or fused_cpu.missing() is not None:
        pytest.skip("no fused kernels")
    network = packed()
    attach(network, "onednn")
    with pytest.raises(QuantempoError, match="is fused; detach"):
        install_int8_attention(network, unet_calls(network, 1))


def test_it_compiles_whole() -> None:
    # A cosine near 1 says nothing of a graph: compare with the eager result.
    q, k, v = (draw(1, 2, 12, 8, seed=s) for s in range(3))
    compiled = torch.compile(int8_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), int8_attention(q, k, v))
