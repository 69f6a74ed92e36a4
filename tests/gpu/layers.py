"""The layers that the contraction is tuned for, as tensors and as calls of `launch.run`.

`LAYERS` are those of a CIFAR-10 diffusion network (batch 1, 16, 256) and of Stable Diffusion 1.5
(batch 2, 8: both halves of classifier-free guidance, one and four images), few of a smaller one.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from quantempo.kernels import layout
from quantempo.kernels.gpu.contraction.tiles import Problem, Tile, choose_tile
from quantempo.kernels.ops.epilogue import GATED, Epilogue, Terms
from quantempo.kernels.ops.qconv2d import Window

LAST = torch.channels_last
PROCESSORS = {80: 108, 89: 128, 90: 132}  # multiprocessors of an A100, an RTX 4090, an H100
ZERO_POINT = 37


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution, or with kernel 0 a linear layer of `images` rows."""

    images: int
    channels: int
    size: int
    outs: int
    kernel: int = 3
    stride: int = 1
    upsample: bool = False
    sides: tuple[int, ...] = ()
    mixed: bool = False
    requantize: bool = False
    activation: str = "none"
    rows: bool = False
    gates: int = 0
    half: int = 0  # channels of a side of float16
    group: int = 0  # of packed 4-bit weights, which are 0 here

    @property
    def gated(self) -> bool:
        return self.activation in GATED

    @property
    def out_size(self) -> int:
        return 2 * self.size if self.upsample else self.size // self.stride

    def problem(self) -> Problem:
        """Return what `choose_tile` is asked, as `launch.run` puts it."""
        if self.kernel == 0:
            size = (1, 1, self.images, 1, self.outs, self.channels, 1, 1, self.sides)
            return Problem(*size, not self.gated, self.gated, 2 * self.half)
        across = self.size if self.upsample else self.out_size
        phases = 4 if self.upsample else 1
        return Problem(
            self.images, across, across, phases, self.outs, self.channels, self.kernel, self.stride,
            self.sides, self.stride == 1 and not self.upsample and not self.sides,
        )  # fmt: skip

    def path(self, path: str) -> str:
        """Return the path that `launch.run` takes when asked for this one."""
        odd = self.stride == 2 and self.channels % 64
        return "pointers" if odd else path


def _cifar(batch: int) -> Iterator[Layer]:
    plain = [
        (128, 32, 128), (128, 16, 256), (256, 16, 256), (256, 8, 256), (256, 4, 256),
        (512, 4, 256), (512, 8, 256), (512, 16, 256), (384, 16, 256), (384, 32, 128),
        (256, 32, 128),
    ]  # fmt: skip
    for channels, size, outs in plain:
        yield Layer(batch, channels, size, outs)
    for channels, size in ((128, 32), (256, 16)):
        yield Layer(batch, channels, size, channels, stride=2)
    for size in (4, 8, 16):
        yield Layer(batch, 256, size, 256, upsample=True)
    yield Layer(batch, 256, 16, 256, sides=(128,))
    for size in (4, 8, 16):
        yield Layer(batch, 256, size, 256, sides=(256, 256))
    for sides in ((256, 128), (128, 128)):
        yield Layer(batch, 128, 32, 128, sides=sides)
    for pixels, outs in ((256, 768), (256, 256), (16, 768)):
        yield Layer(batch * pixels, 256, 1, outs, kernel=0)


def _stable(batch: int) -> Iterator[Layer]:
    plain = [
        (320, 64, 320), (960, 64, 320), (640, 64, 320), (320, 32, 640), (640, 32, 640),
        (1920, 32, 640), (640, 16, 1280), (1280, 16, 1280), (2560, 16, 1280), (1280, 8, 1280),
        (2560, 8, 1280),
    ]  # fmt: skip
    for channels, size, outs in plain:
        yield Layer(batch, channels, size, outs)
    yield Layer(batch, 320, 64, 320, stride=2)
    for channels, size in ((640, 32), (1280, 16), (1280, 8)):
        yield Layer(batch, channels, size, channels, upsample=True)
    joined = [
        (320, 64, (640, 320)), (320, 64, (320, 320)), (640, 32, (320,)), (640, 32, (1280, 640)),
        (1280, 16, (1280, 1280)), (1280, 8, (1280, 1280)),
    ]  # fmt: skip
    for channels, size, sides in joined:
        yield Layer(batch, channels, size, channels, sides=sides)
    for channels, rows in ((320, 4096), (640, 1024), (1280, 256)):
        for inner, outs in ((1, 1), (1, 3), (4, 1)):
            yield Layer(batch * rows, inner * channels, 1, outs * channels, kernel=0)
        how: dict[str, Any] = {"kernel": 0, "activation": "geglu", "requantize": True}
        yield Layer(batch * rows, channels, 1, 8 * channels, **how)
        yield Layer(batch * 77, 768, 1, channels, kernel=0)


def _small(batch: int) -> Iterator[Layer]:
    """Yield layers of 192 channels, steps of 64, of a small Stable Diffusion."""
    yield Layer(batch, 192, 8, 192)
    yield Layer(batch, 192, 8, 192, upsample=True)
    yield Layer(batch, 192, 8, 192, stride=2)
    yield Layer(batch * 64, 192, 1, 1536, kernel=0, activation="geglu", requantize=True)


LAYERS = tuple(
    layer
    for layers, batches in ((_cifar, (1, 16, 256)), (_stable, (2, 8)), (_small, (512,)))
    for batch in batches
    for layer in layers(batch)
)


def mode(layer: Layer) -> tuple[Any, ...]:
    return layer.stride, layer.upsample, len(layer.sides), layer.gated


def ways(path: str, arch: int) -> list[tuple[Layer, Tile]]:
    """Return a layer of LAYERS for each way in which `choose_tile` has one run, sizes aside.

    A way: tile, stride, upsampling, number of sides, gates. Of ways that differ in `splits` alone
    those with 1 and with most remain, and of linear layers and convolutions the latter, which do
    more.
    """
    found: dict[tuple[Any, ...], tuple[Layer, Tile]] = {}
    for layer in LAYERS:
        if layer.path(path) != path:
            continue
        tile = choose_tile(layer.problem(), path, PROCESSORS[arch])
        key = (dataclasses.replace(tile, splits=min(tile.splits, 2)), *mode(layer))
        known = found.get(key)
        if known is None or (known[0].kernel, known[1].splits) < (layer.kernel, tile.splits):
            found[key] = layer, tile
    return list(found.values())


def covering(path: str, arch: int) -> list[tuple[Layer, Tile]]:
    """Return the first of `ways` that together have every tile and every mode, split and not."""
    seen: set[tuple[Any, ...]] = set()
    kept = []
    for layer, tile in ways(path, arch):
        whole = dataclasses.replace(tile, splits=1)
        new = {("tile", whole), ("mode", *mode(layer), tile.splits > 1)} - seen
        if new:
            kept.append((layer, tile))
            seen |= new
    return kept


def _image(rows: Tensor) -> Tensor:
    """(M, C) seen as an image (1, C, 1, M), channels_last, as `qgemm` does."""
    return rows.as_strided(
        (1, rows.shape[1], 1, rows.shape[0]), (rows.numel(), 1, rows.numel(), rows.shape[1])
    )


def tensors(layer: Layer, device: str = "meta", seed: int = 0) -> dict[str, Any]:
    """Return the arguments of `launch.run` but y, tile and path; values unless device is meta.

    With all of bias, shift, residual that can stand beside each other: more than a network asks of
    any layer, so what holds for these binaries holds for less.
    """
    g = None if device == "meta" else torch.Generator(device).manual_seed(seed)
    linear, kernel, outs = layer.kernel == 0, max(layer.kernel, 1), layer.outs
    n = 1 if linear else layer.images

    def integers(*shape: int) -> Tensor:
        return torch.randint(-128, 128, shape, device=device, dtype=torch.int8, generator=g)

    def floats(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.rand(shape, device=device, generator=g) * spread + 0.01 * spread

    def image(size: int, channels: int) -> Tensor:
        if linear:
            return _image(integers(layer.images, channels))
        return integers(n, size, size, channels).permute(0, 3, 1, 2)

    buckets = n if layer.mixed else 0
    known: dict[str, Any] = {
        "codes": image(layer.size, layer.channels),
        "weight": integers(outs, kernel**2, layer.channels),
        "act_scale": floats(layer.images if layer.rows else 8, spread=0.01), "rows": layer.rows,
        "weight_scale": floats(outs, spread=0.01),
        "table": torch.zeros(16, outs, device=device, dtype=torch.int32),
        "bucket": torch.zeros((buckets,) if buckets else (), device=device, dtype=torch.int64),
        "bias": floats(outs), "kernel": kernel, "stride": layer.stride,
        "border": (0, 0) if layer.stride == 2 or kernel == 1 else (1, 1),
        "upsample": layer.upsample,
    }  # fmt: skip
    if layer.sides:
        count = len(layer.sides)
        known |= {
            "side_codes": [image(layer.out_size, side) for side in layer.sides],
            "side_weights": [integers(outs, side) for side in layer.sides],
            "side_scales": floats(count, layer.images if layer.rows else 8, spread=0.01),
            "side_weight_scale": floats(outs, spread=0.01),
            "side_table": torch.zeros(count, outs, device=device, dtype=torch.int32),
        }
    if layer.half:
        side, weight = _image(floats(layer.images, layer.half).half()), floats(outs, layer.half)
        known["side_codes"] = [*known.get("side_codes", []), side]
        known["side_weights"] = [*known.get("side_weights", []), weight.half()]
    if linear and not layer.gated:
        known["residual"] = _image(floats(layer.images, outs).half())
    elif not linear and layer.stride == 1 and not layer.upsample and not layer.sides:
        size = layer.out_size
        known["shift"] = floats(n, outs)
        known["residual"] = floats(n, size, size, outs).half().permute(0, 3, 1, 2)
    if layer.gates:
        known["gate"] = floats(layer.gates, 6 * outs).bfloat16()[:, outs : 2 * outs]
    if layer.activation != "none":
        known["activation"] = layer.activation
    if layer.requantize:
        known |= {"out_scale": floats(8), "out_zero": 70, "out_qmax": 255}
    return _packed(layer.group, known) if layer.group else known


def _packed(group: int, known: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with packed weights; that of a second side stays int8."""

    def zeros(weight: Tensor) -> Tensor:
        outs, *taps, channels = weight.shape
        width = layout.packed_width(math.prod(taps), channels, 64 // min(group, 32))
        return torch.zeros(outs, width, device=weight.device, dtype=torch.uint8)

    known["weight"] = zeros(known["weight"])
    if "side_weights" in known:
        known["side_weights"][0] = zeros(known["side_weights"][0])
    return known


def call(
    launch: ModuleType, layer: Layer, known: dict[str, Any], path: str, tile: Tile | None,
    dtype: torch.dtype = torch.float16,
) -> Tensor:  # fmt: skip
    """Return y of `launch.run`; int32: the sums alone, without the sides."""
    codes, outs = known["codes"], layer.outs
    if layer.gated and dtype != torch.int32:
        outs //= 2
    kind = codes.dtype if layer.requantize and dtype != torch.int32 else dtype
    if layer.kernel == 0:
        y = _image(torch.empty(layer.images, outs, device=codes.device, dtype=kind))
    else:
        shape = (layer.images, layer.out_size, layer.out_size, outs)
        y = torch.empty(shape, device=codes.device, dtype=kind).permute(0, 3, 1, 2)
    rest = {name: value for name, value in known.items() if name not in ("codes", "weight")}
    if dtype == torch.int32:
        keep = ("act_scale", "weight_scale", "table", "bucket", "kernel", "stride", "border")
        rest = {name: rest[name] for name in (*keep, "upsample")}
    return launch.run(
        **contraction(codes=codes, weight=known["weight"], y=y, **rest), tile=tile, path=path
    )


def contraction(
    *, codes: Tensor, weight: Tensor, y: Tensor, kernel: int, stride: int, upsample: bool,
    border: tuple[int, int], activation: str = "none", out_zero: int = 0, out_qmax: int = 255,
    rows: bool = False, side_codes: Sequence[Tensor] = (), side_weights: Sequence[Tensor] = (),
    **terms: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of `launch.run`; border: (top, left)."""
    size = (*y.shape[:1], weight.shape[0], *y.shape[2:])
    return {
        "codes": codes, "weight": weight, "y": y, "size": codes.shape, "out_size": size,
        "epilogue": Epilogue(Terms(**terms), activation, y.dtype, out_zero, out_qmax, rows),
        "window": Window(kernel, stride, *border, upsample), "side_codes": side_codes,
        "side_weights": side_weights,
    }  # fmt: skip


def expected_sums(layer: Layer, known: dict[str, Any], zero_point: int = ZERO_POINT) -> Tensor:
    """Return the integers of `call(..., dtype=int32)`, int64, and set known["table"] for them.

    Float64 holds every sum exactly, whatever the order in which a device adds.
    """
    kernel, outs = known["kernel"], layer.outs
    weight = known["weight"].reshape(outs, kernel, kernel, layer.channels).permute(0, 3, 1, 2)
    known["table"] = layout.border_table(weight.cpu(), zero_point).to(weight.device)
    x = known["codes"].double() - (zero_point - layout.OFFSET)
    if layer.upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    if kernel == 3:
        # Strides of 2 pad below and on the right alone.
        x = F.pad(x, (0, 1, 0, 1) if layer.stride == 2 else (1, 1, 1, 1))
    n, _, height, width = x.shape
    rows, columns = ((size - kernel) // layer.stride + 1 for size in (height, width))
    total = torch.zeros(n, rows, columns, outs, dtype=torch.float64, device=x.device)
    for i in range(kernel):
        for j in range(kernel):
            seen = x[:, :, i :: layer.stride, j :: layer.stride][:, :, :rows, :columns]
            total += seen.permute(0, 2, 3, 1) @ weight[:, :, i, j].double().T
    return total.permute(0, 3, 1, 2).long()


def expected(known: dict[str, Any], sums: Tensor) -> Tensor:
    """Return y before it is cast, float64, from the sums of `expected_sums`; not quantized."""
    column = (-1, 1, 1)
    y = sums.double() * known["act_scale"][0].double() * known["weight_scale"].double().view(column)
    for i, (codes, weight) in enumerate(
        zip(known.get("side_codes", ()), known.get("side_weights", ()), strict=True)
    ):
        part = (codes.permute(0, 2, 3, 1).double() @ weight.double().T).permute(0, 3, 1, 2)
        factor = known["side_weight_scale"].double().view(column)
        y += part * factor * known["side_scales"][i, 0].double()
    y += known["bias"].double().view(column)
    if known.get("activation") == "geglu":
        value, gate = y.chunk(2, 1)
        return value * F.gelu(gate)
    if "shift" in known:
        y += known["shift"].double()[:, :, None, None]
    return y + known["residual"].double() if "residual" in known else y
