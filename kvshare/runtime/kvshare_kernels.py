# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of shared attention: every tile of the cache is read once, rotated in registers, used as K and V.

In: pointers and strides; `kvshare_triton` calls them. Out: the attention output, or what each split of the cached length found.
Never: know of models.

Rows of a program are query tokens with all query heads of a KV head: row r is token r // group, head r % group of them. Positions
come in one of two forms: as rope of each slot, or, for consecutive slots, as rope of where tiles begin and within a tile. Then
queries are turned back once for each tile, and keys by a table that stays in registers. The softmax runs along with the tiles.
"""

# ruff: noqa: N803
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:  # whoever chooses this file asks first
    raise ImportError("the kernels for GPUs need triton: pip install triton, or set KVSHARE_ATTENTION=eager") from error

NONE = tl.constexpr(-1e30)  # a score that gives no weight
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _numbers(rows, columns, live, KIND: tl.constexpr, HALF: tl.constexpr):
    """What is cached in these columns, (slots, columns), as it is cached; of pairs of 4 bits the whole numbers."""
    if KIND == 3:
        pair = tl.load(rows[:, None] + (columns % HALF)[None, :], mask=live, other=0x88).to(tl.int32)
        found = ((pair >> (columns // HALF * 4)[None, :]) & 15) - 8
    else:
        found = tl.load(rows[:, None] + columns[None, :], mask=live, other=0)
    return found


@triton.jit
def _factor(x, kind, WIDE: tl.constexpr):
    """What a product is made of, rounded as queries are. The interpreter can do neither with bfloat16: this can."""
    if WIDE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def _turned(first, second, cosine, sine):
    """Rope on the two numbers of each pair."""
    return first * cosine - second * sine, second * cosine + first * sine


@triton.jit
def _added(sums, numbers, weight, shrink, kind, WIDE: tl.constexpr):
    """What a tile adds to weighted sums, (rows, columns)."""
    return tl.dot(tl.trans(weight), _factor(numbers, kind, WIDE), sums * shrink[:, None], input_precision="ieee")


@triton.jit
def _turned_in_pairs(first, second, cosine, sine):
    """As `_turned`, on bfloat16 or float16 two at a time: half the instructions, each result rounded once more."""
    if first.dtype == tl.bfloat16:
        turn: tl.constexpr = """{
            .reg .b32 a, b, zero;
            mov.b32 zero, 0x80008000;
            fma.rn.bf16x2 a, $3, $5, zero;
            neg.bf16x2 a, a;
            fma.rn.bf16x2 b, $3, $4, zero;
            fma.rn.bf16x2 $0, $2, $4, a;
            fma.rn.bf16x2 $1, $2, $5, b;
        }"""
    else:
        turn: tl.constexpr = """{
            .reg .b32 a, b;
            mul.rn.f16x2 a, $3, $5;
            neg.f16x2 a, a;
            mul.rn.f16x2 b, $3, $4;
            fma.rn.f16x2 $0, $2, $4, a;
            fma.rn.f16x2 $1, $2, $5, b;
        }"""
    return tl.inline_asm_elementwise(
        turn, "=&r,=&r,r,r,r,r", [first, second, cosine, sine], (first.dtype, first.dtype), is_pure=True, pack=2
    )


@triton.jit
def attend_kernel(
    query,
    shared,
    scales,
    cosines,
    within,
    mask,
    key_bias,
    value_bias,
    norm,
    sizes,
    sinks,
    out,
    partial,
    query_b,
    query_h,
    query_t,
    shared_b,
    shared_h,
    shared_t,
    scale_b,
    scale_h,
    scale_t,
    table_b,
    mask_b,
    mask_t,
    out_b,
    out_t,
    out_h,
    heads,
    rows,
    slots,
    splits,
    scaling,
    eps,
    softcap,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    ADJACENT: tl.constexpr,
    KIND: tl.constexpr,
    TABLED: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEY_BIAS: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
    NORM: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SIZES: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
):
    """Programs: (blocks of M rows, batch * kv heads, splits). N slots of a tile; P >= PAIRS and R >= D - 2 PAIRS, powers of 2."""
    unit, split = tl.program_id(1), tl.program_id(2)
    b, h = (unit // heads).to(tl.int64), unit % heads
    kind = query.dtype.element_ty
    row = tl.program_id(0) * M + tl.arange(0, M)
    real = row < rows
    token, head = (row // GROUP).to(tl.int64), h * GROUP + row % GROUP
    pair, rest = tl.arange(0, P), 2 * PAIRS + tl.arange(0, R)
    pairs, rests = pair < PAIRS, rest < D
    if ADJACENT:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + PAIRS
    if PAIRS == 0:
        first, second = pair, pair  # nothing is read of them

    begin_q = query + b * query_b + head * query_h + token * query_t
    q1 = tl.load(begin_q[None, :] + first[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q2 = tl.load(begin_q[None, :] + second[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q3 = tl.load(begin_q[None, :] + rest[:, None], mask=real[None, :] & rests[:, None], other=0.0)
    if not TABLED and PAIRS > 0:
        offset = tl.arange(0, N)[:, None] * 2 * PAIRS + pair[None, :]
        cosine = tl.load(within + offset, mask=pairs[None, :], other=0.0)
        sine = tl.load(within + offset + PAIRS, mask=pairs[None, :], other=0.0)
        if PACKED:
            cosine, sine = cosine.to(kind), sine.to(kind)

    if NORM:
        norm1 = tl.load(norm + first, mask=pairs, other=0.0)[None, :]
        norm2 = tl.load(norm + second, mask=pairs, other=0.0)[None, :]
        norm3 = tl.load(norm + rest, mask=rests, other=0.0)[None, :]
        if PACKED:
            norm1, norm2, norm3 = norm1.to(kind), norm2.to(kind), norm3.to(kind)
            ones = tl.full((P, M), 1.0, kind)

    if SIZES:
        size1 = tl.load(sizes + h * D + first, mask=pairs, other=0.0)[None, :]
        size2 = tl.load(sizes + h * D + second, mask=pairs, other=0.0)[None, :]
        size3 = tl.load(sizes + h * D + rest, mask=rests, other=0.0)[None, :]

    most = tl.full((M,), NONE, tl.float32)
    mass = tl.zeros((M,), tl.float32)
    sum1, sum2, sum3 = tl.zeros((M, P), tl.float32), tl.zeros((M, P), tl.float32), tl.zeros((M, R), tl.float32)

    tiles = tl.cdiv(slots, N)
    lowest, highest = tiles * split // splits, tiles * (split + 1) // splits
    if CAUSAL:  # the last query sees all slots
        last = slots - 1 - (rows - 1) // GROUP + tl.minimum(tl.program_id(0) * M + M, rows) // GROUP
        highest = tl.minimum(highest, tl.cdiv(last + 1, N))
    begin_m = mask + b * mask_b + token * mask_t
    if MASK == 1:  # tiles that no row sees at the ends of the range are not read
        low, high = highest, lowest
        for tile in range(lowest, highest):
            slot = tile * N + tl.arange(0, N)
            seen = tl.load(begin_m[None, :] + slot[:, None], mask=real[None, :] & (slot < slots)[:, None], other=0)
            any_seen = tl.max(seen.to(tl.int32)) > 0
            low = tl.where(any_seen, tl.minimum(low, tile), low)
            high = tl.where(any_seen, tile + 1, high)
        lowest, highest = low, high

    for tile in range(lowest, highest):
        slot = tile * N + tl.arange(0, N)
        there = slot < slots
        at = shared + b * shared_b + h * shared_h + slot.to(tl.int64) * shared_t
        s1 = _numbers(at, first, there[:, None] & pairs[None, :], KIND, D // 2)
        s2 = _numbers(at, second, there[:, None] & pairs[None, :], KIND, D // 2)
        s3 = _numbers(at, rest, there[:, None] & rests[None, :], KIND, D // 2)
        if PACKED:
            k1, k2, k3 = s1.to(kind), s2.to(kind), s3.to(kind)
        else:
            k1, k2, k3 = s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
        # what a whole key is multiplied by multiplies scores: there are fewer of them
        times = tl.full((N, 1), 1.0, tl.float32)
        if KIND >= 2:
            scale = tl.load(scales + b * scale_b + h * scale_h + slot.to(tl.int64) * scale_t, mask=there, other=0.0).to(tl.float32)
            if SIZES:
                k1, k2, k3 = k1 * size1, k2 * size2, k3 * size3
            if KEY_BIAS:
                k1, k2, k3 = k1 * scale[:, None], k2 * scale[:, None], k3 * scale[:, None]
            else:
                times = scale[:, None]
        if KEY_BIAS:
            k1 += tl.load(key_bias + h * D + first, mask=pairs, other=0.0)[None, :]
            k2 += tl.load(key_bias + h * D + second, mask=pairs, other=0.0)[None, :]
            k3 += tl.load(key_bias + h * D + rest, mask=rests, other=0.0)[None, :]
        if NORM:
            if PACKED:  # summed by the unit for products: the sums lie as scores do
                size = tl.dot(k1 * k1 + k2 * k2, ones)
            else:
                size = tl.sum(k1 * k1 + k2 * k2, 1)[:, None] if PAIRS > 0 else tl.zeros((N, 1), tl.float32)
                if 2 * PAIRS < D:
                    size += tl.sum(k3 * k3, 1)[:, None]
            times = times * tl.rsqrt(size * times * times / D + eps)
            k1, k2, k3 = k1 * norm1, k2 * norm2, k3 * norm3
        score = tl.zeros((N, M), tl.float32)
        if PAIRS > 0:
            if TABLED:
                inner = cosines + b * table_b + slot.to(tl.int64)[:, None] * 2 * PAIRS + pair[None, :]
                live = there[:, None] & pairs[None, :]
                k1, k2 = _turned(k1, k2, tl.load(inner, mask=live, other=0.0), tl.load(inner + PAIRS, mask=live, other=0.0))
                r1, r2 = _factor(q1, kind, WIDE), _factor(q2, kind, WIDE)
            else:
                start = cosines + b * table_b + tile * 2 * PAIRS + pair
                back = tl.load(start, mask=pairs, other=0.0)[:, None]
                aside = -tl.load(start + PAIRS, mask=pairs, other=0.0)[:, None]
                r1, r2 = _turned(q1.to(tl.float32), q2.to(tl.float32), back, aside)
                r1, r2 = _factor(r1, kind, WIDE), _factor(r2, kind, WIDE)
                if PACKED:
                    k1, k2 = _turned_in_pairs(k1, k2, cosine, sine)
                else:
                    k1, k2 = _turned(k1, k2, cosine, sine)
            score = tl.dot(_factor(k1, kind, WIDE), r1, score, input_precision="ieee")
            score = tl.dot(_factor(k2, kind, WIDE), r2, score, input_precision="ieee")
        if 2 * PAIRS < D:
            score = tl.dot(_factor(k3, kind, WIDE), _factor(q3, kind, WIDE), score, input_precision="ieee")
        if KIND >= 2 or NORM:
            score *= times
        if CAP:
            score *= scaling
            small = tl.exp2(tl.abs(score) * (-2 * LOG2E) / softcap)
            score = tl.where(score < 0, -softcap, softcap) * (1 - small) / (1 + small) * LOG2E
        else:
            score *= scaling * LOG2E
        attends = there[:, None]
        if CAUSAL:
            attends = attends & (slot[:, None] <= (slots - 1 - (rows - 1) // GROUP + token)[None, :])
        if MASK == 1:
            attends = attends & (tl.load(begin_m[None, :] + slot[:, None], mask=attends & real[None, :], other=0) != 0)
        if MASK == 2:
            added = tl.load(begin_m[None, :] + slot[:, None], mask=attends & real[None, :], other=0.0).to(tl.float32)
            score += tl.maximum(added, NONE) * LOG2E
        score = tl.where(attends, score, NONE)
        above = tl.maximum(most, tl.max(score, 0))
        base = tl.where(above > NONE / 2, above, 0.0)  # a row that has seen nothing yet: all its weights are 0
        shrink = tl.exp2(most - base)
        weight = tl.exp2(score - base[None, :])
        mass = mass * shrink + tl.sum(weight, 0)
        most = above
        if KIND >= 2:
            weight *= scale[:, None]
        weight = _factor(weight, kind, WIDE)
        if PAIRS > 0:
            sum1 = _added(sum1, s1, weight, shrink, kind, WIDE)
            sum2 = _added(sum2, s2, weight, shrink, kind, WIDE)
        if 2 * PAIRS < D:
            sum3 = _added(sum3, s3, weight, shrink, kind, WIDE)

    if SPLIT:
        place = partial + ((unit * splits + split).to(tl.int64) * rows + row) * (D + 2)
        tl.store(place + D, most, mask=real)
        tl.store(place + D + 1, mass, mask=real)
    else:
        place = out + b * out_b + token * out_t + head * out_h
        if SINKS:
            sink = tl.load(sinks + head, mask=real, other=NONE) * LOG2E
            above = tl.maximum(most, sink)
            shrink = tl.exp2(most - above)
            whole = mass * shrink + tl.exp2(sink - above)
        else:
            shrink, whole = tl.full((M,), 1.0, tl.float32), mass
        shrink = tl.where(whole > 0, shrink / tl.where(whole > 0, whole, 1.0), 0.0)[:, None]
        sum1, sum2, sum3 = sum1 * shrink, sum2 * shrink, sum3 * shrink
        if SIZES:
            sum1, sum2, sum3 = sum1 * size1, sum2 * size2, sum3 * size3
        if VALUE_BIAS:
            share = mass[:, None] * shrink
            sum1 += share * tl.load(value_bias + h * D + first, mask=pairs, other=0.0)[None, :]
            sum2 += share * tl.load(value_bias + h * D + second, mask=pairs, other=0.0)[None, :]
            sum3 += share * tl.load(value_bias + h * D + rest, mask=rests, other=0.0)[None, :]
    tl.store(place[:, None] + first[None, :], sum1, mask=real[:, None] & pairs[None, :])
    tl.store(place[:, None] + second[None, :], sum2, mask=real[:, None] & pairs[None, :])
    tl.store(place[:, None] + rest[None, :], sum3, mask=real[:, None] & rests[None, :])


@triton.jit
def join_kernel(
    partial,
    value_bias,
    sizes,
    sinks,
    out,
    out_b,
    out_t,
    out_h,
    heads,
    rows,
    splits,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    VALUE_BIAS: tl.constexpr,
    SINKS: tl.constexpr,
    SIZES: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Programs: (batch * kv heads, rows, blocks of W columns). What splits found becomes one row; S >= splits, a power of 2; of
    these, C are summed at a time.
    """
    unit, row = tl.program_id(0), tl.program_id(1)
    b, h, token, head = (unit // heads).to(tl.int64), unit % heads, row // GROUP, (unit % heads) * GROUP + row % GROUP
    split, column = tl.arange(0, S), tl.program_id(2) * W + tl.arange(0, W)
    begin = partial + (unit.to(tl.int64) * splits * rows + row) * (D + 2)
    real, inside = split < splits, column < D
    most = tl.load(begin + split * rows * (D + 2) + D, mask=real, other=NONE)
    mass = tl.load(begin + split * rows * (D + 2) + D + 1, mask=real, other=0.0)
    above = tl.max(most, 0)
    added = 0.0
    if SINKS:
        sink = tl.load(sinks + head) * LOG2E
        above = tl.maximum(above, sink)
        added = tl.exp2(sink - above)
    own = tl.sum(tl.where(real, tl.exp2(most - above), 0.0) * mass, 0)
    whole = own + added
    found = tl.zeros((W,), tl.float32)
    for start in range(0, splits, C):
        part = start + tl.arange(0, C)
        at = begin + part * rows * (D + 2)
        share = tl.exp2(tl.load(at + D, mask=part < splits, other=NONE) - above)
        sums = tl.load(at[:, None] + column[None, :], mask=(part < splits)[:, None] & inside[None, :], other=0.0)
        found += tl.sum(sums * share[:, None], 0)
    factor = tl.where(whole > 0, 1 / tl.where(whole > 0, whole, 1.0), 0.0)
    found *= factor
    if SIZES:
        found *= tl.load(sizes + h * D + column, mask=inside, other=0.0)
    if VALUE_BIAS:
        found += own * factor * tl.load(value_bias + h * D + column, mask=inside, other=0.0)
    tl.store(out + b * out_b + token * out_t + head * out_h + column, found, mask=inside)
