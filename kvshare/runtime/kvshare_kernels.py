# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Triton kernels of shared attention: every tile of the cache is read once, rotated in registers, used as K and V.

In: pointers and strides; `kvshare_triton` calls them. Out: the attention output, or what each split of the cached length found.
Never: know of models.

Rows of a program are query tokens with all query heads of a KV head: row r is token r // group, head r % group of them. Positions
come in one of two forms: as rope of each slot, or, for consecutive slots, as rope of where tiles begin and within a tile. Then
queries are turned back by where slots begin, and keys by a table that stays in registers. A program goes through its slots in
rounds of some parts, each of some slots: where few rows leave columns of the products empty, each part takes columns of its own, so
that turning queries and the softmax, which runs along, take no more work for a round than for a part.
"""

# ruff: noqa: N803, N806, RUF005
from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as error:  # whoever chooses this file asks first
    raise ImportError("the kernels for GPUs need triton: pip install triton, or set KVSHARE_ATTENTION=eager") from error

from .kvshare_splits import LOG2E, NONE


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
def _turned(first, second, cosine1, sine1, cosine2, sine2):
    """Rope on the two numbers of each pair; tables have what either number is multiplied by, too."""
    return first * cosine1 - second * sine2, second * cosine2 + first * sine1


@triton.jit
def _added(sums, numbers, weight, kind, WIDE: tl.constexpr):
    """Weighted sums, (rows, columns), with the numbers of a part, (slots, columns)."""
    return tl.dot(tl.trans(weight), _factor(numbers, kind, WIDE), sums, input_precision="ieee")


@triton.jit
def _prefetch(begin, step, slot, slots, D: tl.constexpr, LINES: tl.constexpr):
    """Have lines of 128 bytes brought into the device's cache, from a slot on; numbers have 16 bits."""
    each: tl.constexpr = max(1, D // 64)
    line = tl.arange(0, LINES)
    at = begin + tl.minimum(slot + line // each, slots - 1).to(tl.int64) * step + line % each * 64
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def _joined(x, T: tl.constexpr, W: tl.constexpr):
    """(T * W, columns) summed over T: (W, columns)."""
    P: tl.constexpr = x.shape[1]
    return x if T == 1 else tl.sum(tl.reshape(x, (T, W, P)), 0)


@triton.jit
def _turned_in_pairs(first, second, cosine1, sine1, cosine2, against2):
    """As `_turned`, on bfloat16 or float16 two at a time: half the instructions, each result rounded once more.

    `against2` is the negative of `sine2`: in 16 bits a difference takes an instruction more than a sum.
    """
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
    OVERLAP: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
    TILE: tl.constexpr,
    LINES: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
):
    """Programs: (blocks of M rows, batch * kv heads, splits). T parts of N slots in a round, for at most M / T rows where T > 1;
    TILE slots of a tile, whole rounds; P >= PAIRS and R >= D - 2 PAIRS, powers of 2.
    """
    if OVERLAP:  # launched while the kernel before ends, it waits for that; what joins splits may be launched, and waits for this
        tl.extra.cuda.gdc_wait()
        if SPLIT:
            tl.extra.cuda.gdc_launch_dependents()
    W: tl.constexpr = M // T
    unit, split = tl.program_id(1), tl.program_id(2)
    b, h = (unit // heads).to(tl.int64), unit % heads
    kind = query.dtype.element_ty
    begin_s = shared + b * shared_b + h * shared_h
    rounds = tl.cdiv(slots, N * T)
    lowest, highest = rounds * split // splits, rounds * (split + 1) // splits
    if PACKED and KIND == 0:  # while queries and tables are made ready
        _prefetch(begin_s, shared_t, lowest * N * T, slots, D, LINES)
    column = tl.arange(0, M)
    part = column // W
    row = tl.program_id(0) * M + column % W
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

    # everything is read before any of it is waited for
    if not TABLED and PAIRS > 0:
        offset = tl.arange(0, N)[:, None] * 2 * PAIRS + pair[None, :]
        cosine1 = tl.load(within + offset, mask=pairs[None, :], other=0.0)
        sine1 = tl.load(within + offset + PAIRS, mask=pairs[None, :], other=0.0)
        if T > 1:
            ahead = within + (part * N * 2 * PAIRS)[None, :] + pair[:, None]
            turn = tl.load(ahead, mask=pairs[:, None], other=0.0)
            over = tl.load(ahead + PAIRS, mask=pairs[:, None], other=0.0)
    if NORM:
        norm1 = tl.load(norm + first, mask=pairs, other=0.0)
        norm2 = tl.load(norm + second, mask=pairs, other=0.0)
        norm3 = tl.load(norm + rest, mask=rests, other=0.0)
    begin_q = query + b * query_b + head * query_h + token * query_t
    q1 = tl.load(begin_q[None, :] + first[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q2 = tl.load(begin_q[None, :] + second[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q3 = tl.load(begin_q[None, :] + rest[:, None], mask=real[None, :] & rests[:, None], other=0.0)

    if NORM:
        norm1, norm2, norm3 = norm1[None, :], norm2[None, :], norm3[None, :]
        ones = tl.full((P, M), 1.0, kind)
    if not TABLED and PAIRS > 0:
        cosine2, sine2 = cosine1, sine1
        if NORM:
            cosine1, sine1, cosine2, sine2 = cosine1 * norm1, sine1 * norm1, cosine2 * norm2, sine2 * norm2
        if PACKED:
            cosine1, sine1, cosine2, sine2 = cosine1.to(kind), sine1.to(kind), cosine2.to(kind), -sine2.to(kind)
            # a product with 1 gives tables the layout of products, and with them keys, which then pass no shared memory
            same = (tl.arange(0, N)[:, None] == tl.arange(0, N)[None, :]).to(kind)
            cosine1, sine1, sine2 = tl.dot(same, cosine1).to(kind), tl.dot(same, sine1).to(kind), tl.dot(same, sine2).to(kind)
            cosine2 = tl.dot(same, cosine2).to(kind) if NORM else cosine1
        if T > 1:  # queries of a part are turned back by where it begins among the parts
            q1, q2 = _turned(q1.to(tl.float32), q2.to(tl.float32), turn, -over, turn, -over)

    if SIZES:
        size1 = tl.load(sizes + h * D + first, mask=pairs, other=0.0)[None, :]
        size2 = tl.load(sizes + h * D + second, mask=pairs, other=0.0)[None, :]
        size3 = tl.load(sizes + h * D + rest, mask=rests, other=0.0)[None, :]

    most = tl.full((M,), NONE, tl.float32)
    mass = tl.zeros((M,), tl.float32)
    sum1, sum2, sum3 = tl.zeros((M, P), tl.float32), tl.zeros((M, P), tl.float32), tl.zeros((M, R), tl.float32)

    if CAUSAL:  # the last query sees all slots
        last = slots - 1 - (rows - 1) // GROUP + tl.minimum(tl.program_id(0) * M + M, rows) // GROUP
        highest = tl.minimum(highest, tl.cdiv(last + 1, N * T))
    begin_m = mask + b * mask_b + token * mask_t
    inside = tl.arange(0, N)
    if MASK == 1:  # rounds that no row sees at the ends of the range are not read
        low, high = highest, lowest
        for index in range(lowest, highest):
            slot = (index * T + part)[None, :] * N + inside[:, None]
            seen = tl.load(begin_m[None, :] + slot, mask=real[None, :] & (slot < slots), other=0)
            any_seen = tl.max(seen.to(tl.int32)) > 0
            low = tl.where(any_seen, tl.minimum(low, index), low)
            high = tl.where(any_seen, index + 1, high)
        lowest, highest = low, high

    for index in range(lowest, highest):
        r1, r2 = q1, q2
        if PAIRS > 0 and not TABLED:
            start = cosines + b * table_b + index * N * T // TILE * 2 * PAIRS + pair
            back = tl.load(start, mask=pairs, other=0.0)
            aside = -tl.load(start + PAIRS, mask=pairs, other=0.0)
            if N * T < TILE:
                inner = within + index * N * T % TILE * 2 * PAIRS + pair
                further, apart = tl.load(inner, mask=pairs, other=0.0), -tl.load(inner + PAIRS, mask=pairs, other=0.0)
                back, aside = _turned(back, aside, further, apart, further, apart)
            cosine, sine = back[:, None], aside[:, None]
            r1, r2 = _turned(q1.to(tl.float32), q2.to(tl.float32), cosine, sine, cosine, sine)
        r1, r2 = _factor(r1, kind, WIDE), _factor(r2, kind, WIDE)
        score = tl.zeros((N, M), tl.float32)
        rounded = tl.full((N, M), 1.0, tl.float32)  # scales of what is cached in few bits
        read = ()
        for t in tl.static_range(T):
            slot = (index * T + t) * N + inside
            there = slot < slots
            at = begin_s + tl.cast(shared_t, tl.int64) * (index * T + t) * N + inside * shared_t
            s1 = _numbers(at, first, there[:, None] & pairs[None, :], KIND, D // 2)
            s2 = _numbers(at, second, there[:, None] & pairs[None, :], KIND, D // 2)
            s3 = _numbers(at, rest, there[:, None] & rests[None, :], KIND, D // 2)
            read = read + (s1, s2, s3)
            if PACKED:
                k1, k2, k3 = s1.to(kind), s2.to(kind), s3.to(kind)
            else:
                k1, k2, k3 = s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
            # what a whole key is multiplied by multiplies scores: there are fewer of them
            times = tl.full((N, 1), 1.0, tl.float32)
            if KIND >= 2:
                scale = tl.load(scales + b * scale_b + h * scale_h + slot.to(tl.int64) * scale_t, mask=there, other=0.0)
                scale = scale.to(tl.float32)[:, None]
                rounded = scale if T == 1 else tl.where(part[None, :] == t, scale, rounded)
                if SIZES:
                    k1, k2, k3 = k1 * size1, k2 * size2, k3 * size3
                if KEY_BIAS:
                    k1, k2, k3 = k1 * scale, k2 * scale, k3 * scale
                else:
                    times = scale
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
                k3 *= norm3
            product = tl.zeros((N, M), tl.float32)
            if PAIRS > 0:
                if TABLED:
                    inner = cosines + b * table_b + slot.to(tl.int64)[:, None] * 2 * PAIRS + pair[None, :]
                    live = there[:, None] & pairs[None, :]
                    cosine = tl.load(inner, mask=live, other=0.0)
                    sine = tl.load(inner + PAIRS, mask=live, other=0.0)
                    if NORM:
                        k1, k2 = k1 * norm1, k2 * norm2
                    k1, k2 = _turned(k1, k2, cosine, sine, cosine, sine)
                elif PACKED:
                    k1, k2 = _turned_in_pairs(k1, k2, cosine1, sine1, cosine2, sine2)
                else:
                    k1, k2 = _turned(k1, k2, cosine1, sine1, cosine2, sine2)
                product = tl.dot(_factor(k1, kind, WIDE), r1, product, input_precision="ieee")
                product = tl.dot(_factor(k2, kind, WIDE), r2, product, input_precision="ieee")
            if 2 * PAIRS < D:
                product = tl.dot(_factor(k3, kind, WIDE), _factor(q3, kind, WIDE), product, input_precision="ieee")
            if KIND >= 2 or NORM:
                product *= times
            score = product if T == 1 else tl.where(part[None, :] == t, product, score)
        if CAP:
            score *= scaling
            small = tl.exp2(tl.abs(score) * (-2 * LOG2E) / softcap)
            score = tl.where(score < 0, -softcap, softcap) * (1 - small) / (1 + small) * LOG2E
        else:
            score *= scaling * LOG2E
        slot = (index * T + part)[None, :] * N + inside[:, None]
        attends = slot < slots
        if CAUSAL:
            attends = attends & (slot <= (slots - 1 - (rows - 1) // GROUP + token)[None, :])
        if MASK == 1:
            attends = attends & (tl.load(begin_m[None, :] + slot, mask=attends & real[None, :], other=0) != 0)
        if MASK == 2:
            added = tl.load(begin_m[None, :] + slot, mask=attends & real[None, :], other=0.0).to(tl.float32)
            score += tl.maximum(added, NONE) * LOG2E
        score = tl.where(attends, score, NONE)
        above = tl.maximum(most, tl.max(score, 0))
        base = tl.where(above > NONE / 2, above, 0.0)  # a row that has seen nothing yet: all its weights are 0
        shrink = tl.exp2(most - base)
        weight = tl.exp2(score - base[None, :])
        mass = mass * shrink + tl.sum(weight, 0)
        most = above
        if KIND >= 2:
            weight *= rounded
        if PAIRS > 0:
            sum1, sum2 = sum1 * shrink[:, None], sum2 * shrink[:, None]
        if 2 * PAIRS < D:
            sum3 *= shrink[:, None]
        for t in tl.static_range(T):
            own = _factor(weight if T == 1 else tl.where(part[None, :] == t, weight, 0.0), kind, WIDE)
            if PAIRS > 0:
                sum1 = _added(sum1, read[3 * t], own, kind, WIDE)
                sum2 = _added(sum2, read[3 * t + 1], own, kind, WIDE)
            if 2 * PAIRS < D:
                sum3 = _added(sum3, read[3 * t + 2], own, kind, WIDE)

    if T > 1:  # what the parts found becomes one
        over = tl.max(tl.reshape(most, (T, W)), 0)
        share = tl.exp2(most - tl.reshape(tl.broadcast_to(over[None, :], (T, W)), (M,)))
        sum1, sum2 = _joined(sum1 * share[:, None], T, W), _joined(sum2 * share[:, None], T, W)
        sum3 = _joined(sum3 * share[:, None], T, W)
        mass, most = tl.sum(tl.reshape(mass * share, (T, W)), 0), over
        row, real = tl.arange(0, W), tl.arange(0, W) < rows
        token, head = (row // GROUP).to(tl.int64), h * GROUP + row % GROUP
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
            shrink, whole = tl.full((W,), 1.0, tl.float32), mass
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
