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
from .kvshare_tiles import (
    across,
    factor,
    halves,
    held,
    joined,
    numbers,
    prefetch,
    scales_of,
    summed,
    turned,
    turned_back,
    turned_in_pairs,
)


# These grow with the cache: whether 16 divides them makes no faster kernel, but would make another one.
@triton.jit(do_not_specialize=["slots", "splits", "scale_b", "scale_h", "mask_b", "mask_t"])
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
    shared_t: tl.constexpr,
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
    norm_offset,
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
    WORDS: tl.constexpr,
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
    if PACKED == 2:  # while queries and tables are made ready
        width: tl.constexpr = D // (KIND - 1 if KIND else 1) // (4 if WORDS else 1)
        prefetch(begin_s, shared_t, lowest * N * T, slots, width, LINES)
    column = tl.arange(0, M)
    part = column // W
    row = tl.program_id(0) * M + column % W
    real = row < rows
    token, head = (row // GROUP).to(tl.int64), h * GROUP + row % GROUP
    pair, rest = tl.arange(0, P), 2 * PAIRS + tl.arange(0, R)
    inside = tl.arange(0, N)
    if WORDS:  # columns of a tile are byte 0 of every word, then byte 1 of every word, ...
        word, pair = tl.arange(0, P // 4), pair % (P // 4) * 4 + pair // (P // 4)
        like = tl.zeros((N, P // 4), kind if PACKED else tl.float32)
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
        norm1 = tl.load(norm + first, mask=pairs, other=0.0).to(tl.float32) + norm_offset
        norm2 = tl.load(norm + second, mask=pairs, other=0.0).to(tl.float32) + norm_offset
        norm3 = tl.load(norm + rest, mask=rests, other=0.0).to(tl.float32) + norm_offset
    if SIZES:
        size1 = tl.load(sizes + h * D + first, mask=pairs, other=0.0)
        size2 = tl.load(sizes + h * D + second, mask=pairs, other=0.0)
        size3 = tl.load(sizes + h * D + rest, mask=rests, other=0.0)
    if KEY_BIAS:
        bias1 = tl.load(key_bias + h * D + first, mask=pairs, other=0.0).to(tl.float32)
        bias2 = tl.load(key_bias + h * D + second, mask=pairs, other=0.0).to(tl.float32)
        bias3 = tl.load(key_bias + h * D + rest, mask=rests, other=0.0).to(tl.float32)
    begin_q = query + b * query_b + head * query_h + token * query_t
    q1 = tl.load(begin_q[None, :] + first[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q2 = tl.load(begin_q[None, :] + second[:, None], mask=real[None, :] & pairs[:, None], other=0.0)
    q3 = tl.load(begin_q[None, :] + rest[:, None], mask=real[None, :] & rests[:, None], other=0.0)

    # What every number of a key is multiplied by is multiplied into tables, and into the queries of what does not turn; what is
    # added to keys turns once, and is multiplied by queries apart from them. So what is cached is turned as it is.
    if NORM:
        norm1, norm2 = norm1[None, :], norm2[None, :]
        ones = tl.full((P, M), 1.0, kind)
        q3 = q3.to(tl.float32) * norm3[:, None]
    if not TABLED:
        if KEY_BIAS:
            always = tl.sum(q3.to(tl.float32) * bias3[:, None], 0)[None, :]
        if SIZES:
            q3 = q3.to(tl.float32) * size3[:, None]
    q3 = factor(q3, kind, WIDE)
    if NORM and PACKED and KEY_BIAS:  # what squares of keys hold of biases: their own, and twice their products with the rest
        near1, near2 = bias1.to(kind).to(tl.float32), bias2.to(kind).to(tl.float32)
        alone = tl.sum(near1 * near1 + near2 * near2, 0)
        twice1, twice2 = (2 * near1[:, None] * ones).to(kind), (2 * near2[:, None] * ones).to(kind)
    if KEY_BIAS:
        bias1, bias2, bias3 = bias1[None, :], bias2[None, :], bias3[None, :]
    if SIZES:
        size1, size2, size3 = size1[None, :], size2[None, :], size3[None, :]
    if not TABLED and PAIRS > 0:
        cosine2, sine2 = cosine1, sine1
        if NORM:
            cosine1, sine1, cosine2, sine2 = cosine1 * norm1, sine1 * norm1, cosine2 * norm2, sine2 * norm2
        if KEY_BIAS:
            ahead1, ahead2 = turned(bias1, bias2, cosine1, sine1, cosine2, sine2)
            ahead1, ahead2 = factor(ahead1, kind, WIDE), factor(ahead2, kind, WIDE)
        if SIZES:
            cosine1, sine1, cosine2, sine2 = cosine1 * size1, sine1 * size1, cosine2 * size2, sine2 * size2
        if PACKED:
            cosine1, sine1, cosine2, against2 = cosine1.to(kind), sine1.to(kind), cosine2.to(kind), -sine2.to(kind)
            # a product with 1 gives tables the layout of products, and with them keys, which then pass no shared memory
            same = (tl.arange(0, N)[:, None] == tl.arange(0, N)[None, :]).to(kind)
            cosine1, sine1, against2 = tl.dot(same, cosine1).to(kind), tl.dot(same, sine1).to(kind), tl.dot(same, against2).to(kind)
            cosine2 = tl.dot(same, cosine2).to(kind) if NORM or SIZES else cosine1
            if KEY_BIAS:
                ahead1, ahead2 = tl.dot(same, ahead1).to(kind), tl.dot(same, ahead2).to(kind)
            if WORDS:
                like = tl.dot(same, (inside[:, None] + word[None, :]).to(kind)).to(kind)
        if T > 1:  # queries of a part are turned back by where it begins among the parts
            q1, q2 = turned_back(q1.to(tl.float32), q2.to(tl.float32), turn, over)
    if PACKED and SIZES:
        size1, size2 = size1.to(kind), size2.to(kind)

    most, mass = tl.full((M,), NONE, tl.float32), tl.zeros((M,), tl.float32)
    # Of words, sums lie as scores do, a column for each row: that takes half the registers. Numbers that are used as they are read
    # would no longer be read ahead.
    sum1 = tl.zeros((P, M) if WORDS else (M, P), tl.float32)
    sum2, sum3 = sum1, tl.zeros((M, R), tl.float32)

    if CAUSAL:  # the last query sees all slots
        last = slots - 1 - (rows - 1) // GROUP + tl.minimum(tl.program_id(0) * M + M, rows) // GROUP
        highest = tl.minimum(highest, tl.cdiv(last + 1, N * T))
    begin_m = mask + b * mask_b + token * mask_t
    if MASK == 1:  # rounds that no row sees at the ends of the range are not read
        low, high = highest, lowest
        for index in range(lowest, highest):
            slot = (index * T + part)[None, :] * N + inside[:, None]
            seen = tl.load(begin_m[None, :] + slot, mask=real[None, :] & (slot < slots), other=0)
            any_seen = tl.max(seen.to(tl.int32)) > 0
            low = tl.where(any_seen, tl.minimum(low, index), low)
            high = tl.where(any_seen, index + 1, high)
        lowest, highest = low, high

    if KIND >= 2:  # scales are read a round before they are needed
        begin_c = scales + b * scale_b + h * scale_h
        coming = scales_of(begin_c, scale_t, lowest * T + part, inside, slots, N)

    for index in range(lowest, highest):
        r1, r2 = q1, q2
        if PAIRS > 0 and not TABLED:
            start = cosines + b * table_b + index * N * T // TILE * 2 * PAIRS + pair
            cosine, sine = tl.load(start, mask=pairs, other=0.0), tl.load(start + PAIRS, mask=pairs, other=0.0)
            if N * T < TILE:
                inner = within + index * N * T % TILE * 2 * PAIRS + pair
                further, apart = tl.load(inner, mask=pairs, other=0.0), tl.load(inner + PAIRS, mask=pairs, other=0.0)
                cosine, sine = turned(cosine, sine, further, apart, further, apart)
            r1, r2 = turned_back(q1.to(tl.float32), q2.to(tl.float32), cosine[:, None], sine[:, None])
        r1, r2 = factor(r1, kind, WIDE), factor(r2, kind, WIDE)
        if KEY_BIAS and not TABLED:  # the same for all parts: in each, biases turn by where slots lie in it
            added_up = tl.zeros((N, M), tl.float32)
            if PAIRS > 0:
                added_up = tl.dot(ahead1, r1, added_up, input_precision="ieee")
                added_up = tl.dot(ahead2, r2, added_up, input_precision="ieee")
            if 2 * PAIRS < D:
                added_up += always
        if KIND >= 2:
            rounded, coming = coming.to(tl.float32), scales_of(begin_c, scale_t, index * T + T + part, inside, slots, N)
        score, square, mixed = tl.zeros((N, M), tl.float32), tl.zeros((N, M), tl.float32), tl.zeros((N, M), tl.float32)
        read = ()
        for t in tl.static_range(T):
            slot = tl.minimum((index * T + t) * N + inside, slots - 1)  # past the end the last is read again, and given no weight
            at = begin_s + slot.to(tl.int64) * shared_t
            if WORDS:
                live = (word < PAIRS // 4)[None, :]
                s1, s2 = halves(at[:, None] + word[None, :], live, like, KIND, PAIRS // 4, PACKED == 2)
                s3 = tl.zeros((N, R), like.dtype)  # there is no rest
            else:
                s1 = numbers(at, first, pairs[None, :], KIND, D // 2)
                s2 = numbers(at, second, pairs[None, :], KIND, D // 2)
                s3 = numbers(at, rest, rests[None, :], KIND, D // 2)
            v1, v2 = s1, s2
            if WORDS and PACKED == 2:
                v1, v2 = across(s1, sine1), across(s2, sine1)
                s1, s2 = held(s1, sine1), held(s2, sine1)  # triton 3.6 took bytes that are joined for half as wide
            read = read + (v1, v2, s3)
            if PACKED:
                k1, k2, k3 = s1.to(kind), s2.to(kind), s3.to(kind)
            else:
                k1, k2, k3 = s1.to(tl.float32), s2.to(tl.float32), s3.to(tl.float32)
            w1, w2, w3 = k1, k2, k3  # whole keys, where they are needed
            if (TABLED or NORM) and SIZES:
                w1, w2, w3 = w1 * size1, w2 * size2, w3 * size3
            if NORM and PACKED:  # squares are summed by the unit for products: the sums lie as scores do
                found = tl.dot(w1 * w1 + w2 * w2, ones)
                square = found if T == 1 else tl.where(part[None, :] == t, found, square)
                if KEY_BIAS:
                    found = tl.dot(w2, twice2, tl.dot(w1, twice1))
                    mixed = found if T == 1 else tl.where(part[None, :] == t, found, mixed)
            elif TABLED or NORM:
                if KIND >= 2:
                    scale = tl.load(begin_c + slot.to(tl.int64) * scale_t).to(tl.float32)[:, None]
                    w1, w2, w3 = w1 * scale, w2 * scale, w3 * scale
                if KEY_BIAS:
                    w1, w2, w3 = w1 + bias1, w2 + bias2, w3 + bias3
                if NORM:
                    found = tl.sum(w1 * w1 + w2 * w2, 1)[:, None] if PAIRS > 0 else tl.zeros((N, 1), tl.float32)
                    if 2 * PAIRS < D:
                        found += tl.sum(w3 * w3, 1)[:, None]
                    square = tl.where(part[None, :] == t, found, square)
            if TABLED:
                inner = cosines + b * table_b + slot.to(tl.int64)[:, None] * 2 * PAIRS + pair[None, :]
                cosine, sine = tl.load(inner, pairs[None, :], other=0.0), tl.load(inner + PAIRS, pairs[None, :], other=0.0)
                if NORM:
                    w1, w2 = w1 * norm1, w2 * norm2
                k1, k2 = turned(w1, w2, cosine, sine, cosine, sine)
                k3 = w3
            elif PACKED and PAIRS > 0:
                k1, k2 = turned_in_pairs(k1, k2, cosine1, sine1, cosine2, against2, PACKED == 2)
            elif PAIRS > 0:
                k1, k2 = turned(k1, k2, cosine1, sine1, cosine2, sine2)
            product = tl.zeros((N, M), tl.float32)
            if PAIRS > 0:
                product = tl.dot(factor(k1, kind, WIDE), r1, product, input_precision="ieee")
                product = tl.dot(factor(k2, kind, WIDE), r2, product, input_precision="ieee")
            if 2 * PAIRS < D:
                product = tl.dot(factor(k3, kind, WIDE), q3, product, input_precision="ieee")
            score = product if T == 1 else tl.where(part[None, :] == t, product, score)
        if not TABLED:
            if KIND >= 2:
                score *= rounded
            if KEY_BIAS:
                score += added_up
        if NORM:
            if PACKED and KIND >= 2:  # of keys, |scale w + bias|^2
                square *= rounded * rounded
                mixed *= rounded
            if PACKED and KEY_BIAS:
                square = tl.maximum(square + mixed + alone, 0.0)
            score *= tl.rsqrt(square / D + eps)
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
            along = shrink[None, :] if WORDS else shrink[:, None]
            sum1, sum2 = sum1 * along, sum2 * along
        if 2 * PAIRS < D:
            sum3 *= shrink[:, None]
        for t in tl.static_range(T):
            own = factor(weight if T == 1 else tl.where(part[None, :] == t, weight, 0.0), kind, WIDE)
            if PAIRS > 0:
                sum1 = summed(sum1, read[3 * t], own, kind, WIDE, WORDS)
                sum2 = summed(sum2, read[3 * t + 1], own, kind, WIDE, WORDS)
            if 2 * PAIRS < D:
                sum3 = summed(sum3, read[3 * t + 2], own, kind, WIDE, False)

    if WORDS:
        sum1, sum2 = tl.trans(sum1), tl.trans(sum2)
    if T > 1:  # what the parts found becomes one
        over = tl.max(tl.reshape(most, (T, W)), 0)
        share = tl.exp2(most - tl.reshape(tl.broadcast_to(over[None, :], (T, W)), (M,)))
        sum1, sum2 = joined(sum1 * share[:, None], T, W), joined(sum2 * share[:, None], T, W)
        sum3 = joined(sum3 * share[:, None], T, W)
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
            sink = tl.load(sinks + head, mask=real, other=NONE).to(tl.float32) * LOG2E
            above = tl.maximum(most, sink)
            shrink = tl.exp2(most - above)
            whole = mass * shrink + tl.exp2(sink - above)
        else:
            shrink, whole = tl.full((W,), 1.0, tl.float32), mass
        shrink = tl.where(whole > 0, shrink / tl.where(whole > 0, whole, 1.0), 0.0)[:, None]
        sum1, sum2, sum3 = sum1 * shrink, sum2 * shrink, sum3 * shrink
        if SIZES:
            sum1 *= tl.load(sizes + h * D + first, mask=pairs, other=0.0)[None, :]
            sum2 *= tl.load(sizes + h * D + second, mask=pairs, other=0.0)[None, :]
            sum3 *= tl.load(sizes + h * D + rest, mask=rests, other=0.0)[None, :]
        if VALUE_BIAS:
            share = mass[:, None] * shrink
            sum1 += share * tl.load(value_bias + h * D + first, mask=pairs, other=0.0)[None, :]
            sum2 += share * tl.load(value_bias + h * D + second, mask=pairs, other=0.0)[None, :]
            sum3 += share * tl.load(value_bias + h * D + rest, mask=rests, other=0.0)[None, :]
    tl.store(place[:, None] + first[None, :], sum1, mask=real[:, None] & pairs[None, :])
    tl.store(place[:, None] + second[None, :], sum2, mask=real[:, None] & pairs[None, :])
    tl.store(place[:, None] + rest[None, :], sum3, mask=real[:, None] & rests[None, :])
