# Copyright 2026 The kvshare authors. Licensed under the Apache License, Version 2.0.
"""Shared attention on a GPU, by the kernels of `kvshare_kernels` and `kvshare_splits`.

In: rotated queries and what is cached. Out: the attention output. One kernel serves decoding, split over the cached length and put
together by a second one, and prefill. Never: waits for the device once it has run, so that CUDA graphs can hold it.
"""

from __future__ import annotations

import functools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kvshare_bits import dequantise, quantise
from .kvshare_channels import Channels, with_biases
from .kvshare_cpu import TILE, in_rows  # tables are made for tiles of one size
from .kvshare_kernels import attend_kernel
from .kvshare_splits import join_kernel

LEAST, MOST = 4, 128  # rounds of a program, and splits of a head: fewer or more are not worth the sums that have to be joined
LINES = 32  # of 128 bytes that a program asks for before it needs them
FAST = 30.0  # GB/s of memory for each processor: an H100 has 25, an H200 37


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in triton's interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def problem_on(device: torch.device, dtype: torch.dtype, head_dim: int, width: int, bits: int | None = None) -> str | None:
    """Why the kernel is of no use on a device, or None: it is run once on numbers whose attention stock torch can compute, cached
    in `bits` bits by channels where they are given.
    """
    if device.type != "cuda" and not interpreted():
        return f"triton has no kernels for {device.type}"
    generator = torch.Generator("cpu").manual_seed(0)

    def drawn(draw: Any, *shape: int) -> Tensor:
        return draw(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    query, shared = (drawn(torch.randn, 1, 2, n, head_dim).to(dtype) for n in (1, 3 * TILE - 1))
    turned = torch.zeros(2, 3 + TILE, width // 2, dtype=torch.float32, device=device)
    turned[0] = 1
    tables = turned.transpose(0, 1)
    options: dict[str, Any] = dict.fromkeys(("mask", "key_bias", "value_bias", "norm", "softcap", "sinks"))
    numbers = shared
    if bits is not None:
        channels = Channels(*(drawn(torch.rand, 2, 1, head_dim) + begin for begin in (-0.5, 0.5)))
        numbers, scales = quantise(shared, bits, channels)
        shared = dequantise(numbers, scales, dtype, channels)
        options |= {"scales": scales[..., 0], **with_biases(channels, None, None)}
    try:
        found = attend_on_gpu(
            query, numbers, (tables[None, :3], tables[3:]) if width else None, scaling=0.1, adjacent=False, eps=0.0, **options
        )
    except Exception as error:  # whatever a compiler or a driver says
        return f"the kernel for GPUs fails here: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    expected = torch.nn.functional.scaled_dot_product_attention(query.float(), shared.float(), shared.float(), scale=0.1)
    off = float((found.float().transpose(1, 2) - expected).norm() / expected.norm())
    return None if off < 0.02 else f"the kernel for GPUs is off by {off:.1%} here"


def _parts(whole: int, size: int) -> int:
    return -(-whole // size)


def _power(number: int) -> int:
    """The least power of 2 that is no smaller."""
    return 1 << max(0, number - 1).bit_length()


def _splits(rounds: int, most: int) -> int:
    """Into how many programs the rounds of a head are split: as few as make the longest as short as `most` would."""
    most = max(1, min(most, _parts(rounds, LEAST), MOST))
    return _parts(rounds, _parts(rounds, most))


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _fast(device: torch.device) -> bool:
    """Whether memory gives a processor more than few programs can take in."""
    properties = None if device.type == "cpu" else torch.cuda.get_device_properties(device)
    kilohertz, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))  # not in every torch
    return kilohertz * width / 4e6 > FAST * _processors(device)  # two bits a wire and cycle


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends: on NVIDIA's devices from Hopper on."""
    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (9, 0)


def _packs(query: Tensor, tabled: bool, pairs: int, head_dim: int, norm: Tensor | None) -> int:
    """Whether keys are turned two at a time, in 16 bits: 0 no, 1 by plain operations, which is for the interpreter, 2 by machine
    code. Squares, which norms need, stay in range in bfloat16 alone.
    """
    if query.dtype == torch.float32 or tabled or (norm is not None and (query.dtype == torch.float16 or 2 * pairs < head_dim)):
        return 0
    return 2 if not interpreted() else int(query.dtype == torch.float16)


def _in_words(shared: Tensor, pairs: int, head_dim: int, adjacent: bool) -> Tensor | None:
    """What is cached in 8 or 4 bits, four bytes as one number, or None: all numbers turn, halves of heads with one another."""
    if adjacent or 2 * pairs != head_dim or pairs % 4 or pairs <= 16:
        return None
    if any(number % 4 for number in (*shared.stride()[:-1], shared.storage_offset())):
        return None
    return shared.view(torch.int32)


class Launch(NamedTuple):
    """Rows of a block, slots of a part, parts of a round; warps of a program, stages of its loads; the most programs of a
    processor, each of which makes tables and queries ready.
    """

    block: int
    part: int
    parts: int
    warps: int
    stages: int
    programs: int


@functools.cache
def _launch(head_dim: int, rows: int, packed: bool, busy: bool) -> Launch:
    """Of what was tried on an H100 and an H200 for head_dim 64 and 128, the fastest. Wider heads, and keys that are not turned two
    at a time, take more warps, so that most of what a program holds stays in registers. Where programs are `busy`, for integers
    have to be made numbers or memory is fast, and where a round is one part, two of them share what one would leave idle.
    """
    if rows > 16:
        return Launch(min(64, _power(rows)), 64, 1, 4 if head_dim <= 64 else 8, 2, 4)
    block = 8 if rows <= 8 else 16
    parts = 2 if 2 * rows <= block else 1
    warps = 4 if head_dim > 128 else 1 if packed or head_dim <= 64 else 2
    many = busy or parts == 1
    return Launch(block, 16, parts, warps, 4 if head_dim <= 64 and not many else 3, 8 if many else 4)


def attend_on_gpu(
    query: Tensor,
    shared: Tensor,
    tables: tuple[Tensor, Tensor] | Tensor | None,
    *,
    scaling: float,
    adjacent: bool,
    mask: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    norm: Tensor | None,
    eps: float,
    norm_offset: float = 0.0,
    softcap: float | None,
    sinks: Tensor | None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Attention of any number of queries over what is cached.

    Args:
        query: rotated, (batch, query heads, new tokens, head_dim); float32, bfloat16 or float16.
        shared: as cached, (batch, kv heads, slots, head_dim), in the dtype of queries; with `scales` int8, or uint8 of half the
            width, whose lower 4 bits hold the first half of a head and whose upper ones the second, plus 8.
        tables: rope of every slot, (batch or 1, slots, 2, pairs); or of where tiles begin, (batch or 1, tiles, 2, pairs), and of
            the slots of a tile, (slots of a tile, 2, pairs), a power of 2: cosines and sines, float32. None: keys do not rotate.
        scaling: of scores.
        adjacent: how rope pairs lie.
        mask: (batch or 1, 1, new tokens, slots), boolean (whether to attend) or added to scores.
        key_bias, value_bias: (kv heads, head_dim), of any dtype.
        norm: weights of the norm of keys, (head_dim), of any dtype; `norm_offset` is added to them.
        eps: of the norm.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a score for each query head that takes weight and gives no value, (query heads), of any dtype.
        scales: of what is cached, (batch, kv heads, slots), float16.
        sizes: of channels, by which integers are multiplied, too, (kv heads, head_dim), float32; their middles are in the biases.
        causal: whether new tokens, which are the last slots, see no later ones.

    Returns:
        (batch, new tokens, query heads, head_dim), in the dtype of queries; 0 where a query attends to nothing.
    """
    batch, heads, slots = shared.shape[:3]
    queries, new, head_dim = query.shape[1:]
    group, rows = queries // heads, queries // heads * new
    kind = 0 if scales is None else 2 if shared.shape[-1] == head_dim else 3
    tabled = isinstance(tables, Tensor)
    every = tables if isinstance(tables, Tensor) else None if tables is None else tables[0]
    pairs = 0 if every is None else every.shape[-1]
    packed = _packs(query, tabled, pairs, head_dim, norm)
    launch = _launch(head_dim, rows, packed > 0, kind > 0 or _fast(query.device))
    tile = tables[1].shape[0] if isinstance(tables, tuple) else launch.part * launch.parts
    part, parts = min(launch.part, tile), max(1, min(launch.parts, tile // launch.part))
    blocks, rounds = _parts(rows, launch.block), _parts(slots, part * parts)
    splits = _splits(rounds, launch.programs * _processors(query.device) // (blocks * batch * heads))
    stages = launch.stages if rounds > 8 * splits else min(launch.stages, 3)  # what is asked for early delays what is needed first
    query, shared = in_rows(query), in_rows(shared)
    words = _in_words(shared, pairs, head_dim, adjacent) if kind else None
    shared = shared if words is None else words
    if mask is not None:
        mask = in_rows(mask.expand(batch, 1, new, slots))
        mask = mask.view(torch.int8) if mask.dtype == torch.bool else mask
    wide = interpreted() and query.dtype == torch.bfloat16
    out = torch.empty(batch, new, queries, head_dim, device=query.device, dtype=torch.float32 if wide else query.dtype)
    size = batch * heads * splits * rows * (head_dim + 2) if splits > 1 else 1
    partial = torch.empty(size, device=query.device, dtype=torch.float32)
    none = partial  # stands for what there is not
    weights = [none if x is None else x.contiguous() for x in (key_bias, value_bias, norm, sizes, sinks)]
    options: dict[str, Any] = {"VALUE_BIAS": value_bias is not None, "SINKS": sinks is not None, "SIZES": sizes is not None}
    options |= {"GROUP": group, "D": head_dim, "OVERLAP": _overlaps(query.device)}
    launched = {"launch_pdl": True} if options["OVERLAP"] else {}
    table = none if every is None else every.contiguous()
    attend_kernel[(blocks, batch * heads, splits)](
        query,
        shared,
        none if scales is None else scales,
        table,
        none if tables is None or isinstance(tables, Tensor) else tables[1].contiguous(),
        none if mask is None else mask,
        *weights,
        out,
        partial,
        *query.stride()[:3],
        *shared.stride()[:3],
        *((0, 0, 0) if scales is None else scales.stride()[:3]),
        0 if every is None or every.shape[0] == 1 else table.stride(0),
        *((0, 0) if mask is None else (mask.stride(0), mask.stride(2))),
        *out.stride()[:3],
        heads,
        rows,
        slots,
        splits,
        scaling,
        eps,
        norm_offset,
        softcap or 1.0,
        PAIRS=pairs,
        ADJACENT=adjacent,
        KIND=kind,
        TABLED=tabled,
        MASK=0 if mask is None else 1 if mask.dtype == torch.int8 else 2,
        CAUSAL=causal and new > 1,
        KEY_BIAS=key_bias is not None,
        NORM=norm is not None,
        CAP=softcap is not None,
        SPLIT=splits > 1,
        WIDE=wide,
        PACKED=packed,
        WORDS=words is not None,
        M=launch.block,
        N=part,
        T=parts,
        TILE=tile,
        LINES=LINES,
        P=max(16, _power(pairs)),
        R=max(16, _power(head_dim - 2 * pairs)) if 2 * pairs < head_dim else 16,
        num_warps=launch.warps,
        num_stages=stages,
        **launched,
        **options,
    )
    if splits > 1:
        columns = min(32, _power(head_dim))
        join_kernel[(batch * heads, rows, _parts(head_dim, columns))](
            partial,
            *(weights[at] for at in (1, 3, 4)),  # bias of values, sizes, sinks
            out,
            *out.stride()[:3],
            heads,
            rows,
            splits,
            S=_power(splits),
            W=columns,
            **launched,
            **options,
        )
    return out.to(query.dtype) if wide else out
