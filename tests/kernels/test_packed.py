"""Products of our own: those of oneDNN bit for bit, of int8 and of 4 bits unpacked anew."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.core import channels_last
from quantempo.kernels.cpu import fused, onednn
from quantempo.kernels.cpu.packed import Packed
from quantempo.kernels.cpu.product import Product
from quantempo.quantized import QConv2d, QLayer
from tests.engines.quantized import make_conv, make_linear

pytestmark = pytest.mark.skipif(
    onednn.missing() is not None or fused.load() is None,
    reason=str(onednn.missing() or fused.missing()),
)
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
    for first, inputs in ((0, channels), (8, channels - 8), (3, channels - 4), (0, 1)):
        if first + inputs > channels or inputs < 1:
            continue
        rows = channels_last(made.weight_codes[:, first : first + inputs])
        rows = F.pad(rows, (0, -inputs % 4, 0, 0, 0, -out % 64))
        wanted = rows.unflatten(2, (-1, 4)).unflatten(0, (-1, 64)).permute(0, 2, 3, 1, 4)
        found = torch.full_like(wanted, 99, memory_format=torch.contiguous_format)
        packed(made, first, inputs).write(found.data_ptr())
        assert torch.equal(found, wanted), (first, inputs)


def run(weight: Tensor | Packed, of: QLayer, zero: int, own: bool = True, **how) -> Tensor:
    """Return the product of a weight with codes, ours or oneDNN's."""
    g, wide = torch.Generator().manual_seed(0), of.weight_shape[1]
    image = isinstance(of, QConv2d)
    x = torch.randint(0, 256, (2, wide, 7, 6) if image else (9, wide), generator=g).byte()
    geometry = (of.stride, of.padding, of.dilation) if isinstance(of, QConv2d) else ()
    kind: type = Product if own else onednn.Int8Conv2d if image else onednn.Int8Linear
    kernel = (of.kernel_size,) if own and isinstance(of, QConv2d) else ()
    return kind(weight, of.weight_scale, *kernel, *geometry)(x, 0.02, zero, of.bias, **how)


@pytest.mark.parametrize("zero", [0, 93])
@pytest.mark.parametrize(("channels", "out", "kernel"), LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_onednn(channels: int, out: int, kernel: int, zero: int, dtype):
    made = layer(channels, out, kernel)
    wanted = run(made.weight_codes, made, zero, own=False, dtype=dtype)
    for weight in (made.weight_codes, packed(made, 0, channels)):
        assert torch.equal(run(weight, made, zero, dtype=dtype), wanted)
    for name in () if kernel else ("add", "into"):
        other = torch.randn(9, out, generator=torch.Generator().manual_seed(1)).to(dtype)
        y, wanted = (
            run(made.weight_codes, made, zero, own, dtype=dtype, **{name: other.clone()})
            for own in (True, False)
        )
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("dilation", [(1, 1), (1, 2)])
def test_windows_are_those_of_onednn(stride, padding, dilation):
    made = make_conv(20, 48, (3, 2), stride=stride, padding=padding, dilation=dilation)
    for zero in (0, 255):
        y = run(made.weight_codes, made, zero)
        assert torch.equal(y, run(made.weight_codes, made, zero, own=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 32])
def test_sums_behind_a_convolution_are_rounded_one_by_one(dtype, channels):
    made, library = make_conv(12, channels), fused.load()
    edge, other = (
        torch.randn(s, generator=torch.Generator().manual_seed(2))
        for s in ((16, channels), (2, channels, 7, 6))
    )
    other = other.to(dtype).contiguous(memory_format=torch.channels_last)
    y = run(made.weight_codes, made, 0, own=False, dtype=dtype)
    assert library is not None
    library.add(y, other, edge)
    assert torch.equal(run(made.weight_codes, made, 0, dtype=dtype, add=other, edge=edge), y)
    with pytest.raises(ValueError, match="strides"):
        run(made.weight_codes, made, 0, dtype=dtype, add=other.contiguous())


def test_all_layers_share_one_buffer_a_thread() -> None:
    layers = [layer(64, 48, 0), layer(40, 80, 0), layer(128, 64, 0)]
    wanted = [run(made.weight_codes, made, 7) for made in layers]
    weights = [packed(made, 0, made.weight_shape[1]) for made in layers]
    # The largest first: from there on the buffer stays.
    assert len({weight.unpacked() for weight in weights[::-1]}) == 1

    def often(i: int) -> bool:
        return all(torch.equal(run(weights[i], layers[i], 7), wanted[i]) for _ in range(20))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(often, [0, 1, 2] * 4))
