"""How codes and weights lie in memory for the GPU operators, and their zero-point tables.

    stored code q' = q - 128    z' = z - 128    sum (q - z) w = sum q' w - z' sum w

The last sum runs over the taps inside the image, so it is a table over the places a window can
have: 4 classes of rows times 4 of columns, of which an image of more than one row and column has 9.
Everything here is done once, when a model is packed.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "OFFSET", "border_table", "conv_weight", "groups_of", "pack", "packed_width", "row_table",
    "unpack",
]  # fmt: skip

OFFSET = 128


def conv_weight(weight: Tensor) -> Tensor:
    """Return a convolution weight (O, C, kh, kw) as contiguous (O, kh kw, C), taps row-major."""
    out, channels = weight.shape[:2]
    return weight.permute(0, 2, 3, 1).reshape(out, -1, channels).contiguous()


def border_table(weight: Tensor, zero_point: int) -> Tensor:
    """Return z' * sum of w[o] over all taps (row 0), minus those over taps outside the image.

        sum (q - z) w = sum q' w - table[0, o] - (table[4 rc + cc, o] if rc or cc else 0)

    rc = (first tap row above the image) + 2 (last tap row below it), cc likewise for columns.
    Inside the image only row 0 is needed. weight: int8 (O, C, kh, kw); zero_point: z of the
    unsigned codes. Returns int32 (16, O).
    """
    out, _, kh, kw = weight.shape
    taps = weight.sum(1, dtype=torch.int64)
    table = torch.zeros((16, out), dtype=torch.int64, device=weight.device)
    for rc in range(4):
        rows = slice(rc & 1, kh - (rc >> 1))
        for cc in range(4):
            columns = slice(cc & 1, kw - (cc >> 1))
            table[4 * rc + cc] = (zero_point - OFFSET) * taps[:, rows, columns].sum((1, 2))
    table[1:] -= table[0]
    return table.to(torch.int32)


def row_table(weight: Tensor, zero_point: int) -> Tensor:
    """Return table[o] = z' * sum_k w[o, k], int32 (O,), of an int8 weight (O, K)."""
    return ((zero_point - OFFSET) * weight.sum(1, dtype=torch.int64)).to(torch.int32)


def pack(q: Tensor, groups: Tensor, group: int) -> Tensor:
    """Return weights (q - z) s as kernels read them, uint8 (O, P ceil(C / 64) (32 + (4 or 2))).

    Of 64 channels byte 8 t + 4 j + b holds q of channel 16 j + 4 t + b low and that + 32 high: what
    a thread feeds to a matrix instruction lies together. They have 4 groups of 16, or 2 of 32;
    behind the codes of 16 rows follow (P, ceil(C / 64), 16, 4 or 2). Rows may be split and joined
    at multiples of 16.

    q: uint8 (O, P, C), below 16; groups: uint8 (O, P, ceil(C / group)), (s - 1) << 4 | z; group:
    16, 32 or 64 channels, the last ones fewer; O: a multiple of 16.
    """
    out, taps, channels = q.shape
    size = min(group, 32)
    groups = groups.repeat_interleave(group // size, -1)[..., : -(-channels // size)]
    # Channels that are not there weigh 0: they are the zero of a group that began, or of 0.
    rest = groups.shape[-1] * size - channels
    q = torch.cat([q, (groups[..., -1:] & 15).expand(out, taps, rest)], -1)
    q = F.pad(q, (0, -q.shape[-1] % 64)).reshape(out, taps, -1, 2, 2, 4, 4).transpose(-2, -3)
    codes = (q[:, :, :, 0] | q[:, :, :, 1] << 4).reshape(out // 16, -1)
    groups = F.pad(groups, (0, -groups.shape[-1] % (64 // size)))
    groups = groups.reshape(out // 16, 16, taps, -1, 64 // size).permute(0, 2, 3, 1, 4)
    return torch.cat([codes, groups.reshape(out // 16, -1)], 1).reshape(out, -1)


def packed_width(taps: int, channels: int, groups: int) -> int:
    """Return the bytes of a row of `pack`; groups: those of 64 channels, 4 or 2."""
    return taps * -(-channels // 64) * (32 + groups)


def groups_of(weight: Tensor, taps: int, channels: int) -> int:
    """Return the groups that 64 channels of a row have in a weight of `pack`; 0 of an int8 one."""
    packed = weight.dtype == torch.uint8
    return weight.shape[1] // (taps * -(-channels // 64)) - 32 if packed else 0


def unpack(weight: Tensor, taps: int, channels: int) -> Tensor:
    """Return the int8 weights (O, P, C) of `pack`; those of any other weight as they are."""
    if weight.dtype != torch.uint8:
        return weight.reshape(len(weight), taps, channels)
    out, count = len(weight), groups_of(weight, taps, channels)
    width = 16 * packed_width(taps, channels, 0)
    rows = weight.reshape(out // 16, -1)
    codes, groups = rows[:, :width], rows[:, width:]
    q = torch.stack((codes & 15, codes >> 4), 1).reshape(len(codes), 2, 16 * taps, -1, 4, 2, 4)
    q = q.transpose(-2, -3).permute(0, 2, 3, 1, 4, 5, 6).reshape(out, taps, -1)[..., :channels]
    each = groups.reshape(len(groups), taps, -1, 16, count).permute(0, 3, 1, 2, 4)
    each = each.reshape(out, taps, -1).repeat_interleave(64 // count, -1)[..., :channels]
    return ((q.to(torch.int16) - (each & 15)) * ((each >> 4) + 1)).to(torch.int8)
