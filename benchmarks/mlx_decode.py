"""A decoding step in mlx-lm: a shared cache against one of full size, in turns, in one process.

    python benchmarks/mlx_decode.py --contexts 2048 8192

A Llama of random weights with few layers, its heads those of Llama-3.2-1B. Its logits are compared before it is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from decode import in_turns, ratio
from mlx_lm.models.cache import make_prompt_cache

from kvshare.runtime import kvshare_mlx

LAYERS, KV_HEADS, HEAD_DIM = 4, 8, 64


def models(dtype: Any) -> tuple[Any, Any]:
    """The model with a cache of full size, and with a shared one."""
    config = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "vocab_size": 4096}
    config |= {"num_hidden_layers": LAYERS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5}
    config |= {"kvshare": {"form": "shared", "layers": [*range(LAYERS)], "kv_heads": [KV_HEADS] * LAYERS}}
    args = kvshare_mlx.ModelArgs.from_dict(config)
    native, shared = args.module.Model(args.native), kvshare_mlx.Model(args)
    native.set_dtype(dtype)
    for layer in native.layers:
        layer.self_attn.v_proj.weight = layer.self_attn.k_proj.weight
    shared.update(native.parameters())
    mx.eval(native.parameters())
    return native, shared


def filled(model: Any, tokens: int, whole: bool) -> list[Any]:
    """A cache of so many tokens, as if they had been read: what K and V have in common is random."""
    cache = make_prompt_cache(model)
    for index, (layer, part) in enumerate(zip(model.layers, cache, strict=True)):
        shared = mx.random.normal((1, KV_HEADS, tokens, HEAD_DIM), key=mx.random.key(index)).astype(
            layer.self_attn.k_proj.weight.dtype
        )
        part.update_and_fetch(*((layer.self_attn.rope(shared), shared) if whole else (shared, shared[..., :0])))
        mx.eval(part.keys, part.values)
    return cache


def timer(model: Any, cache: list[Any]) -> Callable[[], float]:
    """Seconds of one step, by which the cache grows."""

    def once() -> float:
        start = time.perf_counter()
        mx.eval(model(mx.array([[7]]), cache=cache))
        return time.perf_counter() - start

    return once


def main() -> None:
    """Print a table: for every dtype and context, median times, the ratio of pairs with its quartiles, and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60, help="for the pairs of one row")
    settings = parser.parse_args()
    print(f"{mx.default_device()}, mlx {mx.__version__}")
    print("| dtype | cached | native, shared, ms | native / shared | bytes, native, shared |\n|---|---|---|---|---|")
    for dtype in settings.dtypes:
        pair = models(getattr(mx, dtype))
        for context in settings.contexts:
            caches = [filled(model, context, whole) for model, whole in zip(pair, (True, False), strict=True)]
            sizes = ", ".join(f"{sum(part.nbytes for part in cache):,}" for cache in caches)
            wanted, got = (
                model(mx.array([[7]]), cache=cache).astype(mx.float32) for model, cache in zip(pair, caches, strict=True)
            )
            error = float(mx.linalg.norm(wanted - got) / mx.linalg.norm(wanted))
            assert error < 0.05, f"the forms differ by {error}"
            ways = {name: timer(model, cache) for name, model, cache in zip(("native", "shared"), pair, caches, strict=True)}
            in_turns(ways, 2, 0)
            times = in_turns(ways, settings.pairs, settings.seconds)
            typical = ", ".join(f"{1e3 * statistics.median(taken):.0f}" for taken in times.values())
            middle, lower, upper = ratio(times, "native")
            print(f"| {dtype} | {context:,} | {typical} | {middle:.2f} ({lower:.2f} to {upper:.2f}) | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
