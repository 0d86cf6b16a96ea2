"""A decoding step of attention over the shared cache beside the native one: times in turns, errors against float64.

    python benchmarks/decode.py [--contexts 1024 8192 32768] [--batch-sizes 1 8] [--dtypes float32 bfloat16] [--json FILE]
    python benchmarks/decode.py --bits 16 8 4                # the shared cache in fewer bits, too
    python benchmarks/decode.py --shapes Qwen2.5-7B          # whose keys have a bias
    python benchmarks/decode.py --new-tokens 4               # of several new tokens at once; on a GPU of any number
    python benchmarks/decode.py --models                     # a step of whole models, random weights
    python benchmarks/decode.py --models --compile           # compiled by torch, over a static cache, too

Runs on the GPU if there is one. Native is what transformers' sdpa attention does for new tokens: keys that were rotated when they
came in, and values, in stock scaled_dot_product_attention. Packed is stock attention with the query heads of a KV head as its
tokens: the same sum, and the fastest that stock torch has. Shared is the kernel that the runtime chooses. All read what is cached
for a whole layer; projections are the same in all and are left out. Errors: of what is written into memory that held NaN, against
`runtime.reference`, relative in the Euclidean norm, of the first row of a batch.

On a GPU every time is of a CUDA graph that does the step on as many caches as do not fit into the chip's own memory together, in
turns; the bandwidth is that of what is cached, beside that of a plain copy. Whole models decode one token over a filled dynamic
cache, once by plain calls and once as a CUDA graph.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvshare.runtime import kvshare_cpu
from kvshare.runtime.kvshare_attention import FEW
from kvshare.runtime.kvshare_bits import dequantise, quantise
from kvshare.runtime.kvshare_channels import Channels, with_biases
from kvshare.runtime.modeling_kvshare import shared_class
from kvshare.runtime.reference import rotated, shared_attention
from kvshare.tensors import best_device
from kvshare.timing import clock_of

Step = Callable[[], Tensor]
NAMES = ("native", "packed", "shared")
AWAY = 1 << 29  # bytes of caches after which none of the first is left on the chip


@dataclass(frozen=True)
class Shape:
    """Of a model's attention; `norm`: keys pass a norm of each head, `bias`: one is added to them, natively when they come in."""

    name: str
    queries: int
    heads: int
    head_dim: int
    norm: bool = False
    bias: bool = False


SHAPES = (
    Shape("Llama-3.2-1B", 32, 8, 64),
    Shape("Qwen3-4B", 32, 8, 128, norm=True),
    Shape("Qwen2.5-7B", 28, 4, 128, bias=True),
    Shape("32 heads of 128", 32, 32, 128),
)
CHECKED = 16  # of the new tokens, the last: scores of all would take gigabytes in float64


@dataclass(frozen=True)
class Row:
    """Milliseconds: medians; ratios to the shared step: the median of those of all pairs, with its quartiles.

    `shared_bytes` are numbers and scales. `copied`: bytes that the shared step reads per second, by those that a plain copy of the
    device moves; 0 on the CPU.
    """

    shape: str
    dtype: str
    bits: int
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
    copied: float
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


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, memory that is not initialised holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def kernel_of(device: torch.device) -> Callable[..., Tensor]:
    """What attends to a shared cache on a device."""
    if device.type == "cpu":
        return kvshare_cpu.decode_on_cpu
    from kvshare.runtime import kvshare_triton  # triton is not everywhere

    return kvshare_triton.attend_on_gpu


def copies(numbers: Tensor) -> int:
    """How many caches steps go through: on a GPU so many that none of them stays on the chip."""
    return 1 if numbers.device.type == "cpu" else -(-AWAY // (numbers.numel() * numbers.element_size()))


def prepare(
    shape: Shape, batch: int, context: int, dtype: torch.dtype, bits: int, device: torch.device, new: int = 1
) -> tuple[dict[str, list[Step]], float]:
    """The steps by name, of the last `new` tokens on each of as many caches as it takes, and the error of the shared one."""
    generator = torch.Generator(device).manual_seed(context + batch)
    shared = torch.randn(batch, shape.heads, context, shape.head_dim, generator=generator, device=device).to(dtype)
    channels = None
    if bits < 16:  # as a converted checkpoint has them
        like = torch.rand(2, shape.heads, 1, shape.head_dim, generator=generator, device=device)
        channels = Channels(like[0], like[1] + 0.5)
    numbers, scales = (shared, None) if bits == 16 else quantise(shared, bits, channels)
    frequencies = 5e5 ** -(torch.arange(shape.head_dim // 2, dtype=torch.float64, device=device) / (shape.head_dim // 2))
    positions = torch.arange(context, device=device)
    angles = positions[:, None].double() * frequencies
    norm = torch.rand(shape.head_dim, generator=generator, device=device) + 0.5 if shape.norm else None
    bias = 3 * torch.randn(shape.heads, 1, shape.head_dim, generator=generator, device=device) if shape.bias else None
    key = torch.empty_like(shared)
    for row in range(batch):  # a row at a time: this is float64
        normed = shared[row].double() + (0 if bias is None else bias)
        if norm is not None:
            normed = normed * (normed.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
        key[row] = rotated(normed, angles, False)
    query = torch.randn(batch, shape.queries, new, shape.head_dim, generator=generator, device=device).to(dtype)
    mask = torch.ones(new, context, dtype=torch.bool, device=device).tril(context - new)[None, None] if new > 1 else None
    rows_mask = None if mask is None else mask.repeat(1, 1, shape.queries // shape.heads, 1)
    module, scaling = Native(shape.queries // shape.heads), shape.head_dim**-0.5
    tile, attend = kvshare_cpu.TILE, kernel_of(device)
    known: Any = tables(positions[None], frequencies)  # of every slot; for few new tokens, of tiles and within one
    if new <= FEW:
        known = known[:, ::tile].contiguous(), known[0, :tile]
    given: dict[str, Any] = dict.fromkeys(("softcap", "sinks")) | with_biases(channels, bias, None)
    given |= {"scaling": scaling, "adjacent": False, "norm": norm, "eps": 1e-6}
    given |= {"mask": mask} if device.type == "cpu" else {"mask": None, "causal": new > 1}

    def native(key: Tensor, value: Tensor) -> Tensor:
        return sdpa_attention_forward(module, query, key, value, mask if new < context else None, scaling=scaling)[0]

    def packed(key: Tensor, value: Tensor) -> Tensor:
        rows = query.view(batch, shape.heads, -1, shape.head_dim)
        return torch.nn.functional.scaled_dot_product_attention(rows, key, value, rows_mask, scale=scaling)

    def step(numbers: Tensor, scales: Tensor | None) -> Tensor:
        return attend(query, numbers, known, scales=None if scales is None else scales[..., 0], **given).to(dtype)

    cached = numbers[:1] if scales is None else dequantise(numbers[:1], scales[:1], torch.float64, channels)
    of_keys: dict[str, Any] = {"norm": norm, "eps": 1e-6, "key_bias": None if bias is None else bias[:, 0]}
    last = None if mask is None else mask[:, :, -CHECKED:]
    expected = shared_attention(query[:1, :, -CHECKED:], cached, angles[None], scaling=scaling, mask=last, **of_keys)
    with poisoned():
        error = float((step(numbers, scales)[:1, -CHECKED:].double() - expected).norm() / expected.norm())
    steps: dict[str, list[Step]] = {name: [] for name in NAMES}
    for copy in range(copies(numbers)):
        k, v = (key, shared) if device.type == "cpu" else (key.clone(), shared.clone())
        n, s = (numbers, scales) if not copy else (numbers.clone(), None if scales is None else scales.clone())
        steps["native"].append(partial(native, k, v))
        steps["packed"].append(partial(packed, k, v))
        steps["shared"].append(partial(step, n, s))
    return steps, error


def timer(work: list[Step], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Runs all steps and returns the seconds of one, on the CPU by `clock`, on a GPU as a graph, by its own."""
    if device.type == "cpu":

        def clocked() -> float:
            begin = clock()
            for step in work:
                step()
            return (clock() - begin) / len(work)

        clocked()
        return clocked
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            for step in work:
                step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in work:
            step()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replayed() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / len(work)

    replayed()
    return replayed


def in_turns(timers: dict[str, Callable[[], float]], pairs: int, seconds: float) -> dict[str, list[float]]:
    """Run all in turns, each one first in turn, at least 5 times, until there are enough or the time is over."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    end, names = time.perf_counter() + seconds, list(timers)
    for pair in range(pairs):
        for name in names[pair % len(names) :] + names[: pair % len(names)]:
            times[name].append(timers[name]())
        if pair > 4 and time.perf_counter() > end:
            break
    return times


def ratio(times: dict[str, list[float]], name: str, to: str = "shared") -> tuple[float, float, float]:
    """Of a way's times to those of another: the median, and the quartiles."""
    every = [a / b for a, b in zip(times[name], times[to], strict=True)]
    lower, middle, upper = statistics.quantiles(every, n=4, method="inclusive")
    return middle, lower, upper


def copy_rate(device: torch.device) -> float:
    """Bytes that a plain copy of a GPU reads and writes per second."""
    source = torch.empty(1 << 31, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    once = timer([lambda: target.copy_(source)], device)
    return 2 * source.numel() / statistics.median(once() for _ in range(30))


def measure(
    shape: Shape, batch: int, context: int, dtype: torch.dtype, bits: int, device: torch.device, rate: float, options: Any
) -> Row:
    """All steps in turns."""
    steps, error = prepare(shape, batch, context, dtype, bits, device, options.new_tokens)
    times = in_turns({name: timer(work, device) for name, work in steps.items()}, options.pairs, options.seconds)
    numbers = batch * shape.heads * context * shape.head_dim
    native = 2 * numbers * dtype.itemsize
    held = native // 2 if bits == 16 else numbers * bits // 8 + 2 * batch * shape.heads * context
    medians = {name: statistics.median(found) for name, found in times.items()}
    return Row(
        shape=shape.name,
        dtype=str(dtype).removeprefix("torch."),
        bits=bits if bits < 16 else 8 * dtype.itemsize,
        batch_size=batch,
        context=context,
        pairs=len(times["shared"]),
        native_ms=1e3 * medians["native"],
        packed_ms=1e3 * medians["packed"],
        shared_ms=1e3 * medians["shared"],
        native_ratio=ratio(times, "native"),
        packed_ratio=ratio(times, "packed"),
        native_bytes=native,
        shared_bytes=held,
        gigabytes_per_second=held / medians["shared"] / 1e9,
        copied=held / medians["shared"] / rate if rate else 0.0,
        error=error,
    )


def models() -> dict[str, tuple[Any, Any]]:
    """Configs and classes of whole models by name; K and V are not tied in the native one, which costs it nothing."""
    llama = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    qwen = Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    return {"Llama-3.2-1B": (llama, LlamaForCausalLM), "Qwen3-4B": (qwen, Qwen3ForCausalLM)}


@torch.no_grad()
def whole_model(name: str, batch: int, context: int, dtype: torch.dtype, device: torch.device, options: Any) -> dict[str, Any]:
    """Tokens per second of one more token over a filled cache: by plain calls, if asked for compiled by torch over a static cache,
    and on a GPU as a graph.
    """
    config, native_class = models()[name]
    layers, width = config.num_hidden_layers, config.head_dim
    config.kvshare = {"form": "shared", "layers": list(range(layers))}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            native = native_class(config).eval()
            shared = shared_class(native_class)(config).eval()
    finally:
        torch.set_default_dtype(before)
    ids = torch.zeros(batch, 1, dtype=torch.long, device=device)

    def filled(values: int, way: str) -> Cache:
        cache = StaticCache(config=config, max_cache_len=context + 1) if way == "compiled" else DynamicCache(config=config)
        for layer in range(layers):
            shape = (batch, config.num_key_value_heads, context)
            cache.update(
                torch.randn(*shape, width, dtype=dtype, device=device),
                torch.randn(*shape, values, dtype=dtype, device=device),
                layer,
            )
        return cache

    found: dict[str, Any] = {"model": name, "batch_size": batch, "context": context, "dtype": str(dtype).removeprefix("torch.")}
    clock = clock_of(device)
    ways = ["plain calls", *(["compiled"] if options.compile else []), *(["graph"] if device.type == "cuda" else [])]
    for way in ways:
        timers = {}
        for which, model, values in (("native", native, width), ("shared", shared, 0)):
            cache = filled(values, way)
            kept = [(layer.keys, layer.values) for layer in cache.layers]
            forward = model
            if way == "compiled":
                model(input_ids=ids, cache=cache)  # after which a kernel is known to work here
                forward = torch.compile(model.forward, fullgraph=True, dynamic=False)

            def step(forward: Any = forward, cache: Any = cache, kept: Any = kept, way: str = way) -> Tensor:
                for layer, (keys, other) in zip(cache.layers, kept, strict=True):
                    if way == "compiled":  # every step is the same one
                        layer.cumulative_length.fill_(context)
                    elif way == "graph":
                        layer.keys, layer.values = keys, other
                return forward(input_ids=ids, cache=cache, use_cache=True).logits

            if way == "graph":
                timers[which] = timer([step], device)
                continue

            def clocked(step: Step = step) -> float:
                begin = clock()
                step()
                return clock() - begin

            clocked()
            timers[which] = clocked
        times = in_turns(timers, options.pairs, options.seconds)
        found[way] = {
            "native_tokens_per_second": batch / statistics.median(times["native"]),
            "shared_tokens_per_second": batch / statistics.median(times["shared"]),
            "ratio": ratio(times, "native"),
            "attention": ": ".join(shared.get_decoder().kvshare_choice),
        }
        del timers, cache, kept, step
        gc.collect()
    return found


def show(*cells: Any) -> None:
    """A row of a Markdown table; of three numbers, the median and its quartiles."""
    texts = ["{:.2f} ({:.2f} to {:.2f})".format(*cell) if isinstance(cell, tuple) else str(cell) for cell in cells]
    print(f"| {' | '.join(texts)} |", flush=True)


def header(*cells: str) -> None:
    """The first two rows of a table."""
    show(*cells)
    print("|---" * len(cells) + "|")


def fits(label: tuple[Any, ...], held: float, given: argparse.Namespace) -> bool:
    """Whether a row is to be measured; says so if not."""
    if held > given.memory * 2**30:
        show(*label, f"not run: {held / 2**30:.0f} GiB")
    return held <= given.memory * 2**30


def all_models(given: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of whole models, printed as they come."""
    header("model", "dtype", "batch", "cached", "way", "native, shared, tokens per second", "shared / native", "attention")
    rows = []
    for name, (config, _) in models().items():
        for dtype, batch, context in product(given.dtypes, given.batch_sizes, given.contexts):
            label = (name, dtype, batch, context)
            numbers = config.num_hidden_layers * batch * config.num_key_value_heads * context * config.head_dim
            kind = getattr(torch, dtype)
            if name not in given.shapes or not fits(label, 6 * numbers * kind.itemsize, given):
                continue
            row = whole_model(name, batch, context, kind, device, given)
            rows.append(row)
            for way in ("plain calls", "compiled", "graph"):
                if of := row.get(way):
                    speeds = f"{of['native_tokens_per_second']:.1f}, {of['shared_tokens_per_second']:.1f}"
                    show(*label, way, speeds, of["ratio"], of["attention"])
    return rows


def all_steps(given: argparse.Namespace, device: torch.device, rate: float) -> list[dict[str, Any]]:
    """Rows of single steps, printed as they come."""
    times, ratios = "native, packed, shared, ms", ("native / shared", "packed / shared")
    header("shape", "dtype", "bits", "batch", "cached", times, *ratios, "GB/s" + " (of a copy)" * bool(rate), "error", "runs")
    rows = []
    for shape in (shape for shape in SHAPES if shape.name in given.shapes):
        for dtype, bits, batch, context in product(given.dtypes, given.bits, given.batch_sizes, given.contexts):
            kind = getattr(torch, dtype)
            label = (shape.name, dtype, bits if bits < 16 else 8 * kind.itemsize, batch, context)
            if not fits(label, 3 * batch * shape.heads * context * shape.head_dim * kind.itemsize, given):
                continue
            row = measure(shape, batch, context, kind, bits, device, rate, given)
            rows.append(asdict(row))
            milliseconds = f"{row.native_ms:.3g}, {row.packed_ms:.3g}, {row.shared_ms:.3g}"
            speed = f"{row.gigabytes_per_second:.4g}" + (f" ({row.copied:.0%})" if rate else "")
            show(*label, milliseconds, row.native_ratio, row.packed_ratio, speed, f"{row.error:.1e}", row.pairs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=(16, 8, 4), default=[16], help="of the shared cache; 16: the dtype's"
    )
    parser.add_argument("--new-tokens", type=int, default=1, help=f"of a step; more than {FEW} on a GPU alone")
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES if not shape.bias])
    parser.add_argument("--models", action="store_true", help="measure whole models, and no single steps")
    parser.add_argument("--compile", action="store_true", help="with --models: by torch.compile, too")
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop a row that takes longer, with fewer pairs")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that what a row holds may take; longer rows are left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]  # a property of the module
    device = best_device()
    if not 1 <= given.new_tokens <= (FEW if device.type == "cpu" else min(given.contexts)):
        parser.error("--new-tokens: a step has one or more, no more than are cached, and on the CPU no more than the kernel takes")
    rate = copy_rate(device) if device.type == "cuda" else 0.0
    named = torch.cuda.get_device_name(device) if rate else f"{given.threads} threads, {kvshare_cpu.compiler()}"
    print(f"{named}, torch {torch.__version__}" + (f", a copy moves {rate / 1e9:.0f} GB/s" if rate else ""))
    rows = all_models(given, device) if given.models else all_steps(given, device, rate)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
