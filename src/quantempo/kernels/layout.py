"""How codes and weights lie in memory for the GPU operators, and their zero-point tables.

    stored code q' = q - 128    z' = z - 128    sum (q - z) w = sum q' w - z' sum w

The last sum runs over the taps inside the image, so it is a table over the places a window can
have: 4 classes of rows times 4 of columns, of which an image of more than one row and column has 9.
Everything here is done once, when a model is packed.
"""

import torch
from torch import Tensor

__all__ = ["OFFSET", "border_table", "conv_weight", "row_table"]

OFFSET = 128


def conv_weight(weight: Tensor) -> Tensor:
    """Return a convolution weight (O, C, kh, kw) as contiguous (O, kh kw, C), taps row-major."""
    out, channels = weight.shape[:2]
    return weight.permute(0, 2, 3, 1).reshape(out, -1, channels).contiguous()


def border_table(weight: Tensor, zero_point: int) -> Tensor:
    """Return z' * sum of w[o] over all taps (row 0), minus those over taps outside the image.

        sum (q - z) w = sum q' w - table[0, o] - (table[4 rc + cc, o] if rc or cc else 0)

    rc = (first tap row above the image) + 2 (last tap row below it), cc likewise for columns.
    Inside the image only row 0 is needed, and it is the same for all pixels.

    weight: int8 (O, C, kh, kw); zero_point: z of the unsigned codes. Returns int32 (16, O).
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
