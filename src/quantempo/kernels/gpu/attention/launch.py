"""Launch `kernels.ops.attention8` on a GPU: codes, the attention, what several programs share."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from quantempo.kernels.gpu.attention.hopper import attend
from quantempo.kernels.gpu.contraction.tiles import multiprocessors
from quantempo.kernels.gpu.norm_modulate_quant import MAGIC, scale_of
from quantempo.kernels.ops.attention import BLOCK, Attention, supported

__all__ = ["join_shares", "launch", "quantize_heads", "run"]

_GLUON = {torch.int8: "int8", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# What a program of 128 queries of 128 values has in shared memory: 32 KiB and 48 a stage.
_STAGES = 4
# By how many powers of two the largest weight of the first block is below 1, and what a sum of
# weights may reach: half of float32's exponents on each side for bfloat16.
_RANGE = {torch.float16: (0.0, 6e4), torch.bfloat16: (30.0, 2.0**90)}


@triton.jit(do_not_specialize=["q_tokens", "k_tokens", "heads", *(f"q{i}" for i in range(3)),
                               *(f"k{i}" for i in range(3))])  # fmt: skip
def quantize_heads(
    q, k, over, q_codes, k_codes, q_scale, k_scale, q_tokens, k_tokens, heads, q0, q1, q2, k0, k1,
    k2, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the codes of BLOCK queries or keys of a head, and their scales; `over` becomes zero.

    q0, q1, q2: how far images, tokens and heads are apart, in eights; rows of codes are of 16 i,
    and written whole.
    """
    PITCH: tl.constexpr = (D + 15) // 16 * 16
    ROOM: tl.constexpr = triton.next_power_of_2(D)
    q_blocks, k_blocks = tl.cdiv(q_tokens, BLOCK), tl.cdiv(k_tokens, BLOCK)
    pair = tl.program_id(0) // (q_blocks + k_blocks)
    block = tl.program_id(0) % (q_blocks + k_blocks)
    tl.store(over, 0, mask=tl.program_id(0) == 0)
    keys = block >= q_blocks
    block = tl.where(keys, block - q_blocks, block)
    tokens = tl.where(keys, k_tokens, q_tokens)
    t, d = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, ROOM)[None, :]
    inside = (t < tokens)[:, None]
    image, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    at = image * tl.where(keys, k0, q0) + head * tl.where(keys, k2, q2)
    at = (at + t.to(tl.int64) * tl.where(keys, k1, q1))[:, None] * 8 + d
    real = inside if D == ROOM else inside & (d < D)
    x = tl.load(tl.where(keys, k, q) + at, mask=real, other=0.0).to(tl.float32)
    # Of magnitudes the bits are ordered as the values are, and those of a NaN come last.
    top = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1)
    if keys:
        four = tl.max(tl.max(tl.reshape(top, [BLOCK // 8, 4, 2]), 2), 0)
        tl.store(k_scale + (pair * k_blocks + block) * 4 + tl.arange(0, 4), scale_of(four))
        top = tl.reshape(tl.broadcast_to(four[None, :, None], [BLOCK // 8, 4, 2]), [BLOCK])
    else:
        tl.store(q_scale + pair * q_tokens + t, scale_of(top), mask=t < tokens)
    ratio = tl.math.div_rn(1.0, scale_of(top))[:, None]
    codes = (x * ratio + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
    to = ((image * tokens + t) * heads + head)[:, None] * PITCH + d
    written = inside if PITCH == ROOM else inside & (d < PITCH)
    tl.store(tl.where(keys, k_codes, q_codes) + to, codes, mask=written)


@triton.jit(do_not_specialize=["programs", "rounds", "left", "blocks", "tokens", "heads"])
def join_shares(
    part, part_rows, y, programs, rounds, left, blocks, tokens, heads, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write ROWS queries of a tile from what several programs found of it, in their order."""
    ROOM: tl.constexpr = triton.next_power_of_2(D)
    r = tl.program_id(0)
    tile, q_blocks = rounds * programs + r, tl.cdiv(tokens, 128)
    begin = ((r * blocks + 1) * programs - 1) // left
    end = ((r + 1) * blocks * programs - 1) // left
    # A program that has all blocks of the tile has written it.
    if begin < end:
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        d = tl.arange(0, ROOM)[None, :]
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, ROOM], tl.float32)
        for c in range(begin, end + 1):
            lo = c * left // programs
            if (c + 1) * left // programs > tl.maximum(lo, r * blocks):
                slot = c * 2 + (lo < r * blocks).to(tl.int32)
                other = tl.load(part_rows + slot * 256 + row)
                new = tl.maximum(m, other)
                was, now = tl.exp2(m - new), tl.exp2(other - new)
                total = total * was + tl.load(part_rows + slot * 256 + 128 + row) * now
                x = tl.load(part + ((slot * 128 + row) * ROOM)[:, None] + d)
                acc = acc * was[:, None] + x * now[:, None]
                m = new
        t = tile % q_blocks * 128 + row
        head = tile // q_blocks
        at = ((head // heads * tokens + t).to(tl.int64) * heads + head % heads)[:, None] * D + d
        inside = (t < tokens)[:, None] if D == ROOM else (t < tokens)[:, None] & (d < D)
        tl.store(y + at, (acc / total[:, None]).to(y.dtype.element_ty), mask=inside)


def _describe(x: Tensor, rows: int) -> Any:
    """Describe (B, T, H, D) in boxes of `rows` tokens of a head, zeros behind D."""
    box = [1, rows, 1, triton.next_power_of_2(x.shape[3])]
    # Of one image (token, head) the distance to the next may be anything.
    strides = [x.stride(i) if x.shape[i] > 1 else box[3] for i in range(3)]
    layout = gl.NVMMASharedLayout.get_default_for(box, getattr(gl, _GLUON[x.dtype]))
    return TensorDescriptor(x, [*x.shape], [*strides, 1], box, layout)


def launch(call: Attention) -> Tensor:
    """Return the result of a call, which was checked."""
    q = call.q
    if not supported(q.device, q.shape[3], q.dtype):
        kind = f"{q.dtype} heads of {q.shape[3]} values on {torch.cuda.get_device_name(q.device)}"
        raise ValueError(
            f"attention8: got {kind}; expected float16 or bfloat16, D = 8 i from 40 to 128 and a "
            "GPU of compute capability 9, elsewhere use torch's scaled_dot_product_attention"
        )
    return run(call, multiprocessors(q.device))


def run(call: Attention, programs: int) -> Tensor:
    """Return the result of a call, computed by so many programs."""
    q, k, v = call
    (b, t, h, d), s, y = q.shape, k.shape[1], call.empty()
    if y.numel() == 0:
        return y
    q_blocks, blocks = triton.cdiv(t, BLOCK), triton.cdiv(s, BLOCK)
    room, pitch = triton.next_power_of_2(d), triton.cdiv(d, 16) * 16
    q8, k8 = (q.new_empty(b, n, h, pitch, dtype=torch.int8)[..., :d] for n in (t, s))
    over = q.new_empty(1, dtype=torch.int32)
    sizes = ((b, h, t), (b, h, blocks, 4), (programs, 2, 128, room), (programs, 2, 2, 128))
    q_scale, k_scale, *parts = (q.new_empty(size, dtype=torch.float32) for size in sizes)
    apart = [x.stride(i) // 8 if x.shape[i] > 1 else 0 for x in (q, k) for i in range(3)]
    quantize_heads[((q_blocks + blocks) * b * h,)](
        q, k, over, q8, k8, q_scale, k_scale, t, s, h, *apart, D=d, BLOCK=BLOCK, num_warps=8
    )
    tiles = b * h * q_blocks
    rounds, rest = divmod(tiles, programs)
    boxes = _describe(q8, BLOCK // 2), _describe(k8, BLOCK), _describe(v, BLOCK)
    headroom, limit = _RANGE[v.dtype]
    factor = math.log2(math.e) / math.sqrt(d)
    # The second does nothing unless the first says so: nothing waits on the host.
    for fixed in (True, False):
        attend[(programs,)](
            *boxes, q_scale, k_scale, y, *parts, over, rounds, tiles, q_blocks, blocks, t, s,
            factor, h, D=d, STAGES=_STAGES, FIXED=fixed, HEADROOM=headroom, LIMIT=limit,
            num_warps=4, maxnreg=168,
        )  # fmt: skip
    if rest:
        join_shares[(rest, 8)](
            *parts, y, programs, rounds, rest * blocks, blocks, t, h, D=d, ROWS=16, num_warps=4
        )
    return y
