"""Weights of 4 bits for oneDNN: the bytes that it makes itself, in one buffer, at every call."""

import gc
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import channels_last
from quantempo.kernels.cpu import fused, onednn
from quantempo.kernels.cpu.packed import Packed, missing
from quantempo.quantized import QConv2d, QLayer
from tests.engines.quantized import make_conv, make_linear

pytestmark = pytest.mark.skipif(
    onednn.missing() is not None or fused.load() is None,
    reason=str(onednn.missing() or fused.missing()),
)
# CPUs with AVX-512 and VNNI: those whose order of weights is known.
KNOWN = onednn.has("avx512_vnni")

LAYERS = [(17, 5, 3), (40, 70, 3), (33, 64, 1), (96, 128, 3), (130, 33, 1)]
LAYERS += [(64, 16, 0), (65, 77, 0)]


def layer(channels: int, out: int, kernel: int, group: int = 16) -> QLayer:
    """Return a layer of random grids; kernel 0: linear."""
    bits = (4, 8, group)
    if not kernel:
        return make_linear(channels, out, bits=bits)
    return make_conv(channels, out, (kernel, kernel), padding=(kernel // 2,) * 2, bits=bits)


def packed(of: QLayer, first: int, inputs: int) -> Packed:
    """Return some input channels of a layer's weight."""
    assert of.weight_group is not None
    given = (of.weight_int, of.weight_group, of.weight_format.group, first, inputs)  # type: ignore[attr-defined]
    return Packed(*given, lambda: of.weight_codes[:, first : first + inputs].contiguous())


@pytest.mark.parametrize(("channels", "out", "kernel"), LAYERS)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_bytes_are_those_of_the_definition(channels: int, out: int, kernel: int, group: int):
    made = layer(channels, out, kernel, group)
    assert made.weight_group is not None
    for (first, inputs), block in itertools.product(
        ((0, channels), (8, channels - 8), (3, channels - 4), (0, 1)), (16, 48, 64)
    ):
        if first + inputs > channels or inputs < 1:
            continue
        for depth in (-(-inputs // 4) * 4, -(-inputs // 32) * 32):
            rows = channels_last(made.weight_codes[:, first : first + inputs])
            rows = F.pad(rows, (0, depth - inputs, 0, 0, 0, -out % block))
            wanted = rows.unflatten(2, (-1, 4)).unflatten(0, (-1, block)).permute(0, 2, 3, 1, 4)
            found = torch.full_like(wanted, 99, memory_format=torch.contiguous_format)
            to = found.data_ptr()
            given = (made.weight_int, made.weight_group, group, first, inputs)
            Packed(*given, lambda: made.weight_codes).write(block, depth, to)
            assert torch.equal(found, wanted), (first, inputs, block, depth)


def run(weight: Tensor | Packed, of: QLayer, zero: int) -> tuple[Tensor, onednn.Int8Linear]:
    """Return the product of an operator with a weight, and the operator."""
    g, wide = torch.Generator().manual_seed(0), of.weight_shape[1]
    kind: type = onednn.Int8Conv2d if isinstance(of, QConv2d) else onednn.Int8Linear
    shape = (2, wide, 7, 6) if isinstance(of, QConv2d) else (9, wide)
    how = (of.stride, of.padding) if isinstance(of, QConv2d) else ()
    operator = kind(weight, of.weight_scale, *how)
    x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    operator(x, 0.02, zero, of.bias)
    return operator(x, 0.02, zero, of.bias), operator


@pytest.mark.parametrize("zero", [0, 93])
@pytest.mark.parametrize(("channels", "out", "kernel"), LAYERS)
def test_products_are_those_of_the_unpacked_weight(
    channels: int, out: int, kernel: int, zero: int, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    made = layer(channels, out, kernel)
    wanted, _ = run(made.weight_codes, made, zero)
    weight = packed(made, 0, channels)
    with caplog.at_level(logging.WARNING):
        found, _ = run(weight, made, zero)
        assert torch.equal(found, wanted)
        if KNOWN:
            assert not caplog.records
        # Without compiled kernels it is held as bytes, and that is said, once.
        onednn._say_unpacked.cache_clear()
        monkeypatch.setattr(fused, "load", lambda: None)
        monkeypatch.setattr(fused, "missing", lambda: "no compiler")
        for _ in range(2):
            assert torch.equal(run(weight, made, zero)[0], wanted)
    if KNOWN:
        said = ["weights of 4 bits are held as bytes: no compiler"]
        assert [record.message for record in caplog.records] == said


@pytest.mark.skipif(not KNOWN, reason="the order of weights is not known on this CPU")
def test_all_layers_share_one_buffer_a_thread() -> None:
    layers = [layer(64, 48, 0), layer(40, 80, 0), layer(128, 64, 0)]
    wanted = [run(made.weight_codes, made, 7)[0] for made in layers]
    results = [run(packed(m, 0, m.weight_shape[1]), m, 7) for m in layers]
    assert missing() is None
    # The last is the largest: from here on the buffer stays.
    places = {torch.ops.mkldnn.data_ptr(o._packed()) for _, o in results}
    assert len(places) == 1 and all(o._packed().is_mkldnn for _, o in results)

    def alive() -> int:
        gc.collect()
        return sum(type(o) is Tensor and o.is_mkldnn for o in gc.get_objects())

    before = alive()
    for _ in range(5):
        results[0][1](torch.zeros(9, 64, dtype=torch.uint8), 0.02, 7, None)
    assert alive() == before

    def often(i: int) -> bool:
        weight = packed(layers[i], 0, layers[i].weight_shape[1])
        return all(torch.equal(run(weight, layers[i], 7)[0], wanted[i]) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(often, [0, 1, 2] * 4))
