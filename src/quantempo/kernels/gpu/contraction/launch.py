"""Call the contraction: which kernel, which tile, descriptors, grid, workspace."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from quantempo.kernels.gpu.contraction.portable import contract
from quantempo.kernels.gpu.contraction.tiles import (
    Problem,
    Tile,
    choose_tile,
    multiprocessors,
    tile_pixels,
)
from quantempo.kernels.gpu.dependent_launch import early

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    from quantempo.kernels.gpu.contraction.hopper import contract_hopper
except ImportError:  # a Triton without Gluon, or with another one: the portable kernel runs
    contract_hopper = None

__all__ = ["PATHS", "choose_path", "reserve", "run", "stream_counters"]

# "hopper": `hopper.contract_hopper`; "pointers": `portable.contract`, on any GPU with int8 tensor
# cores.
PATHS = ("hopper", "pointers")

_GLUON = {torch.int8: "int8", torch.float16: "float16", torch.bfloat16: "bfloat16"}
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


def _image(codes: Tensor, stride: int, box: tuple[int, int, int], channels: int) -> tuple[Any, ...]:
    """(N, C, H, W) channels_last seen as (N, H / s, s, W / s, s C), in boxes of one tap."""
    n, c, h, w = codes.shape
    s = stride
    shape = [n, h // s, s, w // s, s * c]
    strides = [h * w * c, s * w * c, w * c, s * c, 1]
    return codes, shape, strides, [box[0], box[1], 1, box[2], channels]


def _rows(weight: Tensor, outs: int, channels: int) -> tuple[Any, ...]:
    """Weights (O, ...) seen as (O, K), in boxes (outs, channels)."""
    width = weight.numel() // weight.shape[0]
    return weight, [weight.shape[0], width], [width, 1], [outs, channels]


def _describe(parts: tuple[Any, ...]) -> Any:
    base, shape, strides, block = parts
    kind = getattr(gl, _GLUON[base.dtype])
    layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    return GluonDescriptor(base, shape, strides, block, layout)


def _half_tiles(residual: Tensor | None, tile: Tile, box: tuple[int, int, int], plain: bool) -> Any:
    """Return the descriptor of a residual that is brought like operands are, None if it is not.

    It takes the place of one step, so a tile of it must be as large: 128 x 128 values of two bytes.
    """
    whole = (tile.outs, tile.pixels, tile.channels, tile.splits) == (128, 128, 128, 1)
    if residual is None or not plain or not whole or residual.element_size() != 2:
        return None
    if residual.data_ptr() % 16 or residual.shape[1] % 8:
        return None
    n, h, w = box
    half = (n // 2, h, w) if n > 1 else (n, h // 2, w) if h > 1 else (n, h, w // 2)
    return _describe(_image(residual, 1, half, tile.outs))


def _workspace(tiles: int, slots: int, tile: Tile, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return room for the sums that are shared, and counters for `tiles` tiles."""
    if tiles > _MOST:
        raise ValueError(f"got {tiles} tiles to be shared; expected {_MOST} at most, do not split")
    size = tiles * slots * tile.outs * tile.pixels
    partial = torch.empty(size, dtype=torch.int32, device=device)
    return partial, stream_counters(device)


def stream_counters(device: torch.device) -> Tensor:
    """Return the zeroed counters (4096,), int32, of the current stream, which launches leave zero.

    Each stream has its own counters, since its launches follow each other, and all recorded graphs
    share another set: graphs must not be replayed on two streams at once, nor fork into branches. A
    norm whose programs meet would wait for ever.
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


def _has_parity(height: int, width: int, channels: int, sides: Sequence[Tensor]) -> bool:
    """Return whether an image can be seen as pairs of rows and columns, in boxes of a pair each."""
    return height % 2 == 0 and width % 2 == 0 and channels % (128 if sides else 64) == 0


def run(
    codes: Tensor, weight: Tensor, y: Tensor, tile: Tile | None = None, *,
    path: str | None = None,
    act_scale: Tensor, weight_scale: Tensor, table: Tensor, bucket: Tensor,
    bias: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
    side_codes: list[Tensor] | tuple[Tensor, ...] = (),
    side_weights: list[Tensor] | tuple[Tensor, ...] = (), side_scales: Tensor | None = None,
    side_weight_scale: Tensor | None = None, side_table: Tensor | None = None,
    kernel: int = 1, stride: int = 1, border: tuple[int, int] = (0, 0), upsample: bool = False,
    activation: str = "none",
    out_scale: Tensor | None = None, out_zero: int = 0, out_qmax: int = 255,
) -> Tensor:  # fmt: skip
    """Contract images (N, C, H, W), channels_last, into y (N, O, H', W').

    Arguments as those of `kernels.ops.qconv2d`; border is (top, left). Tile and path are chosen by
    measured rules unless given.
    """
    images, channels, in_h, in_w = codes.shape
    outs, (out_h, out_w), gated = weight.shape[0], y.shape[2:], activation == "geglu"
    if y.numel() == 0:
        return y
    odd = stride == 2 and not _has_parity(in_h, in_w, channels, side_codes)
    path = "pointers" if odd else path or choose_path(codes.device)
    across = (in_h, in_w) if upsample else (out_h, out_w)
    widths = tuple(side.shape[1] for side in side_codes)
    phases = 4 if upsample else 1
    tile = tile or choose_tile(
        Problem(
            images, *across, phases, outs, channels, kernel, stride, widths, residual is not None,
            gated,
        ),
        path, multiprocessors(codes.device),
    )  # fmt: skip
    if path == "hopper" and stride == 2 and channels % tile.channels:
        raise ValueError(
            f"got a tile of {tile.channels} channels for {channels} with stride 2; expected a "
            "divisor: a box must not reach the next pixel of a pair"
        )
    box = tile_pixels(tile.pixels, images, *across, tile.taps)
    tiles = triton.cdiv(images, box[0]) * triton.cdiv(across[0], box[1]) * phases
    tiles *= triton.cdiv(across[1], box[2]) * triton.cdiv(outs, tile.outs)
    sides = len(side_codes)
    slots = tile.splits + sides if tile.splits > 1 else 1
    partial = counters = None
    if tile.splits > 1:
        partial, counters = _workspace(tiles, slots, tile, codes.device)
    operands: list[Any] = [codes, weight]
    for side, side_weight in zip(side_codes, side_weights, strict=True):
        operands += [side, side_weight]
    if path == "hopper":
        for i in range(0, len(operands), 2):
            by = stride if i == 0 else 1
            part = (1, 1, box[2]) if tile.taps else box
            operands[i] = _describe(_image(operands[i], by, part, tile.channels))
            # Values and gates are two boxes, half as high.
            rows = tile.outs // 2 if gated else tile.outs
            operands[i + 1] = _describe(_rows(operands[i + 1], rows, tile.channels))
    operands += [None] * (6 - len(operands))
    if path == "hopper":
        apart = 2 if upsample else 1
        reach = (box[0] - 1) * out_h + (box[1] - 1) * apart
        if (reach * out_w + (box[2] - 1) * apart + 1) * outs >= 2**31:
            raise ValueError(
                f"got a tile of {box[0]} images of {out_h} x {out_w} x {outs}; expected fewer than "
                "2^31 values from its first to its last"
            )
        plain = not upsample and y.dtype != torch.int32
        operands.append(_half_tiles(residual, tile, box, plain))
    width0, width1 = (*widths, 0, 0)[:2]
    args = (
        *operands, y, partial, counters,
        act_scale, weight_scale, table, bucket, bias, shift, residual,
        side_scales, side_weight_scale, side_table, out_scale,
        images, in_h, in_w, out_h, out_w, channels, width0, width1, outs,
        images * out_h * out_w // bucket.numel(), 0 if shift is None else shift.stride(0),
        out_zero, out_qmax,
    )  # fmt: skip
    switches = {
        "KERNEL": kernel, "STRIDE": stride, "TOP": border[0], "LEFT": border[1],
        "UPSAMPLE": upsample, "SIDES": sides, "BUCKETS": act_scale.shape[0],
        "SIDE_BUCKETS": 1 if side_scales is None else side_scales.shape[1],
        "OUT_BUCKETS": 1 if out_scale is None else out_scale.shape[0],
        "MIXED": bucket.numel() > 1, "BORDER": kernel > 1, "RAW": y.dtype == torch.int32,
        "ACTIVATION": activation, "BLOCK_N": box[0], "BLOCK_H": box[1], "BLOCK_W": box[2],
        "BLOCK_O": tile.outs, "BLOCK_C": tile.channels, "STAGES": tile.stages,
        "SPLITS": tile.splits, "num_warps": tile.warps,
    }  # fmt: skip
    if path == "hopper":
        programs = min(tiles, tile.programs * multiprocessors(codes.device))
        soon = early(codes.device)
        # So many programs have room on a multiprocessor with so many registers a thread. The warp
        # that brings operands counts as four, which give what they do not need to the others.
        room = 65536 // (tile.programs * (tile.warps + 4) * 32) // 8 * 8
        contract_hopper[(tiles if tile.splits > 1 else programs, slots)](
            *args, tiles, **switches, TAPS=tile.taps, EARLY=soon, launch_pdl=soon,
            maxnreg=min(room, 168),
        )  # fmt: skip
    else:
        contract[(tiles, slots)](*args, **switches, num_stages=tile.stages)
    return y
