"""Launch `kernels.ops.join_heads_codes` on a GPU: a program has 32 tokens of one scale."""

import math

import triton
import triton.language as tl
from torch import Tensor

from quantempo.kernels.gpu.dependent_launch import early, wait_for_predecessor
from quantempo.kernels.gpu.join_heads import described, turned
from quantempo.kernels.gpu.norm_modulate_quant import MAGIC, scale_of
from quantempo.kernels.ops.attention import BLOCK
from quantempo.kernels.ops.join_heads import CodedHeads

__all__ = ["join_codes", "launch"]

# Heads of a program at most, one after the other: it finds cosines and sines in its cache again.
_HEADS = 4


@triton.jit
def _codes(x, scale):
    return (
        (x.to(tl.float32) * tl.math.div_rn(1.0, scale) + MAGIC)
        .to(tl.int32, bitcast=True)
        .to(tl.int8)
    )


# Numbers in a tuple would be specialized.
@triton.jit(do_not_specialize=[*range(8)])
def join_codes(
    size, q_step, k_step, v_step, size_2, q_step_2, k_step_2, v_step_2, streams, cos, sin, results,
    STREAMS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    PART: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr = False,
):  # fmt: skip
    """Write the codes of some heads of the tokens t of a block for which t % 8 // 2 is the same."""
    ROWS: tl.constexpr = BLOCK // 4
    PARTS: tl.constexpr = HEADS // PART
    PITCH: tl.constexpr = (DIM + 15) // 16 * 16
    numbers = (size, q_step, k_step, v_step, size_2, q_step_2, k_step_2, v_step_2)
    tokens, program = size + size_2, tl.program_id(0)
    group, whole = program // PARTS % 4, program // (PARTS * 4)
    blocks = tl.cdiv(tokens, BLOCK)
    begin, image = whole % blocks * BLOCK, (whole // blocks).to(tl.int64)
    r = tl.arange(0, ROWS)
    r = r // 2 * 8 + r % 2 + group * 2
    t = begin + r
    # By row too, so that each thread loads what it uses.
    c = tl.max_contiguous(tl.arange(0, WIDTH), 8)[None, :] + 0 * r[:, None]
    inside = (t < tokens)[:, None] & (c < DIM)
    if EARLY:
        wait_for_predecessor()
    if program == 0:
        tl.store(results[5], 0)
    first = program % PARTS * PART
    # Addresses kept between heads would be 40 registers of a thread.
    for head in tl.range(first, first + PART, disable_licm=True):
        cosines, sines = None, None
        if cos is not None:
            place = begin.to(tl.int64) * DIM
            cosines = tl.load(cos + place + (r[:, None] * DIM + c), mask=inside, other=0.0)
            sines = tl.load(sin + place + (r[:, None] * DIM + c), mask=inside, other=0.0)
        start, row = 0, (image * tokens + begin) * HEADS + head
        q = tl.zeros([ROWS, WIDTH], streams[0].dtype.element_ty)
        k = tl.zeros([ROWS, WIDTH], streams[0].dtype.element_ty)
        for i in tl.static_range(STREAMS):
            end = start + numbers[4 * i]
            # A block may have tokens of both.
            if (start < begin + BLOCK) & (end > begin):
                own = ((t >= start) & (t < end))[:, None] & (c < DIM)
                parts = ()
                for j in tl.static_range(3):
                    if streams[7 * i + j] is not None:
                        # Distances are in eights: rows begin at whole 16 bytes.
                        step = numbers[4 * i + 1 + j] * 8
                        at = (image * numbers[4 * i] + begin - start) * step + head * DIM
                        x = streams[7 * i + j] + at + (r[:, None] * step + c)
                        parts += (tl.load(x, mask=own, other=0.0),)
                if streams[7 * i + 2] is not None:
                    to = results[2] + row * DIM + (r[:, None] * (HEADS * DIM) + c)
                    tl.store(to, parts[2], mask=own)
                q = tl.where(own, turned(parts[0], streams[7 * i + 3], streams[7 * i + 5], cosines,
                                         sines, c, own, DIM), q)  # fmt: skip
                k = tl.where(own, turned(parts[1], streams[7 * i + 4], streams[7 * i + 6], cosines,
                                         sines, c, own, DIM), k)  # fmt: skip
            start = end
        # Of magnitudes the bits are ordered as the values are, and those of a NaN come last.
        top = tl.max(tl.abs(q.to(tl.float32)).to(tl.int32, bitcast=True), 1)
        most = tl.max(tl.max(tl.abs(k.to(tl.float32)).to(tl.int32, bitcast=True), 1), 0)
        pair, to = image * HEADS + head, row * PITCH + (r[:, None] * (HEADS * PITCH) + c)
        tl.store(results[3] + pair * tokens + t, scale_of(top), mask=t < tokens)
        tl.store(results[4] + (pair * blocks + begin // BLOCK) * 4 + group, scale_of(most))
        tl.store(results[0] + to, _codes(q, scale_of(top)[:, None]), mask=inside)
        tl.store(results[1] + to, _codes(k, scale_of(most)), mask=inside)


def launch(call: CodedHeads) -> tuple[Tensor, ...]:
    """Return the results of a call, which was checked."""
    results: tuple[Tensor, ...] = call.empty()
    count, tokens, heads, dim = call.shape
    if results[0].numel() == 0:
        return results
    part = math.gcd(heads, _HEADS)
    width = max(8, triton.next_power_of_2(dim))
    numbers, streams = described(call)
    placed = {"EARLY": True, "launch_pdl": True} if early(call.q[0].device) else {}
    join_codes[(count * triton.cdiv(tokens, BLOCK) * 4 * (heads // part),)](
        *numbers, streams, *(call.rotary or (None, None)), results, STREAMS=len(call.q),
        HEADS=heads, DIM=dim, WIDTH=width, PART=part, BLOCK=BLOCK,
        num_warps=min(16, width // 8), **placed,
    )  # fmt: skip
    return results
