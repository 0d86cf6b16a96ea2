# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""What the triton kernel of `kvshare_kernels` does to a tile: reads, rounds, turns, adds.

In: tiles, or where they lie, and their tables. Out: tiles. Never: knows of programs, splits or masks.
"""

# ruff: noqa: N803, N806
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:  # whoever chooses this file asks first
    raise ImportError("the kernels for GPUs need triton: pip install triton, or set KVSHARE_ATTENTION=eager") from error


@triton.jit
def numbers(rows, columns, live, KIND: tl.constexpr, HALF: tl.constexpr):
    """What is cached in these columns, (slots, columns), as it is cached; of pairs of 4 bits the whole numbers."""
    if KIND == 3:
        pair = tl.load(rows[:, None] + (columns % HALF)[None, :], mask=live, other=0x88).to(tl.int32)
        found = ((pair >> (columns // HALF * 4)[None, :]) & 15) - 8
    else:
        found = tl.load(rows[:, None] + columns[None, :], mask=live, other=0)
    return found


@triton.jit
def factor(x, kind, WIDE: tl.constexpr):
    """What a product is made of, rounded as queries are. The interpreter can do neither with bfloat16: this can."""
    if WIDE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def turned(first, second, cosine1, sine1, cosine2, sine2):
    """Rope on the two numbers of each pair; tables have what either number is multiplied by, too."""
    return first * cosine1 - second * sine2, second * cosine2 + first * sine1


@triton.jit
def turned_back(first, second, cosine, sine):
    """Rope the other way. A negative sine would do, but takes an instruction for each."""
    return first * cosine + second * sine, second * cosine - first * sine


@triton.jit
def summed(sums, tile, weight, kind, WIDE: tl.constexpr, TURNED: tl.constexpr):
    """Weighted sums, (rows, columns), with the numbers of a part, (slots, columns); TURNED, (columns, rows)."""
    tile = factor(tile, kind, WIDE)
    if TURNED:
        sums = tl.dot(tl.trans(tile), weight, sums, input_precision="ieee")
    else:
        sums = tl.dot(tl.trans(weight), tile, sums, input_precision="ieee")
    return sums


@triton.jit
def scales_of(begin, step, part, inside, slots, N: tl.constexpr):
    """Scales of what is cached in few bits, (slots, columns): of the part of each column."""
    slot = tl.minimum(part[None, :] * N + inside[:, None], slots - 1)
    return tl.load(begin + slot.to(tl.int64) * step)


@triton.jit
def prefetch(begin, step, slot, slots, WIDTH: tl.constexpr, LINES: tl.constexpr):
    """Have lines of 128 bytes brought into the device's cache, from a slot on, of WIDTH elements each."""
    wide: tl.constexpr = 1024 // begin.dtype.element_ty.primitive_bitwidth  # elements of a line
    each: tl.constexpr = max(1, WIDTH // wide)
    skip: tl.constexpr = max(1, wide // WIDTH)
    line = tl.arange(0, LINES)
    at = begin + tl.minimum(slot + line // each * skip, slots - 1).to(tl.int64) * step + line % each * wide
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def joined(x, T: tl.constexpr, W: tl.constexpr):
    """(T * W, columns) summed over T: (W, columns)."""
    P: tl.constexpr = x.shape[1]
    return x if T == 1 else tl.sum(tl.reshape(x, (T, W, P)), 0)


@triton.jit
def held(x, like):
    """The same numbers, where those of `like` lie. What a compiler finds out of a product's operands, such as the width that they
    were read in, it looks for no further back than here.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, like], x.dtype, is_pure=False, pack=2)


@triton.jit
def turned_in_pairs(first, second, cosine1, sine1, cosine2, against2, MACHINE: tl.constexpr):
    """As `turned`, on bfloat16 or float16 two at a time: half the instructions, each result rounded once more.

    `against2` is the negative of `sine2`: in 16 bits a difference takes an instruction more than a sum. Without MACHINE code, which
    the interpreter does not know, by plain operations.
    """
    if not MACHINE:
        return first * cosine1 + second * against2, second * cosine2 + first * sine1
    if first.dtype == tl.bfloat16:
        turn: tl.constexpr = """{
            .reg .b32 a, b, zero;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 a, $3, $7, zero;
            fma.rn.bf16x2 b, $3, $6, zero;
            fma.rn.bf16x2 $0, $2, $4, a;
            fma.rn.bf16x2 $1, $2, $5, b;
        }"""
    else:
        turn: tl.constexpr = """{
            .reg .b32 a, b;
            mul.rn.f16x2 a, $3, $7;
            mul.rn.f16x2 b, $3, $6;
            fma.rn.f16x2 $0, $2, $4, a;
            fma.rn.f16x2 $1, $2, $5, b;
        }"""
    return tl.inline_asm_elementwise(
        turn,
        "=&r,=&r,r,r,r,r,r,r",
        [first, second, cosine1, sine1, cosine2, against2],
        (first.dtype, first.dtype),
        is_pure=True,
        pack=2,
    )


def _of_bytes(steps: str) -> str:
    """PTX that makes numbers of the bytes of two words, $4 and $5: of byte n of both, in the two halves of a, `steps` makes $n."""
    each = (f"prmt.b32 a, $4, $5, 0x{n + 4}{n + 4}{n}{n}; {steps.replace('OUT', f'${n}')}" for n in range(4))
    return "{ .reg .b32 a, b, one, less; " + " ".join(each) + " }"


# A number from 0 to 127 (1023) in the lowest bits of 128 (1024) is added to it; the sum, less what it should not have, is exact.
SIGNED_BFLOAT16 = tl.constexpr(
    _of_bytes(
        "lop3.b32 b, a, 0x00800080, 0x43004300, 0xea; lop3.b32 a, a, 0x007f007f, 0x43004300, 0xea; "  # 128, with the sign 256
        "mov.b32 less, 0xbf80bf80; fma.rn.bf16x2 OUT, b, less, a;"
    )
)
SIGNED_FLOAT16 = tl.constexpr(
    _of_bytes("lop3.b32 a, a, 0x00ff00ff, 0x64806480, 0x6a; mov.b32 less, 0xe480e480; add.rn.f16x2 OUT, a, less;")
)
FOUR_BFLOAT16 = tl.constexpr(
    _of_bytes(
        "lop3.b32 a, a, 0x000f000f, 0x43004300, 0xea; "
        "mov.b32 one, 0x3f803f80; mov.b32 less, 0xc308c308; fma.rn.bf16x2 OUT, a, one, less;"
    )
)
FOUR_FLOAT16 = tl.constexpr(
    _of_bytes("lop3.b32 a, a, 0x000f000f, 0x64006400, 0xea; mov.b32 less, 0xe408e408; add.rn.f16x2 OUT, a, less;")
)


@triton.jit
def _from_words(words, like, PART: tl.constexpr, MACHINE: tl.constexpr):
    """Numbers in the bytes of words, (slots, words), as `like`, a tile of the same size that lies as products do: (slots, 4 words),
    byte 0 of every word first. The signed bytes, or of PART 1 their lower 4 bits less 8, of PART 2 their upper ones.
    """
    if PART > 0:
        words = words >> (4 * PART - 4)
    if MACHINE:
        if PART > 0:
            code: tl.constexpr = FOUR_BFLOAT16 if like.dtype == tl.bfloat16 else FOUR_FLOAT16
        else:
            code: tl.constexpr = SIGNED_BFLOAT16 if like.dtype == tl.bfloat16 else SIGNED_FLOAT16
        x0, x1, x2, x3 = tl.inline_asm_elementwise(
            code,
            "=&r,=&r,=&r,=&r,r,r,r",  # `like` is not read: its place is where the numbers are to lie, and with them the words
            [words, like],
            (like.dtype, like.dtype, like.dtype, like.dtype),
            is_pure=False,  # or the compiler may do it twice
            pack=2,
        )
    elif PART > 0:
        x0, x1, x2, x3 = (words & 15) - 8, ((words >> 8) & 15) - 8, ((words >> 16) & 15) - 8, ((words >> 24) & 15) - 8
    else:
        x0, x1, x2, x3 = (words << 24) >> 24, (words << 16) >> 24, (words << 8) >> 24, words >> 24
    N: tl.constexpr = words.shape[0]
    W: tl.constexpr = words.shape[1]
    return tl.reshape(tl.permute(tl.join(tl.join(x0, x1), tl.join(x2, x3)), (0, 3, 2, 1)), (N, 4 * W)).to(like.dtype)


@triton.jit
def halves(at, live, like, KIND: tl.constexpr, HALF: tl.constexpr, MACHINE: tl.constexpr):
    """Both halves of what is cached in 8 or 4 bits, read four bytes at a time, each as `_from_words` gives it.

    The words of the second half begin HALF further in 8 bits; in 4 bits they are the upper halves of the bytes.
    """
    if KIND == 2:
        first = _from_words(tl.load(at, mask=live, other=0), like, 0, MACHINE)
        second = _from_words(tl.load(at + HALF, mask=live, other=0), like, 0, MACHINE)
    else:
        words = tl.load(at, mask=live, other=-0x77777778)  # of 8, which stands for 0
        first, second = _from_words(words, like, 1, MACHINE), _from_words(words, like, 2, MACHINE)
    return first, second


@triton.jit
def across(x, like):
    """The same numbers, (slots, columns), from where a product leaves them, as `like` lies, to where the next one takes them in.

    Of each 8 slots and 8 columns a thread holds two columns of a slot, and is to hold two slots of a column. `movmatrix` exchanges
    them among the threads of a warp: that is the transpose of each such block, and taking it back moves nothing.
    """
    N: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    x = tl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r,r", [x, like], x.dtype, is_pure=False, pack=2
    )
    return tl.reshape(tl.permute(tl.reshape(x, (N // 8, 8, P // 8, 8)), (0, 3, 2, 1)), (N, P))
