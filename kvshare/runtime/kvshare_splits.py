# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Triton kernel that makes one of what the splits of a cached length found; `kvshare_kernels` has what finds it.

In: maxima, sums of weights and weighted sums of every split. Out: the attention output.
Never: reads what is cached.
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


@triton.jit(do_not_specialize=["splits"])  # one kernel for any number of them
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
    OVERLAP: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """Programs: (batch * kv heads, rows, blocks of W columns). What splits found becomes one row; S >= splits, a power of 2."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    unit, row = tl.program_id(0), tl.program_id(1)
    b, h, token, head = (unit // heads).to(tl.int64), unit % heads, row // GROUP, (unit % heads) * GROUP + row % GROUP
    split, column = tl.arange(0, S), tl.program_id(2) * W + tl.arange(0, W)
    begin = partial + (unit.to(tl.int64) * splits * rows + row) * (D + 2)
    real, inside = split < splits, column < D
    at = begin + split * rows * (D + 2)
    most = tl.load(at + D, mask=real, other=NONE)
    mass = tl.load(at + D + 1, mask=real, other=0.0)
    sums = tl.load(at[:, None] + column[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    above = tl.max(most, 0)
    added = 0.0
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        above = tl.maximum(above, sink)
        added = tl.exp2(sink - above)
    share = tl.where(real, tl.exp2(most - above), 0.0)
    own = tl.sum(share * mass, 0)
    whole = own + added
    found = tl.sum(sums * share[:, None], 0)
    factor = tl.where(whole > 0, 1 / tl.where(whole > 0, whole, 1.0), 0.0)
    found *= factor
    if SIZES:
        found *= tl.load(sizes + h * D + column, mask=inside, other=0.0)
    if VALUE_BIAS:
        found += own * factor * tl.load(value_bias + h * D + column, mask=inside, other=0.0)
    tl.store(out + b * out_b + token * out_t + head * out_h + column, found, mask=inside)
