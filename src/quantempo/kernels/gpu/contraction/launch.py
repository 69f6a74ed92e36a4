"""Launch `ops.qconv2d` and `ops.qgemm`: which kernel, tile, descriptors, grid, workspace."""

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from quantempo.kernels.gpu.contraction.portable import contract
from quantempo.kernels.gpu.contraction.records import Block
from quantempo.kernels.gpu.contraction.tiles import (
    Problem,
    Tile,
    choose_tile,
    multiprocessors,
    tile_pixels,
)
from quantempo.kernels.gpu.dependent_launch import early
from quantempo.kernels.layout import groups_of, unpack
from quantempo.kernels.ops.epilogue import Epilogue, is_half
from quantempo.kernels.ops.qconv2d import Convolution, Window
from quantempo.kernels.ops.qgemm import Product

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from quantempo.kernels.gpu.contraction.hopper import contract_hopper
except ImportError:  # a Triton without Gluon, or with another one: the portable kernel runs
    contract_hopper = None

__all__ = ["PATHS", "choose_path", "launch", "reserve", "run", "stream_counters"]

# "hopper": `hopper.contract_hopper`; "pointers": `portable.contract`, on any GPU with int8 tensor
# cores.
PATHS = ("hopper", "pointers")

# Tiles whose sums are shared, at most: a GPU has a few hundred processors, and only then they are.
_MOST = 1 << 12
# Streams that have counters of their own (more than torch hands out of a device), the first set
# being that of all recorded graphs.
_STREAMS = 256
_counters: dict[torch.device, Tensor] = {}
_sets: dict[torch.device, dict[int, int]] = {}
_lock = threading.Lock()


def reserve(device: torch.device) -> None:
    """Make the counters of a device, once; before anything is recorded, whose memory is its own."""
    if device not in _counters:
        recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if recording:
            raise RuntimeError("the first call is being recorded; make one call before that")
        _counters[device] = torch.zeros((_STREAMS, _MOST), dtype=torch.int32, device=device)


@functools.cache
def choose_path(device: torch.device) -> str:
    """Return the path for a device: that of Hopper where it can run, else pointers."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "pointers"
    return "pointers" if contract_hopper is None else "hopper"


def stream_counters(device: torch.device) -> Tensor:
    """Return the zeroed counters (4096,), int32, of the current stream, which launches leave zero.

    Each stream has its own counters, since its launches follow each other, and all recorded graphs
    share another set: graphs must not be replayed on two streams at once, nor fork into branches.
    """
    reserve(device)
    chosen = 0
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        stream = torch.cuda.current_stream(device).cuda_stream
        with _lock:
            sets = _sets.setdefault(device, {})
            chosen = sets.setdefault(stream, len(sets) + 1)
        if chosen >= _STREAMS:
            raise RuntimeError(f"got work on {chosen} streams; expected {_STREAMS - 1} at most")
    return _counters[device][chosen]


def _workspace(tiles: int, slots: int, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return room for the sums that are shared, and counters for `tiles` tiles."""
    if tiles > _MOST:
        raise ValueError(f"got {tiles} tiles to be shared; expected {_MOST} at most, do not split")
    size = tiles * slots * tile.outs * tile.pixels
    return torch.empty(size, dtype=torch.int32, device=device), stream_counters(device)


def _describe(base: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    kind = getattr(gl, str(base.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return TensorDescriptor(base, shape, strides, block, layout)


def _image(
    x: Tensor, size: tuple[int, ...], stride: int, box: tuple[int, ...], channels: int
) -> Any:
    """Describe (N, C, H, W) channels_last as (N, H / s, s, W / s, s C), in boxes of one tap."""
    n, c, h, w = size
    s = stride
    shape = [n, h // s, s, w // s, s * c]
    strides = [h * w * c, s * w * c, w * c, s * c, 1]
    return _describe(x, shape, strides, [box[0], box[1], 1, box[2], channels])


def _rows(weight: Tensor, outs: int, channels: int) -> Any:
    """Describe weights (O, ...) as (O, K), in boxes (outs, channels)."""
    width = weight.numel() // weight.shape[0]
    return _describe(weight, [weight.shape[0], width], [weight.stride(0), 1], [outs, channels])


def _packed(weight: Tensor, outs: int, channels: int, per: int) -> tuple[Any, Any]:
    """Describe the codes and the groups of `layout.pack`, in boxes (outs, channels)."""
    high, row, blocks = weight.shape[0] // 16, 16 * weight.shape[1], weight.shape[1] // (32 + per)
    shape, strides = [high, 16, 32 * blocks], [row, 32 * blocks, 1]
    codes = _describe(weight, shape, strides, [outs // 16, 16, channels // 2])
    # From where the codes of the first 16 rows end.
    behind = weight.view(-1)[16 * 32 * blocks :]
    shape, strides = [high, blocks, per, 16], [row, 16 * per, 16, 1]
    return codes, _describe(behind, shape, strides, [outs // 16, channels // 64, per, 16])


def _half_tiles(
    residual: Tensor | None, size: tuple[int, ...], tile: Tile, box: tuple[int, int, int]
) -> Any:
    """Return the descriptor of a residual that is loaded like operands are, None if it is not.

    It takes the place of one step, so a tile of it must be as large: 128 x 128 values of two bytes.
    """
    whole = (tile.outs, tile.pixels, tile.channels, tile.splits) == (128, 128, 128, 1)
    if residual is None or not whole or residual.element_size() != 2:
        return None
    if residual.data_ptr() % 16 or size[1] % 8:
        return None
    n, h, w = box
    half = (n // 2, h, w) if n > 1 else (n, h // 2, w) if h > 1 else (n, h, w // 2)
    return _image(residual, size, 1, half, tile.outs)


def _parity(size: Sequence[int], sides: Sequence[Tensor]) -> bool:
    """Return whether an image can be seen as pairs of rows and columns, in boxes of a pair each."""
    _, channels, height, width = size
    return height % 2 == 0 and width % 2 == 0 and channels % (128 if sides else 64) == 0


def launch(call: Convolution | Product) -> Tensor:
    """Return y of a call, which was checked; rows (M, K) are an image (1, K, 1, M)."""
    operands = call.codes, call.weight, call.empty(), call.epilogue
    if isinstance(call, Convolution):
        sides = call.side_codes, call.side_weights
        return run(*operands, call.codes.shape, call.shape, call.window, *sides)
    (count, width), (_, features) = call.codes.shape, call.shape
    images = [side.t()[None, :, None] for side in call.side_codes]
    size, out_size = (1, width, 1, count), (1, features, 1, count)
    return run(*operands, size, out_size, Window(), images, call.side_weights)


def run(
    codes: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue, size: tuple[int, ...],
    out_size: tuple[int, ...], window: Window = Window(), side_codes: Sequence[Tensor] = (),  # noqa: B008
    side_weights: Sequence[Tensor] = (), *, tile: Tile | None = None, path: str | None = None,
) -> Tensor:  # fmt: skip
    """Contract images into y and return it; operands and window as in `ops.qconv2d`.

    size: (N, C, H, W) of the codes; out_size: of y, of which gates leave half the channels.
    """
    if y.numel() == 0:
        return y
    images, channels, in_h, in_w = size
    out_h, out_w = out_size[2:]
    outs, terms, count = weight.shape[0], epilogue.terms, images * out_h * out_w
    half, gated, stride = is_half(side_codes), epilogue.gated, window.STRIDE
    form = epilogue.form(count, half)
    odd = stride == 2 and not _parity(size, side_codes)
    path = "pointers" if odd else path or choose_path(codes.device)
    across = (in_h, in_w) if window.UPSAMPLE else (out_h, out_w)
    if half and path == "hopper":
        # Loaded as bytes, like any other operand.
        image = side_codes[-1].permute(0, 2, 3, 1).view(torch.int8).permute(0, 3, 1, 2)
        side_codes = [*side_codes[:-1], image]
        side_weights = [*side_weights[:-1], side_weights[-1].view(torch.int8)]
    widths = tuple(side.shape[1] for side in side_codes)
    phases = 4 if window.UPSAMPLE else 1
    tile = tile or choose_tile(
        Problem(
            images, *across, phases, outs, channels, window.KERNEL, stride,
            widths[: len(widths) - half], terms.residual is not None, gated, half and widths[-1],
        ),
        path, multiprocessors(codes.device),
    )  # fmt: skip
    box = tile_pixels(tile.pixels, images, *across, tile.taps)
    tiles = triton.cdiv(images, box[0]) * triton.cdiv(across[0], box[1]) * phases
    tiles *= triton.cdiv(across[1], box[2]) * triton.cdiv(outs, tile.outs)
    slots = tile.splits + len(widths) if tile.splits > 1 else 1
    partial = counters = None
    if tile.splits > 1:
        partial, counters = _workspace(tiles, slots, tile, codes.device)
    operands: list[Any] = [codes, weight]
    for pair in zip(side_codes, side_weights, strict=True):
        operands += pair
    sizes = zip(operands[1::2], (window.KERNEL**2, 1, 1), (channels, *widths), strict=False)
    pers = [0] if path == "pointers" else [groups_of(*size) for size in sizes]
    pers += pers[:1] * (3 - len(pers))
    block = Block(*box, tile.outs, tile.channels, tile.stages, tile.splits, tile.taps, *pers)
    numbers = (
        images, in_h, in_w, out_h, out_w, channels, *(*widths, 0, 0)[:2], outs,
        count // terms.bucket.numel(), 0 if terms.shift is None else terms.shift.stride(0),
        epilogue.out_zero, epilogue.out_qmax,
    )  # fmt: skip
    gate, gates = terms.gate, (0, 1)
    if gate is not None:
        gates = gate.stride(0), count // gate.shape[0]
    if path == "pointers":
        operands[1::2] = [unpack(*size) for size in sizes]
        apart = [w.stride(0) for w in operands[1::2]]
        contract[(tiles, slots)](
            *operands, *[None] * (6 - len(operands)), y, partial, counters, terms, *numbers,
            *gates, *[*apart, 0, 0][:3], form, window, block, num_warps=tile.warps,
            num_stages=tile.stages,
        )  # fmt: skip
        return y
    _check_hopper(size, out_size, window, tile, box)
    groups: list[Any] = [None] * 3
    for i in range(0, len(operands), 2):
        shape, by = (size, stride) if i == 0 else (side_codes[i // 2 - 1].shape, 1)
        part = (1, 1, box[2]) if tile.taps else box
        operands[i] = _image(operands[i], shape, by, part, tile.channels)
        # Values and gates are two boxes, half as high.
        rows = tile.outs // 2 if gated else tile.outs
        given, per = (operands[i + 1], rows, tile.channels), pers[i // 2]
        operands[i + 1], groups[i // 2] = _packed(*given, per) if per else (_rows(*given), None)
    plain = not window.UPSAMPLE and y.dtype != torch.int32
    residual = _half_tiles(terms.residual, out_size, tile, box) if plain else None
    programs = min(tiles, tile.programs * multiprocessors(codes.device))
    soon = early(codes.device)
    # So many programs have room on a multiprocessor with so many registers a thread. The producer
    # warp counts as four, which give what they do not need to the others.
    room = 65536 // (tile.programs * (tile.warps + 4) * 32) // 8 * 8
    contract_hopper[(tiles if tile.splits > 1 else programs, slots)](
        *operands, *[None] * (6 - len(operands)), *groups, residual, y, partial, counters, terms,
        *numbers, tiles, *gates, form, window, block, EARLY=soon, num_warps=tile.warps,
        launch_pdl=soon, maxnreg=min(room, 168),
    )  # fmt: skip
    return y


def _check_hopper(
    size: tuple[int, ...], out_size: tuple[int, ...], window: Window, tile: Tile,
    box: tuple[int, int, int],
) -> None:  # fmt: skip
    """Raise ValueError for what the kernel of Hopper cannot index."""
    if window.STRIDE == 2 and size[1] % tile.channels:
        text = f"got a tile of {tile.channels} channels for {size[1]} with stride 2; expected a"
        raise ValueError(f"{text} divisor: a box must not reach the next pixel of a pair")
    _, outs, out_h, out_w = out_size
    apart = 2 if window.UPSAMPLE else 1
    reach = (box[0] - 1) * out_h + (box[1] - 1) * apart
    if (reach * out_w + (box[2] - 1) * apart + 1) * outs >= 2**31:
        text = f"got a tile of {box[0]} images of {out_h} x {out_w} x {outs}"
        raise ValueError(f"{text}; expected fewer than 2^31 values from its first to its last")
