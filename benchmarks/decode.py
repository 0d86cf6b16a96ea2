"""A decoding step of attention over the shared cache beside the native one: times in turns, errors against float64.

    python benchmarks/decode.py [--contexts 1024 8192 32768] [--batch-sizes 1 8] [--dtypes float32 bfloat16] [--json FILE]

Native is what transformers' sdpa attention does for one new token: keys that were rotated when they came in, and values, in stock
scaled_dot_product_attention. Shared is the kernel that the runtime chooses. Both read what is cached for a whole layer; projections
are the same in both and are left out. Errors: of what is written into memory that held NaN, against `runtime.reference`, relative
in the Euclidean norm, of the first row of a batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvshare.runtime import kvshare_cpu
from kvshare.runtime.reference import rotated, shared_attention


@dataclass(frozen=True)
class Shape:
    """Of a model's attention; `norm`: keys pass a norm of each head, which natively happens when they come in."""

    name: str
    queries: int
    heads: int
    head_dim: int
    norm: bool


SHAPES = (
    Shape("Llama-3.2-1B", 32, 8, 64, False),
    Shape("Qwen3-4B", 32, 8, 128, True),
    Shape("32 heads of 128", 32, 32, 128, False),
)


@dataclass(frozen=True)
class Row:
    """Milliseconds: medians; ratios to the shared step: the median of those of all pairs, with its quartiles.

    `packed`: stock attention with the query heads of a KV head as its tokens, which natively happens for some masks alone.
    """

    shape: str
    dtype: str
    batch_size: int
    context: int
    pairs: int
    native_ms: float
    packed_ms: float
    shared_ms: float
    native_ratio: tuple[float, float, float]
    packed_ratio: tuple[float, float, float]
    native_bytes: int
    shared_bytes: int
    gigabytes_per_second: float
    error: float


class Native(torch.nn.Module):
    """What sdpa attention asks of the module it works for."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def tables(positions: Tensor, frequencies: Tensor) -> Tensor:
    """(..., 2, pairs), float32."""
    angles = positions[..., None].double() * frequencies
    return torch.stack([angles.cos(), angles.sin()], -2).float()


def prepare(shape: Shape, batch: int, context: int, dtype: torch.dtype) -> tuple[dict[str, Callable[[], Tensor]], float]:
    """The steps by name, and the error of the shared one."""
    generator = torch.Generator().manual_seed(context + batch)
    shared = torch.randn(batch, shape.heads, context, shape.head_dim, generator=generator).to(dtype)
    frequencies = 5e5 ** -(torch.arange(shape.head_dim // 2, dtype=torch.float64) / (shape.head_dim // 2))
    angles = torch.arange(context)[:, None].double() * frequencies
    norm = torch.rand(shape.head_dim, generator=generator) + 0.5 if shape.norm else None
    key = torch.empty_like(shared)
    for row in range(batch):  # a row at a time: this is float64
        normed = shared[row].double()
        if norm is not None:
            normed = normed * (normed.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
        key[row] = rotated(normed, angles, False)
    query = torch.randn(batch, shape.queries, 1, shape.head_dim, generator=generator).to(dtype)
    module, scaling, value = Native(shape.queries // shape.heads), shape.head_dim**-0.5, shared.clone()
    begins = tables(torch.arange(0, context, kvshare_cpu.TILE)[None], frequencies)
    within = tables(torch.arange(kvshare_cpu.TILE), frequencies)

    def native() -> Tensor:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]

    def packed() -> Tensor:
        rows = query.view(batch, shape.heads, -1, shape.head_dim)
        return torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=scaling)

    def step() -> Tensor:
        out = kvshare_cpu.decode_on_cpu(
            query,
            shared,
            (begins, within),
            scaling=scaling,
            adjacent=False,
            mask=None,
            key_bias=None,
            value_bias=None,
            norm=norm,
            eps=1e-6,
            softcap=None,
            sinks=None,
        )
        return out.to(dtype)

    expected = shared_attention(query[:1], shared[:1], angles[None], scaling=scaling, norm=norm, eps=1e-6)
    error = float((step()[:1].double() - expected).norm() / expected.norm())
    return {"native": native, "packed": packed, "shared": step}, error


def measure(shape: Shape, batch: int, context: int, dtype: torch.dtype, pairs: int, seconds: float) -> Row:
    """Run all steps in turns, each one first in turn, at least 5 times, until there are enough or the time is over."""
    steps, error = prepare(shape, batch, context, dtype)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for work in steps.values():
        work()
    end, names = time.perf_counter() + seconds, list(steps)
    for pair in range(pairs):
        for name in names[pair % 3 :] + names[: pair % 3]:
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
        if pair > 4 and time.perf_counter() > end:
            break

    def ratio(name: str) -> tuple[float, float, float]:
        every = [a / b for a, b in zip(times[name], times["shared"], strict=True)]
        lower, middle, upper = statistics.quantiles(every, n=4, method="inclusive")
        return middle, lower, upper

    held = batch * shape.heads * context * shape.head_dim * dtype.itemsize
    native, packed, shared = (statistics.median(times[name]) for name in names)
    speed = held / shared / 1e9
    named = str(dtype).removeprefix("torch.")
    milliseconds = (1e3 * native, 1e3 * packed, 1e3 * shared)
    ratios = (ratio("native"), ratio("packed"))
    return Row(shape.name, named, batch, context, len(times["shared"]), *milliseconds, *ratios, 2 * held, held, speed, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop a row that takes longer, with fewer pairs")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that what a row holds may take; longer rows are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"{given.threads} threads, torch {torch.__version__}, {kvshare_cpu.compiler()}")
    print(
        "| shape | dtype | batch | cached | native, packed, shared, ms | native / shared | packed / shared | GB/s | error | runs |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    rows = []
    for shape in (shape for shape in SHAPES if shape.name in given.shapes):
        for dtype in given.dtypes:
            for batch in given.batch_sizes:
                for context in given.contexts:
                    kind = getattr(torch, dtype)
                    held = 3 * batch * shape.heads * context * shape.head_dim * kind.itemsize
                    if held > given.memory * 2**30:
                        print(f"| {shape.name} | {dtype} | {batch} | {context} | not run: {held / 2**30:.0f} GiB | | | | | |")
                        continue
                    row = measure(shape, batch, context, kind, given.pairs, given.seconds)
                    rows.append(asdict(row))
                    times = f"{row.native_ms:.2f}, {row.packed_ms:.2f}, {row.shared_ms:.2f}"
                    ratios = " | ".join(f"{a:.2f} ({b:.2f} to {c:.2f})" for a, b, c in (row.native_ratio, row.packed_ratio))
                    last = f"{row.gigabytes_per_second:.1f} | {row.error:.1e} | {row.pairs}"
                    print(f"| {row.shape} | {row.dtype} | {batch} | {context} | {times} | {ratios} | {last} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
