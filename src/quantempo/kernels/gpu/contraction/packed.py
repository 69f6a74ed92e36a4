"""Weights of 4 bits on Hopper: from shared memory to registers, unpacked there, multiplied.

A step of a packed weight (`layout.pack`) is two blocks of 64 channels. While the matrix instruction
of one block reads its registers those of the other are filled, so one is always under way. A word
of four codes, with K = 0x80808080:

    w8 = ((q - z) s + K) xor K        q: 4 bits a byte, z in each byte: exact in 32 bits, no carries
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

__all__ = ["halves_of", "multiply"]


@gluon.constexpr_function
def _layout(OUTS, BLOCKS, num_warps, GROUPS):
    """Return where the bytes of codes of a step go, [OUTS, 32 BLOCKS]: to a thread 8 of a block.

    GROUPS: the words [OUTS / 16, BLOCKS, 16] of groups, to all threads of their row. Rows 0 and 8
    and those of the next instruction are a thread's own.
    """

    def rows(first, end):
        powers = [first << i for i in range((end // first).bit_length() - 1)]
        return [[row // 16, 0, row % 16] if GROUPS else [row, 0] for row in powers]

    own, lanes = rows(8, 16) + rows(16 * num_warps, OUTS), rows(1, 8)
    if GROUPS:
        shape, lanes = [OUTS // 16, BLOCKS, 16], [[0] * 3] * 2 + lanes
        registers = [[0, 1, 0]] * (BLOCKS - 1)
    else:
        shape, lanes = [OUTS, 32 * BLOCKS], [[0, 8], [0, 16], *lanes]
        registers = [[0, 1], [0, 2], [0, 4], *[[0, 32]] * (BLOCKS - 1)]
    warps = rows(16, 16 * num_warps)
    return gl.DistributedLinearLayout(registers + own, lanes, warps, [], shape)


@gluon.jit
def halves_of(smem_w, stage):
    """Return the two halves of a stage of weights, uint8 [OUTS, channels / 2]: codes, groups."""
    HALF: gl.constexpr = smem_w.shape[2] // 2
    shape: gl.constexpr = [2 * smem_w.shape[0], smem_w.shape[1], HALF]
    halves = smem_w._reinterpret(gl.uint8, shape, gl.NVMMASharedLayout(HALF, 8, 2))
    return halves.index(2 * stage), halves.index(2 * stage + 1)


@gluon.jit
def _weights(codes, step, zero, HIGH: gl.constexpr):
    """Return int8 (q - z) s of the low or the high nibbles of bytes, four at a time.

    step, zero: int32, s and z in each byte, of the shape of codes but for 1s.
    """
    shift: gl.constexpr = "shr.u32 t, $1, 4; and.b32 t, t, " if HIGH else "and.b32 t, $1, "
    rest: gl.constexpr = (
        "0x0f0f0f0f; sub.u32 t, t, $6; mad.lo.u32 t, t, $2, 0x80808080; "
        "xor.b32 $0, t, 0x80808080; }"
    )
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; " + shift + rest, "=r" + ",r" * 9, [codes, step, zero], dtype=gl.int8,
        is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _fields(word, AT: gl.constexpr):
    """Return s, and z in each byte, of byte AT of words of groups; int32."""
    step = ((word >> (8 * AT + 4)) & 15) + 1
    return step, ((word >> (8 * AT)) & 15) * 0x01010101


@gluon.jit
def _half(codes, words, PER: gl.constexpr, HIGH: gl.constexpr):
    """Return the weights [OUTS, 32] of the low or the high nibbles of a block, groups in words."""
    OUTS: gl.constexpr = codes.shape[0]
    if PER == 2:
        step, zero = _fields(words, HIGH)
        step, zero = step.reshape([OUTS, 1]), zero.reshape([OUTS, 1])
    else:
        low, high = _fields(words, 2 * HIGH), _fields(words, 2 * HIGH + 1)
        step, zero = gl.join(low[0], high[0]), gl.join(low[1], high[1])
    parts = codes.reshape([OUTS, PER // 2, 64 // PER])
    of: gl.constexpr = gl.SliceLayout(2, parts.type.layout)
    step = gl.expand_dims(gl.convert_layout(step, of, assert_trivial=True), 2)
    zero = gl.expand_dims(gl.convert_layout(zero, of, assert_trivial=True), 2)
    return _weights(parts, step, zero, HIGH).reshape([OUTS, 32])


@gluon.jit
def _read(smem_w, stage, PER: gl.constexpr, num_warps: gl.constexpr):
    """Return the codes [OUTS, 32] of each block of a step, channels in order, and its groups."""
    OUTS: gl.constexpr = smem_w.shape[1]
    BLOCKS: gl.constexpr = smem_w.shape[2] // 64
    codes, words = halves_of(smem_w, stage)
    codes = codes.load(_layout(OUTS, BLOCKS, num_warps, False))
    codes = codes.reshape([OUTS, BLOCKS, 4, 2, 4]).permute((0, 3, 2, 4, 1))
    kind: gl.constexpr = gl.int16 if PER == 2 else gl.int32
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    words = words._reinterpret(kind, [OUTS // 16, BLOCKS, 16], flat)
    words = words.load(_layout(OUTS, BLOCKS, num_warps, True)).to(gl.int32).permute((0, 2, 1))
    if BLOCKS == 1:
        blocks = (codes.reshape([OUTS, 32]),)
        groups = (words.reshape([OUTS]),)
    else:
        blocks = codes.reshape([OUTS, 32, 2]).split()
        groups = words.reshape([OUTS, 2]).split()
    return blocks, groups


@gluon.jit
def multiply(acc, smem_w, pixels, stage, use_acc, PER: gl.constexpr):
    """Start to add a step to acc; of the instructions before it none is under way any more.

    pixels: [P, channels] in shared memory. PER: groups of 64 channels; 0: the weight is int8.
    """
    if PER == 0:
        weight = smem_w.index(stage)
        acc = warpgroup_mma(weight, pixels.permute((1, 0)), acc, use_acc=use_acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
    else:
        mma: gl.constexpr = acc.type.layout
        of: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
        blocks, groups = _read(smem_w, stage, PER, mma.warps_per_cta[0])
        for i in gl.static_range(len(blocks)):
            if len(blocks) == 1:
                # The registers of the step before are filled again.
                acc = warpgroup_mma_wait(0, deps=[acc])
            low = _half(blocks[i], groups[i], PER, False)
            both = gl.join(low, _half(blocks[i], groups[i], PER, True)).permute((0, 2, 1))
            a = gl.convert_layout(both.reshape([low.shape[0], 64]), of, assert_trivial=True)
            part = pixels.slice(64 * i, 64, dim=1).permute((1, 0))
            later = use_acc if i == 0 else True
            acc = warpgroup_mma(a, part, acc, use_acc=later, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
    return acc
