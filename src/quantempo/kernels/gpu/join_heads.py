"""Launch `kernels.ops.join_heads` on a GPU: a head lies in a warp, eight values in a thread."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.ops.join_heads import Heads

__all__ = ["join_streams", "launch"]


# Numbers in a tuple would be specialized.
@triton.jit(do_not_specialize=[*range(9)])
def join_streams(
    blocks, size, q_step, k_step, v_step, size_2, q_step_2, k_step_2, v_step_2, streams, cos, sin,
    results, STREAMS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write ROWS heads of a stream; streams: q, k, v, weights, eps of each in turn."""
    numbers = (size, q_step, k_step, v_step, size_2, q_step_2, k_step_2, v_step_2)
    tokens = size + size_2
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block, start = tl.program_id(0) % blocks, 0
    if EARLY:
        wait_for_predecessor()
    for i in tl.static_range(STREAMS):
        size, own = numbers[4 * i], tl.cdiv(numbers[4 * i] * HEADS, ROWS)
        if (block >= 0) & (block < own):
            r = (block * ROWS + tl.arange(0, ROWS))[:, None]
            # By row too, so that each thread loads what it uses.
            c = tl.max_contiguous(tl.arange(0, WIDTH), 8)[None, :] + 0 * r
            t = r // HEADS
            inside = (t < size) & (c < DIM)
            column = (r - t * HEADS) * DIM + c
            parts = ()
            for j in tl.static_range(3):
                if streams[7 * i + j] is not None:
                    # Distances are in eights: rows begin at whole 16 bytes.
                    row = (image * size + t) * (numbers[4 * i + 1 + j] * 8) + column
                    parts += (tl.load(streams[7 * i + j] + row, mask=inside, other=0.0),)
            if cos is not None:
                place = (start + t).to(tl.int64) * DIM + c
                cosines = tl.load(cos + place, mask=inside, other=0.0)
                sines = tl.load(sin + place, mask=inside, other=0.0)
            to = (image * tokens + start + t) * (HEADS * DIM) + column
            if streams[7 * i + 2] is not None:
                tl.store(results[2] + to, parts[2], mask=inside)
            for j in tl.static_range(2):
                y = parts[j].to(tl.float32)
                if streams[7 * i + 5 + j] is not None:
                    square = tl.sum(y * y, 1)[:, None] * (1.0 / DIM) + streams[7 * i + 5 + j]
                    # Of squares beyond float32 the head is to be NaN, not 0.
                    y *= tl.where(square < float("inf"), tl.rsqrt(square), float("nan"))
                    if streams[7 * i + 3 + j] is not None:
                        weight = tl.load(streams[7 * i + 3 + j] + c, mask=inside, other=0.0)
                        y *= weight.to(tl.float32)
                    y = y.to(parts[j].dtype).to(tl.float32)
                if cos is not None:
                    real, imaginary = tl.split(tl.reshape(y, (ROWS, WIDTH // 2, 2)))
                    turned = tl.reshape(tl.join(-imaginary, real), (ROWS, WIDTH))
                    y = y * cosines + turned * sines
                tl.store(results[j] + to, y.to(parts[j].dtype), mask=inside)
        block -= own
        start += size


def launch(call: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of a call, which was checked."""
    results = call.empty()
    count, _, heads, dim = results[0].shape
    rows = max(1, 1024 // (width := max(8, triton.next_power_of_2(dim))))
    blocks = sum(triton.cdiv(x.shape[1] * heads, rows) for x in call.q)
    if count * blocks == 0:
        return results
    streams, numbers = list[Any](), list[int]()
    for i, x in enumerate(call.q):
        parts, two = [x, call.k[i], call.v[i] if call.v else None], slice(2 * i, 2 * i + 2)
        streams += [*parts, *call.weights[two], *(None if e < 0 else e for e in call.eps[two])]
        numbers += [x.shape[1], *(0 if y is None else y.stride(1) // 8 for y in parts)]
    placed = {"EARLY": True, "launch_pdl": True} if early(call.q[0].device) else {}
    join_streams[(count * blocks,)](
        blocks, *[*numbers, *[0] * 4][:8], (*streams,), *(call.rotary or (None, None)), results,
        STREAMS=len(call.q), HEADS=heads, DIM=dim, WIDTH=width, ROWS=rows, num_warps=4, **placed,
    )  # fmt: skip
    return results
