"""How long a model takes, and what it holds, beside another that does the same in turns.

In: two loaded models, a batch size, a context length. Out: times per token, cache bytes, peak memory, paired.
Never: loads a model, compares outputs: the tokens are random, for time does not depend on them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvshare.runtime.kvshare_cache import cache_name


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    lower_quartile: float
    upper_quartile: float


@dataclass(frozen=True)
class Timing:
    """Seconds per token of one sequence, of a checkpoint and its source, and the ratio within each pair of runs."""

    seconds: Spread
    source_seconds: Spread
    ratio: Spread


@dataclass(frozen=True)
class Run:
    """What was measured with `batch_size` prompts of `context` tokens.

    `cache_bytes` are those of the cache's tensors when the last token is written, per token and sequence beside it.
    `attention`: what computed the checkpoint's attention over the cache while decoding, and why.
    `peak_bytes`: weights, and the most that prefill and decoding allocated at one time on top of them.
    """

    batch_size: int
    context: int
    cache_bytes: int
    source_cache_bytes: int
    cache_bytes_per_token: float
    source_cache_bytes_per_token: float
    peak_bytes: int
    source_peak_bytes: int
    prefill: Timing
    decode: Timing
    attention: str = ""


@dataclass(frozen=True)
class Pass:
    """One prefill and the decoding behind it: seconds of both, and the cache as it is then."""

    prefill: float
    decode: float
    cache: Any


def held_bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, each memory once, and of what the exact form holds beside its weights."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        maps = getattr(module, "kvshare_maps", None)
        if maps is not None:
            tensors += [maps[1].values, maps[1].order, *maps[1].feedback]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors of a transformers cache, keys and values of all layers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cached_tensors(cache))


def cached_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of all layers of a transformers cache that has any."""
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return [tensor for layer in held for tensor in (layer.keys, layer.values)]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of a single value, that value three times."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


@torch.no_grad()
def run_once(model: Any, ids: Tensor, new_tokens: int, clock: Callable[[], float]) -> Pass:
    """Read the prompts ids (batch, context), then write `new_tokens` tokens greedily, one forward each."""
    cache = cache_name(type(model))
    start = clock()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = clock()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(input_ids=token, use_cache=True, logits_to_keep=1, **{cache: getattr(output, cache)})
    return Pass(read - start, clock() - read, getattr(output, cache))


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, after everything that was given to the device is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def measure_pair(model: Any, source: Any, batch_size: int, context: int, new_tokens: int, repeats: int, seed: int) -> Run:
    """Run both models `repeats` times in turns, the first one changing, after one run each that is not timed.

    Args:
        model, source: on one device, in one dtype.
        batch_size, context: of the prompts.
        new_tokens: to decode behind them.
        repeats: pairs of timed runs.
        seed: of the random tokens.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(int(model.config.vocab_size), (batch_size, context), generator=generator).to(device)
    clock, pair = clock_of(device), (model, source)
    held: list[int] = []
    peaks: list[int] = []
    for one in pair:
        cache = run_once(one, ids, new_tokens, clock).cache  # not timed: lazy work of a first run happens here
        held.append(cache_bytes(cache))
        del cache
        peaks.append(held_bytes(one) + peak_above(partial(run_once, one, ids, new_tokens, clock), device))
    seconds: tuple[list[Pass], list[Pass]] = ([], [])
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            done = run_once(pair[which], ids, new_tokens, clock)
            seconds[which].append(Pass(done.prefill, done.decode, None))
    tokens = batch_size * (context + new_tokens)
    return Run(
        batch_size,
        context,
        held[0],
        held[1],
        held[0] / tokens,
        held[1] / tokens,
        peaks[0],
        peaks[1],
        _timing([p.prefill / context for p in seconds[0]], [p.prefill / context for p in seconds[1]]),
        _timing([p.decode / new_tokens for p in seconds[0]], [p.decode / new_tokens for p in seconds[1]]),
        ": ".join(getattr(model.get_decoder(), "kvshare_choice", None) or ("eager", "no kernel is made for decoders of this kind")),
    )


def _timing(seconds: list[float], source_seconds: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(seconds, source_seconds, strict=True)]
    return Timing(spread(seconds), spread(source_seconds), spread(ratios))


def peak_above(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that torch held at one time while `work` ran, above what it held before.

    On a GPU by the allocator's own count; on the CPU by the profiler's record of every allocation and release of a tensor, which
    does not see what math libraries take for themselves.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its stages between the lines of a command
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    moves = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    now = most = 0
    for _, moved in moves:
        now += moved
        most = max(most, now)
    return most
